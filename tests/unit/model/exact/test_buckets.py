"""Two ways to lay segments side by side, with one result."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.exact import buckets
from groupwise.model.exact.buckets import Pool, Run, make_buckets
from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.packed_attention import PackedLayout
from groupwise.model.forward.packing import Segment, pack


def rows(group: int, prompt: int, lengths: Sequence[int]) -> list[TrainingRow]:
    """Completions of these lengths, their last tokens, which are not packed, left out."""
    return [
        TrainingRow(
            group,
            ModelInput.of(range(3, 3 + prompt)),
            ModelInput.of((5,) * (n + 1)),
            (1,) * (n + 1),
            *[(0.0,) * (n + 1)] * 2,
        )
        for n in lengths
    ]


PACKED = pack([*rows(0, 65, [65] * 9 + [3, 3, 70]), *rows(1, 65, [600]), *rows(2, 64, [64] * 8)])
HEADS = 6, 2, 2  # of queries, keys and values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 33])
def test_attention_is_the_same_over_runs_and_pools(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = torch.randn(len(PACKED.token_ids), sum(HEADS), 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found: list[tuple[Tensor, Tensor]] = []
    for run_tokens in (1, 512, 10**9):
        monkeypatch.setattr(buckets, "_RUN_TOKENS", run_tokens)
        kinds = {type(bucket) for bucket in make_buckets(PACKED.segments, HEADS[0])}
        assert kinds == {1: {Run}, 512: {Run, Pool}, 10**9: {Pool}}[run_tokens]
        x = base.clone().requires_grad_()
        out = PackedLayout(PACKED, HEADS[0]).attend(AttentionCall(0, 8**-0.5, window), *x.split_with_sizes(HEADS, 1))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        out.backward(grad.transpose(0, 1).contiguous().transpose(0, 1))
        assert x.grad is not None
        assert torch.equal(x, base)
        found.append((out.detach(), x.grad))
    for out, grad in found[1:]:
        assert torch.equal(out, found[0][0])
        torch.testing.assert_close(grad, found[0][1], atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_every_segment_is_in_one_bucket_and_memory_bounds_it() -> None:
    segments = [Segment(start=300 * i, length=300) for i in range(20)] + [Segment(6000 + 2 * i, 2) for i in range(9)]
    made = make_buckets(segments, num_heads=1 << 8)
    runs = [bucket for bucket in made if isinstance(bucket, Run)]
    assert [run.start for run in runs] == [0, 300 * 2, *(300 * i for i in range(4, 20, 2))]
    assert sum(run.count for run in runs) == 20
    (pool,) = (bucket for bucket in made if isinstance(bucket, Pool))
    assert sorted(pool.flat.tolist()) == list(range(6000, 6018))
