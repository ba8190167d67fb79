"""The policy of one process: what it asks of its learner, off the event loop."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.algorithms import build_algorithm
from groupwise.batches import Denominators, Knobs, MiniBatch, ScoreRequest, TrainingRow
from groupwise.config import AlgorithmConfig, LoraConfig, OptimConfig, TrainConfig
from groupwise.errors import ConfigError
from groupwise.inputs import ModelInput
from groupwise.model.loading import with_adapter
from groupwise.policy import Learner, LocalPolicy
from groupwise.policy.microbatches import MicroBatch, cut_batch
from groupwise.policy.reference import FrozenScorer
from groupwise.types import REFERENCE

SIZE = 40


def row(group: int, length: int = SIZE, advantage: float = 1.0) -> TrainingRow:
    tokens = ModelInput.of([(7 * group + 3 * i) % 60 + 3 for i in range(length)])
    prompt = ModelInput.of((10, 11, 12 + group % 40))
    return TrainingRow(group, prompt, tokens, (1,) * length, (advantage,) * length, (-4.0,) * length)


def learner(make_model: Any, **settings: Any) -> Learner:
    objective = build_algorithm(AlgorithmConfig.model_validate(settings))
    train = TrainConfig.model_validate({"seed": 1})
    return Learner(make_model(), objective, optim=OptimConfig(), train=train, total_updates=10)  # type: ignore[call-arg]


def batch(count: int) -> MiniBatch:
    rows = tuple(row(k) for k in range(count))
    return MiniBatch(rows, Denominators(float(count * SIZE), float(count), SIZE), measured=(row(count, advantage=0.0),))


def gradient(policy: Learner) -> list[torch.Tensor]:
    return [p.grad.clone() for p in policy.loaded.model.parameters() if p.grad is not None]


def test_it_learns_as_its_learner_does(make_model: Any) -> None:
    one, other = learner(make_model), learner(make_model)
    policy = LocalPolicy(one, micro_batch_tokens=100)
    asyncio.run(policy.learn(batch(4), Knobs()))
    other.learn(cut_batch(batch(4), 100, streams=other.streams.count), batch(4).denominators)
    assert all(map(torch.equal, gradient(one), gradient(other)))


def test_the_event_loop_answers_while_the_policy_learns(make_model: Any) -> None:
    """A timer of 10 ms is late by at most 50 ms, over at least a second of learning."""
    policy = LocalPolicy(learner(make_model), micro_batch_tokens=2_000)
    work = batch(400)
    late: list[float] = []

    async def tick() -> None:
        while True:
            asked = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            late.append(time.perf_counter() - asked)

    async def go() -> float:
        await policy.learn(batch(8), Knobs())  # the thread and torch's own are there
        timer, started = asyncio.create_task(tick()), time.perf_counter()
        while time.perf_counter() - started < 1:
            await policy.learn(work, Knobs())
            await policy.optim_step()
        timer.cancel()
        return time.perf_counter() - started

    # A collection of all that earlier tests have left would hold every thread for half a second.
    gc.collect()
    gc.freeze()
    try:
        assert asyncio.run(go()) >= 1
    finally:
        gc.unfreeze()
    assert len(late) > 20
    assert max(late) < 0.05


def test_cancelled_it_ends_at_the_next_micro_batch_and_the_update_begins_anew(make_model: Any) -> None:
    held, fresh = learner(make_model), learner(make_model)
    policy = LocalPolicy(held, micro_batch_tokens=SIZE)

    async def go() -> None:
        await policy.learn(batch(4), Knobs())  # goes with what is cancelled
        learning = asyncio.create_task(policy.learn(batch(300), Knobs()))
        while len(held._learned) < 10:
            await asyncio.sleep(0.005)
        learning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await learning
        assert not gradient(held)
        await policy.learn(batch(4), Knobs())
        await policy.close()

    begun = count_passes(held)
    asyncio.run(go())
    assert len(begun) < 300
    fresh.learn(cut_batch(batch(4), SIZE, streams=fresh.streams.count), batch(4).denominators)
    assert all(map(torch.equal, gradient(held), gradient(fresh)))


def count_passes(held: Learner) -> list[MicroBatch]:
    """The micro-batches that were begun, from now on."""
    begun: list[MicroBatch] = []
    run = held._run

    def counted(one: Any, *args: Any, **options: Any) -> Any:
        begun.append(one.batch)
        return run(one, *args, **options)

    held._run = counted  # type: ignore[method-assign]
    return begun


def test_what_fails_ends_nothing_but_itself(make_model: Any) -> None:
    held, fresh = learner(make_model), learner(make_model)
    policy = LocalPolicy(held, micro_batch_tokens=100)
    strange = ModelInput.of((64,))  # the model has embeddings for 0 to 63

    async def go() -> None:
        with pytest.raises(IndexError):
            await policy.log_probs([ScoreRequest(strange, strange)])
        half = replace(row(9), follows=ModelInput.of([64] * SIZE))
        with pytest.raises((IndexError, RuntimeError)):
            await policy.learn(replace(batch(3), measured=(half,)), Knobs())
        await policy.learn(batch(4), Knobs())

    asyncio.run(go())
    fresh.learn(cut_batch(batch(4), 100, streams=fresh.streams.count), batch(4).denominators)
    assert all(map(torch.equal, gradient(held), gradient(fresh)))


def test_closed_it_leaves_the_model_and_does_nothing_more(make_model: Any) -> None:
    policy = LocalPolicy(learner(make_model), micro_batch_tokens=100)

    async def go() -> None:
        await policy.close()  # before it did anything
        await policy.close()
        with pytest.raises(AssertionError, match="closed"):
            await policy.optim_step()

    asyncio.run(go())


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_awaited(make_model: Any) -> None:
    held = learner(make_model)
    policy = LocalPolicy(held, micro_batch_tokens=100)
    held.optim_step = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(policy.optim_step())


def test_scorers_have_names(make_model: Any) -> None:
    held = learner(make_model, kl={"coef": 0.1})
    teacher = FrozenScorer(make_model(), temperature=1.0, chunk_tokens=64)
    policy = LocalPolicy(held, micro_batch_tokens=60, scorers={"teacher": teacher})
    asked = [ScoreRequest(row(k % 2).prompt, row(k).follows) for k in (0, 1, 2, 1)]
    names = ("policy", REFERENCE, "teacher")
    mine, reference, taught = (asyncio.run(policy.log_probs(asked, of=name)) for name in names)
    assert [len(values) for values in mine] == [SIZE] * 4
    assert mine == reference == taught  # the same weights
    assert mine[1] == mine[3] != mine[0]
    with pytest.raises(ConfigError, match=r"'judge'.*policy, reference, teacher"):
        asyncio.run(policy.log_probs(asked, of="judge"))


def test_only_a_reference_follows(make_model: Any) -> None:
    held = learner(make_model, kl={"coef": 0.1})
    policy = LocalPolicy(held, micro_batch_tokens=60)
    asked = [ScoreRequest(row(0).prompt, row(0).follows)]
    before = asyncio.run(policy.log_probs(asked, of=REFERENCE))
    with torch.no_grad():
        held.loaded.model.get_input_embeddings().weight.mul_(1.5)  # pyright: ignore[reportCallIssue]
    assert asyncio.run(policy.log_probs(asked, of=REFERENCE)) == before
    asyncio.run(policy.move_reference(REFERENCE, 1.0))
    assert asyncio.run(policy.log_probs(asked, of=REFERENCE)) == asyncio.run(policy.log_probs(asked)) != before
    teacher = FrozenScorer(make_model(), temperature=1.0, chunk_tokens=64)
    taught = LocalPolicy(held, micro_batch_tokens=60, scorers={"teacher": teacher})
    for name in ("teacher", "judge"):
        with pytest.raises(ConfigError, match=f"'{name}' was to follow .* are reference"):
            asyncio.run(taught.move_reference(name, 0.5))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_its_source_makes_another_module_this_policy(make_model: Any, tied: bool, rank: int) -> None:
    """By name, each tensor once; of an adapter's policy the adapter alone; with buffers that are saved."""

    def policy(seed: int) -> tuple[Learner, LocalPolicy]:
        loaded = make_model(tied=tied, seed=0 if rank else seed)
        decoder = loaded.model.get_decoder()
        decoder.register_buffer("counts", torch.full((3,), float(seed)))
        decoder.register_buffer("angles", torch.ones(2), persistent=False)
        loaded = with_adapter(loaded, LoraConfig.model_validate({"rank": rank}), seed=seed)
        objective, train = build_algorithm(AlgorithmConfig.model_validate({})), TrainConfig.model_validate({})
        optim = OptimConfig.model_validate({"lr": 0.01})
        held = Learner(loaded, objective, optim=optim, train=train, total_updates=9)
        return held, LocalPolicy(held, micro_batch_tokens=60)

    async def learn(each: LocalPolicy) -> None:
        await each.learn(batch(3), Knobs())
        await each.optim_step()

    (_, mine), (other, its) = policy(1), policy(2)
    asyncio.run(learn(mine))
    found = dict(mine.source())
    assert len(list(mine.source())) == len(found)
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)
    assert all(".lora_" in name for name in found) if rank else "model.counts" in found
    assert not any("angles" in name or tensor.requires_grad for name, tensor in found.items())
    asked = [ScoreRequest(row(0).prompt, row(0).follows)]
    assert asyncio.run(its.log_probs(asked)) != asyncio.run(mine.log_probs(asked))
    missing = other.loaded.model.load_state_dict(found, strict=False)
    assert not missing.unexpected_keys
    assert asyncio.run(its.log_probs(asked)) == asyncio.run(mine.log_probs(asked))
    if not rank:
        assert other.loaded.model.get_buffer("model.counts").tolist() == [1.0] * 3
