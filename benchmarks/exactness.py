"""The price of exactness: the native engine beside the same engine without what exactness needs.

    python benchmarks/exactness.py --rounds 6 --json exactness.json    # the shapes of vs_trl.py, 64 x 128 tokens

All sides are one engine: its scheduler, keys, draws and records. The inexact ones have the Hugging Face module without
padded activations, prompts padded to one length, and in place of blocks of 64 keys and of sums of two segments
one dense slot per sample, prompt and completion, with a softmax over all its keys at once: `sdpa` by torch's
scaled_dot_product_attention, `products` by two batched products around a softmax.

They run in turns, in one process, on the same weights. The ratio is exact / fastest inexact, of medians. Before, each
side's samples are scored by the trainer's forward, which shows what is paid for: the exact side's differences are 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vs_trl import versions, write_inputs
from vs_trl_sides import Figure, Stopwatch

from groupwise.batches import TrainingRow
from groupwise.config import Config
from groupwise.data import load_prompts, read_rows
from groupwise.engines.native import NativeEngine
from groupwise.engines.native.ahead import Flight
from groupwise.engines.native.scheduler import PromptLane, Sample, Scheduler
from groupwise.engines.native.steps import Beginnings
from groupwise.inputs import ModelInput
from groupwise.model.fast_cpu.evenly import EvenActivation
from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.hidden_states import hidden_states
from groupwise.model.forward.packing import pack
from groupwise.model.loading import LoadedModel, load_model
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

INEXACT = ("sdpa", "products")
SIDES = ("exact", *INEXACT)


class DenseSteps:
    """Steps of an engine that need not be exact, and their own `Layout` (`model/forward/attention.py`), for samples
    that start and end together. Prompts are padded on the left, so that all samples write to one column of the cache
    `[2, layers, B, heads, T, size]`.
    """

    def __init__(self, loaded: LoadedModel, scheduler: Scheduler, *, attention: str) -> None:
        self._loaded = loaded
        self._scheduler = scheduler
        self._attention = attention

    def launch(self, running: Sequence[Sample], prompts: Sequence[PromptLane], before: Flight | None) -> None:
        """No step runs ahead of the host."""

    def prefill(
        self, admitted: Sequence[Sample], running: Sequence[Sample], prompts: Sequence[PromptLane]
    ) -> Beginnings:
        shape = self._scheduler.prompt_cache.shape
        self._width = width = max(len(lane.token_ids) for lane in prompts)
        self._column = -1
        missing = torch.tensor([width - len(lane.token_ids) for lane in prompts])
        tokens = torch.tensor([[0] * (width - len(lane.token_ids)) + list(lane.token_ids) for lane in prompts])
        places = torch.arange(width)
        seen = torch.ones(width, width, dtype=torch.bool).tril() & (places >= missing[:, None])[:, None]
        seen |= torch.eye(width, dtype=torch.bool)  # a padded row must see something, or it is not a number
        self._mask = _bias(seen, shape.dtype)[:, None]
        self._prompt = torch.zeros(2, shape.layers, len(prompts), shape.heads, width, shape.size, dtype=shape.dtype)
        position_ids = (places - missing[:, None]).clamp(min=0)
        hidden = hidden_states(self._loaded.model, tokens.flatten(), position_ids.flatten(), self)
        last = hidden.view(*tokens.shape, -1)[:, -1]
        for lane, row in zip(prompts, last, strict=True):
            lane.hidden = row
        owner = torch.tensor([next(i for i, lane in enumerate(prompts) if lane is s.prompt) for s in running])
        most = width + running[0].request.sampling.max_tokens
        self._cache = torch.zeros(2, shape.layers, len(running), shape.heads, most, shape.size, dtype=shape.dtype)
        self._cache[:, :, :, :, :width] = self._prompt[:, :, owner]
        self._mask = _bias(torch.arange(most) >= missing[owner][:, None], shape.dtype)[:, None, None]
        return Beginnings(
            last, [next(i for i, lane in enumerate(prompts) if lane is s.prompt) for s in admitted], list(admitted)
        )

    def forget(self) -> None:
        """Nothing to let go: what the next prompts need takes the place of the old."""

    def hidden(self, running: Sequence[Sample], prompts: Sequence[PromptLane]) -> Tensor:
        assert len(running) == self._cache.shape[2], "a sample ended before the others, or joined them"
        self._column = self._width + len(running[0].tokens) - 1
        tokens = torch.tensor([sample.tokens[-1] for sample in running])
        position_ids = torch.tensor([len(s.request.prompt.token_ids) + len(s.tokens) - 1 for s in running])
        return hidden_states(self._loaded.model, tokens, position_ids, self)

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert call.window is None, "sliding windows are not measured"
        if self._column < 0:
            return self._attend_prompts(call, query, key, value)
        until = self._column + 1
        self._cache[0, call.layer, :, :, self._column] = key
        self._cache[1, call.layer, :, :, self._column] = value
        keys, values = self._cache[:, call.layer, :, :, :until]
        rows = query.view(*key.shape[:2], -1, query.shape[-1])  # the query heads of one key head are rows of one matrix
        mask = self._mask[..., :until].expand(-1, -1, rows.shape[2], -1)
        if self._attention == "sdpa":
            out = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=call.scale)
        else:
            scores = rows @ keys.transpose(-1, -2) * call.scale + mask
            out = scores.softmax(-1, dtype=torch.float32).to(rows.dtype) @ values
        return out.reshape(query.shape)

    def _attend_prompts(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.view(-1, self._width, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        self._prompt[0, call.layer], self._prompt[1, call.layer] = k, v
        out = scaled_dot_product_attention(q, k, v, attn_mask=self._mask, scale=call.scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(query.shape)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)


def make_activations_plain(loaded: LoadedModel) -> None:
    """Activation functions as transformers has them, without the padding that makes them exact."""
    for module in list(loaded.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, EvenActivation):
                module.register_module(name, child.activation)


@dataclass(frozen=True, slots=True)
class Side:
    """One engine and the requests that it works on."""

    name: str
    engine: NativeEngine
    prompts: Sequence[Prompt]
    samples: int
    tokens: int

    @staticmethod
    def make(name: str, config: Config, *, prompts: int, tokens: int) -> Side:
        loaded = load_model(config.model)
        rows = load_prompts(read_rows(config.data.train), config.data, loaded.tokenizer).prompts[:prompts]
        engine = NativeEngine(loaded, config.rollout)
        if name != "exact":
            make_activations_plain(loaded)
            engine._steps = DenseSteps(loaded, engine._scheduler, attention=name)  # type: ignore[assignment]
        return Side(name, engine, rows, config.rollout.group_size, tokens)

    def sample(self, *, seed: int, temperature: float = 1.0) -> list[Completion]:
        params = SamplingParams(max_tokens=self.tokens, min_tokens=self.tokens, seed=seed, temperature=temperature)
        requests = [SampleRequest.of(prompt, i, params) for prompt in self.prompts for i in range(self.samples)]

        async def collect() -> list[Completion]:
            found = {completion.request_id: completion async for completion in self.engine.generate(requests)}
            return [found[request.id] for request in requests]

        return asyncio.run(collect())

    def turn(self, seed: int) -> Figure:
        watch = Stopwatch()
        watch.mark()
        count = sum(len(completion.token_ids) for completion in self.sample(seed=seed))
        watch.mark()
        assert count == len(self.prompts) * self.samples * self.tokens, f"{self.name} drew {count} tokens"
        return watch.rate(count)[0]


def check(side: Side, exact: Side, trainer: LoadedModel) -> dict[str, float]:
    """How far recorded log-probs are from the trainer's, and the share of greedy samples that equal the exact ones."""
    owners = [(number, prompt) for number, prompt in enumerate(side.prompts) for _ in range(side.samples)]
    ones, blank = (1,) * side.tokens, (0.0,) * side.tokens
    rows = [
        TrainingRow(
            number,
            prompt.input,
            ModelInput.of(completion.token_ids),
            ones,
            blank,
            completion.logprobs,
        )
        for (number, prompt), completion in zip(owners, side.sample(seed=0), strict=True)
    ]
    with torch.inference_mode():
        scored = trainer.scoring(pack(rows)).logprobs
    drift = (scored - torch.tensor([x for row in rows for x in row.logprobs])).abs()
    pairs = zip(side.sample(seed=0, temperature=0.0), exact.sample(seed=0, temperature=0.0), strict=True)
    equal = statistics.mean(mine.token_ids == theirs.token_ids for mine, theirs in pairs)
    return {"difference_max": float(drift.max()), "difference_mean": float(drift.mean()), "greedy_equal": equal}


