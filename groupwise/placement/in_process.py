"""One process, one device: the policy trains the very module that the native engine samples from."""

from __future__ import annotations

from dataclasses import dataclass

from groupwise.config import Config
from groupwise.engines import build_engine
from groupwise.model.loading import LoadedModel
from groupwise.policy import Learner, LocalPolicy, Objective
from groupwise.policy.bundle import BundleWriter
from groupwise.rundir import RunDirectory
from groupwise.types import Engine, Policy, WeightSync
from groupwise.weight_sync import InProcessSync


@dataclass(frozen=True, slots=True)
class InProcess:
    """Makes the parts of one run that hold weights.

    Attributes:
        loaded: the model, with its adapter if it has one.
        run: where bundles are written.

    Example:
        placement = InProcess(config, loaded, run)
        policy = placement.policy(algorithm, updates=500, temperature=1.0)
        engine = placement.engine(policy)
    """

    config: Config
    loaded: LoadedModel
    run: RunDirectory

    def policy(
        self, objective: Objective, *, updates: int, temperature: float = 1.0, supervised: bool = False
    ) -> LocalPolicy:
        """The model being trained.

        Args:
            updates: optimiser steps of the whole run.
            temperature: of sampling.
        """
        config = self.config
        learner = Learner(
            self.loaded,
            objective,
            optim=config.optim,
            train=config.train,
            total_updates=updates,
            temperature=temperature,
            gradient_checkpointing=config.model.gradient_checkpointing,
            bundles=BundleWriter(self.run, config, supervised=supervised),
        )
        return LocalPolicy(learner, micro_batch_tokens=config.train.micro_batch_tokens)

    def engine(self, policy: LocalPolicy) -> Engine:
        """What samples from the policy."""
        return build_engine(self.config.rollout, self.loaded, reserved_bytes=policy.bytes_to_come)

    def sync(self, policy: Policy, engine: Engine) -> WeightSync:
        """What makes the engine serve the policy's newest version."""
        return InProcessSync(policy, engine)
