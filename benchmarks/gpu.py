"""What one device can do, and how much of it Groupwise uses: ceilings, decoding, training, sampler-trainer mismatch.

    python benchmarks/gpu.py --json gpu.jsonl                                       # Qwen3-0.6B's shape, on the GPU
    python benchmarks/gpu.py --batch-invariant                                      # and what that option costs
    python benchmarks/gpu.py --model-shape tiny --samples 8 --tokens 16 --device cpu

Weights are random and made in memory, so nothing is downloaded. The final norm is scaled until a token's distribution
has about 1 nat of entropy, as a trained model's has: near-uniform ones would hide a mismatch. Each result is printed
and appended to the file as it comes, and each section starts nothing more after `--cap` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from gpu_models import SHAPES, ModelShape, build_model
from torch import Tensor

from groupwise.algorithms import build_algorithm
from groupwise.batches import Denominators, TrainingRow
from groupwise.config import AlgorithmConfig, OptimConfig, RolloutConfig, TrainConfig
from groupwise.engines.native import NativeEngine
from groupwise.inputs import ModelInput
from groupwise.model.forward.head import LanguageHead, entropy_of
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import Packed, pack, pack_sequences
from groupwise.model.invariant.use import require_gpu
from groupwise.model.loading import LoadedModel, resolve_device, resolve_dtype
from groupwise.policy import Learner
from groupwise.policy.microbatches import MicroBatch, split_rows
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

GROUP_SIZE = 8
ENTROPY = 1.0


@dataclass(frozen=True, slots=True)
class Bench:
    """What all sections need.

    Attributes:
        cap: seconds after which a section starts nothing more.
        out: where results are appended as JSON lines, if anywhere.
    """

    shape: ModelShape
    loaded: LoadedModel
    prompt_tokens: int
    tokens: int
    micro_batch_tokens: int
    cap: float
    out: Path | None

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.model.dtype

    def record(self, section: str, **figures: Any) -> None:
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items() if v is not None}
        line = json.dumps({"section": section, **rounded})
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Measured limits of the device: floating-point operations and bytes per second."""

    flops: float
    bandwidth: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[int], None], device: torch.device, *, cap: float, repeats: int = 20) -> float:
    """Median time of `work(i)`, i counting up, after two calls that are not counted."""
    started = time.perf_counter()
    seconds: list[float] = []
    for i in range(repeats + 2):
        synchronize(device)
        before = time.perf_counter()
        work(i)
        synchronize(device)
        seconds.append(time.perf_counter() - before)
        if len(seconds) > 3 and time.perf_counter() - started > cap:
            break
    return statistics.median(seconds[2:])