def compare(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Turns of all sides in one dtype."""
    load = os.getloadavg()[0]
    sides = [Side.make(name, config, prompts=args.prompts, tokens=args.tokens) for name in SIDES]
    trainer = load_model(config.model)
    checks = {side.name: check(side, sides[0], trainer) for side in sides}  # and a warm-up
    assert checks["exact"]["difference_max"] == 0, f"the exact engine is not: {checks['exact']}"
    figures: dict[str, list[Figure]] = {name: [] for name in SIDES}
    for number in range(args.rounds):
        for side in sides:
            figures[side.name].append(side.turn(seed=number + 1))
    loads = {"load_before": load, "load_after": os.getloadavg()[0]}
    every = {name: [asdict(x) for x in found] for name, found in figures.items()}
    result: dict[str, Any] = {"dtype": config.model.dtype, **loads, "checks": checks, "figures": every}
    for clock in ("wall", "cpu"):
        median = {name: statistics.median(x[clock] for x in found) for name, found in every.items()}
        fastest = max(INEXACT, key=lambda name: median[name])
        result[clock] = {"median": median, "fastest": fastest, "ratio": median["exact"] / median[fastest]}
    return result


def show(result: dict[str, Any]) -> None:
    for name in SIDES:
        walls, check = [x["wall"] for x in result["figures"][name]], result["checks"][name]
        speeds = (*(result[clock]["median"][name] for clock in ("wall", "cpu")), min(walls), max(walls))
        shown = " | ".join(f"{speed:,.0f}" for speed in speeds)
        drift = f"{check['difference_max']:.2g} | {check['difference_mean']:.2g} | {check['greedy_equal']:.0%}"
        print(f"| {result['dtype']} | {name} | {shown} | {drift} |")
    for clock, label in (("wall", "the wall"), ("cpu", "processor time")):
        fastest, ratio = result[clock]["fastest"], result[clock]["ratio"]
        print(f"{result['dtype']}, by {label}: exact / {fastest} = {ratio:.3f}", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="5.8m", help="of the Qwen3, as of `groupwise model new`")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 is torch's own choice")
    parser.add_argument("--json", type=Path, help="write settings, versions and all figures here")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = {k: v for k, v in vars(args).items() if k != "json"} | {"threads": torch.get_num_threads()}
    print(" ".join(f"{k}={v}" for k, v in (versions() | setting).items()), flush=True)
    print("| dtype | side | tokens/s | by processor time | lowest | highest | difference max | mean | greedy equal |")
    print("|---|---|---|---|---|---|---|---|---|")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="groupwise-bench-") as folder:
        write_inputs(Path(folder), size=args.size)
        for dtype in args.dtypes:
            values = {
                "model": {"path": str(Path(folder) / "model"), "dtype": dtype, "device": "cpu"},
                "data": {"train": str(Path(folder) / "train.jsonl")},
                "rollout": {"group_size": args.samples},
            }
            results.append(compare(Config.model_validate(values), args))
            show(results[-1])
    if args.json:
        document = {"versions": versions(), "setting": setting, "results": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
