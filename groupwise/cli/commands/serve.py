"""`groupwise serve`: the native engine in a process of its own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from groupwise.cli.models import ENGINE_SETTINGS, MODEL_SETTINGS, model_path, quiet_loading
from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, set_key, whole_number
from groupwise.errors import ConfigError

if TYPE_CHECKING:
    from groupwise.config import Config


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "target",
        metavar="RECIPE.toml|MODEL",
        help="the recipe of the run that samples from it; or a model folder, run, RUN@STEP or Hub name",
    )
    parser.add_argument("--model", "--model-path", metavar="PATH", help="replaces the recipe's model (model.path)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default 127.0.0.1: this machine only)")
    parser.add_argument(
        "--follow", action="store_true", help="serve a run's newest checkpoint, and newer ones as they appear"
    )
    parser.add_argument(
        "--port", type=whole_number(0), default=8000, metavar="N", help="0 takes a free one (default 8000)"
    )


def _serve(args: argparse.Namespace) -> None:
    from groupwise.config.loading import load_config
    from groupwise.engines import require_server

    require_server("groupwise serve")
    target = Path(args.target)
    if args.follow:
        config = load_config(None, args.overrides).config
        _start(config, args, name=str(target), follow=target)
        return
    if target.suffix in (".toml", ".json") and target.is_file():
        config = load_config(target, [*set_key("model.path", args.model), *args.overrides]).config
    elif args.model is not None:
        raise ConfigError(f"--model {args.model}: {args.target} is a model already; leave one of them out")
    else:
        config = load_config(None, [*set_key("model.path", model_path(args.target)), *args.overrides]).config
    if not config.model.path:
        raise ConfigError(f"{target} names no model; add model.path to it, or give --model")
    _start(config, args, name=config.model.path)


def _start(config: Config, args: argparse.Namespace, *, name: str, follow: Path | None = None) -> None:
    from groupwise.serve.run import serve

    quiet_loading()
    serve(config, host=args.host, port=args.port, follow=follow, ready=lambda url: say(f"serving {name} at {url}"))


SERVE = Command(
    name="serve",
    summary="sample for a training run elsewhere, and for OpenAI's clients",
    add_arguments=_arguments,
    run=_serve,
    settings=(
        *MODEL_SETTINGS,
        *ENGINE_SETTINGS[3:],
        "rollout.max_completion_tokens",
        "model.batch_invariant",
        "lora.",
        "train.seed",
    ),
)
