"""Keys of turns that ended: a sample that goes on takes its own back, and computes only what is new.

They are copies beside the KV cache, within its bound, and give way to samples that run: the oldest first. What is gone
is computed again, in one packed pass, to the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from groupwise.inputs import ModelInput, SampleKey
from groupwise.types import SampleRequest

MOST_FED = 64
"""Tokens that are fed one by one after kept keys; where more are new, one packed pass over everything is quicker."""


@dataclass(slots=True)
class KeptPrompt:
    """A prompt's keys and values, and its last hidden state `[H]`; `users` kept samples have it."""

    keys: Sequence[Tensor]
    hidden: Tensor
    size: int
    users: int = 0


@dataclass(frozen=True, slots=True)
class KeptSample:
    """Keys and values of `tokens`, which follow the prompt."""

    prompt: ModelInput
    tokens: tuple[int, ...]
    keys: Sequence[Tensor]
    size: int


class KeptKeys:
    """By the sample's key, the most recent last. Sizes are in tokens, as the caches'."""

    def __init__(self) -> None:
        self._samples: OrderedDict[SampleKey, KeptSample] = OrderedDict()
        self._prompts: dict[ModelInput, KeptPrompt] = {}

    @property
    def size(self) -> int:
        prompts = sum(prompt.size for prompt in self._prompts.values())
        return prompts + sum(sample.size for sample in self._samples.values())

    def put(self, key: SampleKey, sample: KeptSample, prompt: KeptPrompt) -> None:
        """Keep a turn's keys in place of an earlier turn's."""
        self._prompts.setdefault(sample.prompt, prompt).users += 1
        self._drop(key)
        self._samples[key] = sample

    def has_prompt(self, prompt: ModelInput) -> bool:
        return prompt in self._prompts

    def take(self, request: SampleRequest) -> tuple[KeptSample, KeptPrompt] | None:
        """What this request goes on from; None where it is gone, or is of another text."""
        kept = self._samples.get(request.key)
        if kept is None:
            return None
        prompt = self._prompts[kept.prompt]
        self._drop(request.key)
        given, size = request.continues.token_ids, len(kept.tokens)
        follows = size < len(given) <= size + MOST_FED and given[:size] == kept.tokens
        return (kept, prompt) if follows and kept.prompt == request.prompt else None

    def give_way(self, room: int) -> None:
        """Drop the oldest until the rest takes no more than `room` tokens."""
        while self._samples and self.size > room:
            self._drop(next(iter(self._samples)))

    def clear(self) -> None:
        self._samples.clear()
        self._prompts.clear()

    def _drop(self, key: SampleKey) -> None:
        kept = self._samples.pop(key, None)
        if kept is None:
            return
        prompt = self._prompts[kept.prompt]
        prompt.users -= 1
        if not prompt.users:
            del self._prompts[kept.prompt]
