"""The model that the KL holds the policy to: its initial weights, frozen."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from groupwise.model.forward import packed_hidden_states
from groupwise.model.head import LanguageHead, token_scores
from groupwise.model.loading import LoadedModel
from groupwise.model.packing import Packed


class Reference:
    """A copy of the policy's weights as they are now.

    Args:
        policy: the model to copy.
        temperature: of sampling.
        chunk_tokens: tokens whose logits exist at one time.
    """

    def __init__(self, policy: LoadedModel, *, temperature: float, chunk_tokens: int) -> None:
        model = copy.deepcopy(policy.model).requires_grad_(False).eval()
        self.loaded = LoadedModel(model, policy.tokenizer, LanguageHead(model), policy.stop_token_ids)
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens

    @torch.no_grad()
    def logprobs(self, packed: Packed) -> Tensor:
        """`[M]` float32, of the packed completion tokens, at the sampling temperature."""
        hidden = packed_hidden_states(self.loaded.model, packed)
        return token_scores(
            self.loaded.head,
            hidden[packed.predictors],
            packed.targets,
            temperature=self._temperature,
            chunk_tokens=self._chunk_tokens,
        ).logprobs
