"""Prefill and decode steps, to hidden states: eager on a CPU, on a GPU replayed CUDA graphs where the model allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.engines.native.ahead import Flight, StepsAhead
from groupwise.engines.native.chosen import Rows, choices_for, lacks_routes, recording, rows_of
from groupwise.engines.native.decode_attention import DecodeLayout, StepShape
from groupwise.engines.native.decode_attention_kernel import KernelDecodeLayout
from groupwise.engines.native.graphs import DecodeGraphs, make_layout, run_step
from groupwise.engines.native.roster import Roster
from groupwise.engines.native.scheduler import PromptLane, Sample, Scheduler
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import Segment, pack_sequences
from groupwise.model.forward.routing import Choices
from groupwise.model.loading import LoadedModel

PREFILL_TOKENS = 16_384


class DecodeSteps:
    """Runs the steps of one scheduler."""

    def __init__(self, loaded: LoadedModel, scheduler: Scheduler) -> None:
        self._loaded = loaded
        self._scheduler = scheduler
        self._graphs = DecodeGraphs(loaded) if scheduler.shape.graphs else None
        self._ahead = StepsAhead(loaded, scheduler) if scheduler.shape.graphs else None
        self._roster: Roster | None = None
        self._layout: tuple[StepShape, DecodeLayout | KernelDecodeLayout] | None = None  # of the roster

    def prefill(
        self, admitted: Sequence[Sample], running: Sequence[Sample], prompts: Sequence[PromptLane]
    ) -> Beginnings:
        """Compute what the admitted samples begin with: the new prompts, and what those that go on have already.

        Args:
            running, prompts: the scheduler's, by lane.
        """
        lane_of = {id(prompt): lane for lane, prompt in enumerate(prompts)}
        place_of = {id(sample): lane for lane, sample in enumerate(running)}
        self._take_back(admitted, lane_of, place_of)
        parts = [
            _Part(prompt, lane_of[id(prompt)])
            for prompt in {id(sample.prompt): sample.prompt for sample in admitted}.values()
            if prompt is not None and (prompt.hidden is None or lacks_routes(prompt, admitted))
        ]
        going_on = [
            _Part(sample.prompt, lane_of[id(sample.prompt)], sample, place_of[id(sample)])
            for sample in admitted
            if sample.num_given and sample.kept is None and sample.prompt is not None
        ]
        computed = self._compute([*parts, *going_on], tells=choices_for(admitted) is not None)
        last = {id(part.sample): row for part, row in computed if part.sample is not None}
        rows: dict[int, Tensor] = {}
        drawing = [sample for sample in admitted if sample.kept is None]
        for sample in admitted:
            sample.kept = None
        for sample in drawing:
            assert sample.prompt is not None and sample.prompt.hidden is not None, "admitted samples have a prompt"
            name = id(sample) if sample.num_given else id(sample.prompt)
            rows[name] = last[id(sample)] if sample.num_given else sample.prompt.hidden
        order = {name: index for index, name in enumerate(rows)}
        of_sample = [order[id(sample) if sample.num_given else id(sample.prompt)] for sample in drawing]
        return Beginnings(torch.stack(list(rows.values())) if rows else None, of_sample, drawing)

    def _take_back(self, admitted: Sequence[Sample], lane_of: Mapping[int, int], place_of: Mapping[int, int]) -> None:
        """Put kept keys into the lanes of the samples that go on from them."""
        for prompt in {id(sample.prompt): sample.prompt for sample in admitted}.values():
            if prompt is not None and prompt.kept is not None:
                self._scheduler.prompt_cache.write(lane_of[id(prompt)], prompt.kept.keys)
                prompt.kept = None
        for sample in admitted:
            if sample.kept is not None:
                self._scheduler.sample_cache.write(place_of[id(sample)], sample.kept.keys)

    def _compute(self, parts: Sequence[_Part], *, tells: bool = False) -> Iterator[tuple[_Part, Tensor]]:
        """Each part with the hidden state `[H]` of its last token; keys and values go into the caches.

        Args:
            tells: which experts are chosen is wanted.
        """
        left = list(parts)
        while left:
            chosen = [left.pop(0)]
            while left and sum(part.num_tokens for part in chosen) < PREFILL_TOKENS:
                chosen.append(left.pop(0))
            packed = pack_sequences([part.sequence for part in chosen]).to(self._loaded.device)
            keep = _KeepKeys(self._scheduler, chosen, packed.segments)
            choices = Choices() if tells else None
            with recording(choices):
                hidden = packed_hidden_states(self._loaded.model, packed, on_keys=keep)[packed.predictors]
            if choices is not None:
                _tell_routes(chosen, packed.segments, rows_of(choices))
            for part, row in zip(chosen, hidden, strict=True):
                if part.sample is None:
                    part.prompt.hidden = row
                yield part, row

    def hidden(self, running: Sequence[Sample], prompts: Sequence[PromptLane]) -> Tensor:
        """`[B, H]`, the last hidden states of the running samples' newest tokens, and of padding."""
        roster = self._roster_of(running, prompts)
        positions = [len(sample.tokens) - 1 for sample in running]
        tokens = max(positions) + 1
        self._scheduler.make_room(tokens)
        shape = roster.shape(min(self._scheduler.shape.tokens_for(tokens), self._scheduler.sample_cache.tokens))
        positions += [0] * (shape.lanes - len(running))
        inputs = roster.inputs([sample.tokens[-1] for sample in running], positions)
        if self._graphs is not None:
            return self._graphs.run(self._scheduler, shape, inputs)
        if self._layout is None or self._layout[0] != shape:
            self._layout = shape, make_layout(self._scheduler, shape)
        choices = choices_for(running)
        with recording(choices):
            found = run_step(self._loaded, self._layout[1], inputs=inputs, positions=positions)
        if choices is not None:
            for sample, row in zip(running, rows_of(choices), strict=False):
                sample.routes.append(row[None])
        return found

    def _roster_of(self, running: Sequence[Sample], prompts: Sequence[PromptLane]) -> Roster:
        if self._roster is None or self._roster.changes != self._scheduler.changes:
            shape, changes = self._scheduler.shape, self._scheduler.changes
            self._roster = Roster.of(running, prompts, shape, changes=changes, device=self._loaded.device)
            self._layout = None
        return self._roster

    def launch(self, running: Sequence[Sample], prompts: Sequence[PromptLane], before: Flight | None) -> Flight | None:
        """A step that draws by itself, asked for and not waited for; None where the host has to draw.

        Args:
            before: the flight that nobody has read yet.
        """
        if self._ahead is None:
            return None
        return self._ahead.launch(self._roster_of(running, prompts), running, before)

    def forget(self) -> None:
        """Let go of the caches' memory."""
        self._roster = self._layout = None

    def forget_graphs(self) -> None:
        for graphs in (self._graphs, self._ahead):
            if graphs is not None:
                graphs.clear()


