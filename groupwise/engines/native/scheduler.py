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

from groupwise.engines.native.cache import CacheShape, make_cache
from groupwise.engines.native.keys import uniforms
from groupwise.errors import EngineError
from groupwise.model.exact import BLOCK
from groupwise.types import Completion, SampleRequest

Outbox = asyncio.Queue[Completion | BaseException]


@dataclass(slots=True)
class PromptLane:
    """A prompt in the cache. `hidden [H]` is its last hidden state, from which every sample's first token is drawn."""

    uid: str
    token_ids: tuple[int, ...]
    hidden: Tensor | None = None
    members: int = 0
    running: int = 0


@dataclass(slots=True, eq=False)
class Sample:
    """One request on its way: what was drawn so far, and where it stands."""

    request: SampleRequest
    outbox: Outbox
    uniform: np.ndarray = field(init=False)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt: PromptLane | None = None
    member: int = 0
    seen: Tensor | None = None

    def __post_init__(self) -> None:
        request = self.request
        self.uniform = uniforms(
            request.sampling.seed, request.prompt.uid, request.sample_index, request.sampling.max_tokens
        )


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


class Scheduler:
    """Owns the caches and the lists of waiting and running samples; `running[lane]` and `prompts[lane]` are dense.

    Args:
        max_samples: most samples decoded together.
        max_bytes: most memory of both caches.

    Attributes:
        changes: counts the changes of both lists. While it stands still, lanes and caches' lanes do too.
    """

    def __init__(self, shape: CacheShape, *, max_samples: int, max_bytes: int) -> None:
        self._shape = shape
        self._max_samples = max_samples
        self._at_once = shape.device.type == "cuda"  # a cache that keeps its address is made long enough from the start
        self._max_blocks = max_bytes // (shape.bytes_per_token * BLOCK)
        self.waiting: deque[Sample] = deque()
        self.running: list[Sample] = []
        self.prompts: list[PromptLane] = []
        self.changes = 0
        self.drop_caches()

    def drop_caches(self) -> None:
        """Release all memory; only when nothing runs."""
        assert not self.running, "caches of running samples cannot be dropped"
        self.prompts.clear()
        self.prompt_cache = make_cache(self._shape)
        self.sample_cache = make_cache(self._shape)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> list[Sample]:
        """Move waiting samples to lanes, in order, as far as memory goes; returns those that were admitted."""
        admitted: list[Sample] = []
        while self.waiting and len(self.running) < self._max_samples and self._fits(self.waiting[0]):
            sample = self.waiting.popleft()
            lane = self._lane_of(sample)
            if lane is None:
                lane = PromptLane(sample.request.prompt.uid, sample.request.prompt.token_ids)
                self.prompts.append(lane)
            sample.prompt, sample.member = lane, lane.members
            lane.members += 1
            lane.running += 1
            self.running.append(sample)
            admitted.append(sample)
        if self.waiting and not self.running:
            self._refuse(self.waiting[0])
        if admitted:
            self.changes += 1
            longest = max(sample.request.sampling.max_tokens for sample in self.running)
            if len(admitted) == len(self.running):
                self._shed(longest)
            self.make_room(lanes=len(self.running), prompts=len(self.prompts), tokens=longest if self._at_once else 0)
        return admitted

    def _lane_of(self, sample: Sample) -> PromptLane | None:
        wanted = sample.request.prompt
        for lane in reversed(self.prompts):
            if lane.uid == wanted.uid and lane.token_ids == wanted.token_ids:
                return lane
        return None

    def _fits(self, sample: Sample) -> bool:
        lengths = [s.request.sampling.max_tokens for s in self.running]
        longest = max([*lengths, sample.request.sampling.max_tokens])
        prompts = [len(lane.token_ids) for lane in self.prompts]
        if self._lane_of(sample) is None:
            prompts.append(len(sample.request.prompt.token_ids))
        needed = (len(self.running) + 1) * blocks_of(longest) + len(prompts) * blocks_of(max(prompts))
        return needed <= self._max_blocks

    def _refuse(self, sample: Sample) -> None:
        request = sample.request
        tokens = (blocks_of(request.sampling.max_tokens) + blocks_of(len(request.prompt.token_ids))) * BLOCK
        raise EngineError(
            f"one sample of {len(request.prompt.token_ids)} prompt and {request.sampling.max_tokens} completion tokens "
            f"needs {tokens * self._shape.bytes_per_token / 2**30:.2f} GiB of keys and values, but "
            f"rollout.kv_cache_gib "
            f"allows {self._max_blocks * BLOCK * self._shape.bytes_per_token / 2**30:.2f}; raise it, or lower "
            "rollout.max_completion_tokens"
        )

    def _shed(self, longest: int) -> None:
        """Start with fresh caches where the old ones, which never shrink, would outgrow the bound: many lanes for short
        samples, then few for long ones. Only before a step of new samples and new prompts."""
        if any(prompt.hidden is not None for prompt in self.prompts):
            return
        samples, prompts = self.sample_cache, self.prompt_cache
        lanes = max(samples.lanes, len(self.running)), max(prompts.lanes, len(self.prompts))
        tokens = max(samples.tokens, longest), max(prompts.tokens, *(len(lane.token_ids) for lane in self.prompts))
        if lanes[0] * blocks_of(tokens[0]) + lanes[1] * blocks_of(tokens[1]) > self._max_blocks:
            self.sample_cache, self.prompt_cache = make_cache(self._shape), make_cache(self._shape)

    def make_room(self, *, lanes: int, prompts: int, tokens: int) -> None:
        """Room for a step of `lanes` samples with `tokens` completion tokens each, and for `prompts` prompts."""
        for cache, wanted in ((self.sample_cache, lanes), (self.prompt_cache, prompts)):
            if cache.lanes < wanted:
                cache.widen(wanted)
        self.sample_cache.reserve(tokens)
        self.prompt_cache.reserve(max(len(lane.token_ids) for lane in self.prompts))

    def release(self, sample: Sample) -> None:
        """Free a finished sample's lane, and its prompt's if it was the last one and none waits."""
        self.changes += 1
        lane = self.running.index(sample)
        last = self.running.pop()
        if last is not sample:
            self.running[lane] = last
            self.sample_cache.move(len(self.running), lane, len(last.tokens))
        prompt = sample.prompt
        assert prompt is not None
        prompt.running -= 1
        if prompt.running == 0 and not self._waits_for(prompt):
            self._release_prompt(prompt)

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
