"""Log-probs of the distribution over the tokens that filters left: values and gradients against the equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.forward.as_sampled import KeptTokens
from groupwise.model.forward.head import LanguageHead, token_scores
from groupwise.model.forward.packing import pack
from groupwise.model.loading import LoadedModel, wrap_model
from groupwise.sides import NO_SIDES, Kept, Sides

MakeModel = Callable[..., LoadedModel]
VOCABULARY = 64
SETS = [(3, 7, 9), (), (5,), (1, 2, 3, 4, 60, 63), tuple(range(VOCABULARY)), (8, 0)]
TARGETS = [7, 12, 5, 60, 33, 0]


@pytest.fixture
def small(make_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> MakeModel:
    def make(dtype: torch.dtype = torch.float32, *, tied: bool = True) -> LoadedModel:
        shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "tie_word_embeddings": tied}
        return wrap_model(make_model("qwen3", dtype=dtype, **shape), tiny_tokenizer)

    return make


def row_of(tokens: list[int], sets: list[tuple[int, ...]] | None, group: int = 0) -> TrainingRow:
    zeros = (0.0,) * len(tokens)
    sides = NO_SIDES if sets is None else Sides(kept=Kept.of(sets))
    return TrainingRow(
        group, ModelInput.of((5, 9, 11)), ModelInput.of(tokens), (1,) * len(tokens), zeros, zeros, sides=sides
    )


def by_the_equation(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(t) = z_t / T - log sum over the tokens left of exp(z / T), and the entropy over them."""
    found, entropies = [], []
    for row, sets, target in zip(logits.double() / temperature, SETS, TARGETS, strict=True):
        left = row[torch.tensor(sets)] if sets else row
        found.append(row[target] - left.logsumexp(0))
        probs = left.softmax(0)
        entropies.append(-(probs * probs.log()).sum())
    return torch.stack(found), torch.stack(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [16, 1024])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients_are_the_equations(
    small: MakeModel, dtype: torch.dtype, temperature: float, chunk: int, with_entropy: bool
) -> None:
    loaded = small(dtype)
    head = LanguageHead(loaded.model)
    weight: Any = loaded.model.get_output_embeddings().weight  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=generator).to(dtype).requires_grad_()
    kept = KeptTokens.of([row_of(TARGETS[:2], SETS[:2]), row_of(TARGETS[2:], SETS[2:])])
    scores = token_scores(
        head, hidden, torch.tensor(TARGETS), temperature=temperature, chunk_tokens=chunk, with_entropy=with_entropy,
        kept=kept,
    )  # fmt: skip
    other = hidden.detach().double().requires_grad_()
    logits = other @ weight.detach().double().T
    rounded = logits.to(dtype).double() if dtype == torch.bfloat16 else logits
    wanted, entropies = by_the_equation(logits + (rounded - logits).detach(), temperature)
    close = 2e-5
    assert float((scores.logprobs.double() - wanted).abs().max()) < close
    mix = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 1.0])
    total, expected = (scores.logprobs * mix).sum(), (wanted * mix).sum()
    if with_entropy:
        assert scores.entropy is not None
        assert float((scores.entropy.double() - entropies).abs().max()) < close
        total, expected = total + scores.entropy.sum(), expected + entropies.sum()
    total.backward()
    expected.backward()
    assert hidden.grad is not None
    assert other.grad is not None
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(hidden.grad.double(), other.grad, rtol=tolerance, atol=tolerance)


def test_no_gradient_reaches_the_tokens_that_were_cut(small: MakeModel) -> None:
    loaded = small(tied=False)
    weight: Any = loaded.model.get_output_embeddings().weight  # type: ignore[union-attr]
    loaded.scoring(pack([row_of([3, 7], [(3, 9), (7, 9, 11)])])).logprobs.sum().backward()
    moved = weight.grad.abs().sum(-1) > 0
    assert moved.nonzero().flatten().tolist() == [3, 7, 9, 11]


def test_a_row_that_was_not_cut_keeps_its_bits_beside_one_that_was(small: MakeModel) -> None:
    loaded = small()
    whole, cut = row_of([3, 7, 20], None), row_of([3, 7, 20], [(3, 9), (), (20, 21)], group=1)
    with torch.no_grad():
        alone = loaded.scoring(pack([whole])).logprobs
        both = loaded.scoring(pack([whole, cut])).logprobs
    assert torch.equal(alone, both[:3])
    assert torch.equal(both[4], alone[1]), "a token that nothing was cut of"
    assert bool((both[3] > alone[0]) & (both[5] > alone[2]))


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), unique=True, max_size=5).map(tuple), max_size=8))
def test_sets_come_back_as_they_were(sets: list[tuple[int, ...]]) -> None:
    kept = Kept.of(sets)
    assert list(kept) == sets
    assert kept.sizes == tuple(map(len, sets))
    assert len(kept.lengths) == 4 * len(sets)
