"""The reference that follows, the entropy bonus that adapts, and when each is due."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.algorithms import build_algorithm
from groupwise.algorithms.entropy import EntropyControl
from groupwise.batches import Denominators, Knobs, TrainingRow
from groupwise.checkpoint import load_checkpoint, save_checkpoint
from groupwise.config import AlgorithmConfig, OptimConfig, TrainConfig
from groupwise.inputs import ModelInput
from groupwise.metrics import Mean, resolve
from groupwise.model.forward.packing import pack
from groupwise.policy import Learner
from groupwise.policy.microbatches import MicroBatch
from groupwise.policy.reference import Reference
from groupwise.policy.upkeep import AdaptiveEntropy, ReferenceSync, Upkeep

ROW = TrainingRow(0, ModelInput.of((3, 4)), ModelInput.of((5, 6, 7)), (1, 1, 1), (0.0,) * 3, (-4.0,) * 3)


def reference(loaded: Any) -> Reference:
    return Reference(loaded, temperature=1.0, chunk_tokens=8)


class Moves:
    """A policy, as far as upkeep asks it for anything."""

    def __init__(self, held: Reference) -> None:
        self.held = held

    async def move_reference(self, name: str, alpha: float) -> None:
        assert name == "reference"
        self.held.sync(alpha)


def after(upkeep: Upkeep, step: int, learned: Any) -> Any:
    return asyncio.run(upkeep.after(step, learned))


def shift(loaded: Any, by: float) -> None:
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(by)


def weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_reference_moves_by_its_part(make_model: Any, alpha: float) -> None:
    loaded = make_model()
    held = reference(loaded)
    before = weights(held.loaded.model)
    shift(loaded, 0.5)
    held.sync(alpha)
    for old, policy, now in zip(before, weights(loaded.model), weights(held.loaded.model), strict=True):
        torch.testing.assert_close(now, alpha * policy + (1 - alpha) * old)
    packed = pack([ROW])
    if alpha == 1:
        assert torch.equal(held.logprobs([packed])[0], reference(loaded).logprobs([packed])[0])


def test_small_steps_are_not_rounded_away_in_bfloat16(make_model: Any) -> None:
    loaded = make_model(torch.bfloat16)
    held = reference(loaded)
    before = weights(held.loaded.model)
    shift(loaded, 0.5)
    for _ in range(40):
        held.sync(0.001)
    moved = [float((now - old).abs().max()) for old, now in zip(before, weights(held.loaded.model), strict=True)]
    assert min(moved) == pytest.approx(0.5 * (1 - 0.999**40), rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_moved_reference_survives_a_checkpoint_bitwise(make_model: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    def upkeep(loaded: Any) -> tuple[Reference, Upkeep]:
        held = reference(loaded)
        return held, Upkeep(entropy=None, sync=ReferenceSync(Moves(held), held, every=1, alpha=0.3))  # pyright: ignore[reportArgumentType]

    loaded = make_model(dtype)
    held, mine = upkeep(loaded)
    shift(loaded, 0.1)
    after(mine, 1, [])
    save_checkpoint(tmp_path, 1, {"upkeep": mine}, keep=1)
    other, restored = upkeep(make_model(dtype))
    load_checkpoint(tmp_path / "step_000001", {"upkeep": restored})
    assert same(weights(held.loaded.model), weights(other.loaded.model))
    fresh = make_model(dtype)
    shift(fresh, 0.1)
    other._policy = fresh  # the policy's own part of the checkpoint brings this
    after(mine, 2, [])
    after(restored, 2, [])
    assert same(weights(held.loaded.model), weights(other.loaded.model))


def test_the_reference_follows_only_when_it_is_due(make_model: Any) -> None:
    loaded = make_model()
    held = reference(loaded)
    upkeep = Upkeep(entropy=None, sync=ReferenceSync(Moves(held), held, every=3, alpha=1.0))  # pyright: ignore[reportArgumentType]
    before = weights(held.loaded.model)
    shift(loaded, 0.5)
    for step in (1, 2):
        assert after(upkeep, step, []) == {}
        assert same(weights(held.loaded.model), before)
    after(upkeep, 3, [])
    assert same(weights(held.loaded.model), weights(loaded.model))


def test_a_frozen_reference_and_a_fixed_bonus_have_no_state() -> None:
    upkeep = Upkeep(entropy=None, sync=None)
    assert after(upkeep, 1, [{"entropy": Mean(1.0)}]) == {}
    assert upkeep.state_dict() == {"entropy": None, "reference": None}
    upkeep.load_state_dict(upkeep.state_dict())


def adaptive(coef: float = 0.0, target: float = 1.0) -> AdaptiveEntropy:
    return AdaptiveEntropy(coef, EntropyControl(target, step=0.1))


def test_the_bonus_rises_below_the_target_and_rests_above_it() -> None:
    entropy = adaptive()
    upkeep = Upkeep(entropy=entropy, sync=None)
    acted = [
        resolve(after(upkeep, step, [{"entropy": Mean(2 * e, 4)}, {"entropy": Mean(2 * e, 4)}]))["entropy_coef"]
        for step, e in enumerate([1.0, 1.0, 1.0, 3.0, 3.0, 1.0, 1.0], 1)
    ]
    assert acted == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.0, 0.0, 0.2])


def test_a_step_without_tokens_teaches_the_bonus_nothing() -> None:
    entropy = adaptive(0.3)
    upkeep = Upkeep(entropy=entropy, sync=None)
    assert resolve(after(upkeep, 1, [])) == {"entropy_coef": 0.3}
    assert entropy.coef == 0.3


def test_the_bonus_that_acts_is_the_one_in_the_gradient(make_model: Any) -> None:
    def gradient(knobs: Knobs, **settings: float) -> torch.Tensor:
        objective = build_algorithm(AlgorithmConfig.model_validate({"entropy": settings}))
        policy = Learner(make_model(), objective, optim=OptimConfig(), train=TrainConfig(), total_updates=1)  # pyright: ignore[reportCallIssue]
        policy.learn([MicroBatch((ROW,))], Denominators(3.0, 1.0, 16.0), knobs)
        grad = policy.loaded.model.get_input_embeddings().weight.grad
        assert isinstance(grad, torch.Tensor)
        return grad

    raised = adaptive(0.2)
    upkeep, follows = Upkeep(entropy=raised, sync=None), {"coef": 0.2, "target": 1.0}
    raised.adapt(0.5)
    assert upkeep.knobs.entropy_coef == pytest.approx(0.3)
    torch.testing.assert_close(gradient(upkeep.knobs, **follows), gradient(Knobs(), coef=0.3))
    raised.adapt(1.5)
    assert upkeep.knobs == Knobs(entropy_coef=0.0)
    assert not gradient(upkeep.knobs, **follows).any()


def test_the_bonus_survives_a_checkpoint(tmp_path: Path) -> None:
    entropy = adaptive(0.2)
    save_checkpoint(tmp_path, 1, {"upkeep": Upkeep(entropy=entropy, sync=None)}, keep=1)
    entropy.adapt(0.5)
    save_checkpoint(tmp_path, 2, {"upkeep": Upkeep(entropy=entropy, sync=None)}, keep=2)
    for step, state in ((1, {"coef": 0.2, "entropy": -math.inf}), (2, entropy.state_dict())):
        other = adaptive()
        load_checkpoint(tmp_path / f"step_00000{step}", {"upkeep": Upkeep(entropy=other, sync=None)})
        assert other.state_dict() == state
