"""vLLM's records as Unsloth's programs use them: SamplingParams and LoRARequest in, RequestOutput out.

A boundary: vLLM need not be installed, and its own objects are known by their attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from groupwise import types
from groupwise.config.temperature import COLDEST, HOTTEST, temperature_problem
from groupwise.errors import ConfigError

_REFUSED: Mapping[str, str] = {
    "presence_penalty": "use repetition_penalty",
    "frequency_penalty": "use repetition_penalty",
    "ignore_eos": "use min_tokens",
    "prompt_logprobs": "only drawn tokens have log-probs",
    "detokenize": "texts are always there",
    "spaces_between_special_tokens": "texts are as the tokenizer decodes them",
    "logits_processors": "the distribution is the model's, cut by top_k, top_p and min_p",
    "structured_outputs": "answers are not bound to a pattern",
    "logit_bias": "the distribution is the model's, cut by top_k, top_p and min_p",
    "allowed_token_ids": "the distribution is the model's, cut by top_k, top_p and min_p",
    "bad_words": "the distribution is the model's, cut by top_k, top_p and min_p",
    "truncate_prompt_tokens": "prompts are never cut",
    "logprob_token_ids": "only drawn tokens have log-probs",
    "thinking_token_budget": "use max_tokens",
    "repetition_detection": "use repetition_penalty",
    "extra_args": "they are for plug-ins of vLLM",
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What an argument holds: one value of a type, or several."""

    name: str
    types: tuple[type, ...]
    several: bool = False

    def fits(self, value: Any, *, none: bool) -> bool:
        if value is None:
            return none or NoneType in self.types
        if self.several and isinstance(value, Sequence) and not isinstance(value, str):
            return all(self._is_one(each) for each in value)
        return self._is_one(value) and (not self.several or isinstance(value, str))

    def _is_one(self, value: Any) -> bool:
        finite = not isinstance(value, float) or math.isfinite(value)
        return isinstance(value, self.types) and not isinstance(value, bool) and finite


_WHOLE, _NUMBER = _Kind("a whole number", (int,)), _Kind("a number", (int, float))
_KINDS: Mapping[str, _Kind] = {
    **dict.fromkeys(("n", "top_k", "seed", "min_tokens", "logprobs"), _WHOLE),
    "max_tokens": _Kind("a whole number, or None", (int, NoneType)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _NUMBER),
    "stop": _Kind("a text or several", (str,), several=True),
    "stop_token_ids": _Kind("a list of token numbers", (int,), several=True),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """vLLM's, with its names and defaults. What cannot act is refused where it is given.

    Attributes:
        n: answers for each prompt.
        max_tokens: of an answer; None is as many as `max_seq_length` leaves.
        seed: the same seed and prompt give the same answers; None draws anew at each call, and a program that runs
            again draws the same.
        stop: one text or several; kept in the answer with `include_stop_str_in_output`.
        logprobs: 0 gives each drawn token's log-prob; those of other tokens are not kept.

    Example:
        SamplingParams(temperature=1.0, top_k=50, max_tokens=1024)
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    detokenize: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: Any = None
    structured_outputs: Any = None
    logit_bias: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    truncate_prompt_tokens: int | None = None
    logprob_token_ids: Any = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    extra_args: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = vars(self)[field.name]
            if field.name in _REFUSED and value != field.default and value not in ([], {}, ()):
                raise _wrong(field.name, value, f"is refused: {_REFUSED[field.name]}")
            if field.name in _KINDS and not _KINDS[field.name].fits(value, none=field.default is None):
                raise _wrong(field.name, value, f": expected {_KINDS[field.name].name}")
        for name, fits, expected in (
            ("n", self.n >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("temperature", temperature_problem(self.temperature) is None, f"0, or {COLDEST} to {HOTTEST}"),
            ("top_p", 0 < self.top_p <= 1, "above 0, to 1"),
            ("top_k", self.top_k >= -1, "a number of tokens; 0 and -1 keep all"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "1 or more, or None"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more, or None"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "0 to max_tokens"),
            ("logprobs", self.logprobs in (None, 0), "None or 0: only drawn tokens have log-probs"),
            ("stop", "" not in self.stop_texts, "texts that are not empty"),
        ):
            if not fits:
                raise _wrong(name, vars(self)[name], f": expected {expected}")

    @classmethod
    def of(cls, given: Any) -> SamplingParams:
        """From this class, vLLM's, a dict of its arguments, or None, which is vLLM's defaults.

        Raises:
            ConfigError: it is something else, or says what cannot act.
        """
        if isinstance(given, cls):
            return given
        names = [field.name for field in fields(cls)]
        if isinstance(given, Mapping):
            unknown = sorted(set(given) - set(names))
            if unknown:
                raise ConfigError(f"SamplingParams has no argument {unknown[0]!r}; expected any of {', '.join(names)}")
            return cls(**given)
        found = {name: getattr(given, name) for name in names if hasattr(given, name)}
        if given is not None and not found:
            raise ConfigError(f"sampling_params: got a {type(given).__name__}; expected SamplingParams")
        return cls(**found)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def groupwise(self, *, room: int, seed: int, own_stop: str) -> types.SamplingParams:
        """For Groupwise's engines.

        Args:
            room: tokens that the prompt leaves.
            seed: where the program gave none.
            own_stop: text of the model's own end token, which ends an answer anyway.
        """
        return types.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=min(room, self.max_tokens or room),
            min_tokens=min(room, self.min_tokens),
            stop=tuple(text for text in self.stop_texts if text != own_stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=seed if self.seed is None else self.seed,
        )


def _wrong(name: str, value: Any, what: str) -> ConfigError:
    return ConfigError(f"SamplingParams.{name} = {value!r}{'' if what.startswith(':') else ' '}{what}")


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A saved adapter to generate with; vLLM's own is accepted, too.

    Example:
        LoRARequest("grpo_saved_lora", 1, "grpo_saved_lora")
    """

    lora_name: str
    lora_int_id: int
    lora_path: str


def adapter_path(request: Any) -> Path:
    """The folder that a request names.

    Raises:
        ConfigError: it is no request.
    """
    path = getattr(request, "lora_path", None)
    if not path:
        raise ConfigError(f"lora_request: got {request!r}; expected what model.load_lora(folder) returns, or None")
    return Path(path)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer, under vLLM's names.

    Attributes:
        logprobs: `[T]`, natural log of each token's probability at the temperature; None unless asked for.
        finish_reason: `stop` or `length`.
        stop_reason: the text or token of `stop` or `stop_token_ids` that ended it; None for the model's own end.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    logprobs: tuple[float, ...] | None
    finish_reason: str
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt, under vLLM's names; `prompt` is None where tokens were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = True
