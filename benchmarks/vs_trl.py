"""Groupwise beside its peers, in one run: the built-in engine against `model.generate`, a GRPO step against TRL's.

    python benchmarks/vs_trl.py                      # 8 prompts x 8 samples x 128 tokens, a 5.8 M Qwen3 in float32
    python benchmarks/vs_trl.py --part engine --rounds 5 --json result.json

Each side is a process of its own that loads once and then works only when told to, so the two take turns: A B A B. Both
have the same weights, prompts, group size, length (every completion has exactly `--tokens`), KL coefficient, thread
count and reward. The first pass of each process, and the first step of each training run, are not counted. Besides the
clock on the wall, processor time is given: with `--threads 1` it says something on a busy machine, too.

`trl` is TRL as it comes, except for bfloat16: it computes activations again in the backward pass (gradient
checkpointing). `trl-keeping` keeps them, which takes memory and saves time; Groupwise keeps them by default.

Needs the extra `bench` (TRL) for the step; the engine part needs nothing beyond Groupwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from vs_trl_sides import ROWS, SIDES, Figure, Setting

PARTS = {"engine": ("generate", "native"), "step": ("trl", "trl-keeping", "groupwise")}  # ours is the last
UNITS = {"engine": "tokens/s", "step": "s/step"}
TARGETS = {"engine": "at least 1.5", "step": "at most 0.5"}


def child(side: str, setting: Setting) -> None:
    """Prepare, then do one pass for each line of standard input, and write its figures as a line of JSON."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; the channel is for figures alone
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import torch

    torch.set_num_threads(setting.threads)
    run = SIDES[side](setting)
    for _ in sys.stdin:
        channel.write(json.dumps([asdict(figure) for figure in run()]) + "\n")


class Side:
    """One child process and the figures that it gave."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self.figures: list[Figure] = []
        self._log = Path(setting.folder) / f"{name}.log"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", name, "--setting", json.dumps(asdict(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            bufsize=1,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def turn(self, *, counted: bool = True) -> None:
        found: list[dict[str, float]] = []
        try:
            _pipe(self._process.stdin).write("go\n")
            found = json.loads(_pipe(self._process.stdout).readline() or "[]")
        except BrokenPipeError:
            pass
        if not found:
            raise SystemExit(f"{self.name} failed:\n" + self._log.read_text("utf-8")[-3000:])
        if counted:
            self.figures += [Figure(**figure) for figure in found]

    def close(self) -> None:
        _pipe(self._process.stdin).close()
        self._process.wait(timeout=60)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "the child was started without pipes"
    return pipe


def write_inputs(folder: Path, *, size: str, rows: int = ROWS) -> None:
    """A fresh model and a file of word problems; the same every time."""
    from groupwise.quickstart.tiny_model import build_tiny_model

    rng = random.Random(0)
    lines: list[str] = []
    for _ in range(rows):
        a, b, c = rng.randint(10, 40), rng.randint(2, 20), rng.randint(2, 9)
        name, thing = rng.choice(["Anna", "Ben", "Mia", "Tom"]), rng.choice(["apples", "books", "coins", "pens"])
        story = f"{name} has {a} {thing}, buys {b} more and gives {c} away. How many {thing} are there now?"
        row = {"prompt": [{"role": "user", "content": story}], "data_source": "benchmark", "answer": str(a + b - c)}
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    build_tiny_model(folder / "model", texts=lines, size=size)


def compare(part: str, setting: Setting, rounds: int) -> dict[str, Any]:
    """Let the sides of a part take turns; returns figures, medians and the ratios of ours to each of the others."""
    load = os.getloadavg()[0]
    sides = [Side(name, setting) for name in PARTS[part]]
    if part == "engine":  # a training run has a warm-up step of its own
        for side in sides:
            side.turn(counted=False)
    for number in range(rounds):
        for side in sides:
            before = len(side.figures)
            side.turn()
            latest = ", ".join(f"{x.wall:.4g} (processor: {x.cpu:.4g})" for x in side.figures[before:])
            print(f"  round {number + 1}/{rounds}  {side.name:<12} {latest} {UNITS[part]}", flush=True)
    for side in sides:
        side.close()
    clocks: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        figures = {side.name: [asdict(figure)[clock] for figure in side.figures] for side in sides}
        median = {name: statistics.median(numbers) for name, numbers in figures.items()}
        *peers, own = PARTS[part]
        ratios = {peer: median[own] / median[peer] for peer in peers}
        clocks[clock] = {"figures": figures, "median": median, "ratios": ratios}
    loads = {"load_before": load, "load_after": os.getloadavg()[0]}
    return {"part": part, "unit": UNITS[part], "target": TARGETS[part], **loads, **clocks}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    for name in ("torch", "transformers", "trl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def report(results: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'part':<8}{'side':<12}{'clock':<6}{'median':>10}{'min':>10}{'max':>10}  unit")
    for result in results:
        *peers, own = PARTS[result["part"]]
        for clock in ("wall", "cpu"):
            for name, figures in result[clock]["figures"].items():
                numbers = "".join(f"{x:>10.4g}" for x in (statistics.median(figures), min(figures), max(figures)))
                print(f"{result['part']:<8}{name:<12}{clock:<6}{numbers}  {result['unit']}")
        for peer in peers:
            wall, cpu = (result[clock]["ratios"][peer] for clock in ("wall", "cpu"))
            print(f"{'':<8}{own} / {peer}: {wall:.2f} by the wall, {cpu:.2f} by processor time")
        load = f"load average {result['load_before']:.1f} before, {result['load_after']:.1f} after"
        print(f"{'':<8}target: {result['target']}; {load}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--samples", type=int, default=8, help="samples per prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of every completion")
    parser.add_argument("--size", default="5.8m", help="tiny model: 0.1m, 0.6m, 1.5m or 5.8m")
    parser.add_argument("--kl-coef", type=float, default=0.001)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="counted steps in one turn")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each side; 0 is torch's own choice")
    parser.add_argument("--trl-batch", type=int, default=0, help="per_device_train_batch_size; 0 is all samples")
    parser.add_argument("--json", type=Path, help="write settings, versions and all figures here")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.child:
        child(args.child, Setting(**json.loads(args.setting)))
        return
    with tempfile.TemporaryDirectory(prefix="groupwise-bench-") as folder:
        write_inputs(Path(folder), size=args.size)
        import torch

        setting = Setting(
            folder=folder,
            prompts=args.prompts,
            samples=args.samples,
            tokens=args.tokens,
            kl_coef=args.kl_coef,
            threads=args.threads or torch.get_num_threads(),
            steps=args.steps,
            trl_batch=args.trl_batch or args.prompts * args.samples,
        )
        shown = {"size": args.size, **{k: v for k, v in asdict(setting).items() if k != "folder"}}
        print(" ".join(f"{k}={v}" for k, v in (versions() | shown).items()), flush=True)
        wanted = PARTS if args.part == "all" else (args.part,)
        results: list[dict[str, Any]] = []
        for part in wanted:
            results.append(compare(part, setting, args.rounds))
            if args.json:  # after each part: a long run that is cut short keeps what it found
                document = {"versions": versions(), "setting": shown, "results": results}
                args.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    report(results)


if __name__ == "__main__":
    main()
