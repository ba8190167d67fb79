"""`python -m tests.fuzz --inputs 3000`: hostile inputs of every kind through the command; prints what broke its word.

Each input must end within the deadline, with a right exit code and sentences instead of tracebacks. The same seed gives
the same inputs; `--only KIND:INDEX` runs one of them again and shows what it printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import kinds
from cases import make_world
from forked import Outcome, run_case

DEADLINE = 25.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--inputs", type=int, default=3000, help="of all kinds together")
    parser.add_argument("--kind", choices=list(kinds.KINDS), action="append", help="only these; may repeat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every outcome there")
    parser.add_argument("--only", metavar="KIND:INDEX", help="one input, shown")
    args = parser.parse_args()
    chosen = args.kind or list(kinds.KINDS)
    with tempfile.TemporaryDirectory(prefix="fuzz-world-") as folder:
        world = Path(folder)
        prepare(world)
        if args.only:
            kind, _, index = args.only.partition(":")
            return show(world, kind, int(index), args)
        return run_all(world, chosen, args)


def prepare(world: Path) -> None:
    """Make the world in a child, so that this process starts no thread; then load what every command needs."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    child = os.fork()
    if child == 0:
        os.chdir(world)
        log = os.open(world / "world.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            make_world(world)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit((world / "world.log").read_text())
    kinds.preload()


def run_all(world: Path, chosen: list[str], args: argparse.Namespace) -> int:
    counts: Counter[str] = Counter()
    records: list[dict[str, object]] = []
    started = time.monotonic()
    for kind in chosen:
        for index, case in enumerate(kinds.cases_of(kind, world, args.inputs // len(chosen), args.seed)):
            outcome = run_case(case, world, deadline=DEADLINE)
            faults = outcome.faults(case)
            counts[kind] += 1
            counts[f"{kind}: exit code {outcome.code}"] += 1
            counts["faults"] += bool(faults)
            if faults or args.json:
                records.append(record(kind, index, case.argv, outcome, faults))
            if faults:
                print(
                    f"{kind}:{index} {' '.join(case.argv)[:200]!r}\n  {'; '.join(faults)}\n  {last_line(outcome)}",
                    flush=True,
                )
    seconds = time.monotonic() - started
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "counts": counts, "outcomes": records}, indent=1))
    total = sum(counts[kind] for kind in chosen)
    print("\n".join(f"{name:<32} {count}" for name, count in sorted(counts.items())))
    print(f"{total} inputs in {seconds:.0f} s, {counts['faults']} faults")
    return 1 if counts["faults"] else 0


def record(kind: str, index: int, argv: tuple[str, ...], outcome: Outcome, faults: list[str]) -> dict[str, object]:
    return {
        "input": f"{kind}:{index}",
        "argv": [ascii(word) for word in argv],
        "code": outcome.code,
        "seconds": round(outcome.seconds, 2),
        "errors": outcome.errors[-600:],
        "faults": faults,
    }


def last_line(outcome: Outcome) -> str:
    lines = [line for line in outcome.errors.strip().splitlines() if "not foreseen" not in line]
    return ascii(lines[-1][:300]) if lines else ""


def show(world: Path, kind: str, index: int, args: argparse.Namespace) -> int:
    wanted = args.inputs // len(args.kind or kinds.KINDS)
    case = list(kinds.cases_of(kind, world, wanted, args.seed))[index]
    print(case.argv)
    for name, content in case.files.items():
        print(f"--- {name}: {content[:1500] if content is not None else 'removed'!r}")
    if "--debug" not in case.argv:
        case = type(case)(case.kind, (*case.argv, "--debug"), case.copies, case.files, case.codes)
    outcome = run_case(case, world, deadline=DEADLINE)
    print(f"--- exit code {outcome.code} after {outcome.seconds:.1f} s\n{outcome.output}\n---\n{outcome.errors}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
