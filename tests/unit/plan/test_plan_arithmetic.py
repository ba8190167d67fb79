"""The plan's arithmetic against values worked by hand, and against what was measured on a GPU."""

from __future__ import annotations

import pytest

from groupwise.errors import ConfigError
from groupwise.plan.amount import find_amount
from groupwise.plan.devices import DEVICES, GIB, decode_share, named_device
from groupwise.plan.facts import Load, ModelFacts, Pass, Setup, largest_pass
from groupwise.plan.memory import Sampling, activations, find_memory, head_bytes, kept_per_token
from groupwise.plan.planned import largest
from groupwise.plan.seconds import (
    attention_pairs,
    find_seconds,
    head_operations,
    layer_operations,
    rates_of,
    sampling_seconds,
    train_seconds,
    update_seconds,
)

LAYER = 1024 * (2048 + 1024 + 1024) + 2048 * 1024 + 3 * 1024 * 3072
SMALL = ModelFacts(
    layers=28,
    width=1024,
    heads=16,
    key_heads=8,
    head_size=128,
    mlp=3072,
    vocabulary=151_936,
    parameters=596_049_920,
    products=28 * LAYER,
    in_layers=28 * LAYER,
    norms_heads=True,
)
"""Qwen3-0.6B."""

NOBODY = Sampling(lanes=0, caches=0, prefill=0)


def test_numbers_of_qwen3() -> None:
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert SMALL.parameters == 151_936 * 1024 + SMALL.in_layers + norms
    assert 2 * SMALL.cached == 114_688
    assert SMALL.weight_bytes(2, packed=False) == 1_192_099_840
    packed = SMALL.weight_bytes(2, packed=True)
    assert packed == int(28 * LAYER * 4.127 / 8) + 2 * (151_936 * 1024 + norms)


def test_what_is_held_beside_the_weights() -> None:
    """16 bytes a parameter in float32 (weight, gradient, two moments), 18 in bfloat16 with its master."""
    work = Pass(tokens=16, scored=16, count=1)
    single = find_memory(SMALL, Setup(each=4), work, NOBODY)
    assert sum(single.held[name] for name in ("weights", "master weights", "Adam moments")) == 12 * SMALL.parameters
    assert single.updating == {"gradients": 4 * SMALL.parameters}
    half = find_memory(SMALL, Setup(each=2), work, NOBODY)
    assert sum(half.held[name] for name in ("weights", "master weights", "Adam moments")) == 14 * SMALL.parameters
    eight = find_memory(SMALL, Setup(each=2, optimizer="adamw_8bit"), work, NOBODY)
    assert eight.held["Adam moments"] == 2 * SMALL.parameters
    muon = find_memory(SMALL, Setup(each=2, optimizer="muon"), work, NOBODY)
    assert muon.held["Adam moments"] == 4 * 28 * LAYER + 8 * (SMALL.parameters - 28 * LAYER)
    kept = find_memory(SMALL, Setup(each=2, reference="moving", teacher=10), work, NOBODY)
    assert kept.held["reference model"] == 6 * SMALL.parameters
    assert kept.held["teacher"] == 20


def test_what_a_layer_keeps_of_a_token() -> None:
    heads = 2048 + 3 * 1024 + 2048 + 2048  # rotated queries, keys before and after, values, the result, queries before
    scales = 2 + 16 + 16 + 8
    assert kept_per_token(SMALL, 2) == 2 * (4 * 1024 + heads + 3 * 3072) + 4 * scales
    all_layers = activations(SMALL, Setup(each=2), 16_384)
    assert all_layers == pytest.approx(21e9, rel=0.05)  # beside a figure that was computed by another way
    few = activations(SMALL, Setup(each=2, recomputes=True), 16_384)
    assert few == 16_384 * (28 * 2 * 1024 + kept_per_token(SMALL, 2) + 2 * (3 * 1024 + 3 * 3072) + 2 * 2 * 1024)


def test_a_chunk_of_logits() -> None:
    chunk, head = 1024 * 151_936, 151_936 * 1024
    assert head_bytes(SMALL, Setup(each=4), 4096) == 4 * chunk + 8 * head + 4 * 4096 * 1024
    assert head_bytes(SMALL, Setup(each=2), 4096) == max(6 * chunk + 2 * head, 2 * chunk + 4 * head) + 2 * 4096 * 1024
    gpu = head_bytes(SMALL, Setup(each=2, on_gpu=True), 16_384)
    assert gpu == 2 * 4 * chunk + 4 * head + 2 * 16_384 * 1024
    kept = head_bytes(SMALL, Setup(each=4), 100)  # 100 rows of weights are small enough to be kept
    assert kept == 4 * 100 * 151_936 + 4 * head + 4 * 100 * 1024


def test_the_peak_is_the_largest_moment() -> None:
    caches = Sampling(lanes=64, caches=7 * GIB, prefill=1024)
    memory = find_memory(SMALL, Setup(each=2), Pass(4096, 2048, count=4), caches)
    sums = {name: sum(parts.values()) for name, parts in memory.moments.items()}
    assert memory.peak == sum(memory.held.values()) + max(sums.values())
    assert memory.peak_moment == "backward pass"
    assert memory.held["KV caches"] == 7 * GIB
    none = find_memory(SMALL, Setup(each=2), Pass(16, 16, count=1), caches)
    assert sum(none.learning.values()) < sum(memory.learning.values())


