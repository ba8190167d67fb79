"""What `eval`, `generate` and `chat` share: from a path that the user gave to a model, and from flags to sampling."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

from groupwise.cli.parsing import Parser, set_key
from groupwise.errors import ConfigError
from groupwise.inputs import ModelInput

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
    """A model that answers messages or continues text. Its weights are loaded when `engine` is first asked for."""

    def __init__(self, config: Config) -> None:
        from groupwise.config.limits import check_stop_tokens
        from groupwise.engines import check_engine
        from groupwise.model.limits import find_limits
        from groupwise.model.loading import load_tokenizer

        check_engine(config.rollout.engine)
        quiet_loading()
        self._config = config
        self._tokenizer = cast("Tokenizer", load_tokenizer(config.model))
        self._limits = find_limits(None, config.model)
        check_stop_tokens(config.rollout.stop_token_ids, self._limits, setting="rollout.stop_token_ids")

    @cached_property
    def engine(self) -> Engine:
        from groupwise.engines import build_engine
        from groupwise.model.loading import load_model

        return build_engine(self._config.rollout, load_model(self._config.model, tokenizer=self._tokenizer))

    def load(self) -> None:
        """Load the weights now, before somebody waits for an answer."""
        _ = self.engine

    def within(self, prompt: Prompt, sampling: SamplingParams) -> SamplingParams:
        """The sampling, with no more tokens than the model has positions for after this prompt.

        Raises:
            ConfigError: there are none, or the prompt has tokens that the model does not know.
        """
        from groupwise.config.limits import check_lengths

        check_lengths([prompt.token_ids], self._limits, most=1, setting="--max-tokens", prompts="prompts")
        positions = self._limits.positions
        if positions is None:
            return sampling
        return replace(sampling, max_tokens=min(sampling.max_tokens, positions - len(prompt.token_ids)))

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
        return Prompt(uid="prompt", messages=tuple(messages), text=text, input=ModelInput.of(token_ids))

    def raw_prompt(self, text: str) -> Prompt:
        from groupwise.data import encode_text
        from groupwise.texts import encodable
        from groupwise.types import Prompt

        if encodable(text) != text:
            raise ConfigError("the prompt holds half a surrogate pair or bytes that are no UTF-8; give text")
        token_ids = encode_text(text, self._tokenizer)
        if not token_ids:
            raise ConfigError("the tokenizer makes no tokens of the prompt; give another text")
        return Prompt(uid="prompt", messages=(), text=text, input=ModelInput.of(token_ids))


def quiet_loading() -> None:
    """No progress bars of transformers between a command's own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
