"""Tokens per second of `groupwise serve` under many clients, beside the engine in process, in turns.

python benchmarks/serve.py --clients 64 --tokens 128 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

Prompts: TypeAlias = Sequence[Sequence[int]]
Way: TypeAlias = Callable[[], Awaitable[None]]
"""Draws one sample of each prompt."""


def main(arguments: list[str] | None = None) -> float:
    """Prints both, and returns the server's part of the engine's tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="5.8m", help="of the tiny model")
    parser.add_argument("--clients", type=int, default=64, help="each asks for one sample at a time")
    parser.add_argument("--tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the server, and of the engine in process")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(options, Path(folder) / "model"))


async def measure(options: argparse.Namespace, folder: Path) -> float:
    import torch

    from groupwise.quickstart.tiny_model import build_tiny_model

    torch.set_num_threads(options.threads)
    build_tiny_model(folder, texts=["a few words of text"] * 4, size=options.size, vocab_size=2048)
    prompts = [[5 + (11 * number + i) % 500 for i in range(32)] for number in range(options.clients)]
    with served(folder, threads=options.threads) as url:
        ways = {"in process": in_process(folder, prompts, options.tokens), "served": over(url, prompts, options.tokens)}
        seconds = await in_turns(ways, rounds=options.rounds)
    total = options.clients * options.tokens
    rates = {name: total / statistics.median(spent) for name, spent in seconds.items()}
    ratio = rates["served"] / rates["in process"]
    print(
        f"{options.clients} clients x {options.tokens} tokens: {rates['in process']:.0f} tokens/s in process, "
        f"{rates['served']:.0f} served: {ratio:.2f}"
    )
    return ratio


def in_process(folder: Path, prompts: Prompts, tokens: int) -> Way:
    """The engine, asked for a sample of each prompt."""
    from groupwise.config import Config
    from groupwise.engines.native import NativeEngine
    from groupwise.inputs import ModelInput, SampleKey
    from groupwise.model.loading import load_model
    from groupwise.types import SampleRequest, SamplingParams

    config = Config.model_validate({"model": {"path": str(folder), "dtype": "float32", "device": "cpu"}})
    engine = NativeEngine(load_model(config.model), config.rollout)
    sampling = SamplingParams(max_tokens=tokens, min_tokens=tokens)

    async def way() -> None:
        requests = [
            SampleRequest(SampleKey(str(number), 0, 0), ModelInput.of(prompt), sampling)
            for number, prompt in enumerate(prompts)
        ]
        assert len([one async for one in engine.generate(requests)]) == len(prompts)

    return way


def over(url: str, prompts: Prompts, tokens: int) -> Way:
    """A client of the server for each prompt, all at once."""
    import httpx

    clients = [httpx.AsyncClient(base_url=url, timeout=None) for _ in prompts]
    sampled: dict[str, Any] = {"max_tokens": tokens, "min_tokens": tokens, "seed": 1}

    async def way() -> None:
        asked = [
            client.post("/v1/completions", json={"prompt": prompt} | sampled)
            for client, prompt in zip(clients, prompts, strict=True)
        ]
        answers = await asyncio.gather(*asked)
        assert sum(one.json()["usage"]["completion_tokens"] for one in answers) == len(prompts) * tokens

    return way


@contextmanager
def served(folder: Path, *, threads: int) -> Iterator[str]:
    """A server of the model, in a process of its own, at the address that is given."""
    command = [sys.executable, "-m", "groupwise.cli", "serve", str(folder), "--port", "0"]
    command += ["--model.dtype", "float32", "--model.device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().rsplit(" ", 1)[1].strip()
    finally:
        server.terminate()
        server.wait()


async def in_turns(ways: Mapping[str, Way], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first one warms up
        for name, way in ways.items():
            started = time.perf_counter()
            await way()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
