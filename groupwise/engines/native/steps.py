"""Prompts and decode steps, to hidden states: eager on a CPU, on a GPU replayed CUDA graphs where the model allows.

A graph fixes sizes and addresses. So sizes are rounded up to a few values, inputs are copied into tensors that stay,
and graphs are thrown away when a cache is replaced. The model's weights change in place and keep their addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.engines.native.cache import ArenaCache, CacheShape, KeyCache
from groupwise.engines.native.decoding import DecodeLayout, StepInputs, StepShape
from groupwise.engines.native.invariant import InvariantDecodeLayout
from groupwise.engines.native.scheduler import PromptLane, Sample, Scheduler
from groupwise.model.forward import hidden_states, packed_hidden_states
from groupwise.model.loading import LoadedModel
from groupwise.model.packing import ROW_MULTIPLE, Segment, pack_prompts, round_up

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 16_384


class DecodeSteps:
    """Runs the steps of one scheduler."""

    def __init__(self, loaded: LoadedModel, scheduler: Scheduler) -> None:
        self._loaded = loaded
        self._scheduler = scheduler
        self._graphs = _Graphs(loaded) if scheduler.shape.graphs else None
        self._roster: _Roster | None = None
        self._layout: tuple[StepShape, DecodeLayout | InvariantDecodeLayout] | None = None  # of the roster

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
        if self._roster is None or self._roster.changes != self._scheduler.changes:
            roster = _Roster.of(running, prompts, self._scheduler.shape, changes=self._scheduler.changes)
            self._roster, self._layout = roster.to(self._loaded.device), None
        positions = [len(sample.tokens) - 1 for sample in running]
        tokens = max(positions) + 1
        self._scheduler.make_room(tokens)
        shape = self._roster.shape(min(self._scheduler.shape.tokens_for(tokens), self._scheduler.sample_cache.tokens))
        positions += [0] * (shape.lanes - len(running))
        inputs = self._roster.inputs([sample.tokens[-1] for sample in running], positions)
        if self._graphs is not None:
            return self._graphs.run(self._scheduler, shape, inputs)
        if self._layout is None or self._layout[0] != shape:
            self._layout = shape, make_layout(self._loaded, self._scheduler, shape)
        return run_step(self._loaded, self._layout[1], inputs=inputs, positions=positions)

    def forget(self) -> None:
        """Let go of the caches' memory."""
        self._roster = self._layout = None

    def forget_graphs(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()


@dataclass(frozen=True, slots=True)
class _Roster:
    """The samples that run, and what steps need of them that stays the same until one comes or goes.

    Attributes:
        changes: the scheduler's, when this was made.
        whole: what all of its steps' shapes have in common; its `sample_tokens` says nothing.
        starts: `[lanes]`, lengths of the samples' prompts; member, prompt_lengths: as in `StepInputs`.
    """

    changes: int
    whole: StepShape
    starts: Tensor
    member: Tensor
    prompt_lengths: Tensor

    @staticmethod
    def of(running: Sequence[Sample], prompts: Sequence[PromptLane], to: CacheShape, *, changes: int) -> _Roster:
        width = max(prompt.members for prompt in prompts)
        lane_of = {id(prompt): lane for lane, prompt in enumerate(prompts)}
        members = [lane_of[id(sample.prompt)] * width + sample.member for sample in running]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        in_order = members == list(range(len(prompts) * width))
        lanes = to.lanes_for(len(running))
        whole = StepShape(
            rows=round_up(lanes, ROW_MULTIPLE),
            lanes=lanes,
            prompts=to.prompts_for(len(prompts)),
            width=width,
            sample_tokens=0,
            prompt_tokens=to.tokens_for(max(lengths)),
            in_order=in_order and lanes == len(running) and to.prompts_for(len(prompts)) == len(prompts),
        )
        missing = whole.lanes - len(running)
        return _Roster(
            changes,
            whole,
            starts=torch.tensor([len(sample.request.prompt.token_ids) for sample in running] + [0] * missing),
            member=torch.tensor(members + [whole.prompts * width] * missing),
            prompt_lengths=torch.tensor(lengths + [1] * (whole.prompts - len(prompts))),
        )

    def to(self, device: torch.device) -> _Roster:
        tensors = (x.to(device, non_blocking=True) for x in (self.starts, self.member, self.prompt_lengths))
        return _Roster(self.changes, self.whole, *tensors)

    def shape(self, tokens: int) -> StepShape:
        """Of a step that reads `tokens` keys of each sample."""
        return replace(self.whole, sample_tokens=tokens)

    def inputs(self, tokens: list[int], positions: list[int]) -> StepInputs:
        """Of a step that feeds `tokens`, one for each sample, at `positions`, one for each lane."""
        rows, lanes = self.whole.rows, self.whole.lanes
        device = self.member.device
        position = torch.tensor(positions).to(device, non_blocking=True)
        places = position + self.starts
        return StepInputs(
            tokens=torch.tensor(tokens + [0] * (rows - len(tokens))).to(device, non_blocking=True),
            position_ids=pad(places, (0, rows - lanes)) if rows > lanes else places,
            position=position,
            member=self.member,
            prompt_lengths=self.prompt_lengths,
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
