"""What it costs to learn in a thread of its own: sampling and learning, side by side with learning on the event loop.

    python benchmarks/off_loop.py --size 0.6m --threads 2 --rounds 3

Each round is two processes, one after the other, because the threads that one way has made would be there in the other.
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

WAYS = ("loop", "thread")
GROUPS, SIZE, TOKENS, WARM = 4, 8, 48, 3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.6m", help="of the tiny model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.way:
        asyncio.run(measure(options))
        return
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--size", options.size]
            command += ["--threads", str(options.threads), "--steps", str(options.steps)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})


async def measure(options: argparse.Namespace) -> None:
    """Prints the medians of one way."""
    import torch

    from groupwise.policy import LocalPolicy
    from groupwise.policy.microbatches import cut_batch

    torch.set_num_threads(options.threads)
    learner, engine = parts(options.size)
    policy, budget = LocalPolicy(learner, micro_batch_tokens=512), 512
    sampled, learned = [], []
    for step in range(options.steps + WARM):
        started = time.perf_counter()
        batch = await sample(engine, step)
        between = time.perf_counter()
        if options.way == "loop":
            learner.learn(cut_batch(batch, budget, streams=learner.streams.count), batch.denominators)
            learner.optim_step()
        else:
            from groupwise.batches import Knobs

            await policy.learn(batch, Knobs())
            await policy.optim_step()
        sampled.append(between - started)
        learned.append(time.perf_counter() - between)
    times = [1000 * statistics.median(seconds[WARM:]) for seconds in (sampled, learned)]
    least = 1000 * min(learned[WARM:])
    print(
        f"{options.way:6}  sampling {times[0]:7.1f} ms  learning {times[1]:7.1f} ms, at least {least:.1f} ms",
        flush=True,
    )
    await policy.close()


def parts(size: str) -> tuple[Any, Any]:
    """A learner and an engine over one tiny model."""
    from groupwise.algorithms import build_algorithm
    from groupwise.config import AlgorithmConfig, ModelConfig, OptimConfig, RolloutConfig, TrainConfig
    from groupwise.engines.native import NativeEngine
    from groupwise.model.loading import load_model
    from groupwise.policy import Learner
    from groupwise.quickstart.tiny_model import build_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        build_tiny_model(path, texts=["one two"], size=size, vocab_size=259)
        loaded = load_model(ModelConfig.model_validate({"path": str(path), "device": "cpu", "dtype": "float32"}))
    algorithm = build_algorithm(AlgorithmConfig.model_validate({}))
    optim, train = OptimConfig.model_validate({"lr": 1e-6}), TrainConfig.model_validate({})
    learner = Learner(loaded, algorithm, optim=optim, train=train, total_updates=10**6)
    return learner, NativeEngine(loaded, RolloutConfig.model_validate({}))


async def sample(engine: Any, seed: int) -> Any:
    """A batch of the engine's own samples, with advantages of both signs."""
    from groupwise.batches import Denominators, MiniBatch, TrainingRow
    from groupwise.inputs import ModelInput
    from groupwise.types import Prompt, SampleRequest, SamplingParams

    prompts = {f"p{g}": Prompt(f"p{g}", (), "", ModelInput.of(range(5 + g, 29 + g))) for g in range(GROUPS)}
    sampling = SamplingParams(max_tokens=TOKENS, seed=seed)
    requests = [SampleRequest.of(prompt, i, sampling) for prompt in prompts.values() for i in range(SIZE)]
    done = sorted([c async for c in engine.generate(requests)], key=lambda c: (c.key.uid, c.sample_index))
    rows: list[TrainingRow] = []
    for c in done:
        count, sign = len(c.token_ids), 1.0 if c.sample_index % 2 else -1.0
        follows, prompt = ModelInput.of(c.token_ids), prompts[c.key.uid].input
        rows.append(TrainingRow(int(c.key.uid[1:]), prompt, follows, (1,) * count, (sign,) * count, tuple(c.logprobs)))
    tokens = float(sum(len(row.token_ids) for row in rows))
    return MiniBatch(tuple(rows), Denominators(tokens, float(len(rows)), float(TOKENS)))


if __name__ == "__main__":
    main()
