"""The proof that an engine computes with the weights that were sent, and with no others.

Two fixed prompts are scored by the engine, and it draws a few tokens after each, through whatever it has captured or
cached. The trainer computes the log-probs of the very same tokens at that version. What this finds, among others: a
tied head that was not refreshed, a tensor that is missing, an adapter that is bound to nothing, weights of the version
before, and drawing that reads old memory while scoring reads the new.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from groupwise.batches import ScoreRequest
from groupwise.engines.dialects.base import Drawn
from groupwise.engines.member import Asked, NotProven
from groupwise.engines.told import Unusable, usable_kept
from groupwise.engines.weights import WeightRef
from groupwise.inputs import ModelInput, SampleKey
from groupwise.protocols import Policy
from groupwise.sides import NO_SIDES, Kept, Sides
from groupwise.types import BASE, SampleRequest, SamplingParams

DRAWN_TOKENS = 16
_PROMPT_TOKENS = 64
_CHANGED = 4
"""So many of the trainer's numbers have to be others for the engine's to have to be others."""

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one server said of one prompt, beside the trainer's numbers for the same tokens.

    Attributes:
        tokens: that it drew.
        engine, trainer: log-probs of what was scored (where it scores) and what was drawn, in this order.
        without: what it drew without the adapter.
    """

    tokens: tuple[int, ...]
    engine: Numbers
    trainer: Numbers
    without: Drawn | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one server answered about one prompt: log-probs of it, where it scores, and of what it drew, with the tokens
    that its filters left, where it tells."""

    tokens: tuple[int, ...]
    scored: Numbers | None
    drawn: Numbers
    without: Drawn | None
    kept: Kept | None


@dataclass(slots=True)
class Canary:
    """Compares a server with the policy; raises `NotProven` with numbers.

    Args:
        prompts: two, of at least two tokens each; the same for the whole run.
        tolerance: largest difference of a log-prob, in nats.
        vocabulary: tokens from 0 up to this are the model's.
        told_apart: the engine computes in the trainer's precision, so its numbers must change where the trainer's do.

    Attributes:
        difference, seconds, proofs: of the newest version: the largest difference, how long the last proof took, and
            how many servers are proven.

    Example:
        engine.prover = Canary(policy, prompts=[p.token_ids for p in prompts[:2]], tolerance=1e-4, vocabulary=259).prove
    """

    policy: Policy
    prompts: Sequence[tuple[int, ...]]
    tolerance: float
    vocabulary: int
    told_apart: bool = True
    difference: float = 0.0
    seconds: float = 0.0
    proofs: int = 0
    _version: int = -1
    _before: dict[int, list[_Answer]] = field(default_factory=dict[int, list[_Answer]])

    async def prove(self, server: Asked, ref: WeightRef) -> None:
        """Ask, compute, compare.

        Raises:
            NotProven: says what differs, by how much, and what is likely.
            EngineError: the server did not answer.
        """
        started = time.perf_counter()
        if ref.version != self._version:
            self._version, self.proofs, self.difference = ref.version, 0, 0.0
        prompts = [prompt[:_PROMPT_TOKENS] for prompt in self.prompts]
        asked = [self._ask(server, ref, index, prompt) for index, prompt in enumerate(prompts)]
        found = await asyncio.gather(*asked)
        trainer = await self._trainer(prompts, found)
        answers = [
            _Answer(one.tokens, (*(one.scored or ()), *one.drawn), numbers, one.without)
            for one, numbers in zip(found, trainer, strict=True)
        ]
        self._compare(answers, ref)
        if self.told_apart:
            await self._tell_apart(id(server), prompts, answers, ref)
        self._before[id(server)] = answers
        self.proofs += 1
        self.seconds = time.perf_counter() - started

    async def _ask(self, server: Asked, ref: WeightRef, index: int, prompt: tuple[int, ...]) -> _Asked:
        request = SampleRequest(
            SampleKey("canary", 0, index),
            ModelInput.of(prompt),
            SamplingParams(max_tokens=DRAWN_TOKENS),
            policy_version=ref.version,
        )
        drawn, scored = await asyncio.gather(server.draw(request), server.score(prompt))
        wrong = drawn.error
        if len(drawn.token_ids) != DRAWN_TOKENS:
            wrong = wrong or f"it drew {len(drawn.token_ids)} tokens; {DRAWN_TOKENS} were asked for"
        elif not all(0 <= token < self.vocabulary for token in drawn.token_ids):
            wrong = wrong or f"it drew token {max(drawn.token_ids)}, of a vocabulary of {self.vocabulary}"
        if wrong:
            raise NotProven(f"version {ref.version}: the engine does not draw as it must: {wrong}")
        kept = self._kept(drawn, ref)
        logprobs = drawn.logprobs
        if logprobs is None:  # it has none of what it drew, and scores instead
            both = await server.score((*prompt, *drawn.token_ids))
            assert both is not None, "an engine has log-probs of what it draws, or of what it is given"
            logprobs = both[len(prompt) - 1 :]
        # Afterwards: vLLM for CPUs gives both the same answer where they are drawn together.
        without = await server.draw(request, whose="base") if ref.kind == "adapter" else None
        return _Asked(drawn.token_ids, scored, logprobs, without, kept)

    def _kept(self, drawn: Drawn, ref: WeightRef) -> Kept | None:
        if drawn.kept is None:
            return None
        try:
            return usable_kept(drawn.kept, drawn.token_ids, vocabulary=self.vocabulary)
        except Unusable as error:
            raise NotProven(f"version {ref.version}: the engine does not draw as it must: {error}") from error

    async def _trainer(self, prompts: Sequence[tuple[int, ...]], found: Sequence[_Asked]) -> list[Numbers]:
        """The trainer's own, of the same tokens, at temperature 1. Where a prompt ends decides its last bits: it ends
        where the engine had it end, unless the prompt itself is scored."""
        requests: list[ScoreRequest] = []
        for prompt, one in zip(prompts, found, strict=True):
            first = len(prompt) if one.scored is None else 1
            sides = NO_SIDES if one.kept is None else Sides(kept=Kept.none(len(prompt) - first) + one.kept)
            follows = ModelInput.of((*prompt[first:], *one.tokens))
            requests.append(ScoreRequest(ModelInput.of(prompt[:first]), follows, sides=sides))
        return await self.policy.log_probs(requests, temperature=1.0)

    def _compare(self, answers: Sequence[_Answer], ref: WeightRef) -> None:
        differences = [abs(e - t) for a in answers for e, t in zip(a.engine, a.trainer, strict=True)]
        worst = math.inf if any(map(math.isnan, differences)) else max(differences)
        self.difference = max(self.difference, worst)
        if worst > self.tolerance:
            raise NotProven(
                f"version {ref.version}: the engine's log-probs differ from the trainer's by up to "
                f"{worst:.3g} nats ({sum(differences) / len(differences):.3g} on average), and "
                f"{self.tolerance:g} is allowed (rollout.sync_tolerance); it computes with other weights, or otherwise"
            )

    async def _acts(self, prompts: Sequence[tuple[int, ...]]) -> bool:
        """Whether the adapter changes the trainer's answers."""
        requests = [ScoreRequest(ModelInput.of(prompt[:1]), ModelInput.of(prompt[1:])) for prompt in prompts]
        mine = await self.policy.log_probs(requests, temperature=1.0)
        base = await self.policy.log_probs(requests, of=BASE, temperature=1.0)
        return sum(a != b for m, n in zip(mine, base, strict=True) for a, b in zip(m, n, strict=True)) >= _CHANGED

    async def _tell_apart(
        self, server: int, prompts: Sequence[tuple[int, ...]], answers: Sequence[_Answer], ref: WeightRef
    ) -> None:
        """A small step is smaller than any tolerance; but not one bit of the answers may stay as it was."""
        for answer in answers:
            bare = answer.without
            same = bare is not None and (bare.token_ids, bare.logprobs) == (
                answer.tokens,
                answer.engine[-DRAWN_TOKENS:],
            )
            if same and await self._acts(prompts):
                raise NotProven(
                    f"version {ref.version}: the engine answers with the adapter as without it, to the last bit, and "
                    "the trainer does not: the adapter is bound to nothing"
                )
        before = self._before.get(server)
        if before is None:
            return
        for old, new in zip(before, answers, strict=True):
            for what, part in (("scores", slice(None, -DRAWN_TOKENS)), ("draws", slice(-DRAWN_TOKENS, None))):
                if old.engine[part] != new.engine[part] or (part.start is not None and old.tokens != new.tokens):
                    continue
                changed = sum(a != b for a, b in zip(old.trainer[part], new.trainer[part], strict=True))
                if changed >= _CHANGED:
                    raise NotProven(
                        f"version {ref.version}: the engine {what} as before, to the last bit, while {changed} of the "
                        "trainer's log-probs changed: it computes with the weights of an earlier version"
                    )
