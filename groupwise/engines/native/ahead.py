"""Steps of a GPU that run ahead of the host: the next one is asked for before the last one's tokens are read.

A graph feeds the tokens of the step before, computes, and draws, all on the device. While it runs, the host reads what
the step before has drawn: which samples end, what is given back. So a sample that ends is computed once more than it
needs, and what comes of that is dropped. What is drawn does not depend on it: a token is a function of its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from groupwise.engines.native.decode_attention import StepInputs, StepShape
from groupwise.engines.native.graphs import Graphs, make_layout, run_step
from groupwise.engines.native.roster import Roster
from groupwise.engines.native.sampling import RowParams, choose
from groupwise.engines.native.scheduler import Sample, Scheduler
from groupwise.model.fast_gpu.layers import fused
from groupwise.model.loading import LoadedModel
from groupwise.tensors import floats, ints
from groupwise.types import SamplingParams

_PADDING = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Flight:
    """A step under way.

    Attributes:
        samples: by lane.
        tokens, logprobs: `[B]` on the host, once `read` has waited for them.
    """

    samples: tuple[Sample, ...]
    tokens: Tensor
    logprobs: Tensor
    landed: torch.cuda.Event | None

    def read(self) -> Iterator[tuple[Sample, int, float]]:
        """Each sample with its token and that one's log-prob."""
        if self.landed is not None:
            self.landed.synchronize()
        return zip(self.samples, ints(self.tokens), floats(self.logprobs), strict=True)

    @property
    def is_last(self) -> bool:
        """Whether every sample of it ends with it, by its length alone."""
        return all(sample.over or len(sample.tokens) + 1 >= sample.most_tokens for sample in self.samples)


class StepsAhead:
    """Launches the steps of one scheduler, by graphs that draw, too."""

    def __init__(self, loaded: LoadedModel, scheduler: Scheduler) -> None:
        self._loaded = loaded
        self._scheduler = scheduler
        self._graphs: Graphs[_Step] = Graphs(loaded.device)
        # What the last step has drawn, by lane; its address is in every graph.
        self._drawn = torch.zeros(scheduler.most_lanes, dtype=torch.int64, device=loaded.device)
        self._params: tuple[int, RowParams | None] | None = None  # of the samples that run since this change

    def launch(self, roster: Roster, running: Sequence[Sample], before: Flight | None) -> Flight | None:
        """Ask for a step of all that run; None where the host has to draw for one of them.

        Args:
            before: the one whose tokens nobody has read yet.
        """
        if self._params is None or self._params[0] != roster.changes:
            self._params = roster.changes, _params_of(running, roster.whole.lanes, self._loaded.device)
        params = self._params[1]
        if params is None:
            return None
        at = {} if before is None else {id(sample): lane for lane, sample in enumerate(before.samples)}
        source = [at.get(id(sample), -1) for sample in running]
        counts = [len(sample.tokens) + (place >= 0) for sample, place in zip(running, source, strict=True)]
        tokens = max(counts)
        self._scheduler.make_room(tokens)
        cache = self._scheduler.sample_cache
        shape = roster.shape(min(self._scheduler.shape.tokens_for(tokens), cache.tokens))
        key = (shape, params.any_greedy, params.any_scaled)
        step = self._graphs.get(key, self._scheduler, lambda: _Step(self, shape, roster, params))
        given = [0 if place >= 0 else sample.tokens[-1] for sample, place in zip(running, source, strict=True)]
        uniform = [
            sample.uniform[count] if count < len(sample.uniform) else 0.0  # one that will be found to have ended
            for sample, count in zip(running, counts, strict=True)
        ]
        step.stand_with(roster, params)
        logprobs = step.run(roster.starts, given=given, source=source, counts=counts, uniform=uniform)
        return self._read_later(tuple(running), logprobs)

    def _read_later(self, samples: tuple[Sample, ...], logprobs: Tensor) -> Flight:
        count, on_gpu = len(samples), self._drawn.device.type == "cuda"
        tokens, logprobs = (
            torch.empty(count, dtype=x.dtype, pin_memory=on_gpu).copy_(x[:count], non_blocking=True)
            for x in (self._drawn, logprobs)
        )
        landed = None
        if on_gpu:
            landed = torch.cuda.Event()
            landed.record(torch.cuda.current_stream(self._drawn.device))
        return Flight(samples, tokens, logprobs, landed)

    def capture(self, step: _Step, shape: StepShape) -> Callable[[], Tensor]:
        """The graph of a step, from the numbers that it keeps to log-probs `[lanes]`; tokens go into `drawn`.

        A capture begins with a run, which must find, and leave, what the first replay will find.
        """
        loaded, lanes, drawn = self._loaded, shape.lanes, self._drawn

        def compute() -> Tensor:
            inputs = step.inputs
            tokens = torch.where(step.source >= 0, drawn[step.source.clamp(min=0)], inputs.tokens)
            fed = StepInputs(tokens, *inputs.tensors[1:])
            hidden = run_step(loaded, make_layout(self._scheduler, shape), inputs=fed)
            choice = choose(
                loaded.head.logits(hidden, as_computed=fused(hidden))[:lanes],
                step.uniform,
                step.params,
                sums=loaded.head.row_sums,
            )
            drawn[:lanes].copy_(choice.tokens)
            return choice.logprobs

        before = drawn.clone()
        replay = self._graphs.capture(compute)
        drawn.copy_(before)
        return replay

    def clear(self) -> None:
        self._graphs.clear()