def measure_ceiling(bench: Bench, size: int) -> Ceiling:
    """Square matrix products, and copies, over buffers that together exceed any cache; outputs are poisoned first."""
    device, dtype = bench.device, bench.dtype
    pairs = [(torch.randn(size, size, device=device, dtype=dtype) / size**0.5) for _ in range(4)]
    outs = [torch.full((size, size), torch.nan, device=device, dtype=dtype) for _ in range(4)]

    def multiply(i: int) -> None:
        torch.mm(pairs[i % 4], pairs[(i + 1) % 4], out=outs[i % 4])

    def copy(i: int) -> None:
        outs[i % 4].copy_(pairs[i % 4])

    flops = 2 * size**3 / median_seconds(multiply, device, cap=bench.cap / 2)
    assert all(bool(out.isfinite().all()) for out in outs), "a matrix product was not computed"
    bandwidth = 2 * size**2 * dtype.itemsize / median_seconds(copy, device, cap=bench.cap / 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    bench.record(
        "ceiling", device=name, torch=torch.__version__, dtype=str(dtype), size=size,
        tflops=flops / 1e12, copy_tb_per_s=bandwidth / 1e12,
    )  # fmt: skip
    return Ceiling(flops, bandwidth)


@torch.no_grad()
def set_entropy(loaded: LoadedModel, prompts: Sequence[Prompt], wanted: float) -> float:
    """Scale the final norm until the mean entropy over the prompts' tokens is `wanted` nats; returns what it is."""
    packed = pack_sequences([(prompt.token_ids, ()) for prompt in prompts]).to(loaded.device)
    head = LanguageHead(loaded.model)
    norm = cast(Any, loaded.model.get_decoder()).norm.weight
    original = norm.clone()

    def entropy(factor: float) -> float:
        norm.copy_(original * factor)
        hidden = packed_hidden_states(loaded.model, packed)[:512]
        return float(entropy_of(head.logits(hidden)).mean())

    low, high = 0.0, 1.0
    while entropy(high) > wanted and high < 1e4:
        low, high = high, high * 2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(middle) > wanted else (low, middle)
    return entropy(high)


def make_prompts(shape: ModelShape, count: int, tokens: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocab, (count, tokens), generator=generator).tolist()
    return [Prompt(uid=f"p{i}", messages=(), text="", input=ModelInput.of(row)) for i, row in enumerate(ids)]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Groups of completions by prompt, and how long sampling took."""

    prompts: tuple[Prompt, ...]
    groups: tuple[tuple[Completion, ...], ...]
    seconds: float
    capped: bool

    @property
    def tokens(self) -> int:
        return sum(len(c.token_ids) for group in self.groups for c in group)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def rows(self) -> list[TrainingRow]:
        """With advantages of both signs, as a real batch has."""
        return [
            _training_row(number, prompt, completion, 1.0 if place % 2 else -1.0)
            for number, (prompt, group) in enumerate(zip(self.prompts, self.groups, strict=True))
            for place, completion in enumerate(group)
            if completion.token_ids
        ]


def _training_row(group: int, prompt: Prompt, completion: Completion, advantage: float) -> TrainingRow:
    tokens, count = completion.token_ids, len(completion.token_ids)
    return TrainingRow(
        group,
        prompt.input,
        ModelInput.of(tokens),
        (1,) * count,
        (advantage,) * count,
        completion.logprobs,
    )


async def sample(engine: NativeEngine, prompts: Sequence[Prompt], tokens: int, *, cap: float) -> Sampled:
    """`GROUP_SIZE` samples of each prompt; what is unfinished after `cap` seconds is kept as far as it got."""
    params = SamplingParams(max_tokens=tokens)

    async def one(prompt: Prompt) -> tuple[Completion, ...]:
        requests = [SampleRequest.of(prompt, i, params) for i in range(GROUP_SIZE)]
        found = [completion async for completion in engine.generate(requests)]
        return tuple(sorted(found, key=lambda completion: completion.sample_index))

    async def stop() -> None:
        await asyncio.sleep(cap)
        await engine.abort()

    started = time.perf_counter()
    work = asyncio.gather(*(one(prompt) for prompt in prompts))
    timer = asyncio.create_task(stop())
    await asyncio.wait({work, timer}, return_when=asyncio.FIRST_COMPLETED)
    if timer.done():
        timer.result()  # an abort that failed would leave the work unfinished for ever
    groups = await work
    seconds = time.perf_counter() - started
    timer.cancel()
    capped = any(c.finish_reason == "abort" for group in groups for c in group)
    return Sampled(tuple(prompts), tuple(groups), seconds, capped)


def measure_decode(bench: Bench, ceiling: Ceiling, samples: int) -> Sampled:
    """Tokens per second, prompts included; the floor is one reading of all weights, keys and values per step."""
    prompts = make_prompts(bench.shape, -(-samples // GROUP_SIZE), bench.prompt_tokens)
    count = len(prompts) * GROUP_SIZE
    engine = NativeEngine(bench.loaded, RolloutConfig(max_concurrent_samples=count))  # type: ignore[call-arg]
    asyncio.run(sample(engine, prompts, bench.tokens, cap=bench.cap))  # captures the graphs
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    found = asyncio.run(sample(engine, prompts, bench.tokens, cap=bench.cap))
    steps = max(1, max(len(c.token_ids) for group in found.groups for c in group))
    cached = bench.shape.kv_bytes(bench.dtype) * (len(prompts) * bench.prompt_tokens + count * steps / 2)
    read = bench.shape.weights * bench.dtype.itemsize + cached
    floor = max(read / ceiling.bandwidth, 2 * count * bench.shape.weights / ceiling.flops)
    per_step = found.seconds / steps
    bench.record(
        "decode", samples=count, prompt_tokens=bench.prompt_tokens, tokens=found.tokens, capped=found.capped,
        tokens_per_s=found.tokens_per_s, ms_per_step=per_step * 1e3, floor_ms_per_step=floor * 1e3,
        percent_of_floor=100 * floor / per_step, peak_gib=bench.peak_gib(),
    )  # fmt: skip
    return found


def training_flops(shape: ModelShape, packed: Packed) -> float:
    """Of one forward and backward pass; what is recomputed counts once: 6 per weight and token, and attention's.

    Attention multiplies each query with each key it sees, and each weight with a value: 4 · heads · head_dim
    operations a pair forward, twice that backward.
    """
    pairs = 0.0
    for segment in packed.segments:
        before = 0 if segment.prefix is None else packed.segments[segment.prefix].length
        pairs += segment.length * (segment.length + 1) / 2 + segment.length * before
    attention = 12 * shape.layers * shape.heads * shape.head_dim * pairs
    tokens = sum(segment.length for segment in packed.segments)
    return 6 * (shape.layer_weights * tokens + shape.head_weights * len(packed.targets)) + attention


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
    flops = sum(training_flops(bench.shape, p) for p in packed)
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


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second: decoded by number of samples, and trained on."""

    decode: dict[int, float]
    training: float


def measure_model(bench: Bench, ceiling: Ceiling, samples: Sequence[int]) -> Speed:
    """All sections of one model."""
    entropy = set_entropy(bench.loaded, make_prompts(bench.shape, 4, bench.prompt_tokens), ENTROPY)
    invariant = bench.loaded.batch_invariant
    name = next(name for name, shape in SHAPES.items() if shape == bench.shape)
    bench.record("model", model_shape=name, batch_invariant=invariant, entropy_nats=entropy, **asdict(bench.shape))
    found = {count: measure_decode(bench, ceiling, count) for count in samples}
    trained = measure_training(bench, ceiling, found[samples[-1]])
    return Speed({count: sampled.tokens_per_s for count, sampled in found.items()}, trained)


def record_price(bench: Bench, plain: Speed, invariant: Speed) -> None:
    """Tokens per second without `model.batch_invariant` by those with it: 2 is half as fast."""
    for count, speed in plain.decode.items():
        bench.record("price", part="decode", samples=count, times_slower=speed / invariant.decode[count])
    bench.record("price", part="training", times_slower=plain.training / invariant.training)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model-shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[64, 256], help="decoded together; the last are trained on"
    )
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of every completion")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--matmul-size", type=int, help="default: 8192 on a GPU, 512 on a CPU")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="measure a second time with model.batch_invariant, on a GPU"
    )
    parser.add_argument("--cap", type=float, default=120.0, help="seconds of each section")
    parser.add_argument("--json", type=Path, help="append each result to this file, one JSON object a line")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    device = resolve_device(args.device)
    if args.batch_invariant:
        require_gpu(device)
    dtype = resolve_dtype(args.dtype, device)
    shape = SHAPES[args.model_shape]
    bench = Bench(
        shape=shape,
        loaded=build_model(shape, device, dtype),
        prompt_tokens=args.prompt_tokens,
        tokens=args.tokens,
        micro_batch_tokens=args.micro_batch_tokens,
        cap=args.cap,
        out=args.json,
    )
    ceiling = measure_ceiling(bench, args.matmul_size or (8192 if device.type == "cuda" else 512))
    plain = measure_model(bench, ceiling, args.samples)
    if args.batch_invariant:
        bench = replace(bench, loaded=build_model(shape, device, dtype, batch_invariant=True))
        record_price(bench, plain, measure_model(bench, ceiling, args.samples))


if __name__ == "__main__":
    main()
