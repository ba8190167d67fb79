"""Seconds and bytes of each way for weights to a real vLLM, in one run.

    python benchmarks/weights.py --vllm .venv-vllm/bin/python --rounds 5

One server takes versions of a model in bfloat16 by each way in turn. Between two versions every value moves by the
learning rate, up or down, in float32, as Adam's first steps move it, and is rounded: what stays the same then is what
`delta` leaves out. Nothing is drawn, so no proof is in the seconds; the worker compares every tensor on every way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

WAYS = ("directory", "ipc", "nccl", "delta")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"), help="where folders are written")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args(arguments)
    found = asyncio.run(measure(options))
    base = found["directory"]
    for name, row in found.items():
        print(
            f"{name:10} {row['seconds']:7.2f} s ({row['seconds'] / base['seconds']:4.2f})  "
            f"{row['bytes'] / 1e6:8.1f} MB ({row['bytes'] / base['bytes']:5.3f})"
        )
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "rows": found}))
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians by way, of rounds in which the ways take turns; the first is not counted."""
    import torch

    from groupwise.config import Config
    from groupwise.model.loading import load_model
    from groupwise.placement.elsewhere import engine_elsewhere
    from groupwise.weight_sync.ways import way_of

    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="groupwise-weights-", dir=options.place))
    model = {"path": str(made(folder / "model", options)), "dtype": "bfloat16", "device": "cpu"}
    rollout: dict[str, Any] = {"engine": "vllm", "launch": {"python": options.vllm}, "max_completion_tokens": 64}
    config = Config.model_validate({"model": model, "rollout": rollout})
    loaded = load_model(config.model)
    policy = Steps(loaded, lr=options.lr)
    engine = engine_elsewhere(config, loaded, length=128, logs=folder / "logs")
    ways = {
        name: way_of(
            config.rollout.model_copy(update={"weights_by": name}),
            policy,  # type: ignore[arg-type]
            engine,
            folder / name,
            adapter=False,
            leaves_none=True,
        )
        for name in WAYS
    }
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    sizes: dict[str, list[int]] = {name: [] for name in WAYS}
    for number in range(options.rounds + 1):
        policy.step(number)
        for name, way in ways.items():
            spent, size = await published(way, engine, number)
            if number:
                seconds[name].append(spent)
                sizes[name].append(size)
    await engine.close()
    for way in ways.values():
        await way.close()
    return {
        name: {"seconds": statistics.median(seconds[name]), "bytes": statistics.median(sizes[name])} for name in WAYS
    }


async def published(way: Any, engine: Any, version: int) -> tuple[float, int]:
    import time

    started = time.perf_counter()
    ref = await way.prepared(version)
    await engine.load(ref)
    size = way.taken(ref)
    return time.perf_counter() - started, size


def made(folder: Path, options: argparse.Namespace) -> Path:
    """A Qwen3 of this shape, with the tokenizer of the quickstart's tiny model."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from groupwise.quickstart.tiny_model import build_tokenizer

    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=max(1, options.width // 192),
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(shape).bfloat16().save_pretrained(folder)
    build_tokenizer(["a few words of text to make tokens of"], 270).save_pretrained(folder)
    return folder


class Steps:
    """A policy whose values move by the learning rate."""

    def __init__(self, loaded: Any, *, lr: float) -> None:
        self._loaded = loaded
        self._lr = lr
        self._masters = [weight.detach().float() for weight in loaded.model.parameters()]

    def step(self, seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        for master, weight in zip(self._masters, self._loaded.model.parameters(), strict=True):
            master += self._lr * (2 * torch.randint(0, 2, master.shape, generator=generator) - 1)
            weight.data.copy_(master)

    async def weights(self) -> Any:
        from groupwise.model.saved_weights import saved_weights

        return saved_weights(self._loaded.model)

    async def export(self, folder: Path, *, merged: bool = False) -> None:
        from groupwise.policy.saving import write_model

        await asyncio.to_thread(write_model, self._loaded, folder, merged=merged)


if __name__ == "__main__":
    main()
