"""The experts that a mixture chose for the tokens of samples, where a request wants them.

Shapes: N rows of a pass, L layers with experts, k choices. A prompt's rows are those of its lane; a sample has the rows
of what follows, as it is fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from groupwise.engines.native.scheduler import PromptLane, Sample
from groupwise.model.forward.routing import Choices
from groupwise.sides import NO_SIDES, NUMPY_TYPES, Routes, Sides, expert_type

Rows = NDArray[np.integer[Any]]
"""`[N, L, k]`."""


def recording(choices: Choices | None) -> AbstractContextManager[Any]:
    """Around a pass, where somebody wants to know."""
    return nullcontext() if choices is None else choices.recording()


def choices_for(samples: Sequence[Sample]) -> Choices | None:
    """To record a pass of these samples with; None where none wants it."""
    return Choices() if any(sample.request.wants_routes for sample in samples) else None


def rows_of(choices: Choices) -> Rows:
    """Of a pass that has been recorded."""
    return torch.stack(choices.chosen, 1).numpy().astype(NUMPY_TYPES[expert_type(choices.experts)])


def lacks_routes(prompt: PromptLane, samples: Sequence[Sample]) -> bool:
    """Whether one of these samples wants a prompt's choices that were not recorded."""
    return prompt.routes is None and any(
        sample.prompt is prompt and sample.request.wants_routes and sample.request.routes_from < len(prompt.token_ids)
        for sample in samples
    )


def sides_of(sample: Sample) -> Sides:
    """What a sample has to tell of what was run for it."""
    request, prompt = sample.request, sample.prompt
    if not request.wants_routes or prompt is None:
        return NO_SIDES
    length, first = len(prompt.token_ids), request.routes_from
    parts = [*sample.routes]
    begin = length + sample.routed_from
    if first < length:
        assert prompt.routes is not None, "a prompt whose choices are wanted was recorded"
        parts, begin = [prompt.routes, *parts], 0
    if not parts:
        return NO_SIDES
    rows = cast(Rows, np.concatenate(parts))[first - begin :]
    assert begin <= first, f"choices from {first} on were asked for, and are known from {begin} on"
    dtype = "uint8" if rows.itemsize == 1 else "int16"
    return Sides(routes=Routes(rows.tobytes(), dtype, rows.shape[1], rows.shape[2], first))
