"""One episode per sample, one group per prompt: for training, for evaluation and for the doors.

    begin -> turn -> answer -> turn -> ... -> Done, or a budget ends it -> rewards score the whole group

All that an episode knows of engines is a function from a request to its completion. What follows the prompt stays one
stretch of tokens: a turn's are kept as they were drawn, an answer is rendered once and its tokens are appended.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from groupwise.environments import ENVIRONMENT, EnvironmentFailed, Environments, Visit
from groupwise.errors import EngineError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.protocols import Engine
from groupwise.types import (
    Boundary,
    Completion,
    Done,
    FinishReason,
    Prompt,
    Reply,
    Rollout,
    RolloutGroup,
    SampleRequest,
    SamplingParams,
    Segment,
)

Sample: TypeAlias = Callable[[SampleRequest], Awaitable[Completion]]
"""All that a rollout knows of engines."""


class Score(Protocol):
    """What a scorer says of one rollout; `groupwise.rewards` has the real one."""

    @property
    def reward(self) -> float | None: ...

    @property
    def rewards(self) -> Mapping[str, float | None]: ...

    @property
    def failed(self) -> bool: ...

    @property
    def cause(self) -> str: ...


class Scorer(Protocol):
    async def score(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> Sequence[Score]: ...


def sampled_by(engine: Engine, *, learns: bool = False) -> Sample:
    """One request at a time; concurrent ones share the engine's steps, and each prompt is computed once.

    Args:
        learns: what comes is learned from, and brings what the engine tells beside tokens.

    Raises:
        EngineError: from the returned function: the engine did not answer exactly the request.
    """

    async def sample(request: SampleRequest) -> Completion:
        if learns and (engine.caps.routes or engine.caps.kept):
            request = replace(request, wants_routes=engine.caps.routes, wants_kept=engine.caps.kept)
        answers = [completion async for completion in engine.generate([request])]
        if [completion.key for completion in answers] != [request.key]:
            got = ", ".join(completion.request_id for completion in answers) or "nothing"
            raise EngineError(f"engine {engine.caps.name!r} answered {got} to {request.id}; expected it once")
        return answers[0]

    return sample


async def run_group(
    sample: Sample,
    scorer: Scorer,
    environments: Environments,
    prompt: Prompt,
    *,
    keys: Sequence[SampleKey],
    sampling: SamplingParams,
    version: int = 0,
    index: int = 0,
) -> RolloutGroup:
    """Run one episode per key, all at once, and score them together; an episode that fails is a failed rollout.

    Args:
        sampling: `max_tokens` bounds all that follows the prompt, an environment's tokens included; `min_tokens` what
            the model writes.
        version: of the policy that is sampled from.
        index: the group's.

    Raises:
        EngineError: the engine as a whole failed.
        ConfigError, DataError: an environment or a reward says that it cannot serve this row.
    """
    episodes = [
        asyncio.ensure_future(_Episode(sample, environments, prompt, key, sampling=sampling, version=version).run())
        for key in sorted(keys, key=lambda key: key.sample_index)
    ]
    try:
        rollouts = await asyncio.gather(*episodes)
    finally:
        for episode in episodes:
            episode.cancel()
    usable = [rollout for rollout in rollouts if rollout.status == "ok"]
    found = await scorer.score(prompt, usable) if usable else ()
    assert len(found) == len(usable), f"the scorer gave {len(found)} scores for {len(usable)} rollouts"
    scores = iter(found)
    return RolloutGroup(
        index,
        prompt,
        tuple(
            _scored(rollout, next(scores), weight=environments.weight) if rollout.status == "ok" else rollout
            for rollout in rollouts
        ),
    )


def _scored(rollout: Rollout, score: Score, *, weight: float) -> Rollout:
    rewards, reward = dict(score.rewards), score.reward
    given = [segment.reward for segment in rollout.segments if segment.reward is not None]
    if given and not score.failed:
        total = math.fsum(given)
        rewards[ENVIRONMENT], reward = total, (reward or 0.0) + weight * total
    return replace(
        rollout,
        rewards=rewards,
        reward=None if score.failed else reward,
        status="failed" if score.failed else "ok",
        boundary="reward" if score.failed else None,
        cause="" if given and not score.failed else score.cause,
    )


@dataclass(slots=True)
class _Episode:
    """One sample on its way."""

    sample: Sample
    environments: Environments
    prompt: Prompt
    key: SampleKey
    sampling: SamplingParams
    version: int
    segments: list[Segment] = field(default_factory=list)
    begun: Prompt | None = None
    error: str = ""

    async def run(self) -> Rollout:
        """To its end; whatever its environment does is data."""
        async with self.environments.visit(self.key) as visit:
            try:
                self.begun = await visit.begin(self.prompt)
                return self._rollout(await self._turns(visit, self.begun))
            except EnvironmentFailed as failure:
                return self._failed("environment", str(failure))

    async def _turns(self, visit: Visit, prompt: Prompt) -> FinishReason:
        """Turn and answer, turn and answer; returns what ended the episode."""
        while True:
            completion = await self.sample(self._request(prompt))
            self.segments.append(Segment.turn(completion))
            if completion.finish_reason != "stop":
                self.error = completion.error
                return completion.finish_reason
            said = await visit.answer(self.segments[-1])
            self.segments[-1] = replace(self.segments[-1], reward=said.reward)
            if isinstance(said, Done):
                return "stop"
            if self._num_turns == self.environments.max_turns:
                return "turns"
            answer = self._answer(said, prompt)
            if self._num_tokens + len(answer.token_ids) >= self.sampling.max_tokens:
                return "length"  # no room for a turn after it
            self.segments.append(answer)

    def _request(self, prompt: Prompt) -> SampleRequest:
        """The next turn: it continues the stretch that follows the prompt."""
        written = sum(len(segment.token_ids) for segment in self.segments if segment.by == "model")
        sampling = replace(
            self.sampling,
            max_tokens=self.sampling.max_tokens - self._num_tokens,
            min_tokens=max(0, self.sampling.min_tokens - written),
            stop=(*self.sampling.stop, *(each for each in self.environments.stop if each not in self.sampling.stop)),
        )
        follows = ModelInput(tuple(piece for segment in self.segments for piece in segment.input.pieces))
        return SampleRequest(
            self.key,
            prompt.input,
            sampling,
            continues=follows,
            policy_version=self.version,
            routes_from=self._first_route(prompt),
            keeps=self._num_turns + 1 < self.environments.max_turns,
        )

    def _first_route(self, prompt: Prompt) -> int:
        """The last token of the turn before was not run with it; all before it were."""
        turns = [index for index, segment in enumerate(self.segments) if segment.by == "model"]
        if not turns:
            return 0
        return len(prompt.input) + sum(len(s.token_ids) for s in self.segments[: turns[-1] + 1]) - 1

    def _answer(self, said: Reply, prompt: Prompt) -> Segment:
        given, text = self.environments.render(said, prompt, self.segments)
        return Segment.answer(given, text, said.messages, version=self.version)

    @property
    def _num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def _num_turns(self) -> int:
        return sum(segment.by == "model" for segment in self.segments)

    def _rollout(self, reason: FinishReason) -> Rollout:
        if reason in ("abort", "error") or not self.segments[-1].token_ids:
            return self._failed("engine", self.error or f"the engine ended it with {reason!r}", reason)
        return Rollout(self.key, tuple(self.segments), reason, prompt=self._own_prompt)

    def _failed(self, boundary: Boundary, cause: str, reason: FinishReason = "error") -> Rollout:
        return Rollout(
            self.key,
            tuple(self.segments),
            reason,
            status="failed",
            boundary=boundary,
            cause=cause,
            prompt=self._own_prompt,
        )

    @property
    def _own_prompt(self) -> ModelInput | None:
        changed = self.begun is not None and self.begun.input != self.prompt.input
        return self.begun.input if changed and self.begun is not None else None