class _Step:
    """A captured step with the tensors that it reads: five of them parts of one, which is one copy from the host."""

    def __init__(self, ahead: StepsAhead, shape: StepShape, roster: Roster, params: RowParams) -> None:
        rows, lanes, device = shape.rows, shape.lanes, roster.member.device
        self._sizes = (rows, rows, rows, lanes, lanes)
        self._packed = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        given, places, source, position, uniform = torch.split(self._packed, list(self._sizes))
        self.source = source
        self.uniform = uniform.view(torch.float64)
        self.inputs = StepInputs(given, places, position, roster.member.clone(), roster.prompt_lengths.clone())
        self.params = replace(params, temperature=params.temperature.clone())
        self._roster = roster.changes
        self._ahead, self._shape = ahead, shape
        self._replay: Callable[[], Tensor] | None = None

    def stand_with(self, roster: Roster, params: RowParams) -> None:
        """Take over what stays the same until a sample comes or goes."""
        if self._roster == roster.changes:
            return
        for kept, fresh in (
            (self.inputs.member, roster.member),
            (self.inputs.prompt_lengths, roster.prompt_lengths),
            (self.params.temperature, params.temperature),
        ):
            kept.copy_(fresh)
        self._roster = roster.changes

    def run(
        self,
        starts: np.ndarray,
        *,
        given: Sequence[int],
        source: Sequence[int],
        counts: Sequence[int],
        uniform: Sequence[float],
    ) -> Tensor:
        """Log-probs `[lanes]`, until the next run.

        Args:
            starts: the roster's.
            given: tokens that the host knows; those of other samples are drawn at place `source` of the step before.
            counts: how many tokens each sample has behind its prompt.
        """
        on_gpu = self._packed.device.type == "cuda"
        packed = torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=on_gpu)
        some, count = packed.numpy(), len(given)
        rows, lanes = self._sizes[0], self._sizes[3]
        position = np.zeros(lanes, dtype=np.int64)
        position[:count] = np.array(counts) - 1
        some[:count] = given
        some[rows : rows + lanes] = position + starts
        some[2 * rows : 3 * rows] = -1
        some[2 * rows : 2 * rows + count] = source
        some[3 * rows : 3 * rows + lanes] = position
        some[3 * rows + lanes : 3 * rows + lanes + count] = np.array(uniform).view(np.int64)
        # Pinned memory is not given away before the copy has read it: torch's host allocator waits for the stream.
        self._packed.copy_(packed, non_blocking=True)
        if self._replay is None:
            self._replay = self._ahead.capture(self, self._shape)
        return self._replay()


def _params_of(running: Sequence[Sample], lanes: int, device: torch.device) -> RowParams | None:
    """`[lanes]`, with padding; None unless every sample draws from the whole distribution, and nothing but what it
    draws is wanted: where no token is given, and stop tokens can be drawn already."""
    if not all(map(_draws_freely, running)):
        return None
    padding = [_PADDING] * (lanes - len(running))
    params = RowParams.of([*(sample.request.sampling for sample in running), *padding], device)
    return None if params.any_filter or params.penalty is not None else params


def _draws_freely(sample: Sample) -> bool:
    return (
        not sample.fed
        and not sample.request.likeliest
        and len(sample.tokens) >= sample.begun + sample.request.sampling.min_tokens
    )
