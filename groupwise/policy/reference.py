"""The model that the KL holds the policy to: its initial weights, frozen, or moved after it from time to time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from groupwise.model.forward.head import LanguageHead
from groupwise.model.forward.packed_scores import packed_scores
from groupwise.model.forward.packing import Packed
from groupwise.model.loading import LoadedModel
from groupwise.policy.lanes import Lanes


class Reference:
    """A copy of the policy's weights as they are now.

    Args:
        policy: the model to copy, and to follow.
        temperature: of sampling.
        chunk_tokens: tokens whose logits exist at one time.

    Example:
        reference = Reference(loaded, temperature=1.0, chunk_tokens=1024)
        reference.sync(0.6)
    """

    def __init__(self, policy: LoadedModel, *, temperature: float, chunk_tokens: int) -> None:
        model = copy.deepcopy(policy.model).requires_grad_(False).eval()
        self.loaded = LoadedModel(model, policy.tokenizer, LanguageHead(model), policy.stop_token_ids)
        self._lanes = Lanes(model)
        self._policy = policy
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens
        self._masters: dict[str, Tensor] = {}

    def logprobs(self, packs: Sequence[Packed]) -> list[Tensor]:
        """`[M]` float32 each, of the packed completion tokens, at the sampling temperature."""
        with self._in_place():
            return list(self._lanes.map(self._logprobs, packs))

    @torch.no_grad()
    def _logprobs(self, packed: Packed) -> Tensor:
        scores = packed_scores(self.loaded, packed, temperature=self._temperature, chunk_tokens=self._chunk_tokens)
        return scores.logprobs

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Inside, `self.loaded` computes what the reference does."""
        yield

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """The reference becomes `alpha` x policy + (1 - `alpha`) x reference: TR-DPO's soft update (arXiv:2404.09656).

        It adds up in float32, as bfloat16 would round small changes away.
        """
        current = dict(self._policy.model.named_parameters())
        for name, weight in self.loaded.model.named_parameters():
            master = self._masters.setdefault(name, _master_of(weight))
            master.lerp_(current[name].detach().to(master.dtype), alpha)
            weight.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Weights that have moved; a reference that has not is made again from the initial model."""
        return dict(self._masters)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in self.loaded.model.named_parameters():
            if name in state:
                self._masters[name] = _master_of(weight).copy_(state[name])
                weight.copy_(self._masters[name])


def _master_of(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
