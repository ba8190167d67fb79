"""Episodes of several turns on the real engine, learned from by the real policy: one stretch, to the bit."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.algorithms import build_algorithm
from groupwise.batches import MiniBatch
from groupwise.config import AlgorithmConfig, LoraConfig, OptimConfig, TrainConfig
from groupwise.environments import Environments
from groupwise.inputs import ModelInput, SampleKey
from groupwise.metrics import merge, resolve
from groupwise.model.loading import LoadedModel, with_adapter
from groupwise.policy import Learner
from groupwise.policy.microbatches import cut_batch
from groupwise.rewards import RewardScorer
from groupwise.rollout.batch import BatchShape, build_batch
from groupwise.rollout.episode import run_group, sampled_by
from groupwise.types import Done, Reply, RolloutGroup, SamplingParams, Segment

Lab = Any

ANSWERS = (" = 12 ", "x" * 80, "!")
"""The second crosses a block."""


class Turns:
    """Answers that differ from sample to sample, for three turns."""

    async def begin(self, prompt: Any, key: SampleKey) -> None:
        self.turn, self.index = 0, key.sample_index

    async def answer(self, turn: Segment) -> Reply | Done:
        self.turn += 1
        return Done() if self.turn == 3 else Reply(text=ANSWERS[(self.turn + self.index) % len(ANSWERS)])

    async def close(self) -> None: ...


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def groups(lab: Lab, loaded: LoadedModel, limit: int) -> list[RolloutGroup]:
    """Every turn ends with one of many stop tokens."""
    loaded = replace(loaded, stop_token_ids=tuple(range(3, 120)))
    sample = sampled_by(lab.engine(loaded, max_concurrent_samples=limit))
    held = Environments(Turns, lab.tokenizer, max_turns=5, name="turns")
    scorer = RewardScorer([], functions=[spread])
    sampling = SamplingParams(max_tokens=260, seed=3)

    async def go() -> list[RolloutGroup]:
        work = [
            run_group(
                sample,
                scorer,
                held,
                prompt,
                keys=[SampleKey(prompt.uid, 0, i) for i in range(4)],
                sampling=sampling,
                index=index,
            )
            for index, prompt in enumerate([lab.prompt("a", 5), lab.prompt("b", 66)])
        ]
        return list(await asyncio.gather(*work))

    return asyncio.run(go())


def learner(loaded: LoadedModel) -> Learner:
    objective = build_algorithm(AlgorithmConfig.model_validate({"name": "dr_grpo"}))
    made = Learner(loaded, objective, optim=OptimConfig(), train=TrainConfig(), total_updates=1)  # type: ignore[call-arg]
    made.published()
    return made


def batch_of(found: list[RolloutGroup]) -> MiniBatch:
    algorithm = build_algorithm(AlgorithmConfig.model_validate({"name": "dr_grpo"}))
    batch = build_batch(found, algorithm, shape=BatchShape(1, 260), reward_weights={"spread": 1.0})
    return batch.minibatches[0]


def learned(held: Learner, batch: MiniBatch, budget: int = 10_000) -> tuple[dict[str, float], list[torch.Tensor]]:
    metrics = held.learn(cut_batch(batch, budget), batch.denominators)
    masters = [m.grad.clone() for m in held._optimizer._masters.values() if m.grad is not None]
    return resolve(merge(*metrics)), masters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("rank", [0, 4])
def test_three_turns_are_learned_without_mismatch(lab: Lab, dtype: torch.dtype, architecture: str, rank: int) -> None:
    loaded = lab.model(architecture, dtype=dtype)
    if rank:
        loaded = with_adapter(loaded, LoraConfig.model_validate({"rank": rank}), seed=1)
        with torch.no_grad():
            for name, weight in loaded.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
    found = groups(lab, loaded, limit=7)
    assert all(rollout.status == "ok" for group in found for rollout in group.rollouts)
    assert max(rollout.num_turns for group in found for rollout in group.rollouts) == 3
    assert any(0 in rollout.loss_mask for group in found for rollout in group.rollouts)
    metrics, _ = learned(learner(loaded), batch_of(found), budget=500)
    assert metrics["sampling/sampling_logp_difference/max"] == 0.0


@pytest.mark.parametrize("limit", [1, 64])
def test_episodes_do_not_depend_on_their_company(lab: Lab, limit: int) -> None:
    loaded = lab.model()
    some, others = groups(lab, loaded, limit), groups(lab, loaded, 7)
    for one, other in zip(some, others, strict=True):
        for mine, theirs in zip(one.rollouts, other.rollouts, strict=True):
            assert (mine.token_ids, mine.logprobs, mine.loss_mask) == (
                theirs.token_ids,
                theirs.logprobs,
                theirs.loss_mask,
            )


def test_an_environments_tokens_have_no_gradient(lab: Lab) -> None:
    """Whatever advantages and log-probs stand at masked places, the gradient is the same; and they do not count."""
    loaded = lab.model()
    batch = batch_of(groups(lab, loaded, 64))
    assert batch.denominators.tokens == sum(sum(row.loss_mask) for row in (*batch.rows, *batch.measured))

    def poisoned(values: tuple[float, ...], mask: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(x if keep else 1e6 for x, keep in zip(values, mask, strict=True))

    rows = tuple(
        replace(
            row,
            advantages=poisoned(row.advantages, row.loss_mask),
            logprobs=poisoned(row.logprobs, row.loss_mask),
        )
        for row in batch.rows
    )
    _, expected = learned(learner(lab.model()), batch)
    _, found = learned(learner(lab.model()), replace(batch, rows=rows))
    assert expected
    assert all(map(torch.equal, found, expected))


def test_prompts_of_a_group_may_differ(lab: Lab) -> None:
    """As where an environment begins each episode with a message of its own."""
    loaded = lab.model()
    found = groups(lab, loaded, 64)
    first = found[0].rollouts
    own = tuple(replace(r, prompt=ModelInput.of((40 + i, 41))) if i % 2 else r for i, r in enumerate(first))
    batch = batch_of([replace(found[0], rollouts=own), found[1]])
    _, apart = learned(learner(lab.model()), batch, budget=1)
    _, together = learned(learner(lab.model()), batch)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(apart, together, strict=True))
