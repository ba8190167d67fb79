"""Reductions, KL helpers and entropy control by themselves."""

from __future__ import annotations

import math

import pytest
import torch

from groupwise.algorithms.corrections import masked, mismatch, truncated, veto_mask
from groupwise.algorithms.entropy import EntropyControl, top_entropy_mask
from groupwise.algorithms.kl import kl_in_reward, kl_penalty
from groupwise.algorithms.reduce import row_mean, row_sum, token_weights
from groupwise.batches import Denominators

ROW = torch.tensor([0, 0, 1, 2, 2, 2])
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])


def test_row_reductions():
    values = torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0, 5.0])
    assert row_sum(values, ROW, num_rows=4).tolist() == [6.0, 2.0, 12.0, 0.0]
    assert row_mean(values, ROW, mask=MASK, num_rows=4).tolist() == [1.0, 2.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("token", [0.1, 0, 0.1, 0.1, 0.1, 0.1]),
        ("sequence", [0.25, 0, 0.25, 1 / 12, 1 / 12, 1 / 12]),
        ("constant", [1 / 128, 0, 1 / 128, 1 / 128, 1 / 128, 1 / 128]),
    ],
)
def test_token_weights_use_the_optimiser_batch(kind, want):
    denominators = Denominators(tokens=10, sequences=4, max_tokens=32)
    got = token_weights(kind, MASK, row=ROW, num_rows=3, denominators=denominators)
    assert got.tolist() == pytest.approx(want)


def test_expected_gradients_of_the_estimators_are_those_documented():
    """Over a whole vocabulary, so the expectation is exact: k1 none, k2 of KL(π‖ref), k3 of KL(ref‖π)."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    gradients = {}
    for estimator in ("k1", "k2", "k3"):
        logp = logits.log_softmax(-1)
        expected = (logp.exp().detach() * kl_penalty(logp, ref, estimator=estimator)).sum()
        (gradients[estimator],) = torch.autograd.grad(expected, logits)
    logp = logits.log_softmax(-1)
    (forward,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)
    torch.testing.assert_close(gradients["k1"], torch.zeros(7, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(gradients["k2"], forward)
    torch.testing.assert_close(gradients["k3"], reverse)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    torch.manual_seed(1)
    logp, ref = (torch.randn(9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (logp.exp() * (logp - ref)).sum()
    torch.testing.assert_close((logp.exp() * kl_penalty(logp, ref, estimator=estimator)).sum(), exact)


def test_k3_is_precise_for_small_differences_and_never_negative():
    logp = torch.tensor([-1.0, -2.0, -0.5])
    kl = kl_penalty(logp, logp + 1e-4, estimator="k3")
    assert (kl >= 0).all()
    d = (logp + 1e-4).double() - logp.double()
    torch.testing.assert_close(kl.double(), torch.expm1(d) - d, rtol=5e-2, atol=0)


def test_kl_in_reward_subtracts_each_rows_sum():
    rewards = torch.tensor([1.0, math.nan, 0.0]).double()
    token_kl = torch.tensor([0.5, 9.0, 1.0, 1.0, 2.0, 3.0], requires_grad=True)
    got = kl_in_reward(rewards, token_kl, coef=0.1, mask=MASK, row=ROW)
    assert not got.requires_grad
    assert got[0].item() == pytest.approx(0.95)
    assert math.isnan(got[1].item())
    assert got[2].item() == pytest.approx(-0.6)


def test_mismatch_levels():
    logs = torch.tensor([math.log(2), 9.0, math.log(0.5), math.log(2), math.log(2), math.log(0.25)])
    token = mismatch(logs, "token", mask=MASK, row=ROW, num_rows=3)
    sequence = mismatch(logs, "sequence", mask=MASK, row=ROW, num_rows=3)
    geometric = mismatch(logs * 3, "geometric", mask=MASK, row=ROW, num_rows=3)
    assert token[0].item() == pytest.approx(2)
    assert sequence.tolist() == pytest.approx([2, 2, 0.5, 1, 1, 1])
    assert geometric.tolist() == pytest.approx([8, 8, 0.125, 1, 1, 1])
    assert truncated(torch.tensor([0.1, 3.0]), high=2.0).tolist() == pytest.approx([0.1, 2.0])
    assert masked(torch.tensor([0.4, 0.5, 5.0, 5.1]), low=0.5, high=5.0).tolist() == [0.0, 0.5, 5.0, 0.0]
    assert veto_mask(logs, threshold=0.3, mask=MASK, row=ROW, num_rows=3).tolist() == [1, 1, 1, 0, 0, 0]


def test_top_entropy_rounds_up_without_float_surprises():
    row = torch.zeros(100, dtype=torch.long)
    got = top_entropy_mask(torch.arange(100.0), fraction=0.07, mask=torch.ones(100), row=row, num_rows=1)
    assert got.tolist() == [0] * 93 + [1] * 7
    row, entropy = row[:10], torch.arange(10.0)
    one = top_entropy_mask(entropy, fraction=0.01, mask=torch.ones(10), row=row, num_rows=1)
    assert one.tolist() == [0] * 9 + [1]


def test_adaptive_entropy_coefficient():
    control = EntropyControl(target=1.0, step=0.02)
    assert control.adapt(0.1, 0.5) == pytest.approx(0.12)
    assert control.adapt(0.1, 1.5) == pytest.approx(0.08)
    assert control.adapt(0.0, 1.5) == 0.0
    assert control.adapt(1.0, 0.5) == 1.0
    assert (control.acting(0.1, 1.0), control.acting(0.1, 1.01)) == (0.1, 0.0)
