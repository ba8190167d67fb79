"""The reference of a policy that trains an adapter: the policy's own module, without a second copy of the model."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from groupwise.model.adapters import adds_nothing
from groupwise.model.loading import LoadedModel
from groupwise.policy.reference import FrozenScorer, Reference
from groupwise.policy.streams import Streams


class AdapterReference(Reference):
    """The base with its adapter off while the adapter is as it was made; else with an adapter of its own, which is the
    one that training began with, or what `sync` made of it. Arguments as for `Reference`.

    Its `logprobs` come before the policy's own forward, because they change the module that then has a backward pass
    to come.
    """

    def __init__(self, policy: LoadedModel, *, temperature: float, chunk_tokens: int) -> None:
        self.loaded = policy
        self._streams = Streams(policy.model)
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens
        self._trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        self._own: dict[str, Tensor] = {}
        self._has_moved = False
        if not adds_nothing(policy.model):
            self._own = {name: p.detach().clone() for name, p in self._trained.items()}

    @contextmanager
    def _in_place(self) -> Generator[None, None, None]:
        with self._swapped() if self._own else adapter_off(self.loaded):
            yield

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """Each weight of its adapter becomes `alpha` x the policy's + (1 - `alpha`) x its own, in float32."""
        if not self._own:  # off is a B of zero, whatever A is
            self._own = {
                name: torch.zeros_like(p) if ".lora_B." in name else p.detach().clone()
                for name, p in self._trained.items()
            }
        for name, trained in self._trained.items():
            self._own[name] = self._own[name].float().lerp_(trained.detach().float(), alpha)
        self._has_moved = True

    def state_dict(self) -> dict[str, Any]:
        """An adapter that has moved; one that has not is made again from the initial model."""
        return dict(self._own) if self._has_moved else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self._own = {name: state[name].to(p.device, copy=True) for name, p in self._trained.items()}
            self._has_moved = True

    @contextmanager
    def _swapped(self) -> Generator[None, None, None]:
        held = {name: p.data for name, p in self._trained.items()}
        try:
            for name, p in self._trained.items():
                p.data = self._own[name].to(p.dtype)
            yield
        finally:
            for name, p in self._trained.items():
                p.data = held[name]


class AdapterBase(FrozenScorer):
    """What the adapter stands on: the policy's own module with its adapter off. Arguments as for `FrozenScorer`."""

    def __init__(self, policy: LoadedModel, *, temperature: float, chunk_tokens: int) -> None:
        self.loaded = policy
        self._streams = Streams(policy.model)
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens

    @contextmanager
    def _in_place(self) -> Generator[None, None, None]:
        with adapter_off(self.loaded):
            yield


@contextmanager
def adapter_off(loaded: LoadedModel) -> Generator[None, None, None]:
    """Inside, the model computes what its base does."""
    loaded.model.disable_adapters()
    try:
        yield
    finally:
        loaded.model.enable_adapters()


def make_reference(policy: LoadedModel, *, temperature: float, chunk_tokens: int) -> Reference:
    """The policy as it is now: a frozen copy, or with an adapter the same module."""
    kind = Reference if policy.adapter is None else AdapterReference
    return kind(policy, temperature=temperature, chunk_tokens=chunk_tokens)
