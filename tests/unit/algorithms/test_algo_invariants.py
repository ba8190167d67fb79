"""What must hold for every loss: no dependence on split or order, no NaN, the same gradient on policy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.algorithms import LossInputs, build_algorithm
from groupwise.batches import Denominators
from groupwise.config import AlgorithmConfig
from groupwise.metrics import Mean, merge, resolve

Row = dict[str, torch.Tensor]
TENSORS = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "advantages", "mask", "sampler_logprobs")


def config_of(**settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(settings)


def make_rows(seed: int, lengths: tuple[int, ...] = (5, 1, 7, 3)) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def normal(length: int) -> torch.Tensor:
        return torch.randn(length, generator=generator, dtype=torch.float64)

    rows = []
    for index, length in enumerate(lengths):
        row = {name: -1 + 0.4 * normal(length) for name in TENSORS}
        row["entropy"] = normal(length).abs()
        row["advantages"] = (1 if index % 2 else -1) * normal(1).abs().expand(length)
        row["mask"] = (normal(length) < 0.8).double()
        row["mask"][0] = 1
        rows.append(row)
    return rows


def count(rows: list[Row]) -> Denominators:
    masks = [row["mask"] for row in rows]
    return Denominators(float(sum(mask.sum() for mask in masks)), float(sum(mask.any() for mask in masks)), 16.0)


def to_inputs(rows: list[Row], denominators: Denominators, *, dtype: torch.dtype = torch.float64) -> LossInputs:
    fields: dict[str, Any] = {name: torch.cat([row[name] for row in rows]).to(dtype) for name in TENSORS}
    fields["logprobs"].requires_grad_()
    fields["entropy"].requires_grad_()
    indices = torch.cat([torch.full((len(row["mask"]),), index) for index, row in enumerate(rows)])
    return LossInputs(**fields, row=indices, num_rows=len(rows), denominators=denominators)


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


EVERY = [
    {
        "name": name,
        "kl": {"coef": 0.1},
        "entropy": {"coef": 0.01, "top_fraction": fraction},
        "correction": {"name": "mask"},
    }
    for name, fraction in (
        *((name, 0.7) for name in ("grpo", "dr_grpo", "dapo", "gspo_token", "cispo", "sapo", "rloo")),
        *((name, 1.0) for name in ("gspo", "gmpo")),
    )
]


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config["name"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), data=st.data())
def test_gradient_does_not_depend_on_split_or_order(config, seed, data):
    algorithm = build_algorithm(config_of(**config))
    rows = make_rows(seed, lengths=(3, 5, 1, 4, 2))
    whole = to_inputs(rows, count(rows))
    algorithm.loss(whole).loss.backward()
    want = torch.split(grad_of(whole.logprobs), [len(row["mask"]) for row in rows])

    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1))))
    total, outputs = 0.0, []
    for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        chosen = order[start:end]
        part = to_inputs([rows[index] for index in chosen], count(rows))
        output = algorithm.loss(part)
        output.loss.backward()
        total += output.loss.item()
        outputs.append(output.metrics)
        grads = torch.split(grad_of(part.logprobs), [len(rows[index]["mask"]) for index in chosen])
        for index, grad in zip(chosen, grads, strict=True):
            torch.testing.assert_close(grad, want[index], rtol=1e-10, atol=1e-14)
    reference = algorithm.loss(whole)
    assert total == pytest.approx(reference.loss.item(), rel=1e-9, abs=1e-12)
    assert resolve(merge(*outputs)) == pytest.approx(resolve(reference.metrics), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config["name"])
def test_order_of_tokens_does_not_matter(config):
    algorithm = build_algorithm(config_of(**config))
    rows = make_rows(11)
    plain = to_inputs(rows, count(rows))
    order = torch.randperm(plain.row.shape[0], generator=torch.Generator().manual_seed(0))
    tensors = {name: getattr(plain, name) for name in LossInputs.__slots__}
    moved = {name: value.detach()[order] for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    shuffled = LossInputs(**{**tensors, **moved})
    for value in (shuffled.logprobs, shuffled.entropy):
        assert value is not None
        value.requires_grad_()
    algorithm.loss(plain).loss.backward()
    algorithm.loss(shuffled).loss.backward()
    torch.testing.assert_close(grad_of(shuffled.logprobs), grad_of(plain.logprobs)[order], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config["name"])
def test_masked_tokens_are_never_read(config):
    algorithm = build_algorithm(config_of(**config))
    rows = make_rows(7)
    clean = to_inputs(rows, count(rows))
    algorithm.loss(clean).loss.backward()
    for row in rows:
        for name in TENSORS[:-2] + TENSORS[-1:]:
            row[name] = torch.where(row["mask"] > 0, row[name], math.nan)
    dirty = to_inputs(rows, count(rows))
    output = algorithm.loss(dirty)
    output.loss.backward()
    torch.testing.assert_close(grad_of(dirty.logprobs), grad_of(clean.logprobs), rtol=1e-12, atol=0)
    assert (grad_of(dirty.logprobs)[dirty.mask == 0] == 0).all()
    assert all(math.isfinite(value) for value in resolve(output.metrics).values())


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config["name"])
@pytest.mark.parametrize("gap", [60.0, 150.0, -150.0])
def test_huge_ratios_stay_finite_in_float32(config, gap):
    algorithm = build_algorithm(config_of(**config))
    rows = make_rows(9)
    for row in rows:
        row["logprobs"] = row["logprobs"] + gap
    inputs = to_inputs(rows, count(rows), dtype=torch.float32)
    output = algorithm.loss(inputs)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert torch.isfinite(grad_of(inputs.logprobs)).all()


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config["name"])
def test_a_fully_masked_batch_has_zero_loss_and_gradient(config):
    rows = make_rows(9)
    for row in rows:
        row["mask"] = torch.zeros_like(row["mask"])
    inputs = to_inputs(rows, count(rows))
    output = build_algorithm(config_of(**config)).loss(inputs)
    output.loss.backward()
    assert output.loss.item() == 0
    assert (grad_of(inputs.logprobs) == 0).all()


def test_a_row_without_unmasked_tokens_changes_nothing():
    rows = make_rows(9)
    for name in ("grpo", "gspo", "gmpo"):
        algorithm = build_algorithm(config_of(name=name))
        want = algorithm.loss(to_inputs(rows, count(rows))).loss.item()
        empty = make_rows(10, lengths=(4,))[0]
        empty["mask"] = torch.zeros_like(empty["mask"])
        more = [*rows, empty]
        assert algorithm.loss(to_inputs(more, count(more))).loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "config", [{"name": n} for n in ("grpo", "gspo", "gspo_token", "cispo", "sapo", "gmpo", "rloo")]
)
def test_on_policy_every_loss_is_the_policy_gradient(config):
    """At π = π_old all objectives have the gradient -A/|o|: only the drift separates them."""
    rows = make_rows(6)
    for row in rows:
        row["old_logprobs"] = row["sampler_logprobs"] = row["logprobs"].clone()
    inputs = to_inputs(rows, count(rows))
    build_algorithm(config_of(**config, normaliser="sequence")).loss(inputs).loss.backward()
    want = torch.cat([-row["advantages"] * row["mask"] / row["mask"].sum() / len(rows) for row in rows])
    torch.testing.assert_close(grad_of(inputs.logprobs), want, rtol=1e-9, atol=1e-12)


def test_gspo_token_is_gspo_where_advantages_are_equal():
    rows = make_rows(8)
    grads = []
    for name in ("gspo", "gspo_token"):
        inputs = to_inputs(rows, count(rows))
        build_algorithm(config_of(name=name, loss={"clip_low": 0.2, "clip_high": 0.2})).loss(inputs).loss.backward()
        grads.append(grad_of(inputs.logprobs))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)


def test_a_correction_is_one_where_the_samplers_logprobs_are_the_old_ones():
    rows = make_rows(8)
    plain = build_algorithm(config_of()).loss(to_inputs(rows, count(rows))).loss.item()
    for kind in ("truncate", "mask", "decoupled"):
        algorithm = build_algorithm(config_of(correction={"name": kind}))
        assert algorithm.needs_sampler_logprobs
        inputs = replace(to_inputs(rows, count(rows)), sampler_logprobs=None)
        assert algorithm.loss(inputs).loss.item() == pytest.approx(plain, rel=1e-12)


def test_metrics_count_what_the_clip_stopped():
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.0], dtype=torch.float64).log()
    row: Row = {name: torch.zeros_like(ratio) for name in TENSORS}
    row |= {"logprobs": ratio, "ref_logprobs": ratio - 0.1, "entropy": torch.full_like(ratio, 2.0)}
    row |= {"advantages": torch.tensor([-1.0, 1, -1, 1, 1]), "mask": torch.tensor([1.0, 1, 1, 1, 0])}
    inputs = to_inputs([row], Denominators(8.0, 2.0, 16.0))
    output = build_algorithm(config_of(kl={"coef": 0.1, "estimator": "k1"})).loss(inputs)
    values = resolve(output.metrics)
    assert values["clip_ratio/low_mean"] == 0.25
    assert values["clip_ratio/high_mean"] == 0.25
    assert values["clip_ratio/region_mean"] == 0.5
    assert values["kl"] == pytest.approx(0.1)
    assert values["entropy"] == pytest.approx(2.0)
    # Half of the optimiser batch's tokens: merging with the other half's must add up to the batch's loss.
    share = output.metrics["policy_loss"]
    assert isinstance(share, Mean)
    assert share.weight == 0.5
    assert share.total == pytest.approx(output.loss.item() - 0.1 * 0.1 * 4 / 8)


def test_a_kl_in_the_reward_is_measured_and_no_part_of_the_loss():
    rows = make_rows(5)
    plain = build_algorithm(config_of()).loss(to_inputs(rows, count(rows)))
    output = build_algorithm(config_of(kl={"coef": 0.5, "place": "reward"})).loss(to_inputs(rows, count(rows)))
    assert output.loss.item() == plain.loss.item()
    in_loss = build_algorithm(config_of(kl={"coef": 0.5, "estimator": "k1"})).loss(to_inputs(rows, count(rows)))
    assert in_loss.loss.item() != plain.loss.item()
    assert resolve(output.metrics)["kl"] == resolve(in_loss.metrics)["kl"]


def test_missing_tensors_and_wrong_shapes_are_refused():
    rows = make_rows(0)
    inputs = to_inputs(rows, count(rows))
    fields = {name: getattr(inputs, name) for name in LossInputs.__slots__}
    with pytest.raises(AssertionError, match="ref_logprobs"):
        build_algorithm(config_of(kl={"coef": 0.1})).loss(LossInputs(**{**fields, "ref_logprobs": None}))
    with pytest.raises(AssertionError, match="entropy"):
        build_algorithm(config_of(entropy={"top_fraction": 0.2})).loss(LossInputs(**{**fields, "entropy": None}))
    with pytest.raises(AssertionError, match="differ"):
        LossInputs(**{**fields, "mask": fields["mask"][:-1]})
