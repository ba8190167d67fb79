"""The attention kernel: against softmax in float64, and the same bits for a token wherever it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.packing import Packed, pack

SHAPE = [(1, [2, 64]), (63, [2]), (64, [65, 3, 2]), (65, [66]), (5, [131]), (129, [4, 66])]


def rows_of(shape: list[tuple[int, list[int]]]) -> list[TrainingRow]:
    """Rows by prompt length and completion lengths; a completion's last token is not computed."""
    return [
        TrainingRow(group, ModelInput.of((1,) * prompt), ModelInput.of((1,) * n), (1,) * n, (0.0,) * n, (0.0,) * n)
        for group, (prompt, lengths) in enumerate(shape)
        for n in lengths
    ]


def seen_by(packed: Packed, window: int | None) -> Tensor:
    """`[N, N]`: which key each token sees."""
    seen = torch.zeros(len(packed.token_ids), len(packed.token_ids), dtype=torch.bool)
    for segment in packed.segments:
        own = slice(segment.start, segment.stop)
        seen[own, own] = torch.ones(segment.length, segment.length).tril().bool()
        if segment.prefix is not None:
            prefix = packed.segments[segment.prefix]
            seen[own, prefix.start : prefix.stop] = True
    if window is not None:
        seen &= packed.position_ids[:, None] - packed.position_ids[None] < window
    return seen


def reference(query: Tensor, key: Tensor, value: Tensor, packed: Packed, call: AttentionCall) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    query, key, value = (x.double() for x in (query, key, value))
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * call.scale
    scores.masked_fill_(~seen_by(packed, call.window), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0.0), value)


def tensors(packed: Packed, heads: int, repeat: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    count = len(packed.token_ids)
    shapes = (count, heads * repeat, size), (count, heads, size), (count, heads, size)
    return [(torch.randn(shape, generator=generator) * 2).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("heads", "repeat", "size", "window", "dtype"),
    [
        (2, 2, 16, None, torch.float32),
        (1, 7, 24, None, torch.float32),
        (1, 1, 32, 21, torch.float32),
        (2, 3, 16, 70, torch.float32),
        (2, 2, 16, None, torch.bfloat16),
    ],
)
def test_values_and_gradients(heads: int, repeat: int, size: int, window: int | None, dtype: torch.dtype) -> None:
    from groupwise.model.invariant.packed import InvariantPackedLayout

    packed = pack(rows_of(SHAPE))
    call = AttentionCall(0, size**-0.5, window)
    inputs = [x.requires_grad_() for x in tensors(packed, heads, repeat, size, dtype)]
    out = InvariantPackedLayout(packed, heads * repeat).attend(call, *inputs)
    wanted = reference(*inputs, packed, call)  # pyright: ignore[reportCallIssue]
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    real = sum(segment.length for segment in packed.segments)
    assert not out[real:].any()
    torch.testing.assert_close(out[:real].double(), wanted[:real], rtol=tolerance, atol=tolerance)

    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    weights[real:] = 0
    mine = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((wanted[:real] * weights[:real]).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("window", [None, 21, 70])
@pytest.mark.parametrize("repeat", [2, 3])
def test_a_token_has_the_same_bits_in_any_company(window: int | None, repeat: int) -> None:
    """Each completion alone with its prompt, so at other places of other tiles."""
    from groupwise.model.invariant.packed import InvariantPackedLayout

    rows = rows_of(SHAPE)
    packed = pack(rows)
    inputs = tensors(packed, 2, repeat, 16, torch.float32)
    call = AttentionCall(0, 0.25, window)
    whole = InvariantPackedLayout(packed, 2 * repeat).attend(call, *inputs)
    completions = [segment for segment in packed.segments if segment.prefix is not None]
    for row, segment in zip(rows, completions, strict=True):
        alone = pack([row])
        prompt = packed.segments[segment.prefix or 0]
        places = torch.tensor([*range(prompt.start, prompt.stop), *range(segment.start, segment.stop)])
        missing = len(alone.token_ids) - len(places)
        mine = [torch.cat([x[places], x.new_full((missing, *x.shape[1:]), 9e9)]) for x in inputs]
        found = InvariantPackedLayout(alone, 2 * repeat).attend(call, *mine)
        assert torch.equal(found[: len(places)], whole[places])


def test_log_mass_is_that_of_all_keys_seen() -> None:
    from groupwise.model.invariant.attention_kernel import BLOCK_ROWS, KeySource, Tiles, attend
    from groupwise.model.invariant.packed import tiles_of

    packed = pack(rows_of([(70, [5, 3])]))
    query, key, value = tensors(packed, 1, 4, 16, torch.float32)
    source = KeySource(key, value, 1, 1)
    table = tiles_of(packed.segments, tokens=BLOCK_ROWS // 4, heads=1)
    found = attend(query, Tiles(table, source, source), heads=1, scale=0.5, window=None)
    scores = torch.einsum("qhd,kd->qhk", query.double(), key[:, 0].double()) * 0.5
    scores.masked_fill_(~seen_by(packed, None)[:, None], -torch.inf)
    real = packed.segments[-1].stop
    torch.testing.assert_close(found.log_mass[:real].double(), scores.logsumexp(-1)[:real], rtol=1e-5, atol=1e-5)
