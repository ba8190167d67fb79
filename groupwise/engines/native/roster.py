"""The samples that run, and what steps need of them that stays the same until one comes or goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.engines.native.cache import CacheShape
from groupwise.engines.native.decode_attention import StepInputs, StepShape
from groupwise.engines.native.scheduler import PromptLane, Sample
from groupwise.model.forward.packing import ROW_MULTIPLE, round_up


@dataclass(frozen=True, slots=True)
class Roster:
    """Lanes and what is known of them.

    Attributes:
        changes: the scheduler's, when this was made.
        whole: what all of its steps' shapes have in common; its `sample_tokens` says nothing.
        starts: `[lanes]`, lengths of the samples' prompts, on the host.
        member, prompt_lengths: as in `StepInputs`.
    """

    changes: int
    whole: StepShape
    starts: np.ndarray
    member: Tensor
    prompt_lengths: Tensor

    @staticmethod
    def of(
        running: Sequence[Sample],
        prompts: Sequence[PromptLane],
        to: CacheShape,
        *,
        changes: int,
        device: torch.device,
    ) -> Roster:
        width = max(prompt.members for prompt in prompts)
        lane_of = {id(prompt): lane for lane, prompt in enumerate(prompts)}
        members = [lane_of[id(sample.prompt)] * width + sample.member for sample in running]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        in_order = not to.by_kernel and members == list(range(len(prompts) * width))
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
        return Roster(
            changes,
            whole,
            starts=np.array([len(sample.request.prompt) for sample in running] + [0] * missing),
            member=torch.tensor(members + [whole.prompts * width] * missing).to(device, non_blocking=True),
            prompt_lengths=torch.tensor(lengths + [1] * (whole.prompts - len(prompts))).to(device, non_blocking=True),
        )

    def shape(self, tokens: int) -> StepShape:
        """Of a step that reads `tokens` keys of each sample."""
        return replace(self.whole, sample_tokens=tokens)

    def inputs(self, tokens: list[int], positions: list[int]) -> StepInputs:
        """Of a step that feeds `tokens`, one for each sample, at `positions`, one for each lane."""
        rows, lanes = self.whole.rows, self.whole.lanes
        device = self.member.device
        places = torch.from_numpy(np.array(positions) + self.starts)  # pyright: ignore[reportUnknownMemberType]
        places = places.to(device, non_blocking=True)
        return StepInputs(
            tokens=torch.tensor(tokens + [0] * (rows - len(tokens))).to(device, non_blocking=True),
            position_ids=pad(places, (0, rows - lanes)) if rows > lanes else places,
            position=torch.tensor(positions).to(device, non_blocking=True),
            member=self.member,
            prompt_lengths=self.prompt_lengths,
        )
