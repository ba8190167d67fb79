"""Which prompt comes k-th: a pure function of seed and k, so that a resumed run sees what an unbroken one would."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from groupwise.errors import CheckpointError, DataError
from groupwise.types import Prompt


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One element of the stream: `index` is k, counted from 0 over the whole run.

    Example:
        StreamItem(index=17, prompt=prompt)
    """

    index: int
    prompt: Prompt


class PromptSampler:
    """An endless stream over the prompts: every epoch has each prompt exactly once, in an order of its own.

    Epoch e is `k // n`. Its order sorts the prompts by one 64-bit Philox number each, keyed by seed and epoch; raw
    Philox output is fixed by its definition, so the order does not change with the version of a shuffling routine.

    Args:
        prompts: `[n]`, at least one.
        seed: decides every epoch's order.
        shuffle: False keeps the data's order in every epoch.
        same_data: a saved position of other data, or of another order, is refused.

    Raises:
        DataError: there are no prompts.

    Example:
        sampler = PromptSampler(prompt_set.prompts, seed=0, shuffle=True)
        items = sampler.take(32)          # indices 0 to 31; the next call gives 32 to 63
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool, same_data: bool = True) -> None:
        if not prompts:
            raise DataError("there are no prompts to sample from; expected at least one")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._same_data = same_data
        self._position = 0
        self._fingerprint = _fingerprint(self._prompts)
        self._cached_epoch = -1
        self._cached_order = np.empty(0, dtype=np.int64)

    @property
    def num_prompts(self) -> int:
        """n, the length of an epoch."""
        return len(self._prompts)

    @property
    def position(self) -> int:
        """k of the next item that `take` gives."""
        return self._position

    @property
    def epoch(self) -> float:
        """Passes over the data so far, in parts of one."""
        return self._position / len(self._prompts)

    def prompt_at(self, k: int) -> Prompt:
        """The k-th prompt of the stream, whatever was taken before."""
        assert k >= 0, f"the stream starts at 0, got k = {k}"
        epoch, place = divmod(k, len(self._prompts))
        return self._prompts[int(self._order(epoch)[place])] if self._shuffle else self._prompts[place]

    def take(self, n: int) -> list[StreamItem]:
        """The next n items."""
        assert n >= 0, f"cannot take {n} prompts"
        items = [StreamItem(k, self.prompt_at(k)) for k in range(self._position, self._position + n)]
        self._position += n
        return items

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "fingerprint": self._fingerprint,
            "num_prompts": len(self._prompts),
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved position.

        Raises:
            CheckpointError: the state is malformed, or of other data, another seed or another order: then position k
                would mean another prompt.
        """
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise CheckpointError(f"the sampler's saved position is {position!r}; expected a whole number from 0 on")
        if self._same_data:
            self._check_same(state)
        self._position = position

    def _check_same(self, state: dict[str, Any]) -> None:
        if state.get("fingerprint") != self._fingerprint:
            raise CheckpointError(
                f"the checkpoint was written with other data ({state.get('num_prompts')} prompts, now "
                f"{len(self._prompts)}); resume with the same file and the same data settings, or start a new run"
            )
        for name, now in (("seed", self._seed), ("shuffle", self._shuffle)):
            if state.get(name) != now:
                raise CheckpointError(
                    f"the checkpoint was written with {name} = {state.get(name)!r}, but it is {now!r} now, which would "
                    "repeat and skip prompts; resume with the same setting, or start a new run"
                )

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._cached_epoch:
            self._cached_order = epoch_order(len(self._prompts), seed=self._seed, epoch=epoch)
            self._cached_epoch = epoch
        return self._cached_order


@lru_cache(maxsize=2)
def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """`[count]` int64, a permutation that depends on the arguments alone."""
    digest = hashlib.blake2s(f"prompt order/{seed}/{epoch}".encode(), digest_size=16).digest()
    # As explicit little-endian numbers, so that the order is the same on every machine.
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.blake2s()
    for prompt in prompts:
        digest.update(prompt.uid.encode() + b"\n")
    return digest.hexdigest()
