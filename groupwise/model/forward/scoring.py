"""One module from packed rows to their scores: the root that sharding and compilation wrap."""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn
from transformers import PreTrainedModel

from groupwise.model.forward.head import LanguageHead, TokenScores, token_scores
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import Packed
from groupwise.model.forward.replay import Replay
from groupwise.model.forward.routing import Routing, routers_of


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
        self._routers: tuple[nn.Module, ...] | None = None  # found when they are asked for first

    def forward(
        self,
        packed: Packed,
        *,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
        with_entropy: bool = False,
        routing: Routing | None = None,
        as_sampled: bool = False,
    ) -> TokenScores:
        """Log-probs (and entropies) `[M]` of the packed sequence's completion tokens; arguments as for `token_scores`.

        Args:
            routing: takes note of what the routers of a mixture of experts choose.
            as_sampled: with the experts that the sampler chose, where the rows say it. This is for the policy's own
                scores of tokens that it drew, and for no other model's.
        """
        with ExitStack() as during:
            if as_sampled and (replay := self.replay_of(packed)) is not None:
                during.enter_context(replay.acting())
            if routing is not None:
                during.enter_context(routing.recording())
            hidden = packed_hidden_states(self.model, packed)
        return token_scores(
            self.head,
            hidden[packed.predictors],
            packed.targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            with_entropy=with_entropy,
            kept=packed.sampled.kept,
        )

    def replay_of(self, packed: Packed) -> Replay | None:
        """The sampler's choices, for this model's routers; None where the rows have none."""
        if packed.sampled.routes is None:
            return None
        if self._routers is None:
            self._routers = tuple(routers_of(self.model))
        return Replay.of(packed.sampled.routes, self._routers)
