"""Models that score and are not trained: a teacher, and the reference that the KL holds the policy to, which is its
initial weights, frozen, or moved after it from time to time."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.model.forward.head import LanguageHead
from groupwise.model.forward.packing import Packed
from groupwise.model.forward.scoring import ScoringModel
from groupwise.model.loading import LoadedModel
from groupwise.policy.streams import Streams


class FrozenScorer:
    """Log-probs by a model that is not trained: a teacher, or, below, the policy as it was.

    Args:
        loaded: whose vocabulary is the policy's.
        temperature: of sampling.
        chunk_tokens: tokens whose logits exist at one time.

    Example:
        teacher = FrozenScorer(load_model(config.teacher), temperature=1.0, chunk_tokens=1024)
    """

    def __init__(self, loaded: LoadedModel, *, temperature: float, chunk_tokens: int) -> None:
        self.loaded = loaded
        loaded.model.requires_grad_(False)
        self._streams = Streams(loaded.model)
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens

    def logprobs(self, packs: Sequence[Packed], *, temperature: float | None = None) -> list[Tensor]:
        """`[M]` float32 each, of the packed completion tokens, at the sampling temperature or another."""
        at = self._temperature if temperature is None else temperature
        with self._in_place():
            return list(self._streams.map(partial(self._logprobs, temperature=at), packs))

    @torch.no_grad()
    def _logprobs(self, packed: Packed, *, temperature: float) -> Tensor:
        return self.loaded.scoring(packed, temperature=temperature, chunk_tokens=self._chunk_tokens).logprobs

    @contextmanager
    def _in_place(self) -> Generator[None, None, None]:
        """Inside, `self.loaded` computes what the scorer does."""
        yield


class Reference(FrozenScorer):
    """A copy of the policy's weights as they are now.

    Args:
        policy: the model to copy, and to follow.

    Example:
        reference = Reference(loaded, temperature=1.0, chunk_tokens=1024)
        reference.sync(0.6)
    """

    def __init__(self, policy: LoadedModel, *, temperature: float, chunk_tokens: int) -> None:
        model = copy.deepcopy(policy.model).requires_grad_(False).eval()
        copied = LoadedModel(ScoringModel(model, LanguageHead(model)), policy.tokenizer, policy.stop_token_ids)
        super().__init__(copied, temperature=temperature, chunk_tokens=chunk_tokens)
        self._policy = policy
        self._masters: dict[str, Tensor] = {}

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
