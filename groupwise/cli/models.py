"""What `eval`, `generate` and `chat` share: from a path that the user gave to a model, and from flags to sampling."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from groupwise.cli.parsing import Parser, set_key

if TYPE_CHECKING:
    import argparse

    from groupwise.assembly.session import Session
    from groupwise.config import Config

MODEL_SETTINGS = (
    "model.dtype",
    "model.device",
    "model.quantization",
    "model.chat_template",
    "model.trust_remote_code",
)
ROW_SETTINGS = (
    "data.prompt_column",
    "data.question_column",
    "data.answer_column",
    "data.data_source",
    "data.system_prompt",
    "data.few_shot",
)
"""How rows become prompts."""

ENGINE_SETTINGS = (
    "rollout.engine",
    "rollout.urls",
    "rollout.engine_timeout",
    "rollout.kv_cache_gib",
    "rollout.max_concurrent_samples",
)


def model_path(path: str) -> str:
    """The model that the user named, by a name that stays: a run becomes its `final`, `RUN@latest` becomes `RUN@40`.

    Raises:
        ConfigError: it leads to no model.
    """
    from groupwise.config.checks import check_model_path
    from groupwise.config.model_name import settled_model

    settled = settled_model(path)
    check_model_path(settled)
    return settled


def add_trust_flag(parser: Parser) -> None:
    parser.add_argument(
        "--trust-rewards",
        action="store_true",
        help="run the reward code that a run's config.json names, though the run was not made by you here",
    )


def add_sampling_flags(parser: Parser) -> None:
    parser.add_argument("--max-tokens", metavar="N", help="most tokens of one reply (default 512)")
    parser.add_argument("--temperature", metavar="T", help="0 is greedy (default 1)")
    parser.add_argument("--top-p", metavar="P", help="keep the likeliest tokens that sum to P (default 1: all)")
    parser.add_argument("--top-k", metavar="K", help="keep the K likeliest tokens (default 0: all)")
    parser.add_argument(
        "--min-p", metavar="P", help="drop tokens below P times the likeliest's probability (default 0)"
    )
    parser.add_argument("--repetition-penalty", metavar="R", help="above 1 avoids tokens already seen (default 1)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="a string that ends the reply; may repeat")
    parser.add_argument("--seed", metavar="N", help="the same seed draws the same tokens (default 0)")


def sampling_config(args: argparse.Namespace) -> Config:
    """The config of these flags, checked as a recipe's would be.

    Raises:
        ConfigError: a value is out of range, or the model path leads nowhere.
    """
    from groupwise.config.loading import load_config

    return load_config(
        None,
        [
            *set_key("model.path", model_path(args.model)),
            *set_key("rollout.max_completion_tokens", args.max_tokens),
            *set_key("rollout.temperature", args.temperature),
            *set_key("rollout.top_p", args.top_p),
            *set_key("rollout.top_k", args.top_k),
            *set_key("rollout.min_p", args.min_p),
            *set_key("rollout.repetition_penalty", args.repetition_penalty),
            *set_key("rollout.stop", json.dumps(args.stop) if args.stop else None),
            *set_key("train.seed", args.seed),
            *args.overrides,
        ],
    ).config


def open_session(config: Config) -> Session:
    """Quietly, as between a command's own lines.

    Raises:
        ConfigError: as of `Session`.
    """
    from groupwise.assembly.session import Session

    quiet_loading()
    return Session(config)


def quiet_loading() -> None:
    """No progress bars of transformers between a command's own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
