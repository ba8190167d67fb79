"""Tokens per second and mismatch of engines over one model, in one run: native, transformers' `generate`, vLLM.

    python benchmarks/engines.py --vllm .venv-vllm/bin/python --samples 64 --tokens 128 --rounds 3

All draw from the same prompts, on the same processor, in turn. The mismatch is the difference
between an engine's log-probs and the trainer's, in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; without, a tiny model is made")
    parser.add_argument("--size", default="5.8m", help="of that tiny model")
    parser.add_argument("--vllm", help="interpreter of an environment with vLLM; without, it is left out")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt; 8 samples share one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args(arguments)
    found = asyncio.run(measure(options))
    for name, row in found.items():
        print(
            f"{name:10} {row['tokens_per_second']:9.0f} tokens/s  {row['ratio']:5.2f} x native  "
            f"|d| mean {row['mean']:.2e} max {row['max']:.2e}"
        )
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "rows": found}))
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Numbers by engine: medians of the rounds, in which the engines take turns."""
    import torch

    from groupwise.config import Config
    from groupwise.engines.native import NativeEngine
    from groupwise.model.loading import load_model
    from groupwise.placement.elsewhere import engine_elsewhere

    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="groupwise-engines-"))
    path = options.model or tiny(folder / "model", options.size)
    rollout: dict[str, Any] = {"max_concurrent_samples": options.samples, "max_completion_tokens": options.tokens}
    model = {"path": str(path), "dtype": "float32", "device": "cpu"}
    config = Config.model_validate({"model": model, "rollout": rollout})
    loaded = load_model(config.model)
    requests = asked(loaded, options)
    native = NativeEngine(loaded, config.rollout)
    engines: dict[str, Any] = {"native": native}
    if options.vllm:
        launch = {**rollout, "engine": "vllm", "launch": {"python": options.vllm}}
        outside = Config.model_validate({"model": model, "rollout": launch})
        vllm = engine_elsewhere(outside, loaded, length=options.prompt + options.tokens, logs=folder / "logs")
        await publish(vllm, loaded, folder / "weights")
        engines["vllm"] = vllm
    rates: dict[str, list[float]] = {name: [] for name in (*engines, "generate")}
    gaps: dict[str, list[float]] = {}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, engine in engines.items():
            started = time.perf_counter()
            drawn = [one async for one in engine.generate(requests)]
            spent = time.perf_counter() - started
            if number:
                rates[name].append(sum(len(one.token_ids) for one in drawn) / spent)
            else:
                gaps[name] = differences(loaded, requests, drawn)
        spent, gap = with_generate(loaded, requests, options.tokens)
        if number:
            rates["generate"].append(options.samples * options.tokens / spent)
        else:
            gaps["generate"] = gap
    if options.vllm:
        await engines["vllm"].close()
    base = statistics.median(rates["native"])
    return {
        name: {
            "tokens_per_second": statistics.median(rate),
            "ratio": statistics.median(rate) / base,
            "mean": sum(gaps[name]) / len(gaps[name]),
            "max": max(gaps[name]),
        }
        for name, rate in rates.items()
    }


def tiny(folder: Path, size: str) -> Path:
    from groupwise.quickstart.tiny_model import build_tiny_model

    build_tiny_model(folder, texts=["a few words of text to make tokens of"] * 4, size=size, vocab_size=2048)
    return folder


def asked(loaded: Any, options: argparse.Namespace) -> list[Any]:
    """Eight samples of each prompt. A few end by themselves: to forbid it would change what vLLM calls a log-prob."""
    from groupwise.inputs import ModelInput, SampleKey
    from groupwise.types import SampleRequest, SamplingParams

    vocabulary = loaded.model.config.vocab_size
    stops = set(loaded.stop_token_ids)
    loaded_stops = [token for token in range(vocabulary) if token not in stops]
    sampling = SamplingParams(max_tokens=options.tokens)
    return [
        SampleRequest(
            SampleKey(f"prompt-{number // 8}", 0, number % 8),
            ModelInput.of([loaded_stops[(3 + 7 * number // 8 * i) % len(loaded_stops)] for i in range(options.prompt)]),
            sampling,
        )
        for number in range(options.samples)
    ]


async def publish(engine: Any, loaded: Any, folder: Path) -> None:
    """The weights to an engine that the run starts."""
    from groupwise.engines.weights import WeightRef
    from groupwise.policy.saving import write_model
    from groupwise.weight_sync.folder import add_manifest, weights_bytes

    folder.mkdir(parents=True)
    place = folder / "version_000000"
    write_model(loaded, place)
    add_manifest(place, version=0)
    await engine.load(WeightRef(0, place, "model", weights_bytes(place)))


def differences(loaded: Any, requests: Sequence[Any], drawn: Sequence[Any]) -> list[float]:
    """Between the log-probs that came and the trainer's."""
    import torch

    from groupwise.batches import TrainingRow
    from groupwise.inputs import ModelInput
    from groupwise.model.forward.packing import pack
    from groupwise.tensors import floats

    by_key, found = {one.key: one for one in drawn}, list[float]()
    for request in requests[:16]:
        one = by_key[request.key]
        zeros = (0.0,) * len(one.token_ids)
        row = TrainingRow(
            prompt=request.prompt,
            follows=ModelInput.of(one.token_ids),
            logprobs=zeros,
            advantages=zeros,
            loss_mask=(1,) * len(zeros),
            group=0,
        )
        with torch.no_grad():
            own = floats(loaded.scoring(pack([row]), temperature=1.0, chunk_tokens=1024).logprobs)
        found += [abs(a - b) for a, b in zip(own, one.logprobs, strict=True)]
    return found


def with_generate(loaded: Any, requests: Sequence[Any], tokens: int) -> tuple[float, list[float]]:
    """Seconds of transformers' own loop, and how far its log-probs are from the trainer's."""
    import torch

    from groupwise.types import Completion

    prompts = torch.tensor([list(request.prompt.token_ids) for request in requests])
    held = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("sdpa")
    try:
        started = time.perf_counter()
        out = loaded.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        spent = time.perf_counter() - started
    finally:
        loaded.model.set_attn_implementation(held)
    drawn = out.sequences[:, prompts.shape[1] :]
    logits = torch.stack(out.logits, dim=1).float()
    logprobs = torch.log_softmax(logits, -1).gather(-1, drawn[..., None])[..., 0]
    made = [
        Completion(r.key, tuple(t.tolist()), tuple(v.tolist()), (0,) * tokens, "", "length")
        for r, t, v in zip(requests, drawn, logprobs, strict=True)
    ]
    return spent, differences(loaded, requests, made)


if __name__ == "__main__":
    main()
