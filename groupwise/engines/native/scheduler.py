"""Which samples are decoded together: admission under the memory bound, lanes, and their compaction.

A prompt holds a lane of the prompt cache while any of its samples waits or runs; a sample holds a lane of the sample
cache while it runs. Lanes in use are always 0 … n-1: the last one moves into a gap, so a decode step touches no idle
lane.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from groupwise.engines.native.budget import CacheBudget, Demand
from groupwise.engines.native.cache import CacheShape, KeyCache, make_cache
from groupwise.engines.native.kept import KeptKeys, KeptPrompt, KeptSample
from groupwise.engines.native.uniforms import uniforms
from groupwise.errors import EngineError
from groupwise.inputs import ModelInput
from groupwise.types import Completion, Likeliest, SampleRequest

Outbox = asyncio.Queue[Completion | BaseException]


@dataclass(slots=True)
class PromptLane:
    """A prompt in the cache. `hidden [H]` is its last hidden state, from which every sample's first token is drawn.
    `kept` are keys that are to be put into its lane first; `routes [P, L, k]` the experts of its tokens, once somebody
    wanted them."""

    input: ModelInput
    hidden: Tensor | None = None
    members: int = 0
    running: int = 0
    kept: KeptPrompt | None = None
    routes: np.ndarray | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.input.token_ids


@dataclass(slots=True, eq=False)
class Sample:
    """One request on its way: what was drawn so far, and where it stands.

    Attributes:
        tokens: what follows the prompt, given and drawn; `logprobs` are those of the drawn ones, and `likeliest` what
            is told beside each, if anything is.
        num_given: how many of `tokens` the request brought.
        begun: where in `tokens` the answer begins that is being drawn.
        kept: keys of an earlier turn, which are to be put into its lane first.
        fed: given tokens that follow `tokens`, and are fed one by one in place of drawn ones.
        over: it has a lane no more; what a step under way draws for it is dropped.
        routes: `[n, L, k]` each, the experts of `tokens` from number `routed_from` on, where they are wanted.
    """

    request: SampleRequest
    outbox: Outbox
    uniform: np.ndarray = field(init=False)
    num_given: int = field(init=False)
    begun: int = field(init=False)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[Likeliest] = field(default_factory=list[Likeliest])
    prompt: PromptLane | None = None
    member: int = 0
    seen: Tensor | None = None
    kept: KeptSample | None = None
    fed: deque[int] = field(default_factory=deque[int])
    over: bool = False
    routes: list[np.ndarray] = field(default_factory=list[np.ndarray])
    routed_from: int = 0

    def __post_init__(self) -> None:
        self.tokens.extend(self.request.continues.token_ids)
        self.num_given = len(self.tokens)
        self.begun = self.num_given - self.request.resumed
        self.uniform = uniforms(self.request.sampling.seed, self.request.key, self.most_tokens)

    def take_back(self, kept: KeptSample) -> None:
        """Go on from these keys: the next given token is fed first."""
        given, size = self.tokens, len(kept.tokens)
        self.kept, self.tokens, self.fed = kept, given[: size + 1], deque(given[size + 1 :])
        self.routed_from = size

    @property
    def drawn(self) -> list[int]:
        return self.tokens[self.num_given :]

    @property
    def most_tokens(self) -> int:
        """How many `tokens` there can be."""
        return most_tokens(self.request)


def most_tokens(request: SampleRequest) -> int:
    """How many tokens can follow its prompt: given ones, and those of the answer, which may have begun among them."""
    return len(request.continues) - request.resumed + request.sampling.max_tokens


class Scheduler:
    """Owns the caches and the lists of waiting and running samples; `running[lane]` and `prompts[lane]` are dense.

    Args:
        max_samples: most samples decoded together.
        max_bytes: most memory of both caches.

    Attributes:
        changes: counts the changes of running samples and prompts. While it stands still, their lanes stay.
    """

    def __init__(self, shape: CacheShape, *, max_samples: int, max_bytes: int) -> None:
        self.shape = shape
        self._max_samples = max_samples
        self._budget = CacheBudget(shape, max_bytes // shape.bytes_per_token)
        self.waiting: deque[Sample] = deque()
        self.running: list[Sample] = []
        self.prompts: list[PromptLane] = []
        self.changes = 0
        self.kept = KeptKeys()
        self.drop_caches()

    def drop_caches(self) -> None:
        """Release all memory; only when nothing runs."""
        assert not self.running, "caches of running samples cannot be dropped"
        self.prompts.clear()
        self.kept.clear()
        self.prompt_cache = make_cache(self.shape)
        self.sample_cache = make_cache(self.shape)

    def clear(self) -> None:
        """Forget every sample, and what the caches hold."""
        self.waiting.clear()
        self.running.clear()
        self.changes += 1
        self.drop_caches()

    @property
    def most_lanes(self) -> int:
        """Lanes of the largest step."""
        return self.shape.lanes_for(self._max_samples)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> list[Sample]:
        """Move waiting samples to lanes, in order, as far as memory goes; returns those that were admitted."""
        live = any(prompt.hidden is not None for prompt in self.prompts)
        admitted = self._take_those_that_fit(live=live)
        if self.waiting and not self.running:
            self._make_way(live=live)
            return self.admit()
        if admitted:
            self._grow(admitted, live=live)
        return admitted

    def _take_those_that_fit(self, *, live: bool) -> list[Sample]:
        """As many waiting samples as there are lanes and memory for, in their order.

        Args:
            live: a prompt's keys are in the cache, which therefore cannot be made anew.
        """
        admitted: list[Sample] = []
        while self.waiting and len(self.running) < self._max_samples and self._fits(self.waiting[0], live=live):
            sample = self.waiting.popleft()
            self._enter(sample)
            admitted.append(sample)
        return admitted

    def _enter(self, sample: Sample) -> None:
        """A lane for the sample, and one for its prompt where it has none; from keys of an earlier turn, if kept."""
        lane = self._lane_of(sample)
        back = self.kept.take(sample.request) if sample.num_given else None
        if lane is None:
            lane = PromptLane(sample.request.prompt)
            self.prompts.append(lane)
            if back is not None:
                lane.kept, lane.hidden = back[1], back[1].hidden
        if back is not None:
            sample.take_back(back[0])
        sample.prompt, sample.member = lane, lane.members
        lane.members += 1
        lane.running += 1
        self.running.append(sample)

    def _make_way(self, *, live: bool) -> None:
        """Nobody runs and nobody fits: the first one never will, or a prompt that was kept stands in the way of larger
        caches, and will be computed again."""
        if not live:
            self.check(self.waiting[0].request)
        self.prompts.clear()
        self.changes += 1

    def _grow(self, admitted: Sequence[Sample], *, live: bool) -> None:
        """The caches grow to what was admitted, and copies of earlier turns give way."""
        self.changes += 1
        needed = self._needed()
        if not live and self._budget.begins_anew(self._caches, needed):
            self.prompt_cache, self.sample_cache = make_cache(self.shape), make_cache(self.shape)
        # A cache that keeps its address is made long enough from the start.
        given = max(sample.num_given for sample in admitted)
        self.make_room(needed[1].tokens if self.shape.fixed else given)
        self.kept.give_way(self._budget.room(self._caches))

    def _lane_of(self, sample: Sample) -> PromptLane | None:
        return next((lane for lane in reversed(self.prompts) if lane.input == sample.request.prompt), None)

    def _fits(self, sample: Sample, *, live: bool) -> bool:
        """Whether the caches would stay under the bound with this sample."""
        return self._budget.fits(self._caches, self._needed(sample), live=live)

    def _needed(self, sample: Sample | None = None) -> tuple[Demand, Demand]:
        """What prompts and samples need of their caches, with `sample` among them."""
        samples = self.running if sample is None else [*self.running, sample]
        prompts = [len(lane.token_ids) for lane in self.prompts]
        if sample is not None and self._lane_of(sample) is None:
            prompts.append(len(sample.request.prompt))
        return self._budget.needed(prompts=prompts, samples=[sample.most_tokens for sample in samples])

    @property
    def _caches(self) -> tuple[KeyCache, KeyCache]:
        return self.prompt_cache, self.sample_cache

    def check(self, request: SampleRequest) -> None:
        """Whether it would fit with the caches to itself.

        Raises:
            EngineError: it never will.
        """
        prompt, most = len(request.prompt), most_tokens(request)
        needed = self._budget.needed(prompts=[prompt], samples=[most])
        if self._budget.fits((), needed, live=False):
            return
        gib = self.shape.bytes_per_token / 2**30
        raise EngineError(
            f"one sample of {prompt} prompt and {most} completion tokens "
            f"needs {sum(demand.size for demand in needed) * gib:.2f} GiB of keys and values, but rollout.kv_cache_gib "
            f"allows {self._budget.most * gib:.2f}; raise it, or lower rollout.max_completion_tokens"
        )

    def make_room(self, tokens: int) -> None:
        """Room for all that run, with `tokens` completion tokens each, and for their prompts."""
        self.sample_cache.reserve(self.shape.lanes_for(len(self.running)), tokens)
        longest = max(len(lane.token_ids) for lane in self.prompts)
        self.prompt_cache.reserve(self.shape.prompts_for(len(self.prompts)), longest)

    def release(self, sample: Sample) -> None:
        """Free a finished sample's lane, and its prompt's if it was the last one and none waits."""
        self.changes += 1
        sample.over = True
        lane = self.running.index(sample)
        if sample.request.keeps:
            self._keep(sample, lane)
        last = self.running.pop()
        if last is not sample:
            self.running[lane] = last
            self.sample_cache.move(len(self.running), lane, len(last.tokens))
        prompt = sample.prompt
        assert prompt is not None
        prompt.running -= 1
        if prompt.running == 0 and not self._waits_for(prompt):
            self._release_prompt(prompt)

    def _keep(self, sample: Sample, lane: int) -> None:
        """Copy what was computed of the sample: all but its newest token, which was drawn and not fed."""
        prompt, tokens = sample.prompt, tuple(sample.tokens[:-1])
        if prompt is None or prompt.hidden is None or not tokens:
            return
        length = len(prompt.token_ids)
        own, shared = self.shape.capacity(len(tokens)), self.shape.capacity(length)
        room = self._budget.room(self._caches)
        if own + shared > room:
            return
        given = sample.request.prompt
        keys: list[Tensor] = []
        if not self.kept.has_prompt(given):
            place = next(index for index, known in enumerate(self.prompts) if known is prompt)
            keys = self.prompt_cache.read(place, length)
        kept = KeptSample(given, tokens, self.sample_cache.read(lane, len(tokens)), own)
        self.kept.put(sample.request.key, kept, KeptPrompt(keys, prompt.hidden, shared))
        self.kept.give_way(room)

    def _waits_for(self, prompt: PromptLane) -> bool:
        return bool(self.waiting) and self._lane_of(self.waiting[0]) is prompt

    def _release_prompt(self, prompt: PromptLane) -> None:
        self.changes += 1
        lane = next(index for index, known in enumerate(self.prompts) if known is prompt)
        last = self.prompts.pop()
        if last is not prompt:
            self.prompts[lane] = last
            self.prompt_cache.move(len(self.prompts), lane, len(last.token_ids))

    def find(self, request_ids: Sequence[str] | None) -> list[Sample]:
        """Samples of these requests (or all), waiting and running."""
        wanted = None if request_ids is None else set(request_ids)
        return [s for s in [*self.waiting, *self.running] if wanted is None or s.request.id in wanted]

    @torch.inference_mode()  # lanes move, and tensors made in that mode can be written in no other
    def remove(self, samples: Sequence[Sample]) -> None:
        """Take these samples out of both lists, where they are still in one."""
        gone = set(samples)
        self.waiting = deque(sample for sample in self.waiting if sample not in gone)
        for sample in [sample for sample in self.running if sample in gone]:
            self.release(sample)
        # A prompt was kept for a sample that waited; it must not outlive it, or later weights would meet its old keys.
        for prompt in [prompt for prompt in self.prompts if prompt.running == 0 and not self._waits_for(prompt)]:
            self._release_prompt(prompt)
