"""Kills runs at random moments, goes on with them, and compares with runs that nobody killed, bit for bit.

    python benchmarks/chaos.py --kills 200 --seed 1 --output chaos.json

Each mode trains a tiny model of its own through the `groupwise` command: once undisturbed, and then again and again
with kill -9 at a random moment, from the start of the process on. What was killed is resumed (a plain start where it
had not begun), killed again, and so on until it is done; weights and ledger must then be those of the undisturbed run.
Of the moments, a part are random points of a run's length and a part come right after a file appears.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

STEPS = 6
MODES = ("grpo", "sft", "lora", "batches")
WORDS = ("red", "green", "blue", "one", "two", "three", "four", "five")
REWARD = """
def low(completion_ids, **columns):
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]
"""


@dataclass(frozen=True, slots=True)
class Task:
    """Files that every run of the campaign uses."""

    folder: Path

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    def make(self) -> None:
        from groupwise.quickstart.tiny_model import build_tiny_model

        rows = [{"prompt": f"say {word}:", "completion": f" {word}", "answer": word} for word in WORDS]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.folder / "rewards.py").write_text(REWARD)
        build_tiny_model(self.folder / "model", texts=WORDS, size="0.1m", vocab_size=259)

    def command(self, mode: str, output: Path) -> list[str]:
        flags = ["--model", str(self.folder / "model"), "--data", str(self.rows), "--output", str(output)]
        flags += ["--optim.lr", "0.003", "--train.steps", str(STEPS), "--train.save_every", "2"]
        flags += ["--tracking.backends", "jsonl"]
        if mode == "sft":
            return ["sft", *flags, "--sft.rows_per_step", "3"]
        flags += ["--reward", f"{self.folder / 'rewards.py'}:low", "--rollout.group_size", "4"]
        flags += ["--rollout.prompts_per_step", "4", "--rollout.max_completion_tokens", "8"]
        extra = {"lora": ["--lora.rank", "4"], "batches": ["--optim.steps_per_batch", "2"]}
        return ["train", *flags, *extra.get(mode, [])]


@dataclass(slots=True)
class Result:
    """What the campaign found; `faults` is empty where everything held.

    Attributes:
        kills: processes that a kill -9 ended. before_checkpoint: those that had no checkpoint yet.
        runs: killed runs that came to their end, all equal to the undisturbed one unless a fault says so.
        refused: changed inputs and second processes that were refused, as they must be.
    """

    kills: int = 0
    before_checkpoint: int = 0
    runs: int = 0
    refused: int = 0
    by_mode: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    def __init__(self, task: Task, seed: int, *, deadline: float) -> None:
        self.task = task
        self.random = random.Random(seed)
        self.deadline = deadline
        self.result = Result()
        self.wanted: dict[str, str] = {}
        self.lengths: dict[str, float] = {}

    def measure(self, mode: str) -> None:
        """The undisturbed run, and how long it takes."""
        output, began = self.task.folder / f"{mode}-whole", time.monotonic()
        process = self.start(self.task.command(mode, output))
        _, errors = process.communicate(timeout=300)
        if process.returncode:
            raise SystemExit(f"the undisturbed run of {mode} failed: {errors}")
        self.lengths[mode] = time.monotonic() - began
        self.wanted[mode] = fingerprint(output)

    def run(self, mode: str, number: int, *, kills: int, pairs: bool, changes: bool) -> None:
        """One run with `kills` kills at most, and then to its end."""
        output = self.task.folder / f"{mode}-{number}"
        for k in range(kills):
            self.kill_once(mode, output, pair=pairs and k == 0)
            if changes and (output / "checkpoints" / "latest").exists():
                self.must_refuse_changes(mode, output)
                changes = False
        if pairs:
            self.two_at_once(mode, output)
        else:
            self.finish(mode, output)
        self.result.runs += 1
        if (found := fingerprint(output)) != self.wanted[mode]:
            self.result.faults.append(f"{output.name}: got {found}, expected {self.wanted[mode]}")

    def kill_once(self, mode: str, output: Path, *, pair: bool) -> None:
        process = self.start(self.next_command(mode, output))
        second = self.start(self.next_command(mode, output)) if pair else None
        until = time.monotonic() + self.random.uniform(0.0, 1.1 * self.lengths[mode])
        watched = output / self.random.choice(["config.json", "ledger.jsonl", "checkpoints/latest", "final", "nothing"])
        while time.monotonic() < until and process.poll() is None and not watched.exists():
            time.sleep(0.01)
        if watched.exists() and watched.name != "nothing":
            time.sleep(self.random.uniform(0.0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            self.result.kills += 1
            self.result.by_mode[mode] = self.result.by_mode.get(mode, 0) + 1
            self.result.before_checkpoint += not (output / "checkpoints" / "latest").exists()
        process.communicate()
        if second is not None:
            self.judge(second, output, allowed=("live run", "not empty"))

    def finish(self, mode: str, output: Path) -> None:
        process = self.start(self.next_command(mode, output))
        self.judge(process, output, allowed=())

    def two_at_once(self, mode: str, output: Path) -> None:
        """Two processes go on with one directory: one does it, the other is refused."""
        pair = [self.start(self.next_command(mode, output)) for _ in range(2)]
        for process in pair:
            self.judge(process, output, allowed=("live run", "not empty"))
        self.finish(mode, output)

    def must_refuse_changes(self, mode: str, output: Path) -> None:
        rows = self.task.rows.read_text()
        name = self.random.choice(["rows", "order", "config"])
        config = output / "config.json"
        before = config.read_text()
        if name == "rows":
            self.task.rows.write_text(rows.replace('"answer": "two"', '"answer": "2"').replace(" two", " 2"))
        elif name == "order":
            self.task.rows.write_text("".join(reversed(rows.splitlines(keepends=True))))
        else:
            config.write_text(before.replace('"lr": 0.003', '"lr": 0.004'))
        process = self.start([self.task.command(mode, output)[0], "--resume", "--output", str(output)])
        _, errors = process.communicate(timeout=120)
        self.task.rows.write_text(rows)
        config.write_text(before)
        if process.returncode == 2 and "would change it" in errors:
            self.result.refused += 1
        else:
            self.result.faults.append(f"{output.name}: changed {name} was not refused: {process.returncode} {errors}")

    def judge(self, process: subprocess.Popen[str], output: Path, *, allowed: tuple[str, ...]) -> None:
        try:
            _, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            self.result.faults.append(f"{output.name}: hung")
            return
        if process.returncode == 2 and any(text in " ".join(errors.split()) for text in allowed):
            self.result.refused += 1
        elif process.returncode:
            self.result.faults.append(f"{output.name}: exit code {process.returncode}: {errors[-600:]}")

    def next_command(self, mode: str, output: Path) -> list[str]:
        """As a user would: --resume where there is something, a plain start where nothing was begun."""
        begun = (output / "config.json").exists()
        return self.task.command(mode, output) + (["--resume"] if begun else [])

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "groupwise.cli", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def fingerprint(run: Path) -> str:
    """Of the weights and, where there is one, the ledger."""
    digest = hashlib.blake2b(digest_size=8)
    for file in (*sorted((run / "final").glob("*.safetensors")), run / "ledger.jsonl"):
        digest.update(file.read_bytes() if file.exists() else b"none")
    return digest.hexdigest()


def campaign(*, kills: int, seed: int, seconds: float, modes: tuple[str, ...], options: frozenset[str]) -> Result:
    """Until there were so many kills, or so many seconds have passed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        task = Task(Path(folder))
        task.make()
        found = Campaign(task, seed, deadline=began + seconds)
        number = 0
        while found.result.kills < kills and time.monotonic() < found.deadline:
            mode = modes[number % len(modes)]
            if mode not in found.wanted:
                found.measure(mode)
            most = min(kills - found.result.kills, found.random.randint(3, 7))
            pairs = "pairs" in options and number % 2 == 0
            found.run(mode, number, kills=most, pairs=pairs, changes="changes" in options)
            number += 1
    found.result.seconds = round(time.monotonic() - began, 1)
    return found.result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after so long")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--pairs", action="store_true", help="two processes on one directory, in every other run")
    parser.add_argument("--changes", action="store_true", help="inputs changed between kill and resume: refused")
    parser.add_argument("--output", type=Path, help="write the result there, as JSON")
    args = parser.parse_args(argv)
    modes = tuple(args.modes.split(","))
    if unknown := set(modes) - set(MODES):
        parser.error(f"unknown modes {', '.join(sorted(unknown))}; expected some of {', '.join(MODES)}")
    options = frozenset(name for name in ("pairs", "changes") if getattr(args, name))
    result = campaign(kills=args.kills, seed=args.seed, seconds=args.seconds, modes=modes, options=options)
    text = json.dumps({"seed": args.seed, **asdict(result)}, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
