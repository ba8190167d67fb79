"""The parts of a GPU's packed attention that a CPU can compute: its plan, and how two parts of the keys become one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.forward import varlen_attention as varlen
from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.packing import Packed, pack, pack_sequences


def make_packed() -> Packed:
    """Three prompts, of which the second has no token behind it to compute."""
    shapes = [(0, 5, 4), (0, 5, 7), (1, 3, 1), (2, 6, 2), (2, 6, 3)]
    rows: list[TrainingRow] = []
    for group, prompt, count in shapes:
        nothing = (0.0,) * count
        tokens = ModelInput.of(tuple(range(count)))
        rows.append(TrainingRow(group, ModelInput.of((7,) * prompt), tokens, (1,) * count, nothing, nothing))
    return pack(rows)


def test_every_completion_asks_its_own_prompt() -> None:
    plan = varlen.VarlenPlan(make_packed())
    assert (plan.num_keys, plan.rows, plan.num_queries) == (14, 14, 14 + 3 + 6 + 1 + 2)
    assert plan.own.queries.tolist() == plan.own.keys.tolist() == [0, 5, 8, 14, 17, 23, 24, 26]
    assert plan.prompts is not None
    assert plan.prompts.queries.tolist() == [0, 9, 9, 12]
    assert plan.prompts.keys.tolist() == [0, 5, 8, 14]
    assert (plan.prompts.longest_query, plan.prompts.longest_key) == (9, 6)
    positions, joined = plan.joined
    assert joined.keys.tolist() == [0, 5, 8, 14, 14 + 8, 22 + 11, 33 + 7, 40 + 8]
    assert positions[14:22].tolist() == [0, 1, 2, 3, 4, 14, 15, 16]


def test_prompts_alone_ask_nobody_else() -> None:
    assert varlen.VarlenPlan(pack_sequences([((1, 2), ()), ((3,), ())])).prompts is None


class _Flash(varlen._Flash):
    """Flash attention of its definition, in the type of its arguments."""

    def _parts(self) -> list[tuple[slice, slice]]:
        bounds = [part.tolist() for part in (self.sequences.queries, self.sequences.keys)]
        return [
            (slice(*pair[0]), slice(*pair[1])) for pair in zip(*(itertools.pairwise(b) for b in bounds), strict=True)
        ]

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(repeat, 1)) * self.scale
        behind = (
            torch.arange(scores.shape[1])[:, None] - torch.arange(scores.shape[2]) + scores.shape[2] - scores.shape[1]
        )
        hidden = behind < 0 if self.causal else torch.zeros_like(behind, dtype=torch.bool)
        if self.window is not None:
            hidden = hidden | (behind >= self.window)
        return scores.masked_fill(hidden, -torch.inf)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, log_mass = torch.zeros_like(query), query.new_zeros(query.shape[1], query.shape[0])
        for rows, seen in self._parts():
            scores = self._scores(query[rows], key[seen])
            log_mass[:, rows] = scores.logsumexp(-1)
            values = value[seen].repeat_interleave(query.shape[1] // key.shape[1], 1)
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return out, log_mass

    def backward(self, grad: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, log_mass = kept
        found = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        repeat = query.shape[1] // key.shape[1]
        for rows, seen in self._parts():
            weights = (self._scores(query[rows], key[seen]) - log_mass[:, rows, None]).exp()
            along = torch.einsum("qhd,khd->hqk", grad[rows], value[seen].repeat_interleave(repeat, 1))
            own = (grad[rows] * out[rows]).sum(-1).t()[..., None]
            of_scores = weights * (along - own) * self.scale
            found[0][rows] = torch.einsum("hqk,khd->qhd", of_scores, key[seen].repeat_interleave(repeat, 1))
            of_key = torch.einsum("hqk,qhd->khd", of_scores, query[rows])
            of_value = torch.einsum("hqk,qhd->khd", weights, grad[rows])
            for place, part in ((found[1], of_key), (found[2], of_value)):
                place[seen] = part.unflatten(1, (-1, repeat)).sum(2)
        return found


@pytest.mark.parametrize("window", [None, 4])
def test_two_parts_give_the_result_and_the_gradients_of_one(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_Flash", _Flash)
    packed = make_packed()
    plan, call = varlen.VarlenPlan(packed), AttentionCall(0, 0.3, window)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(len(packed.token_ids), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    out = varlen.varlen_attention(query, key, value, plan, call)
    assert not out[plan.num_queries :].any()
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad)

    # By one softmax over all keys that a token sees.
    seen = torch.zeros(len(packed.token_ids), len(packed.token_ids), dtype=torch.bool)
    for segment in packed.segments:
        before = [] if segment.prefix is None else list(range(*_bounds(packed.segments[segment.prefix])))
        for token in range(segment.start, segment.stop):
            visible = [*before, *range(segment.start, token + 1)]
            seen[token, visible if window is None else visible[-window:]] = True
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) * call.scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    wanted = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1))
    torch.testing.assert_close(out, wanted)
    for one, other in zip(found, torch.autograd.grad(wanted, (query, key, value), grad), strict=True):
        torch.testing.assert_close(one, other.nan_to_num())


def _bounds(segment: object) -> tuple[int, int]:
    return segment.start, segment.stop  # type: ignore[attr-defined]
