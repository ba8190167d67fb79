"""A reproduction bundle computed again, on this machine, from the model that its config names."""

from __future__ import annotations

from pathlib import Path

from groupwise.algorithms import build_algorithm
from groupwise.errors import DataError
from groupwise.model.loading import load_model, with_adapter
from groupwise.policy import Learner
from groupwise.policy.bundle import MOST_WEIGHT_BYTES, load_bundle
from groupwise.policy.optimizer import Gradient
from groupwise.rundir import read_run_config
from groupwise.sft import SupervisedLoss


def replay_bundle(folder: str | Path) -> dict[str, Gradient]:
    """Every parameter's gradient, as the bundle's micro-batches give it at the bundle's weights.

    Raises:
        DataError: the folder holds no bundle, or one whose weights were too large to be kept.

    Example:
        bad = [name for name, gradient in replay_bundle("runs/one/bundles/step_000012").items() if gradient.num_bad]
    """
    folder = Path(folder)
    bundle = load_bundle(folder)
    if bundle.weights is None:
        raise DataError(
            f"{folder} holds no weights: they take more than {MOST_WEIGHT_BYTES >> 30} GiB; train again from "
            "last_checkpoint, which its bundle.json names"
        )
    config = read_run_config(folder)
    learner = Learner(
        with_adapter(load_model(config.model), config.lora, seed=config.train.seed),
        SupervisedLoss(router_aux_loss_coef=config.algorithm.router_aux_loss_coef)
        if bundle.supervised
        else build_algorithm(config.algorithm),
        optim=config.optim,
        train=config.train,
        total_updates=bundle.update + 1,
        temperature=1.0 if bundle.supervised else config.rollout.temperature,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    return learner.gradients_of(bundle.batches, update=bundle.update, weights=bundle.weights)
