"""The attention of one decode step on a GPU, by the kernel of batch-invariant models, reading the caches.

It reads as many keys as there are: no masks, no padding to the longest sample; and those of a prompt once for all of
its samples. Nothing here asks the device for anything, so a step can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.engines.native.cache import ArenaCache, KeyCache
from groupwise.engines.native.decode_attention import StepInputs, StepShape
from groupwise.model.fast_gpu.layers import fused
from groupwise.model.forward.attention import AttentionCall
from groupwise.model.invariant.use import heads_fit
from groupwise.model.loading import LoadedModel


def kernel_attends(loaded: LoadedModel) -> bool:
    """Whether the model decodes by this kernel: on a GPU with Triton, where it takes the model's heads."""
    return loaded.batch_invariant or (fused(next(loaded.model.parameters())) and heads_fit(loaded.model))


class KernelDecodeLayout:
    """Takes the place of `DecodeLayout`; arguments as there."""

    def __init__(self, prompts: KeyCache, samples: KeyCache, shape: StepShape) -> None:
        assert isinstance(prompts, ArenaCache) and isinstance(samples, ArenaCache), "the kernel reads arenas"
        self._shape = shape
        self._prompts = prompts
        self._samples = samples

    def stand_at(self, inputs: StepInputs, positions: Sequence[int]) -> None:
        """As `DecodeLayout.stand_at`."""
        from groupwise.model.invariant.decode_kernel import DecodeTable

        shape, device = self._shape, inputs.member.device
        everybody = shape.prompts * shape.width
        lanes = torch.full((everybody + 1,), -1, dtype=torch.int64, device=device)
        lanes[inputs.member] = torch.arange(shape.lanes, device=device)  # the last place takes the padding
        bases = torch.arange(shape.prompts, device=device) * (self._prompts.shape.heads * self._prompts.tokens)
        self._table = DecodeTable(
            prompts=torch.stack((bases, inputs.prompt_lengths), 1),
            lanes=lanes[:-1].view(shape.prompts, shape.width),
            has_prompt=(inputs.member < everybody).long(),
            position=inputs.position,
        )

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from groupwise.model.invariant.attention_kernel import KeySource
        from groupwise.model.invariant.decode_kernel import attend_step, store_keys

        lanes = self._shape.lanes
        prefix, own = (
            KeySource(cache.arena[0, call.layer], cache.arena[1, call.layer], by_token=1, by_head=cache.tokens)
            for cache in (self._prompts, self._samples)
        )
        store_keys(key[:lanes], value[:lanes], own, self._table.position)
        heads = key.shape[1]
        out = attend_step(query[:lanes], self._table, prefix, own, heads=heads, scale=call.scale, window=call.window)
        missing = self._shape.rows - lanes
        return pad(out, (0, 0, 0, 0, 0, missing)) if missing else out
