"""When a completion is over."""

from __future__ import annotations

from groupwise.engines.native.scheduler import Sample
from groupwise.model.loading import LoadedModel
from groupwise.types import FinishReason


def find_finish(sample: Sample, loaded: LoadedModel) -> FinishReason | None:
    """Why the sample ends with its newest token, or None. A stop counts before the length."""
    sampling = sample.request.sampling
    count = len(sample.tokens) - sample.begun
    if count > sampling.min_tokens:
        token = sample.tokens[-1]
        if token in loaded.stop_token_ids or token in sampling.stop_token_ids:
            return "stop"
    if sampling.stop and count >= sampling.min_tokens and _completes(sample, sampling.stop, loaded):
        return "stop"
    return "length" if count >= sampling.max_tokens else None


def _completes(sample: Sample, stops: tuple[str, ...], loaded: LoadedModel) -> bool:
    """Whether a stop string ends in the newest token. A token is at least one byte, so a tail of tokens suffices."""
    longest = max(len(stop.encode()) for stop in stops)
    tokens = sample.tokens[max(sample.begun, len(sample.tokens) - longest - 8) :]
    tail = loaded.decode(tokens)
    if not any(stop in tail for stop in stops):
        return False
    # Under `min_tokens` one may stand there already; it ends nothing any more.
    known = _common(loaded.decode(tokens[:-1]), tail)
    return any(stop in tail and tail.rfind(stop) + len(stop) > known for stop in stops)


def _common(first: str, second: str) -> int:
    """Characters that both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
