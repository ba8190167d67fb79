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
from pathlib import Path
from typing import Any


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
    import httpx
    import torch

    from groupwise.config import Config
    from groupwise.engines.native import NativeEngine
    from groupwise.inputs import ModelInput, SampleKey
    from groupwise.model.loading import load_model
    from groupwise.quickstart.tiny_model import build_tiny_model
    from groupwise.types import SampleRequest, SamplingParams

    torch.set_num_threads(options.threads)
    build_tiny_model(folder, texts=["a few words of text"] * 4, size=options.size, vocab_size=2048)
    config = Config.model_validate({"model": {"path": str(folder), "dtype": "float32", "device": "cpu"}})
    loaded = load_model(config.model)
    engine = NativeEngine(loaded, config.rollout)
    sampling = SamplingParams(max_tokens=options.tokens, min_tokens=options.tokens)
    prompts = [[5 + (11 * number + i) % 500 for i in range(32)] for number in range(options.clients)]

    async def in_process() -> None:
        requests = [
            SampleRequest(SampleKey(str(number), 0, 0), ModelInput.of(prompt), sampling)
            for number, prompt in enumerate(prompts)
        ]
        assert len([one async for one in engine.generate(requests)]) == options.clients

    command = [sys.executable, "-m", "groupwise.cli", "serve", str(folder), "--port", "0"]
    command += ["--model.dtype", "float32", "--model.device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().rsplit(" ", 1)[1].strip()
        clients = [httpx.AsyncClient(base_url=url, timeout=None) for _ in range(options.clients)]

        async def over_the_wire() -> None:
            asked = [
                client.post("/v1/completions", json={"prompt": prompt, "seed": 1} | sampled)
                for client, prompt in zip(clients, prompts, strict=True)
            ]
            answers = await asyncio.gather(*asked)
            assert sum(one.json()["usage"]["completion_tokens"] for one in answers) == len(prompts) * options.tokens

        sampled: dict[str, Any] = {"max_tokens": options.tokens, "min_tokens": options.tokens}
        seconds: dict[str, list[float]] = {"in process": [], "served": []}
        for number in range(options.rounds + 1):  # the first one warms up
            for name, way in (("in process", in_process), ("served", over_the_wire)):
                started = time.perf_counter()
                await way()
                if number:
                    seconds[name].append(time.perf_counter() - started)
    finally:
        server.terminate()
        server.wait()
    total = options.clients * options.tokens
    rates = {name: total / statistics.median(spent) for name, spent in seconds.items()}
    ratio = rates["served"] / rates["in process"]
    print(
        f"{options.clients} clients x {options.tokens} tokens: {rates['in process']:.0f} tokens/s in process, "
        f"{rates['served']:.0f} served: {ratio:.2f}"
    )
    return ratio


if __name__ == "__main__":
    main()