@dataclass(frozen=True, slots=True)
class Beginnings:
    """What admitted samples draw their first tokens from.

    Attributes:
        hidden: `[U, H]`, one row for each prompt and for each sample that goes on; None where there are none.
        of_sample: the row of each in `samples`.
        samples: those that draw now; those with kept keys feed first what is new.
    """

    hidden: Tensor | None
    of_sample: list[int]
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class _Part:
    """A prompt to be computed, or a sample that goes on, behind its prompt.

    Attributes:
        lane: the prompt's.
        place: the sample's lane.
    """

    prompt: PromptLane
    lane: int
    sample: Sample | None = None
    place: int = 0

    @property
    def sequence(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.prompt.token_ids, () if self.sample is None else tuple(self.sample.tokens))

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequence))


def _tell_routes(parts: Sequence[_Part], segments: Sequence[Segment], rows: Rows) -> None:
    """Give prompts and samples of a pass the experts that were chosen for them.

    Args:
        segments: as of `_KeepKeys`; rows: of the pass.
    """
    followers = iter(segments[len(parts) :])
    for part, segment in zip(parts, segments, strict=False):
        part.prompt.routes = rows[segment.start : segment.stop]
        if part.sample is not None:
            own = next(followers)
            part.sample.routes.append(rows[own.start : own.stop])


@dataclass(frozen=True, slots=True)
class _KeepKeys:
    """Puts the keys and values of packed parts into their lanes.

    Attributes:
        segments: of the pass: a prompt for each part, and what follows it, part by part.
    """

    scheduler: Scheduler
    parts: Sequence[_Part]
    segments: Sequence[Segment]

    def __call__(self, layer: int, key: Tensor, value: Tensor) -> None:
        prompts, samples = self.scheduler.prompt_cache, self.scheduler.sample_cache
        followers = iter(self.segments[len(self.parts) :])
        for part, segment in zip(self.parts, self.segments[: len(self.parts)], strict=True):
            if part.sample is None:
                span = slice(segment.start, segment.stop)
                prompts.fill(layer, part.lane, key[span], value[span])
            else:
                own = next(followers)
                span = slice(own.start, own.stop)
                samples.fill(layer, part.place, key[span], value[span])
