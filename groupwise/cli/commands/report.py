"""`groupwise report` and `groupwise watch`: runs to look at."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, whole_number


def _arguments(parser: Parser) -> None:
    parser.add_argument("run", nargs="+", metavar="RUN", help="run directories; several are laid over each other")
    parser.add_argument(
        "--output", metavar="FILE", help="(default report.html in the run; comparison.html in the first of several)"
    )
    parser.add_argument("--all", action="store_true", help="keep every sample's text and tokens, however large")
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def _report(args: argparse.Namespace) -> None:
    from groupwise.report import ROOM, write_report

    runs = [Path(run) for run in args.run]
    out = Path(args.output) if args.output else runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    written = write_report(runs, out, room=None if args.all else ROOM)
    kept = f"all {written.groups}" if written.kept == written.groups else f"{written.kept} of {written.groups}"
    say(f"wrote {written.path} ({written.size / 1e6:.1f} MB; {kept} groups with their texts and tokens)")
    if args.open and not webbrowser.open(written.path.absolute().as_uri()):
        say("no browser was found; open the file with one")


REPORT = Command(
    name="report",
    summary="write a page about a run, or about several side by side; it opens from disk",
    add_arguments=_arguments,
    run=_report,
)


def _watch_arguments(parser: Parser) -> None:
    parser.add_argument("run", nargs="+", metavar="RUN", help="run directories, also of others on a shared disk")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=whole_number(0), metavar="N", help="(default 8477, or one that is free)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def _watch(args: argparse.Namespace) -> None:
    from groupwise.report.live import LiveServer

    with LiveServer([Path(run) for run in args.run], host=args.host, port=args.port) as server:
        say(f"watching at {server.url}")
        say("whoever has this address may look, and ask the runs to save or to stop; Ctrl-C ends it")
        if args.open:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")


WATCH = Command(
    name="watch",
    summary="the page of runs that go on, live, from a small local server",
    add_arguments=_watch_arguments,
    run=_watch,
)
