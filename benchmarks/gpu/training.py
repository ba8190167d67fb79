"""Training: the difference of log-probs to the sampler's, tokens per second, share of the device's matrix products."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from gpu.bench import Bench, Ceiling, median_seconds
from gpu.decode import Sampled
from gpu.shapes import ModelShape
from groupwise.algorithms import build_algorithm
from groupwise.batches import Denominators
from groupwise.config import AlgorithmConfig, OptimConfig, TrainConfig
from groupwise.model.forward.packing import Packed, pack
from groupwise.policy import Learner
from groupwise.policy.microbatches import MicroBatch, split_rows


def training_flops(shape: ModelShape, packed: Packed, *, frozen: bool = False) -> float:
    """Of one forward and backward pass; what is recomputed counts once: 6 per weight and token, and attention's.

    `frozen` weights, behind an adapter, have no gradient of their own: 4 per weight. The adapter's few are not counted.

    Attention multiplies each query with each key it sees, and each weight with a value: 4 · heads · head_dim
    operations a pair forward, twice that backward.
    """
    pairs = 0.0
    for segment in packed.segments:
        before = 0 if segment.prefix is None else packed.segments[segment.prefix].length
        pairs += segment.length * (segment.length + 1) / 2 + segment.length * before
    attention = 12 * shape.layers * shape.heads * shape.head_dim * pairs
    tokens = sum(segment.length for segment in packed.segments)
    per_weight = 4 if frozen else 6
    return per_weight * (shape.layer_weights * tokens + shape.head_weights * len(packed.targets)) + attention


def measure_mismatch(bench: Bench, found: Sampled, micro: Sequence[MicroBatch], policy: Learner) -> None:
    """Sampler's log-probs against those of the trainer's forward, on the same weights, temperature 1."""
    drifts: list[Tensor] = []
    started = time.perf_counter()
    for part in micro:
        sampled = torch.tensor([x for row in part.rows for x in row.logprobs])
        drifts.append((policy.log_probs(part.rows).cpu() - sampled).abs())
        if time.perf_counter() - started > bench.cap:
            break
    drift = torch.cat(drifts)
    assert bool(drift.isfinite().all()), "a log-prob is not finite"
    bench.record(
        "mismatch", dtype=str(bench.dtype), compared=drift.numel(), of=found.tokens, unequal=int((drift > 0).sum()),
        max=float(drift.max()), mean=float(drift.mean()),
    )  # fmt: skip


def measure_training(bench: Bench, ceiling: Ceiling, found: Sampled) -> float:
    """Forward, backward and update of GRPO without a reference; before them, the mismatch. Returns tokens per second.

    `tokens` counts every sequence whole; `packed_tokens` counts what is computed, each group's prompt once.
    """
    rows = found.rows()
    micro = split_rows(rows, bench.micro_batch_tokens)
    policy = Learner(
        bench.loaded,
        build_algorithm(AlgorithmConfig()),  # type: ignore[call-arg]
        optim=OptimConfig(),  # type: ignore[call-arg]
        train=TrainConfig(),  # type: ignore[call-arg]
        total_updates=1000,
    )
    measure_mismatch(bench, found, micro, policy)
    packed = [pack(part.rows) for part in micro]
    frozen = bench.loaded.adapter is not None
    flops = sum(training_flops(bench.shape, p, frozen=frozen) for p in packed)
    tokens, computed = sum(row.num_tokens for row in rows), sum(len(p.token_ids) for p in packed)
    counts = Denominators(float(sum(len(row.token_ids) for row in rows)), float(len(rows)), float(bench.tokens))

    def step(_: int) -> None:
        for part in micro:
            policy.forward_backward(part, counts)
        policy.optim_step()

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds = median_seconds(step, bench.device, cap=bench.cap, repeats=5)
    bench.record(
        "training", sequences=len(rows), micro_batches=len(micro), seconds_per_step=seconds,
        tokens=tokens, tokens_per_s=tokens / seconds, packed_tokens=computed, packed_tokens_per_s=computed / seconds,
        tflops=flops / seconds / 1e12, mfu_percent=100 * flops / seconds / ceiling.flops, peak_gib=bench.peak_gib(),
    )  # fmt: skip
    return tokens / seconds
