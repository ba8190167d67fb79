"""The draw of one token: filters against transformers' warpers, the inverted distribution against counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from groupwise.engines.native.sampling import Forbidden, RowParams, choose, invert_cdf
from groupwise.types import SamplingParams

CPU = torch.device("cpu")
VOCABULARY = 283
NEUTRAL = SamplingParams()


def random_logits(rows: int, *, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def drawn(logits: Tensor, sampling: SamplingParams, points: Tensor, seen: Tensor | None = None) -> Tensor:
    """`[points]` tokens of one row of logits."""
    rows = logits.expand(points.shape[0], -1).contiguous()
    params = RowParams.of([sampling] * points.shape[0], CPU)
    return choose(rows, points, params, seen=None if seen is None else seen.expand_as(rows)).tokens


def grid(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def warped(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities `[V]` of transformers' own chain of warpers."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits)  # pyright: ignore[reportArgumentType]
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)  # pyright: ignore[reportArgumentType]
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)  # pyright: ignore[reportArgumentType]
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)  # pyright: ignore[reportArgumentType]
    return scores.double().softmax(-1)[0]


FILTERS = [
    {"top_k": 1},
    {"top_k": 17},
    {"top_k": 5000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.02},
    {"min_p": 0.9},
    {"top_k": 30, "top_p": 0.7},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 50, "min_p": 0.1},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_tokens_and_their_shares_are_those_of_transformers_warpers(settings: dict[str, float]) -> None:
    """A fine grid of uniform numbers reads the distribution off, to within one cell of the grid per token."""
    sampling = replace(NEUTRAL, **settings)  # type: ignore[arg-type]
    logits = random_logits(1, seed=3)
    wanted = warped(logits, sampling)
    shares = torch.bincount(drawn(logits, sampling, grid(20_000)), minlength=VOCABULARY) / 20_000
    assert (shares - wanted).abs().max() <= 1.5 / 20_000
    support = wanted > 2 / 20_000
    assert (shares[support] > 0).all()
    assert not shares[wanted == 0].any()


def test_draws_follow_the_distribution() -> None:
    logits = random_logits(1, spread=1.5)
    points = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn(logits, NEUTRAL, points), minlength=VOCABULARY).double()
    expected = logits.double().softmax(-1)[0] * 40_000
    likely = expected > 5
    statistic = float(((counts - expected) ** 2 / expected)[likely].sum())
    freedom = int(likely.sum()) - 1
    # Wilson-Hilferty: five standard deviations.
    bound = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 283, 1000])
def test_the_cumulative_distribution_is_inverted_to_the_last_token(vocabulary: int) -> None:
    weights = torch.rand(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary)).expand(501, -1)
    points = torch.linspace(0, 1, 501, dtype=torch.float64).clamp(max=1 - 2**-53)
    edges = weights[0].double().cumsum(-1) / weights[0].double().sum()
    wanted = torch.searchsorted(edges, points, right=True).clamp(max=vocabulary - 1)
    got = invert_cdf(weights.contiguous(), points)
    close = (edges[wanted.clamp(max=vocabulary - 1)] - points).abs() < 1e-6
    close |= (edges[(wanted - 1).clamp(min=0)] - points).abs() < 1e-6
    assert torch.equal(got[~close], wanted[~close])
    assert ((got - wanted).abs() <= 1).all()
    assert got[0] == 0
    assert got[-1] == vocabulary - 1


@pytest.mark.parametrize("allowed", [[0], [282], [5, 200], [127, 128], [256], [0, 282]])
def test_a_token_without_probability_is_never_drawn(allowed: list[int]) -> None:
    weights = torch.zeros(1, VOCABULARY)
    weights[0, allowed] = torch.tensor([0.3, 1e-7][: len(allowed)])
    points = torch.cat([grid(2000), torch.tensor([0.0, 1e-300, 2**-53, 1 - 2**-53], dtype=torch.float64)])
    got = invert_cdf(weights.expand(points.shape[0], -1).contiguous(), points)
    assert set(got.tolist()) <= set(allowed)


def test_the_largest_uniform_never_passes_the_last_likely_token() -> None:
    for seed in range(50):
        logits = random_logits(4, seed=seed, spread=8.0)
        points = torch.full((4,), 1 - 2**-53, dtype=torch.float64)
        params = RowParams.of([replace(NEUTRAL, top_k=3)] * 4, CPU)
        tokens = choose(logits, points, params).tokens
        assert (logits.gather(-1, tokens[:, None]) >= logits.topk(3).values[:, -1:]).all()


def test_repetition_penalty_is_transformers() -> None:
    logits = random_logits(1)
    history = torch.tensor([[5, 5, 17, 200, 3]])
    sampling = replace(NEUTRAL, repetition_penalty=1.7)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone()).double().softmax(-1)[0]  # pyright: ignore[reportArgumentType]
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    seen[history[0]] = True
    shares = torch.bincount(drawn(logits, sampling, grid(20_000), seen), minlength=VOCABULARY) / 20_000
    assert (shares - wanted).abs().max() <= 1.5 / 20_000
    greedy = drawn(logits, replace(sampling, temperature=0.0), grid(1), seen)
    assert greedy.item() == RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone()).argmax()  # pyright: ignore[reportArgumentType]


def test_log_probs_are_the_policys_before_any_filter() -> None:
    logits = random_logits(6)
    rows = [
        NEUTRAL,
        replace(NEUTRAL, temperature=0.5),
        replace(NEUTRAL, temperature=0.5, top_k=2),
        replace(NEUTRAL, top_p=0.3),
        replace(NEUTRAL, temperature=0.0),
        replace(NEUTRAL, repetition_penalty=2.0, min_p=0.2),
    ]
    seen = torch.ones(6, VOCABULARY, dtype=torch.bool)
    choice = choose(logits, torch.rand(6, dtype=torch.float64), RowParams.of(rows, CPU), seen=seen)
    temperature = torch.tensor([row.temperature or 1.0 for row in rows])
    wanted = (logits / temperature[:, None]).log_softmax(-1).gather(-1, choice.tokens[:, None])[:, 0]
    torch.testing.assert_close(choice.logprobs, wanted, rtol=1e-5, atol=1e-5)
    assert choice.tokens[4] == logits[4].argmax()


def test_a_row_is_drawn_alike_among_rows_with_other_settings() -> None:
    """A filter that another row uses leaves this row's bits as they are."""
    rows = [replace(NEUTRAL, **settings) for settings in FILTERS]  # type: ignore[arg-type]
    rows += [NEUTRAL, replace(NEUTRAL, temperature=0.0), replace(NEUTRAL, repetition_penalty=1.4)]
    count = len(rows)
    for seed in range(10):
        logits = random_logits(count, seed=seed)
        points = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        seen = torch.rand(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) < 0.3
        together = choose(logits, points, RowParams.of(rows, CPU), seen=seen)
        for i in range(count):
            row = slice(i, i + 1)
            alone = choose(logits[row].clone(), points[row], RowParams.of(rows[row], CPU), seen=seen[row])
            assert alone.tokens.item() == together.tokens[i].item(), rows[i]
            assert alone.logprobs.item() == together.logprobs[i].item(), rows[i]


