"""One decode step, and CUDA graphs of it where a GPU replays them.

A graph fixes sizes and addresses. So sizes are rounded up to a few values, inputs are copied into tensors that stay,
and graphs are thrown away when a cache is replaced. The model's weights change in place and keep their addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.engines.native.cache import ArenaCache
from groupwise.engines.native.decode_attention import DecodeLayout, StepInputs, StepShape
from groupwise.engines.native.decode_attention_invariant import InvariantDecodeLayout
from groupwise.engines.native.scheduler import Scheduler
from groupwise.model.forward.hidden_states import hidden_states
from groupwise.model.loading import LoadedModel

logger = logging.getLogger(__name__)


def make_layout(loaded: LoadedModel, scheduler: Scheduler, shape: StepShape) -> DecodeLayout | InvariantDecodeLayout:
    kind = InvariantDecodeLayout if loaded.batch_invariant else DecodeLayout
    return kind(scheduler.prompt_cache, scheduler.sample_cache, shape)


def run_step(
    loaded: LoadedModel,
    layout: DecodeLayout | InvariantDecodeLayout,
    *,
    inputs: StepInputs,
    positions: Sequence[int] = (),
) -> Tensor:
    """The step itself, `[B, H]`; on a GPU it asks the device for nothing, so it can be captured."""
    layout.stand_at(inputs, positions)
    return hidden_states(loaded.model, inputs.tokens, inputs.position_ids, layout)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    hidden: Tensor


class DecodeGraphs:
    """One graph per shape, captured at its first use, all in one memory pool."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._captured: dict[StepShape, _Captured] = {}
        self._generation = (-1, -1)

    def run(self, scheduler: Scheduler, shape: StepShape, inputs: StepInputs) -> Tensor:
        prompts, samples = scheduler.prompt_cache, scheduler.sample_cache
        assert isinstance(prompts, ArenaCache) and isinstance(samples, ArenaCache), "graphs need caches that stay"
        if self._generation != (prompts.generation, samples.generation):
            self._captured.clear()
            self._generation = (prompts.generation, samples.generation)
        with torch.cuda.device(self._loaded.device):  # streams and graphs belong to the current one
            if shape not in self._captured:
                self._captured[shape] = self._capture(scheduler, shape, inputs)
            captured = self._captured[shape]
            for kept, fresh in zip(captured.inputs.tensors, inputs.tensors, strict=True):
                kept.copy_(fresh)
            captured.graph.replay()
            return captured.hidden.clone()

    def clear(self) -> None:
        self._captured.clear()

    def _capture(self, scheduler: Scheduler, shape: StepShape, inputs: StepInputs) -> _Captured:
        kept = StepInputs(*(x.clone() for x in inputs.tensors))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in the first run, which a capture forbids
            run_step(self._loaded, make_layout(self._loaded, scheduler, shape), inputs=kept)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self._captured.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=side):
            hidden = run_step(self._loaded, make_layout(self._loaded, scheduler, shape), inputs=kept)
        logger.debug("captured a decode graph of shape %s", shape)
        return _Captured(graph, kept, hidden)
