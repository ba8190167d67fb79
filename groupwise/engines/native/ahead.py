"""Steps of a GPU that run ahead of the host: the next one is asked for before the last one's tokens are read.

A graph feeds the tokens of the step before, computes, and draws, all on the device. While it runs, the host reads what
the step before has drawn: which samples end, what is given back. So a sample that ends is computed once more than it
needs, and what comes of that is dropped. What is drawn does not depend on it: a token is a function of its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from groupwise.engines.native.decode_attention import StepInputs, StepShape
from groupwise.engines.native.graphs import Graphs, fixed_by_graph, make_layout, run_step
from groupwise.engines.native.roster import Roster
from groupwise.engines.native.sampling import RowParams, choose
from groupwise.engines.native.scheduler import Sample, Scheduler
from groupwise.model.fast_gpu.layers import fused
from groupwise.model.loading import LoadedModel
from groupwise.tensors import floats, ints


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

    def launch(self, roster: Roster, running: Sequence[Sample], before: Flight | None) -> Flight:
        """Ask for a step of all that run.

        Args:
            before: the one whose tokens nobody has read yet.
        """
        at = {} if before is None else {id(sample): lane for lane, sample in enumerate(before.samples)}
        source = [at.get(id(sample), -1) for sample in running]
        counts = [len(sample.tokens) + (place >= 0) for sample, place in zip(running, source, strict=True)]
        tokens = max(counts)
        self._scheduler.make_room(tokens)
        cache = self._scheduler.sample_cache
        shape = roster.shape(min(self._scheduler.shape.tokens_for(tokens), cache.tokens))
        shape = fixed_by_graph(self._loaded, shape)
        key = (shape, roster.params.any_greedy, roster.params.any_scaled)
        step = self._graphs.get(key, self._scheduler, lambda: _Step(self, shape, roster))
        given = [0 if place >= 0 else sample.tokens[-1] for sample, place in zip(running, source, strict=True)]
        uniform = [
            sample.uniform[count] if count < len(sample.uniform) else 0.0  # one that will be found to have ended
            for sample, count in zip(running, counts, strict=True)
        ]
        logprobs = step.run(roster, given=given, source=source, counts=counts, uniform=uniform)
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
            hidden = run_step(loaded, make_layout(loaded, self._scheduler, shape), inputs=fed)
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

    def __init__(self, ahead: StepsAhead, shape: StepShape, roster: Roster) -> None:
        rows, lanes, device = shape.rows, shape.lanes, roster.member.device
        self._sizes = (rows, rows, rows, lanes, lanes)
        self._packed = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        given, places, source, position, uniform = torch.split(self._packed, list(self._sizes))
        self.source = source
        self.uniform = uniform.view(torch.float64)
        self.inputs = StepInputs(given, places, position, roster.member.clone(), roster.prompt_lengths.clone())
        params = roster.params
        self.params = RowParams(
            params.temperature.clone(), params.any_greedy, params.any_scaled, None, None, None, None
        )
        self._roster = roster.changes
        self._ahead, self._shape = ahead, shape
        self._replay: Callable[[], Tensor] | None = None

    def run(
        self,
        roster: Roster,
        *,
        given: Sequence[int],
        source: Sequence[int],
        counts: Sequence[int],
        uniform: Sequence[float],
    ) -> Tensor:
        """Log-probs `[lanes]`, until the next run.

        Args:
            given: tokens that the host knows; those of other samples are drawn at place `source` of the step before.
            counts: how many tokens each sample has behind its prompt.
        """
        if self._roster != roster.changes:
            for kept, fresh in (
                (self.inputs.member, roster.member),
                (self.inputs.prompt_lengths, roster.prompt_lengths),
                (self.params.temperature, roster.params.temperature),
            ):
                kept.copy_(fresh)
            self._roster = roster.changes
        on_gpu = self._packed.device.type == "cuda"
        packed = torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=on_gpu)
        some, count = packed.numpy(), len(given)
        rows, lanes = self._sizes[0], self._sizes[3]
        position = np.zeros(lanes, dtype=np.int64)
        position[:count] = np.array(counts) - 1
        some[:count] = given
        some[rows : rows + lanes] = position + roster.starts
        some[2 * rows : 3 * rows] = -1
        some[2 * rows : 2 * rows + count] = source
        some[3 * rows : 3 * rows + lanes] = position
        some[3 * rows + lanes : 3 * rows + lanes + count] = np.array(uniform).view(np.int64)
        # Pinned memory is not given away before the copy has read it: torch's host allocator waits for the stream.
        self._packed.copy_(packed, non_blocking=True)
        if self._replay is None:
            self._replay = self._ahead.capture(self, self._shape)
        return self._replay()