def forbid(token: int, *, rows: int) -> Forbidden:
    return Forbidden(torch.arange(rows), torch.full((rows,), token))


def test_forbidden_tokens_are_not_drawn_and_the_log_prob_stays_the_policys() -> None:
    logits = random_logits(2)
    logits[:, 7] = 50.0
    params = RowParams.of([NEUTRAL, replace(NEUTRAL, temperature=0.0)], CPU)
    points = torch.tensor([0.5, 0.5], dtype=torch.float64)
    choice = choose(logits, points, params, forbidden=forbid(7, rows=2))
    assert 7 not in choice.tokens.tolist()
    assert (choice.logprobs < -20).all()


@pytest.mark.parametrize("height", [-5.0, 3.0, 8.0, 200.0])
@pytest.mark.parametrize("neighbour", [{"top_k": 5}, {"temperature": 0.7}, {"repetition_penalty": 1.3}])
def test_a_forbidden_token_gives_the_same_draws_beside_any_neighbour(
    height: float, neighbour: dict[str, float]
) -> None:
    """Whether or not it was the most likely one, or so likely that the others' weights vanish beside it."""
    logits = random_logits(64)
    logits[:, 7] = height
    points = grid(64)
    alone = choose(logits, points, RowParams.of([NEUTRAL] * 64, CPU), forbidden=forbid(7, rows=64))
    beside = RowParams.of([NEUTRAL] * 63 + [replace(NEUTRAL, **neighbour)], CPU)
    seen = torch.ones(64, VOCABULARY, dtype=torch.bool)
    together = choose(logits, points, beside, seen=seen, forbidden=forbid(7, rows=64))
    assert torch.equal(alone.tokens[:63], together.tokens[:63])
    assert torch.equal(alone.logprobs[:63], together.logprobs[:63])
    assert len(set(alone.tokens.tolist())) > 10


def test_equally_likely_tokens_are_kept_together() -> None:
    """So no choice hangs on how a sort breaks ties."""
    logits = torch.zeros(1, VOCABULARY)
    got = drawn(logits, replace(NEUTRAL, top_k=2), grid(5000))
    assert len(set(got.tolist())) == VOCABULARY
