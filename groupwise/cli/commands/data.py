"""`groupwise data gsm8k` and `groupwise data stats`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from groupwise.cli.models import ROW_SETTINGS
from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, set_key
from groupwise.errors import ConfigError

if TYPE_CHECKING:
    from groupwise.protocols import Tokenizer


def _gsm8k_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--input-dir", required=True, metavar="DIR", help="holds train.jsonl and test.jsonl, or GSM8K's Parquet files"
    )
    parser.add_argument("--out-dir", required=True, metavar="DIR", help="gets train.jsonl and test.jsonl")


def _gsm8k(args: argparse.Namespace) -> None:
    from groupwise.data import convert_gsm8k

    counts = convert_gsm8k(args.input_dir, args.out_dir)
    out = Path(args.out_dir)
    print(f"wrote {counts.train:,} rows to {out / 'train.jsonl'} and {counts.test:,} rows to {out / 'test.jsonl'}")


def _stats_arguments(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="the data")
    parser.add_argument("--model", "--model-path", metavar="PATH", help="count tokens with this model's tokenizer")
    parser.add_argument("--max-prompt-tokens", metavar="N", help="data.max_prompt_tokens")


def _stats(args: argparse.Namespace) -> None:
    from groupwise.config.loading import load_config

    overrides = set_key("model.path", args.model) + set_key("data.max_prompt_tokens", args.max_prompt_tokens)
    config = load_config(None, [*overrides, *args.overrides]).config
    tokenizer = None
    if not config.model.path and args.overrides:
        for word in args.overrides:
            if word.startswith(("--model.", "--data.chat_template_kwargs")):
                raise ConfigError(f"{word.partition('=')[0]} has no effect without --model; leave it out, or give one")
    if config.model.path:
        from groupwise.config.checks import check_model_path

        check_model_path(config.model.path)
        from groupwise.model.loading import load_tokenizer

        tokenizer = cast("Tokenizer", load_tokenizer(config.model))
    from groupwise.data import data_stats

    say(data_stats(args.file, config.data, tokenizer).render())


GSM8K = Command(
    name="data gsm8k",
    summary="convert GSM8K to training data",
    add_arguments=_gsm8k_arguments,
    run=_gsm8k,
)
STATS = Command(
    name="data stats",
    summary="count rows, sources and prompt lengths of a data file",
    add_arguments=_stats_arguments,
    run=_stats,
    settings=(
        *ROW_SETTINGS,
        "data.chat_template_kwargs",
        "data.chat_template_kwargs.",
        "data.max_prompt_tokens",
        "model.chat_template",
        "model.trust_remote_code",
    ),
)
