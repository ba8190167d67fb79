"""`groupwise xtuner`."""

from __future__ import annotations

import argparse

from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser


def _arguments(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG.py", help="defines `trainer`, with names of groupwise.compat.xtuner")
    parser.add_argument("backend", metavar="BACKEND", help="lmdeploy, sglang, vllm or native; native is what samples")
    parser.add_argument("model", metavar="MODEL", help="the config finds it as MODEL_PATH")
    parser.add_argument("train", metavar="TRAIN", help="rows to train on, as DATA_PATH")
    parser.add_argument("evaluation", nargs="?", default="", metavar="EVAL", help="held-out rows, as EVAL_DATA_PATH")
    parser.add_argument("--dry-run", action="store_true", help="show the program as a recipe, do not train")


def _xtuner(args: argparse.Namespace) -> None:
    from groupwise.compat.xtuner.program import open_program
    from groupwise.config.loading import render_resolved

    with open_program(
        args.config, backend=args.backend, model=args.model, train=args.train, evaluation=args.evaluation
    ) as trainer:
        if args.dry_run:
            say(render_resolved(trainer.to_config()).rstrip("\n"))
        else:
            trainer.build().fit()


XTUNER = Command(
    name="xtuner",
    summary="run a program written for XTuner, its imports changed",
    add_arguments=_arguments,
    run=_xtuner,
)
