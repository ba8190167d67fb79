"""All figures of one model: decoding, mismatch, training; and what `model.batch_invariant` costs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from gpu.bench import Bench, Ceiling, measure_ceiling
from gpu.decode import ENTROPY, make_prompts, measure_decode, set_entropy
from gpu.shapes import SHAPES, build_model
from gpu.training import measure_training
from groupwise.model.invariant.use import require_gpu
from groupwise.model.loading import resolve_device, resolve_dtype


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second: decoded by number of samples, and trained on."""

    decode: dict[int, float]
    training: float


def measure_model(bench: Bench, ceiling: Ceiling, samples: Sequence[int], *, eager: bool, train: bool) -> Speed:
    """All sections of one model.

    Args:
        eager: decode without CUDA graphs as well, the fewest samples.
        train: and train on the last samples.
    """
    entropy = set_entropy(bench.loaded, make_prompts(bench.shape, 4, bench.prompt_tokens), ENTROPY)
    invariant = bench.loaded.batch_invariant
    name = next(name for name, shape in SHAPES.items() if shape == bench.shape)
    bench.record("model", model_shape=name, batch_invariant=invariant, entropy_nats=entropy, **asdict(bench.shape))
    if eager:
        measure_decode(bench, ceiling, samples[0], graphs=False)
    found = {count: measure_decode(bench, ceiling, count) for count in samples}
    trained = measure_training(bench, ceiling, found[samples[-1]]) if train else math.nan
    return Speed({count: sampled.tokens_per_s for count, sampled in found.items()}, trained)


def record_price(bench: Bench, plain: Speed, invariant: Speed) -> None:
    """Tokens per second without `model.batch_invariant` by those with it: 2 is half as fast."""
    for count, speed in plain.decode.items():
        bench.record("price", part="decode", samples=count, times_slower=speed / invariant.decode[count])
    if not math.isnan(plain.training):
        bench.record("price", part="training", times_slower=plain.training / invariant.training)


def run(args: argparse.Namespace) -> None:
    device = resolve_device(args.device)
    if args.batch_invariant:
        require_gpu(device)
    dtype = resolve_dtype(args.dtype, device)
    shape = SHAPES[args.model_shape]
    bench = Bench(
        shape=shape,
        loaded=build_model(shape, device, dtype, lora_rank=args.lora_rank),
        prompt_tokens=args.prompt_tokens,
        tokens=args.tokens,
        micro_batch_tokens=args.micro_batch_tokens,
        cap=args.cap,
        out=args.json,
    )
    ceiling = measure_ceiling(bench, args.matmul_size or (8192 if device.type == "cuda" else 512))
    measure = partial(measure_model, samples=args.samples, eager=args.eager, train=not args.decode_only)
    plain = measure(bench, ceiling)
    if args.batch_invariant:
        loaded = build_model(shape, device, dtype, lora_rank=args.lora_rank, batch_invariant=True)
        bench = replace(bench, loaded=loaded)
        record_price(bench, plain, measure(bench, ceiling))
