"""One decode step, and CUDA graphs of it where a GPU replays them.

A graph fixes sizes and addresses. So sizes are rounded up to a few values, inputs are copied into tensors that stay,
and graphs are thrown away when a cache is replaced. The model's weights change in place and keep their addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from groupwise.engines.native.cache import ArenaCache
from groupwise.engines.native.decode_attention import DecodeLayout, StepInputs, StepShape
from groupwise.engines.native.decode_attention_kernel import KernelDecodeLayout
from groupwise.engines.native.scheduler import Scheduler
from groupwise.model.forward.hidden_states import hidden_states
from groupwise.model.loading import LoadedModel

logger = logging.getLogger(__name__)

_Replay = TypeVar("_Replay")


def make_layout(scheduler: Scheduler, shape: StepShape) -> DecodeLayout | KernelDecodeLayout:
    kind = KernelDecodeLayout if scheduler.shape.by_kernel else DecodeLayout
    return kind(scheduler.prompt_cache, scheduler.sample_cache, shape)


def run_step(
    loaded: LoadedModel,
    layout: DecodeLayout | KernelDecodeLayout,
    *,
    inputs: StepInputs,
    positions: Sequence[int] = (),
) -> Tensor:
    """The step itself, `[B, H]`; on a GPU it asks the device for nothing, so it can be captured."""
    layout.stand_at(inputs, positions)
    return hidden_states(loaded.model, inputs.tokens, inputs.position_ids, layout)


class Graphs(Generic[_Replay]):
    """What was captured, by key, all in one memory pool; void with the caches that it reads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, _Replay] = {}
        self._generation = (-1, -1)
        self._pool: Any = None

    def get(self, key: Hashable, scheduler: Scheduler, make: Callable[[], _Replay]) -> _Replay:
        """The one of this key; `make` captures it, by `capture`, where there is none."""
        prompts, samples = scheduler.prompt_cache, scheduler.sample_cache
        assert isinstance(prompts, ArenaCache) and isinstance(samples, ArenaCache), "graphs need caches that stay"
        if self._generation != (prompts.generation, samples.generation):
            self.clear()
            self._generation = (prompts.generation, samples.generation)
        if key not in self._captured:
            self._captured[key] = make()
            logger.debug("captured a decode graph of %s", key)
        return self._captured[key]

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The step as a graph; each call replays it, and writes over the result of the last. On a CPU, the step."""
        if self._device.type != "cuda":
            return step
        with torch.cuda.device(self._device):  # streams and graphs belong to the current one
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up in the first run, which a capture forbids
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                result = step()
            self._pool = graph.pool()

        def replay() -> Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return result

        return replay

    def clear(self) -> None:
        """Forget all of them, once what was asked of them is done."""
        if self._captured and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._captured.clear()
        self._pool = None


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], Tensor]
    inputs: StepInputs


class DecodeGraphs:
    """One graph per shape, from tokens to hidden states."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._graphs: Graphs[_Captured] = Graphs(loaded.device)

    def run(self, scheduler: Scheduler, shape: StepShape, inputs: StepInputs) -> Tensor:
        def make() -> _Captured:
            kept = StepInputs(*(x.clone() for x in inputs.tensors))
            step = partial(run_step, self._loaded, inputs=kept)
            return _Captured(self._graphs.capture(lambda: step(make_layout(scheduler, shape))), kept)

        captured = self._graphs.get(shape, scheduler, make)
        for kept, fresh in zip(captured.inputs.tensors, inputs.tensors, strict=True):
            kept.copy_(fresh)
        return captured.replay().clone()

    def clear(self) -> None:
        self._graphs.clear()
