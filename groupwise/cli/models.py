"""What `eval`, `generate` and `chat` share: from a path that the user gave to a model, and from flags to sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from groupwise.cli.parsing import Parser, set_key
from groupwise.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from groupwise.config import Config, RolloutConfig
    from groupwise.types import Engine, Message, Prompt, SamplingParams, Tokenizer

MODEL_SETTINGS = (
    "model.dtype",
    "model.device",
    "model.quantization",
    "model.chat_template",
    "model.trust_remote_code",
)
ENGINE_SETTINGS = ("rollout.engine", "rollout.kv_cache_gib", "rollout.max_concurrent_samples")


def is_run(path: str) -> bool:
    """Whether the folder is a run directory: its config.json has our sections, a model's has an architecture."""
    folder = Path(path)
    if (folder / "final").is_dir():
        return True
    try:
        content: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "rollout" in content and "train" in content


def model_path(path: str) -> str:
    """A run directory's `final` model, a model folder, or a Hub name.

    Raises:
        ConfigError: it is a path that leads to no model.
    """
    from groupwise.config.checks import check_model_path
    from groupwise.config.lora import ADAPTER_FILE

    final = Path(path) / "final"
    if not is_run(path):
        check_model_path(path)
        return path
    if not any((final / name).is_file() for name in ("config.json", ADAPTER_FILE)):
        raise ConfigError(
            f"{path} is a run without a finished model: there is no {final}; finish the run with --resume, "
            "or give a model folder"
        )
    return str(final)


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


def sampling_of(rollout: RolloutConfig, *, seed: int) -> SamplingParams:
    from groupwise.types import SamplingParams

    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        max_tokens=rollout.max_completion_tokens,
        stop=rollout.stop,
        seed=seed,
    )


class Talker:
    """A loaded model that answers messages or continues text."""

    def __init__(self, config: Config) -> None:
        from groupwise.engines import build_engine, check_engine
        from groupwise.model.loading import load_model, load_tokenizer

        check_engine(config.rollout.engine)
        quiet_loading()
        tokenizer = load_tokenizer(config.model)
        self._config = config
        self._tokenizer = cast("Tokenizer", tokenizer)
        self.engine: Engine = build_engine(config.rollout, load_model(config.model, tokenizer=tokenizer))

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """The conversation, rendered with the model's chat template.

        Raises:
            ConfigError: the model has no chat template.
        """
        from groupwise.data import check_template, encode_rendered, render
        from groupwise.types import Prompt

        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{self._config.model.path} has no chat template; give one with --model.chat_template FILE, "
                "or continue plain text with `groupwise generate --raw`"
            )
        kwargs = self._config.data.chat_template_kwargs
        check_template(self._tokenizer, kwargs)
        text = render(messages, self._tokenizer, template_kwargs=kwargs)
        token_ids = encode_rendered(text, self._tokenizer)
        if not token_ids:
            raise ConfigError("the chat template makes nothing of the message; set model.chat_template to another")
        return Prompt(uid="prompt", messages=tuple(messages), text=text, token_ids=token_ids)

    def raw_prompt(self, text: str) -> Prompt:
        from groupwise.data import encode_text
        from groupwise.texts import encodable
        from groupwise.types import Prompt

        if encodable(text) != text:
            raise ConfigError("the prompt holds half a surrogate pair or bytes that are no UTF-8; give text")
        token_ids = encode_text(text, self._tokenizer)
        if not token_ids:
            raise ConfigError("the tokenizer makes no tokens of the prompt; give another text")
        return Prompt(uid="prompt", messages=(), text=text, token_ids=token_ids)


def quiet_loading() -> None:
    """No progress bars of transformers between a command's own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
