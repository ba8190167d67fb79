"""What `groupwise plan` says of a run, beside what the run then takes: peak memory and seconds per step, on a CPU.

    python benchmarks/plan.py                                   # three sizes, two types, all weights and LoRA
    python benchmarks/plan.py --sizes 10m --dtypes float32 --ways full --rounds 3

Each run is a process of its own that trains `--steps` steps, on random weights. **Measured memory** is its highest
resident set (Linux: `VmHWM`) less what was resident once everything was imported, before the data were read. **Planned
memory** is the plan's peak less its part for imports. **Measured seconds** are the median of the steps but the first,
which makes threads, caches and kernels ready. The plan is made before and after the run, each time with a calibration
of its own, and the mean of the two counts, because other work on the machine comes and goes. `--processor-time` takes
one thread, and the processor's seconds for both, which other work hardly touches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Size:
    """A Qwen3's shape, and the tokens of an answer."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    mlp: int
    answer: int


SIZES = {
    "10m": Size(16_384, 256, 6, 4, 768, answer=64),
    "50m": Size(32_768, 512, 10, 8, 1_536, answer=32),
    "150m": Size(32_768, 768, 18, 12, 2_048, answer=32),
}
WAYS = {"full": (), "lora": ("--lora.rank=8",)}
REWARD = "def varied(completions):\n    return [float(sum(map(ord, str(text))) % 7) for text in completions]\n"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = make_parser().parse_args(argv)
    if args.child:
        print(json.dumps(measure(args.child[0], args.child[1:])))
        return []
    found: list[dict[str, Any]] = []
    print("| size | type | trained | planned, MiB | measured, MiB | ratio | planned, s | measured, s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sizes:
            make_model(Path(folder, name), SIZES[name])
            make_data(Path(folder))
            for dtype in args.dtypes:
                for way in args.ways:
                    for _ in range(args.rounds):
                        kind = "none" if args.no_seconds else "processor" if args.processor_time else "wall"
                        result = compare(settings(Path(folder), name, dtype, way, steps=args.steps), kind)
                        result = {"size": name, "dtype": dtype, "way": way, "clock": kind} | result
                        found.append(result)
                        print(line(result), flush=True)
                        if args.json:
                            with args.json.open("a", encoding="utf-8") as file:
                                file.write(json.dumps(result) + "\n")
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="of each run; memory levels off after six or so")
    parser.add_argument("--processor-time", action="store_true", help="one thread, and seconds of the processor")
    parser.add_argument("--no-seconds", action="store_true", help="compare memory alone, and calibrate nothing")
    parser.add_argument("--json", type=Path, help="append each result to this file, one JSON object a line")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def make_model(folder: Path, size: Size) -> None:
    """A folder with random weights, and a tokenizer that is smaller than its vocabulary."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from groupwise.quickstart.tiny_model import build_tokenizer

    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        head_dim=64,
        intermediate_size=size.mlp,
        tie_word_embeddings=True,
        max_position_embeddings=4_096,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    build_tokenizer(["one two three four five " * 3], 300).save_pretrained(folder)


def make_data(folder: Path) -> None:
    rows = [json.dumps({"prompt": f"{number} " * (18 + number % 5)}) + "\n" for number in range(16)]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")


def settings(folder: Path, name: str, dtype: str, way: str, *, steps: int) -> list[str]:
    """The run's, as overrides."""
    reward = f"{folder / 'rewards.py'}:varied"
    return [
        f"--model.path={folder / name}",
        "--model.device=cpu",
        f"--model.dtype={dtype}",
        f"--data.train={folder / 'rows.jsonl'}",
        f"--reward={json.dumps([{'name': reward}])}",
        f"--train.output={folder / 'run'}",
        "--tracking.backends=jsonl",
        f"--train.steps={steps}",
        "--rollout.prompts_per_step=8",
        f"--rollout.max_completion_tokens={SIZES[name].answer}",
        "--train.micro_batch_tokens=1024" if name == "150m" else "--train.micro_batch_tokens=4096",
        *WAYS[way],
    ]


def compare(arguments: list[str], clock: str) -> dict[str, Any]:
    """Plan, run, plan again.

    Args:
        clock: `wall`, `processor` (of one thread), or `none`.
    """
    plans = [planned(arguments, clock)]
    measured = _output([sys.executable, __file__, "--child", clock, *arguments], clock)
    if clock != "none":
        plans.append(planned(arguments, clock))
    steps = [plan["seconds"]["step"] for plan in plans if plan["seconds"] is not None]
    memory = plans[0]["memory"]
    return {
        "planned_bytes": memory["peak"] - memory["held"]["imports"],
        "measured_bytes": measured["peak"] - measured["imported"],
        "planned_seconds": sum(steps) / len(steps) if steps else None,
        "planned_between": [min(steps), max(steps)] if steps else None,
        "measured_seconds": statistics.median(measured["seconds"][1:]),
        "first_step_seconds": measured["seconds"][0],
        "parts": {**memory["held"], **memory["moments"][memory["peak_moment"]]},
        "phases": {"planned": plans[-1]["seconds"], "measured": measured["phases"]},
    }


def planned(arguments: list[str], clock: str) -> dict[str, Any]:
    """The plan as JSON, made by a process of its own, as a user's is."""
    by = {"wall": "time.perf_counter", "processor": "time.process_time", "none": "None"}[clock]
    code = (
        "import json, sys, time; from groupwise.config.loading import load_config\n"
        "from groupwise.plan import as_json, make_plan\n"
        f"print(json.dumps(as_json(make_plan(load_config(None, sys.argv[1:]).config, clock={by}))))"
    )
    return _output([sys.executable, "-c", code, *arguments], clock)


def _output(command: list[str], clock: str) -> dict[str, Any]:
    threads = {"OMP_NUM_THREADS": "1"} if clock == "processor" else {}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if ended.returncode:
        raise SystemExit(f"{command[:3]} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def measure(clock: str, arguments: list[str]) -> dict[str, Any]:
    """Train in this process: bytes resident after imports, and at most; seconds of each step."""
    import groupwise.clock
    from groupwise.config.loading import load_config
    from groupwise.launch import run_training

    if clock == "processor":
        groupwise.clock.time = SimpleNamespace(perf_counter=time.process_time)  # pyright: ignore[reportAttributeAccessIssue]
    imported = _status("VmRSS")
    config = load_config(None, arguments).config
    run_training(config, overwrite=True)
    rows = [json.loads(row) for row in Path(config.train.output, "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "imported": imported,
        "peak": _status("VmHWM"),
        "seconds": [row["time/step"] for row in rows],
        "phases": {name: rows[-1][f"time/{name}"] for name in ("rollout", "train")},
    }


def _status(name: str) -> int:
    """Bytes, of Linux's account of this process."""
    (found,) = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    return 1024 * int(found)


def line(result: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    bytes_ratio = result["planned_bytes"] / result["measured_bytes"]
    times = "| | | |"
    if result["planned_seconds"] is not None:
        low, high = result["planned_between"]
        ratio = result["planned_seconds"] / result["measured_seconds"]
        times = f"| {low:.1f} to {high:.1f} | {result['measured_seconds']:.1f} | {ratio:.2f} |"
    sizes = f"{result['planned_bytes'] / MIB:,.0f} | {result['measured_bytes'] / MIB:,.0f} | {bytes_ratio:.2f} "
    return f"| {result['size']} | {result['dtype']} | {result['way']} | {sizes}{times}"


if __name__ == "__main__":
    main()
