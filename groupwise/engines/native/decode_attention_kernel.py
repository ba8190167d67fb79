"""The attention of one decode step on a GPU, by the kernel of batch-invariant models, reading the caches.

Every sample's new token is a tile of its own, and reads as many keys as there are: no masks, no padding to the longest
sample. The samples of a prompt are neighbours, so its keys come from the GPU's cache for all but the first. Nothing
here asks the device for anything, so a step can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.engines.native.cache import ArenaCache, KeyCache
from groupwise.engines.native.decode_attention import StepInputs, StepShape
from groupwise.model.forward.attention import AttentionCall
from groupwise.model.invariant.use import heads_fit
from groupwise.model.loading import LoadedModel


def kernel_attends(loaded: LoadedModel) -> bool:
    """Whether the model decodes by this kernel: on a GPU with Triton, where it takes the model's heads."""
    if loaded.batch_invariant:
        return True
    return loaded.device.type == "cuda" and find_spec("triton") is not None and heads_fit(loaded.model)


class KernelDecodeLayout:
    """Takes the place of `DecodeLayout`; arguments as there."""

    def __init__(self, prompts: KeyCache, samples: KeyCache, shape: StepShape) -> None:
        assert isinstance(prompts, ArenaCache) and isinstance(samples, ArenaCache), "the kernel reads arenas"
        self._shape = shape
        self._prompts = prompts
        self._samples = samples

    def stand_at(self, inputs: StepInputs, positions: Sequence[int]) -> None:
        """As `DecodeLayout.stand_at`."""
        self._write = self._samples.plan_write(inputs.position, positions)
        self._table = _tiles(self._shape, inputs, self._prompts, self._samples)

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from groupwise.model.invariant.attention_kernel import KeySource, Tiles, attend

        lanes = self._shape.lanes
        self._write.put(call.layer, key[:lanes], value[:lanes])
        prefix, own = (
            KeySource(cache.arena[0, call.layer], cache.arena[1, call.layer], by_token=1, by_head=cache.tokens)
            for cache in (self._prompts, self._samples)
        )
        tiles = Tiles(self._table, prefix, own)
        out = attend(query[:lanes], tiles, heads=key.shape[1], scale=call.scale, window=call.window).out
        missing = self._shape.rows - lanes
        return pad(out, (0, 0, 0, 0, 0, missing)) if missing else out


def _tiles(shape: StepShape, inputs: StepInputs, prompts: ArenaCache, samples: ArenaCache) -> Tensor:
    """The kernel's table `[B, 6]`. A padded lane sees no prompt, and its own first key."""
    lane = torch.arange(shape.lanes, device=inputs.member.device)
    exists = inputs.member < shape.prompts * shape.width
    prompt = torch.where(exists, inputs.member // shape.width, 0)
    columns = (
        lane,
        torch.ones_like(lane),
        prompt * (prompts.shape.heads * prompts.tokens),
        torch.where(exists, inputs.prompt_lengths[prompt], 0),
        lane * (samples.shape.heads * samples.tokens),
        inputs.position,
    )
    return torch.stack(columns, 1)