def test_how_much_a_run_is() -> None:
    load = Load(prompts=32, group=8, prompt=100, longest_prompt=300, answer=512, longest_answer=512)
    amount = find_amount(load, rows=7473, steps=300, every=50, at_start=True, eval_rows=1319, eval_samples=1)
    assert (amount.prompts, amount.samples, amount.tokens) == (9_600, 76_800, 39_321_600)
    assert amount.epochs == pytest.approx(1.2846, abs=1e-4)
    assert (amount.evaluations, amount.eval_samples) == (7, 1319)
    odd = find_amount(load, rows=10, steps=301, every=50, at_start=False, eval_rows=4, eval_samples=2)
    assert (odd.evaluations, odd.eval_samples) == (7, 8)
    assert load.packed == 32 * (100 + 8 * 511)


def test_operations_of_a_step() -> None:
    load = Load(prompts=1, group=2, prompt=3, longest_prompt=3, answer=2, longest_answer=2)
    assert attention_pairs(load) == 6 + 2 * (3 + 2 * 3)
    facts = ModelFacts(1, 4, 2, 1, 2, 8, vocabulary=10, parameters=0, products=144, in_layers=144)
    assert layer_operations(facts, 5, 24, backward=True) == 6 * 144 * 5 + 12 * 4 * 24
    assert layer_operations(facts, 5, 24, backward=False) == 2 * 144 * 5 + 4 * 4 * 24
    assert head_operations(facts, 4, backward=True, at_once=4) == 6 * 40 * 4
    many = 2**26 // 10 + 1  # of these a pass keeps no weights, so it computes them again
    assert head_operations(facts, many, backward=True, at_once=many) == 8 * 40 * many
    assert head_operations(facts, many, backward=True, at_once=4) == 6 * 40 * many
    assert head_operations(facts, many, backward=False) == 2 * 40 * many


def test_rates_reproduce_what_was_measured_on_an_h100() -> None:
    """benchmarks/RESULTS.md: tokens per second of 64 and 256 samples of 512 tokens after prompts of 256, and of
    training, prompts counted whole."""
    setup, device = Setup(each=2, on_gpu=True), DEVICES["h100-80gb"]
    for groups, samples, measured in ((8, 64, 25_278), (32, 256, 50_124)):
        load = Load(groups, 8, 256, 256, 512, 512)
        rates = rates_of(device, SMALL, setup, samples=samples)
        drawn = load.drawn / sampling_seconds(SMALL, setup, load, lanes=samples, rates=rates)
        assert drawn == pytest.approx(measured, rel=0.1)
        learned = load.samples * (256 + 512) / train_seconds(SMALL, setup, load, rates)
        assert learned == pytest.approx(82_952, rel=0.1)


def test_seconds_add_up() -> None:
    setup, load = Setup(each=2, on_gpu=True, compares=True), Load(32, 8, 256, 256, 512, 512)
    rates = rates_of(DEVICES["h100-80gb"], SMALL, setup, samples=256)
    bare = train_seconds(SMALL, Setup(each=2, on_gpu=True), load, rates)
    assert bare < train_seconds(SMALL, setup, load, rates) < 1.5 * bare
    seconds = find_seconds(SMALL, setup, load, lanes=256, rates=rates, evaluation=(load, 10))
    assert seconds.evaluation == pytest.approx(seconds.rollout / 10)
    assert seconds.step == seconds.rollout + seconds.train + seconds.update + seconds.evaluation
    assert update_seconds(SMALL, setup, load, rates) == pytest.approx(596_049_920 * 42 / (3.35e12 * 0.86))


def test_shares_between_those_measured() -> None:
    assert [decode_share(samples) for samples in (1, 64, 128, 256, 1024)] == pytest.approx(
        [0.45, 0.45, 0.555, 0.66, 0.66]
    )


def test_named_devices() -> None:
    assert set(DEVICES) == {"h100-80gb", "h200", "a100-40gb", "a100-80gb", "l4", "rtx4090"}
    assert named_device("cpu", 8 * GIB).memory == 8 * GIB
    for name, memory, said in (
        ("h100-80", None, r"did you mean h100-80gb\?"),
        ("cpu", None, "--device cpu needs --memory"),
        ("l4", GIB, "l4 has its own memory"),
    ):
        with pytest.raises(ConfigError, match=said):
            named_device(name, memory)


def test_the_largest_size_that_holds() -> None:
    assert [largest(lambda n, top=top: n <= top, 100) for top in (0, 1, 57, 100, 200)] == [0, 1, 57, 100, 100]


def test_passes_of_a_step() -> None:
    load = Load(prompts=8, group=8, prompt=40, longest_prompt=60, answer=64, longest_answer=64)
    assert largest_pass(load, 4096, 2) == Pass(tokens=4 * (40 + 8 * 63), scored=4 * 8 * 64, count=2)
    assert largest_pass(load, 10**6, 1) == Pass(tokens=8 * (40 + 8 * 63), scored=8 * 8 * 64, count=1)
    alone = largest_pass(load, 50, 1)  # a row that is longer than the budget stands alone
    assert (alone.scored, alone.count) == (64, 64)
