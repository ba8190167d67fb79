"""One module from packed rows to their scores: the root that sharding and compilation wrap."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn
from transformers import PreTrainedModel

from groupwise.model.forward.head import LanguageHead, TokenScores, token_scores
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import Packed
from groupwise.model.forward.routing import Routing


class ScoringModel(nn.Module):
    """Decoder, head and chunks as one forward. Its parameters are the model's, under the prefix `model.`.

    `fully_shard` of it gathers what no layer holds (embedding, head, last norm) around the whole forward, tied or not,
    where decoder and head called apart would meet shards.

    Example:
        scores = ScoringModel(model, head)(packed, temperature=1.0, chunk_tokens=1024)
    """

    def __init__(self, model: PreTrainedModel, head: LanguageHead) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def forward(
        self,
        packed: Packed,
        *,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
        with_entropy: bool = False,
        routing: Routing | None = None,
    ) -> TokenScores:
        """Log-probs (and entropies) `[M]` of the packed sequence's completion tokens; arguments as for `token_scores`.

        Args:
            routing: takes note of what the routers of a mixture of experts choose.
        """
        with nullcontext() if routing is None else routing.recording():
            hidden = packed_hidden_states(self.model, packed)
        return token_scores(
            self.head,
            hidden[packed.predictors],
            packed.targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            with_entropy=with_entropy,
        )
