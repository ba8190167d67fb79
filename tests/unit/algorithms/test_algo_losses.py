"""Losses, KL and corrections: values against loops written from the equations, gradients against their differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from groupwise.algorithms import LossInputs, build_algorithm
from groupwise.batches import Denominators
from groupwise.config import AlgorithmConfig

MAX_TOKENS = 16


def config_of(**settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(settings)


@dataclass(kw_only=True)
class Row:
    """One row, all arrays `[T]` float64."""

    logp: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    sampler: np.ndarray
    entropy: np.ndarray
    adv: np.ndarray
    mask: np.ndarray


def make_rows(seed, lengths=(5, 1, 7, 3), spread=0.4, constant_advantage=True):
    rng = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate(lengths):
        logp = -rng.exponential(1.0, length)
        mask = (rng.random(length) < 0.8).astype(float)
        mask[0] = 1.0
        # Signs alternate, so every sign meets every side of the clip.
        adv = np.full(length, (1 if index % 2 else -1) * rng.uniform(0.2, 2.0))
        if not constant_advantage:
            adv = adv * rng.uniform(0.5, 1.5, length)
        old, ref, sampler = (logp + rng.normal(0, spread, length) for _ in range(3))
        entropy = rng.exponential(1.0, length)
        rows.append(Row(logp=logp, old=old, ref=ref, sampler=sampler, entropy=entropy, adv=adv, mask=mask))
    return rows


def to_inputs(rows, denominators, requires_grad=True, dtype=torch.float64, with_sampler=True):
    def cat(name):
        return torch.tensor(np.concatenate([getattr(row, name) for row in rows]), dtype=dtype)

    logp, entropy = cat("logp"), cat("entropy")
    if requires_grad:
        logp.requires_grad_()
        entropy.requires_grad_()
    return LossInputs(
        logprobs=logp,
        old_logprobs=cat("old"),
        ref_logprobs=cat("ref"),
        entropy=entropy,
        advantages=cat("adv"),
        mask=cat("mask"),
        row=torch.tensor(np.concatenate([np.full(len(row.logp), index) for index, row in enumerate(rows)])).long(),
        num_rows=len(rows),
        denominators=denominators,
        sampler_logprobs=cat("sampler") if with_sampler else None,
    )


def count(rows):
    tokens = sum(row.mask.sum() for row in rows)
    return Denominators(float(tokens), float(sum(row.mask.sum() > 0 for row in rows)), float(MAX_TOKENS))


def grad_of(tensor):
    assert tensor.grad is not None
    return tensor.grad


def clip(x, low, high):
    return min(max(x, low), high)


# --- references: per-token loss of a row, `frozen` is the log-probs that carry no gradient ---------------------------


def ref_ppo(row, logp, frozen, low=0.2, high=0.2, dual=None):
    out = []
    for t in range(len(logp)):
        r, a = math.exp(logp[t] - row.old[t]), row.adv[t]
        objective = min(r * a, clip(r, 1 - low, 1 + high) * a)
        if dual is not None and a < 0:
            objective = max(objective, dual * a)
        out.append(-objective)
    return out


def masked_mean(values, mask):
    return sum(v for v, m in zip(values, mask, strict=True) if m) / max(sum(mask), 1)


def ref_gspo(row, logp, frozen, low=3e-4, high=4e-4):
    s = math.exp(masked_mean(logp - row.old, row.mask))
    return [-min(s * a, clip(s, 1 - low, 1 + high) * a) for a in row.adv]


def ref_gspo_token(row, logp, frozen, low=3e-4, high=4e-4):
    s = math.exp(masked_mean(frozen - row.old, row.mask))
    out = []
    for t, a in enumerate(row.adv):
        st_ = s * math.exp(logp[t]) / math.exp(frozen[t])
        out.append(-min(st_ * a, clip(st_, 1 - low, 1 + high) * a))
    return out


def ref_cispo(row, logp, frozen, low=1.0, high=4.0):
    return [-clip(math.exp(frozen[t] - row.old[t]), 1 - low, 1 + high) * row.adv[t] * logp[t] for t in range(len(logp))]


def ref_sapo(row, logp, frozen, positive=1.0, negative=1.05):
    out = []
    for t in range(len(logp)):
        tau = positive if row.adv[t] > 0 else negative
        r = math.exp(logp[t] - row.old[t])
        out.append(-4 / tau / (1 + math.exp(-tau * (r - 1))) * row.adv[t])
    return out


GMPO_LOW, GMPO_HIGH = 1 - math.exp(-0.4), math.exp(0.4) - 1


def ref_gmpo(row, logp, frozen, low=GMPO_LOW, high=GMPO_HIGH):
    a, product, n = row.adv[0], 1.0, 0
    for t in range(len(logp)):
        if row.mask[t]:
            r = math.exp(logp[t] - row.old[t])
            product *= abs(min(r * a, clip(r, 1 - low, 1 + high) * a)) / abs(a)
            n += 1
    return [-a * product ** (1 / max(n, 1))] * len(logp)


def ref_reinforce(row, logp, frozen):
    return [-row.adv[t] * logp[t] for t in range(len(logp))]


def ref_kl(row, logp, estimator):
    out = []
    for t in range(len(logp)):
        d = row.ref[t] - logp[t]
        out.append({"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[estimator])
    return out


def ref_total(rows, flat_logp, per_row, normaliser):
    """Σ over rows of the normalised per-token values; `per_row(row, logp, frozen) -> [T]`."""
    d, total, start = count(rows), 0.0, 0
    for row in rows:
        logp = flat_logp[start : start + len(row.logp)]
        start += len(row.logp)
        values = per_row(row, logp, row.logp)
        inside = sum(v for v, m in zip(values, row.mask, strict=True) if m)
        if normaliser == "token":
            total += inside / d.tokens
        elif normaliser == "sequence":
            total += inside / max(row.mask.sum(), 1) / d.sequences
        else:
            total += inside / (d.sequences * MAX_TOKENS)
    return total


def numeric_gradient(function, at, step=1e-6):
    gradient = np.zeros_like(at)
    for i in range(len(at)):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


def check(config, per_row, rows):
    config = config_of(**config)
    inputs = to_inputs(rows, count(rows))
    output = build_algorithm(config).loss(inputs)
    flat = np.concatenate([row.logp for row in rows])
    want = ref_total(rows, flat, per_row, config.normaliser)
    assert output.loss.item() == pytest.approx(want, rel=1e-10, abs=1e-13)
    output.loss.backward()
    expected = numeric_gradient(lambda logp: ref_total(rows, logp, per_row, config.normaliser), flat)
    assert np.abs(expected).max() > 1e-4, "the reference has no gradient: the test would prove nothing"
    np.testing.assert_allclose(grad_of(inputs.logprobs).numpy(), expected, rtol=1e-5, atol=1e-8)


CASES = [
    ({"name": "grpo"}, ref_ppo),
    ({"name": "bnpo"}, ref_ppo),
    ({"name": "dr_grpo"}, ref_ppo),
    ({"name": "dapo"}, lambda row, logp, frozen: ref_ppo(row, logp, frozen, high=0.28)),
    ({"loss": {"clip_low": 0.1, "clip_high": 0.3}}, lambda row, logp, frozen: ref_ppo(row, logp, frozen, 0.1, 0.3)),
    ({"loss": {"dual_clip": 1.3}}, lambda row, logp, frozen: ref_ppo(row, logp, frozen, dual=1.3)),
    ({"name": "gspo", "loss": {"clip_low": 0.2, "clip_high": 0.2}}, lambda r, x, f: ref_gspo(r, x, f, 0.2, 0.2)),
    ({"name": "gspo", "normaliser": "token", "loss": {"clip_low": 0.3}}, lambda r, x, f: ref_gspo(r, x, f, 0.3)),
    (
        {"name": "gspo_token", "loss": {"clip_low": 0.2, "clip_high": 0.2}},
        lambda r, x, f: ref_gspo_token(r, x, f, 0.2, 0.2),
    ),
    ({"name": "cispo"}, ref_cispo),
    ({"name": "cispo", "loss": {"clip_low": 0.1, "clip_high": 0.1}}, lambda r, x, f: ref_cispo(r, x, f, 0.1, 0.1)),
    ({"name": "sapo"}, ref_sapo),
    ({"name": "sapo", "loss": {"temperature_negative": 2.0}}, lambda r, x, f: ref_sapo(r, x, f, 1.0, 2.0)),
    ({"name": "gmpo"}, ref_gmpo),
    ({"name": "gmpo", "loss": {"clip_low": 1.0}}, lambda r, x, f: ref_gmpo(r, x, f, low=1.0)),
    ({"name": "rloo"}, ref_reinforce),
    ({"name": "opo", "normaliser": "sequence"}, ref_reinforce),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("config", "per_row"), CASES, ids=[str(config) for config, _ in CASES])
def test_loss_and_gradient_equal_the_equation(config, per_row, seed):
    check(config, per_row, make_rows(seed))


@pytest.mark.parametrize("name", ["grpo", "gspo", "gspo_token", "cispo", "sapo"])
def test_per_token_advantages(name):
    per_row = {"grpo": ref_ppo, "gspo": ref_gspo, "gspo_token": ref_gspo_token, "cispo": ref_cispo, "sapo": ref_sapo}
    check({"name": name}, per_row[name], make_rows(5, constant_advantage=False))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("normaliser", ["token", "sequence", "constant"])
def test_kl_in_the_loss(estimator, normaliser):
    def per_row(row, logp, frozen):
        kl = ref_kl(row, logp, estimator)
        return [p + 0.7 * k for p, k in zip(ref_ppo(row, logp, frozen), kl, strict=True)]

    check({"kl": {"coef": 0.7, "estimator": estimator}, "normaliser": normaliser}, per_row, make_rows(3))


def ref_weights(row, level):
    logs = row.old - row.sampler
    if level == "token":
        return [math.exp(x) for x in logs]
    total = sum(x for x, m in zip(logs, row.mask, strict=True) if m)
    return [math.exp(total if level == "sequence" else total / max(row.mask.sum(), 1))] * len(logs)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("kind", ["truncate", "mask", "decoupled"])
def test_mismatch_corrections(kind, level):
    def per_row(row, logp, frozen):
        out = []
        for value, w in zip(ref_ppo(row, logp, frozen), ref_weights(row, level), strict=True):
            if kind == "truncate":
                w = min(w, 1.05)
            if kind == "mask":
                w = w if 0.5 <= w <= 2.0 else 0.0
            out.append(w * value)
        return out

    bounds = {"truncate": {"high": 1.05}, "mask": {"low": 0.5, "high": 2.0}}
    settings_ = {"correction": {"name": kind, "level": level, **bounds.get(kind, {})}}
    for seed in (0, 1):
        check(settings_, per_row, make_rows(seed, lengths=(5, 2, 7, 3, 4, 4)))


def test_veto_drops_whole_rows():
    def per_row(row, logp, frozen):
        lowest = min(math.exp(o - s) for o, s, m in zip(row.old, row.sampler, row.mask, strict=True) if m)
        return [0.0 if lowest < 0.5 else value for value in ref_ppo(row, logp, frozen)]

    rows = make_rows(1)
    vetoed = [min(np.exp(row.old - row.sampler)[row.mask > 0]) < 0.5 for row in rows]
    assert any(vetoed)
    assert not all(vetoed)
    check({"correction": {"veto": 0.5}}, per_row, rows)


def test_off_policy_mask_drops_negative_rows_that_drifted():
    def per_row(row, logp, frozen):
        drift = masked_mean(row.sampler - frozen, row.mask)
        return [0.0 if row.adv[0] < 0 and drift > 0.02 else value for value in ref_ppo(row, logp, frozen)]

    rows = make_rows(4, lengths=(5, 4, 7, 3, 6, 2, 4, 4))
    dropped = [row.adv[0] < 0 and masked_mean(row.sampler - row.logp, row.mask) > 0.02 for row in rows]
    assert any(dropped)
    assert not all(dropped)
    check({"correction": {"off_policy_mask": 0.02}}, per_row, rows)


def test_entropy_bonus_value_and_gradients():
    rows = make_rows(2)
    inputs = to_inputs(rows, count(rows))
    build_algorithm(config_of(entropy={"coef": 0.3})).loss(inputs).loss.backward()
    mask = np.concatenate([row.mask for row in rows])
    np.testing.assert_allclose(grad_of(inputs.entropy).numpy(), -0.3 * mask / mask.sum(), rtol=1e-12)
    flat = to_inputs(rows, count(rows))
    plain = build_algorithm(config_of()).loss(flat).loss.item()
    want = plain - 0.3 * masked_mean(np.concatenate([row.entropy for row in rows]), mask)
    assert build_algorithm(config_of(entropy={"coef": 0.3})).loss(flat).loss.item() == pytest.approx(want, rel=1e-12)


def test_entropy_bonus_without_a_gradient_is_refused():
    inputs = to_inputs(make_rows(2), count(make_rows(2)), requires_grad=False)
    with pytest.raises(AssertionError, match="entropy's gradient"):
        build_algorithm(config_of(entropy={"coef": 0.3})).loss(inputs)


def test_top_entropy_filter_keeps_each_rows_highest():
    def per_row(row, logp, frozen):
        alive = [t for t in range(len(logp)) if row.mask[t]]
        keep = sorted(alive, key=lambda t: -row.entropy[t])[: math.ceil(0.4 * len(alive) - 1e-9)]
        return [v if t in keep else 0.0 for t, v in enumerate(ref_ppo(row, logp, frozen))]

    for seed in range(3):
        check({"entropy": {"top_fraction": 0.4}}, per_row, make_rows(seed))
