"""Prompts and decode steps, to hidden states: eager on a CPU, replayed CUDA graphs on a GPU.

A graph fixes sizes and addresses. So sizes are rounded up to a few values, inputs are copied into tensors that stay,
and graphs are thrown away when a cache is replaced. The model's weights change in place and keep their addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.engines.native.cache import ARENA_SPAN, ArenaCache, KeyCache
from groupwise.engines.native.decoding import DecodeLayout, StepInputs, StepShape
from groupwise.engines.native.invariant import InvariantDecodeLayout
from groupwise.engines.native.scheduler import PromptLane, Sample, Scheduler
from groupwise.model.forward import hidden_states, packed_hidden_states
from groupwise.model.loading import LoadedModel
from groupwise.model.packing import ROW_MULTIPLE, Segment, pack_prompts

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 16_384
GRAPH_LANES = 32
GRAPH_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class _Rounding:
    """What sizes are rounded up to."""

    rows: int
    lanes: int
    prompts: int
    tokens: int


_EAGER = _Rounding(rows=ROW_MULTIPLE, lanes=1, prompts=1, tokens=1)
_GRAPH = _Rounding(rows=GRAPH_LANES, lanes=GRAPH_LANES, prompts=GRAPH_PROMPTS, tokens=ARENA_SPAN)


class DecodeSteps:
    """Runs the steps of one scheduler."""

    def __init__(self, loaded: LoadedModel, scheduler: Scheduler) -> None:
        self._loaded = loaded
        self._scheduler = scheduler
        self._graphs = _Graphs(loaded) if loaded.device.type == "cuda" else None
        self._rounding = _EAGER if self._graphs is None else _GRAPH

    def prefill(self, prompts: Sequence[PromptLane]) -> None:
        """Compute the new prompts: keys and values, and the hidden state that predicts the first token."""
        fresh = [lane for lane, prompt in enumerate(prompts) if prompt.hidden is None]
        while fresh:
            lanes = [fresh.pop(0)]
            while fresh and sum(len(prompts[lane].token_ids) for lane in lanes) < PREFILL_TOKENS:
                lanes.append(fresh.pop(0))
            packed = pack_prompts([prompts[lane].token_ids for lane in lanes]).to(self._loaded.device)
            keep = _KeepKeys(self._scheduler.prompt_cache, lanes, packed.segments)
            hidden = packed_hidden_states(self._loaded.model, packed, on_keys=keep)[packed.predictors]
            for lane, row in zip(lanes, hidden, strict=True):
                prompts[lane].hidden = row

    def hidden(self, running: Sequence[Sample], prompts: Sequence[PromptLane]) -> Tensor:
        """`[B, H]`, the last hidden states of the running samples' newest tokens, and of padding."""
        positions = [len(sample.tokens) - 1 for sample in running]
        shape = self._shape(running, prompts, max(positions) + 1)
        self._scheduler.make_room(lanes=shape.lanes, prompts=shape.prompts, tokens=shape.sample_tokens)
        positions += [0] * (shape.lanes - len(running))
        inputs = _inputs(shape, running, prompts, positions)
        inputs = StepInputs(*(x.to(self._loaded.device, non_blocking=True) for x in inputs.tensors))
        if self._graphs is not None:
            return self._graphs.run(self._scheduler, shape, inputs)
        return run_step(self._loaded, self._scheduler, shape=shape, inputs=inputs, positions=positions)

    def _shape(self, running: Sequence[Sample], prompts: Sequence[PromptLane], tokens: int) -> StepShape:
        to = self._rounding
        width = max(prompt.members for prompt in prompts)
        lane_of = {id(prompt): lane for lane, prompt in enumerate(prompts)}
        members = [lane_of[id(sample.prompt)] * width + sample.member for sample in running]
        full = members == list(range(len(prompts) * width))
        return StepShape(
            rows=_up(len(running), to.rows),
            lanes=_up(len(running), to.lanes),
            prompts=_up(len(prompts), to.prompts),
            width=width,
            sample_tokens=_up(tokens, to.tokens),
            prompt_tokens=_up(max(len(prompt.token_ids) for prompt in prompts), to.tokens),
            in_order=full and len(running) % to.lanes == 0 and len(prompts) % to.prompts == 0,
        )


@dataclass(frozen=True, slots=True)
class _KeepKeys:
    """Puts the keys and values of packed prompts into their lanes."""

    cache: KeyCache
    lanes: Sequence[int]
    segments: Sequence[Segment]

    def __call__(self, layer: int, key: Tensor, value: Tensor) -> None:
        for lane, segment in zip(self.lanes, self.segments, strict=True):
            span = slice(segment.start, segment.stop)
            self.cache.fill(layer, lane, key[span], value[span])


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _inputs(
    shape: StepShape, running: Sequence[Sample], prompts: Sequence[PromptLane], positions: list[int]
) -> StepInputs:
    missing = [0] * (shape.lanes - len(running))
    blank = [0] * (shape.rows - shape.lanes)
    lane_of = {id(prompt): lane for lane, prompt in enumerate(prompts)}
    starts = [len(sample.request.prompt.token_ids) for sample in running] + missing
    members = [lane_of[id(sample.prompt)] * shape.width + sample.member for sample in running]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    return StepInputs(
        tokens=torch.tensor([sample.tokens[-1] for sample in running] + missing + blank),
        position_ids=torch.tensor([start + place for start, place in zip(starts, positions, strict=True)] + blank),
        position=torch.tensor(positions),
        member=torch.tensor(members + [shape.prompts * shape.width] * len(missing)),
        prompt_lengths=torch.tensor(lengths + [1] * (shape.prompts - len(prompts))),
    )


def run_step(
    loaded: LoadedModel, scheduler: Scheduler, *, shape: StepShape, inputs: StepInputs, positions: Sequence[int]
) -> Tensor:
    """The step itself, `[B, H]`; on a GPU it asks the device for nothing, so it can be captured."""
    make_layout = InvariantDecodeLayout if loaded.batch_invariant else DecodeLayout
    layout = make_layout(
        scheduler.prompt_cache, scheduler.sample_cache, shape=shape, inputs=inputs, positions=positions
    )
    return hidden_states(loaded.model, inputs.tokens, inputs.position_ids, layout)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    hidden: Tensor


class _Graphs:
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
        if shape not in self._captured:
            self._captured[shape] = self._capture(scheduler, shape, inputs)
        captured = self._captured[shape]
        for kept, fresh in zip(captured.inputs.tensors, inputs.tensors, strict=True):
            kept.copy_(fresh)
        captured.graph.replay()
        return captured.hidden.clone()

    def _capture(self, scheduler: Scheduler, shape: StepShape, inputs: StepInputs) -> _Captured:
        kept = StepInputs(*(x.clone() for x in inputs.tensors))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in the first run, which a capture forbids
            run_step(self._loaded, scheduler, shape=shape, inputs=kept, positions=())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self._captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            hidden = run_step(self._loaded, scheduler, shape=shape, inputs=kept, positions=())
        logger.debug("captured a decode graph of shape %s", shape)
        return _Captured(graph, kept, hidden)
