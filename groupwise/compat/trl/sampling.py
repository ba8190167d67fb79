"""Sampling arguments: TRL's own, its `generation_kwargs`, and vLLM's SamplingParams.

A boundary: the objects of vLLM, which need not be installed, are known by their attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from groupwise.compat.trl.arguments import GRPOConfig
from groupwise.config.values import literal
from groupwise.errors import ConfigError

_KNOWN: Mapping[str, tuple[str, Any]] = {
    "temperature": ("rollout.temperature", 1.0),
    "top_p": ("rollout.top_p", 1.0),
    "top_k": ("rollout.top_k", 0),
    "min_p": ("rollout.min_p", 0.0),
    "repetition_penalty": ("rollout.repetition_penalty", 1.0),
    "min_tokens": ("rollout.min_completion_tokens", 0),
    "min_new_tokens": ("rollout.min_completion_tokens", 0),
    "stop": ("rollout.stop", ()),
    "stop_strings": ("rollout.stop", ()),
    "stop_token_ids": ("rollout.stop_token_ids", ()),
    "seed": ("train.seed", None),
}
"""Their names -> the setting, and the value that asks for nothing."""

_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (None, 1),
    "do_sample": (True,),
    "include_stop_str_in_output": (True,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "ignore_eos": (False,),
    "max_tokens": (None, 16),  # vLLM's default; max_completion_length decides
    "bad_words": (None, []),
    "logit_bias": (None,),
    "allowed_token_ids": (None,),
    "logits_processors": (None, []),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None, -1),
}
"""What else they may hold, with the values that say what Groupwise does anyway."""


def sampling_values(args: GRPOConfig) -> dict[str, Any]:
    """Settings of `rollout`, of evaluation's temperature and top-p, and the seed.

    Raises:
        ConfigError: a value that cannot act, or two that contradict each other.
    """
    values: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        dotted, neutral = _KNOWN[name]
        values[dotted] = neutral if vars(args)[name] is None else vars(args)[name]
    values["rollout.top_k"] = max(0, values["rollout.top_k"])  # -1 keeps all, too
    own = {dotted: values.get(dotted, vars(args)[name]) for name, (dotted, _) in _KNOWN.items() if name in args.given}
    for place, found in (
        ("generation_kwargs", _read("generation_kwargs", args.generation_kwargs or {})),
        ("vllm_sampling_params", _read("vllm_sampling_params", _attributes(args.vllm_sampling_params))),
    ):
        for dotted, value in found.items():
            if own.get(dotted, value) != value:
                raise ConfigError(
                    f"GRPOConfig.{place} asks for {dotted} = {literal(value)}, and another argument for "
                    f"{literal(own[dotted])}; give one"
                )
            own[dotted] = values[dotted] = value
    return {
        **values,
        "eval.temperature": values["rollout.temperature"],
        "eval.top_p": values["rollout.top_p"],
    }


def _attributes(params: Any) -> dict[str, Any]:
    """What a SamplingParams says; its defaults are left out, because a program cannot be seen to have given them."""
    if params is None:
        return {}
    if isinstance(params, Mapping):
        return dict(params)
    absent = object()
    found = {name: getattr(params, name, absent) for name in (*_KNOWN, *_WITHOUT_EFFECT)}
    if all(value is absent for value in found.values()):
        raise ConfigError(
            f"GRPOConfig.vllm_sampling_params: got a {type(params).__name__}; expected vLLM's SamplingParams, or a dict"
        )
    # Without a stop string the switch decides nothing, and its default is False.
    if not found["stop"] or found["stop"] is absent:
        found["include_stop_str_in_output"] = absent
    return {
        name: value
        for name, value in found.items()
        if value is not absent and not (name in _KNOWN and _clean(name, value) == _KNOWN[name][1])
    }


def _read(place: str, given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in _KNOWN:
            values[_KNOWN[name][0]] = _clean(name, value)
        elif name not in _WITHOUT_EFFECT or value not in _WITHOUT_EFFECT[name]:
            raise ConfigError(
                f"GRPOConfig.{place}: {name} = {literal(value)} cannot act; expected any of "
                f"{', '.join(_KNOWN)}{_instead(name)}"
            )
    return values


def _instead(name: str) -> str:
    return {
        "max_tokens": "; set max_completion_length",
        "max_new_tokens": "; set max_completion_length",
        "n": "; set num_generations",
        "include_stop_str_in_output": "; set it to True: rewards see the stop string",
    }.get(name, "")


def _clean(name: str, value: Any) -> Any:
    if name in ("stop", "stop_strings", "stop_token_ids"):
        return (value,) if isinstance(value, str | int) else tuple(value or ())
    if name == "top_k":
        return max(0, value or 0)
    return _KNOWN[name][1] if value is None else value
