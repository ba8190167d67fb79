"""Decoding: tokens per second beside the least time that reading weights, keys and values takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from gpu.bench import Bench, Ceiling
from gpu.shapes import ModelShape
from groupwise.batches import TrainingRow
from groupwise.config import RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.inputs import ModelInput
from groupwise.model.forward.head import LanguageHead, entropy_of
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import pack_sequences
from groupwise.model.loading import LoadedModel
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

GROUP_SIZE = 8
ENTROPY = 1.0


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


def measure_decode(bench: Bench, ceiling: Ceiling, samples: int, *, graphs: bool = True) -> Sampled:
    """Tokens per second, prompts included; the floor is one reading of all weights, keys and values per step."""
    prompts = make_prompts(bench.shape, -(-samples // GROUP_SIZE), bench.prompt_tokens)
    count = len(prompts) * GROUP_SIZE
    engine = NativeEngine(bench.loaded, RolloutConfig(max_concurrent_samples=count))  # type: ignore[call-arg]
    if not graphs:
        engine._steps._graphs = engine._steps._ahead = None
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
        "decode", samples=count, graphs=graphs and bench.device.type == "cuda", prompt_tokens=bench.prompt_tokens,
        tokens=found.tokens, capped=found.capped, tokens_per_s=found.tokens_per_s, ms_per_step=per_step * 1e3,
        floor_ms_per_step=floor * 1e3, percent_of_floor=100 * floor / per_step, peak_gib=bench.peak_gib(),
    )  # fmt: skip
    return found
