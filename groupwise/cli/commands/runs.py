"""`groupwise runs` and `groupwise plot`: runs side by side, and drawn."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, whole_number
from groupwise.errors import ConfigError

if TYPE_CHECKING:
    from groupwise.runs import RunRecord

_KEYS = ("name", "state", "steps", "accuracy", "best", "reward", "seconds", "findings")


def _arguments(parser: Parser) -> None:
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="(default runs)")
    parser.add_argument(
        "--sort", choices=_KEYS, default="name", metavar="KEY", help=f"{', '.join(_KEYS)} (default name)"
    )
    parser.add_argument("--json", action="store_true", help="everything that is known of each, as one JSON array")


def _runs(args: argparse.Namespace) -> None:
    from groupwise.runs import differing, find_runs, read_run, sort_runs, table

    root = Path(args.folder)
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; give one that has runs below it")
    found = sort_runs([read_run(path) for path in find_runs(root)], args.sort)
    if args.json:
        names = differing(found)
        say(json.dumps([_record(run, names) for run in found], indent=2, ensure_ascii=False))
        return
    if not found:
        say(f"no run below {root}")
        return
    for line in table(found, root=root, width=shutil.get_terminal_size((120, 24)).columns):
        say(line)


def _record(run: RunRecord, names: list[str]) -> dict[str, Any]:
    numbers = ("steps", "of_steps", "first", "best", "accuracy", "reward", "seconds", "findings")
    return {
        "path": str(run.path),
        "state": run.state,
        **{name: getattr(run, name) for name in numbers},
        "differs": {name: run.settings.get(name) for name in names} if run.state != "unreadable" else {},
        "problem": run.problem,
    }


RUNS = Command(
    name="runs",
    summary="list all runs below a folder, with what they reached and where they differ",
    add_arguments=_arguments,
    run=_runs,
)


def _plot_arguments(parser: Parser) -> None:
    parser.add_argument("run", nargs="+", metavar="RUN", help="run directories; several are laid over each other")
    parser.add_argument("--output", metavar="FILE", help=".svg, .png or .pdf (default plot.svg in the first run)")
    parser.add_argument(
        "--metrics", metavar="A,B", help="names in metrics.jsonl (default reward, accuracy, length, entropy, mismatch)"
    )
    parser.add_argument("--smooth", type=whole_number(1), default=5, metavar="N", help="running mean (default 5 steps)")


def _plot(args: argparse.Namespace) -> None:
    from groupwise.runs.plot import chosen_panels, draw, read_metrics

    runs = [read_metrics(Path(run)) for run in args.run]
    names = [name.strip() for name in (args.metrics or "").split(",") if name.strip()]
    out = Path(args.output) if args.output else Path(args.run[0]) / "plot.svg"
    draw(runs, chosen_panels(runs, names), out, smooth=args.smooth)
    say(f"wrote {out}")


PLOT = Command(
    name="plot",
    summary="draw the metrics of one run or several",
    add_arguments=_plot_arguments,
    run=_plot,
)
