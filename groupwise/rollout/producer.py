"""Samples and scores the groups that the policy's version allows, all of them at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from groupwise.data.sampler import PromptSampler
from groupwise.rewards.scorer import RewardScorer, Score
from groupwise.rollout.buffer import Buffer
from groupwise.types import Completion, Engine, Prompt, Rollout, RolloutGroup, SampleRequest, SamplingParams


async def produce_group(
    engine: Engine, scorer: RewardScorer, prompt: Prompt, requests: Sequence[SampleRequest], *, index: int
) -> RolloutGroup:
    """Sample the requests of one prompt and score them; a sample that fails is a failed rollout."""
    completions = [completion async for completion in engine.generate(requests)]
    completions.sort(key=lambda completion: completion.sample_index)
    usable = [completion for completion in completions if _is_usable(completion)]
    scores = iter(await scorer.score(prompt, usable))
    rollouts = [_scored(c, next(scores)) if _is_usable(c) else _failed(c) for c in completions]
    return RolloutGroup(index, prompt, tuple(rollouts))


def _is_usable(completion: Completion) -> bool:
    return completion.finish_reason in ("stop", "length") and bool(completion.token_ids)


def _scored(completion: Completion, score: Score) -> Rollout:
    return Rollout(
        sample_index=completion.sample_index,
        token_ids=completion.token_ids,
        loss_mask=(1,) * len(completion.token_ids),
        logprobs=completion.logprobs,
        policy_versions=completion.policy_versions,
        text=completion.text,
        finish_reason=completion.finish_reason,
        rewards=score.rewards,
        reward=None if score.failed else score.reward,
        status="failed" if score.failed else "ok",
        cause=score.cause,
    )


def _failed(completion: Completion) -> Rollout:
    return Rollout(
        sample_index=completion.sample_index,
        token_ids=completion.token_ids,
        loss_mask=(0,) * len(completion.token_ids),
        logprobs=completion.logprobs,
        policy_versions=completion.policy_versions,
        text=completion.text,
        finish_reason=completion.finish_reason,
        status="failed",
        cause=completion.error or f"the engine ended it with {completion.finish_reason!r}",
    )


class Producer:
    """Keeps the engine busy with every group whose version exists, and puts finished groups into the buffer.

    Args:
        total_steps: steps of the whole run; no group beyond is sampled.
    """

    def __init__(
        self,
        engine: Engine,
        scorer: RewardScorer,
        sampler: PromptSampler,
        buffer: Buffer,
        *,
        sampling: SamplingParams,
        group_size: int,
        total_steps: int,
    ) -> None:
        self._engine = engine
        self._scorer = scorer
        self._sampler = sampler
        self._buffer = buffer
        self._sampling = sampling
        self._group_size = group_size
        self._total_steps = total_steps
        self._tasks: set[asyncio.Task[None]] = set()

    def admit(self, version: int) -> None:
        """Start every group that `version` (the newest) allows and that is not started yet."""
        while self._is_due(self._sampler.position, version):
            item = self._sampler.take(1)[0]
            task = asyncio.get_running_loop().create_task(self._produce(item.index, item.prompt, version))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _is_due(self, index: int, version: int) -> bool:
        return self._buffer.step_of(index) < self._total_steps and self._buffer.pin(index) <= version

    async def _produce(self, index: int, prompt: Prompt, version: int) -> None:
        # An engine's draw is a function of seed, prompt and sample; a prompt that comes again must not draw the same.
        draw = index // self._sampler.num_prompts
        requests = [SampleRequest.of(prompt, i, self._sampling, version, draw=draw) for i in range(self._group_size)]
        try:
            self._buffer.put(await produce_group(self._engine, self._scorer, prompt, requests, index=index))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - whoever takes the group raises it
            self._buffer.fail(error)

    async def close(self) -> None:
        """End what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def rewind(self, index: int) -> None:
        """Go back to group `index`, as after a resume."""
        self._sampler.load_state_dict(self._sampler.state_dict() | {"position": index})

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, which knows the data by its fingerprint: a resume with other prompts is refused."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state)
