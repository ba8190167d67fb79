"""Tokens for the same samples, step after step. What changes only when a sample comes or goes is found once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from groupwise.engines.native.sampling import Choice, Forbidden, RowParams, choose
from groupwise.engines.native.scheduler import Sample
from groupwise.engines.native.stopping import find_finish
from groupwise.model.loading import LoadedModel
from groupwise.tensors import floats, ints
from groupwise.types import FinishReason


class Draws:
    """Draws for `samples`, one row of logits each, as long as they are the ones that run."""

    def __init__(self, samples: Sequence[Sample], loaded: LoadedModel) -> None:
        self._samples = tuple(samples)
        self._loaded = loaded
        self._params = RowParams.of([sample.request.sampling for sample in samples], loaded.device)
        self._seen: Tensor | None = None
        self._forbidden: Forbidden | None = None
        self._holds = 0  # draws for which the forbidden tokens stay the same
        self._feeds = any(sample.fed for sample in samples)
        self._likeliest = max(sample.request.likeliest for sample in samples)

    def next(self, logits: Tensor) -> list[tuple[Sample, FinishReason]]:
        """Give each sample a token from `logits [B, V]`; returns those that it ends, and why."""
        samples, device = self._samples, logits.device
        if self._holds == 0:
            self._forbid(logits)
        self._holds -= 1
        if self._params.penalty is not None and self._seen is None:
            self._seen = _seen(samples, logits)
        uniform = np.array([sample.uniform[len(sample.tokens)] for sample in samples])
        choice = choose(
            logits,
            torch.from_numpy(uniform).to(device),  # pyright: ignore[reportUnknownMemberType]
            self._params,
            seen=self._seen,
            forbidden=self._forbidden,
            sums=self._loaded.head.row_sums,
            likeliest=self._likeliest,
        )
        tokens = self._with_fed(choice.tokens) if self._feeds else choice.tokens
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        ended: list[tuple[Sample, FinishReason]] = []
        self._tell(choice)
        for sample, token, logprob in zip(samples, ints(tokens), floats(choice.logprobs), strict=True):
            sample.tokens.append(token)
            if sample.fed:
                sample.fed.popleft()
                continue
            sample.logprobs.append(logprob)
            reason = find_finish(sample, self._loaded)
            if reason is not None:
                ended.append((sample, reason))
        self._feeds = self._feeds and any(sample.fed for sample in samples)
        return ended

    def _tell(self, choice: Choice) -> None:
        """Give the likeliest tokens to the samples that want them, where one is drawn."""
        if choice.likeliest is None or choice.their_logprobs is None:
            return
        width = choice.likeliest.shape[1]
        pairs = tuple(zip(ints(choice.likeliest.flatten()), floats(choice.their_logprobs.flatten()), strict=True))
        for row, sample in enumerate(self._samples):
            if sample.request.likeliest and not sample.fed:
                first = row * width
                sample.likeliest.append(pairs[first : first + min(width, sample.request.likeliest)])

    def _with_fed(self, drawn: Tensor) -> Tensor:
        """`[B]`, with the token that is given where one is."""
        fed = [sample.fed[0] if sample.fed else -1 for sample in self._samples]
        given = torch.tensor(fed, device=drawn.device, dtype=drawn.dtype)
        return torch.where(given >= 0, given, drawn)

    def _forbid(self, logits: Tensor) -> None:
        """Stop tokens cannot be drawn until a sample has its `min_tokens`."""
        left = [sample.begun + sample.request.sampling.min_tokens - len(sample.tokens) for sample in self._samples]
        self._holds = min((count for count in left if count > 0), default=-1)
        pairs = [
            (row, stop)
            for row, (sample, count) in enumerate(zip(self._samples, left, strict=True))
            if count > 0
            for stop in (*self._loaded.stop_token_ids, *sample.request.sampling.stop_token_ids)
            if 0 <= stop < logits.shape[-1]
        ]
        self._forbidden = Forbidden(*torch.tensor(pairs, device=logits.device).unbind(1)) if pairs else None


def _seen(samples: Sequence[Sample], logits: Tensor) -> Tensor:
    """`[B, V]`, tokens that stand in a sample or its prompt; each sample keeps its row."""
    for sample in samples:
        if sample.seen is None:
            sample.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            sample.seen[[*sample.request.prompt.token_ids, *sample.tokens]] = True
    rows = torch.stack([sample.seen for sample in samples if sample.seen is not None])
    for sample, row in zip(samples, rows, strict=True):
        sample.seen = row
    return rows
