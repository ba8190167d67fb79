"""All parts in turn, each in a process of its own with a limit: what hangs or ends badly takes no other part along."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.bench import write_record

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Part:
    """A command with its limit in seconds; `tiny` takes the place of its arguments in a rehearsal."""

    name: str
    command: tuple[str, ...]
    seconds: float
    tiny: tuple[str, ...] = ()


_SELF = (sys.executable, str(Path(__file__).parent))
_TINY = ("--model-shape", "tiny", "--device", "cpu", "--dtype", "float32", "--samples", "8", "--tokens", "6")
PARTS = (
    Part("tests", (sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "tests/gpu"), 150),
    Part("0.6b", (*_SELF, "model", "--samples", "64", "256", "512", "--eager", "--batch-invariant"), 150,
         (*_SELF, "model", *_TINY, "--prompt-tokens", "9", "--matmul-size", "64")),
    Part("vllm", (*_SELF, "vllm", "--samples", "64", "256", "512"), 150),
    Part("learning", (*_SELF, "learning"), 120,
         (*_SELF, "learning", "--device", "cpu", "--steps", "4", "--warm-up-steps", "3")),
    Part("1.7b", (*_SELF, "model", "--model-shape", "1.7b", "--cap", "30"), 90),
    Part("8b", (*_SELF, "model", "--model-shape", "8b", "--lora-rank", "16", "--cap", "30"), 120),
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the parts that are asked for until the time is up; exits with 1 if one of them failed."""
    end = time.monotonic() + args.seconds
    failed = False
    for part in _wanted(args.only):
        command = _command(part, args)
        if not command:
            continue
        left = end - time.monotonic()
        if left < 10:
            write_record(args.json, "part", part=part.name, outcome="no time was left")
            continue
        failed |= not _run_part(part.name, command, min(part.seconds, left), args.json)
    if failed:
        raise SystemExit(1)


def _wanted(names: Sequence[str] | None) -> list[Part]:
    known = [part.name for part in PARTS]
    if unknown := sorted({*(names or ())} - {*known}):
        raise SystemExit(f"no part is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [part for part in PARTS if names is None or part.name in names]


def _command(part: Part, args: argparse.Namespace) -> tuple[str, ...]:
    """Empty for a part that is left out: one that cannot be rehearsed, and vLLM where nobody says where it is."""
    command = part.tiny if args.rehearse else part.command
    if part.name == "vllm":
        command = () if args.site is None or args.rehearse else (*command, "--site", str(args.site))
    if command and part.name != "tests" and args.json is not None:
        command += ("--json", str(args.json))
    return command


def _run_part(name: str, command: Sequence[str], seconds: float, out: Path | None) -> bool:
    """Whether it ended well; it and its children are killed at the limit."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
        outcome = "ok" if code == 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        outcome = "cut at its limit"
    write_record(out, "part", part=name, outcome=outcome, seconds=time.monotonic() - started)
    return outcome == "ok"
