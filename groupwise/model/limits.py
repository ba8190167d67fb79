"""A model's limits before its weights are loaded, and prompts and samples held against them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from groupwise.config import Config, ModelConfig, RolloutConfig
from groupwise.config.limits import ModelLimits, check_cache, check_lengths, check_stop_tokens, limits_of, say_high_rate
from groupwise.config.lora import read_adapter_file
from groupwise.config.model_name import named_checkpoint
from groupwise.errors import ConfigError
from groupwise.model.checkpoints import base_config
from groupwise.model.loading import LoadedModel, resolve_device, resolve_dtype
from groupwise.types import Prompt

_CPU_GIB = 4.0
_GPU_SHARE = 0.6


def find_limits(loaded: LoadedModel | None, config: ModelConfig) -> ModelLimits:
    """Of the model that a program gave, or that `config` names; of that, only config.json is read.

    Raises:
        ConfigError: it cannot be read.
    """
    if loaded is not None:
        return limits_of(loaded.model.config.get_text_config().to_dict())
    if checkpoint := named_checkpoint(config.path):
        return find_limits(None, base_config(config, checkpoint))
    adapter = read_adapter_file(Path(config.path))
    path = config.path if adapter is None else adapter.base
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"model.path = {path!r} could not be loaded: {first}") from error
    return limits_of(found.get_text_config().to_dict())


def check_samples(
    prompts: Sequence[Prompt], limits: ModelLimits, rollout: RolloutConfig, *, most: int, setting: str
) -> None:
    """Refuse prompts, completions and stop tokens that the model has no room for.

    Args:
        most: tokens of a completion, decided by `setting`.

    Raises:
        ConfigError: says what to lower.
    """
    check_lengths([prompt.token_ids for prompt in prompts], limits, most=most, setting=setting)
    check_stop_tokens(rollout.stop_token_ids, limits, setting="rollout.stop_token_ids")


def check_run(
    config: Config, limits: ModelLimits, *, prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt]
) -> None:
    """All that a training run asks of its model, before the weights are loaded.

    Raises:
        ConfigError: says what to lower.
    """
    rollout = config.rollout
    most, setting = rollout.max_completion_tokens, "rollout.max_completion_tokens"
    check_samples(prompts, limits, rollout, most=most, setting=setting)
    _check_memory(config, limits, prompt=max(len(each.token_ids) for each in prompts), most=most)
    if eval_prompts:
        check_evaluation(eval_prompts, limits, config)
    say_high_rate(config.optim, limits, lora=config.lora.rank > 0)


def check_evaluation(prompts: Sequence[Prompt], limits: ModelLimits, config: Config) -> None:
    """Raises ConfigError where evaluation's completions have no room."""
    own = config.eval.max_completion_tokens
    most = config.rollout.max_completion_tokens if own is None else own
    setting = "rollout.max_completion_tokens" if own is None else "eval.max_completion_tokens"
    check_samples(prompts, limits, config.rollout, most=most, setting=setting)


def _check_memory(config: Config, limits: ModelLimits, *, prompt: int, most: int) -> None:
    device = resolve_device(config.model.device)
    gib, bound = config.rollout.kv_cache_gib, "rollout.kv_cache_gib"
    if gib is None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        gib, bound = _GPU_SHARE * total / 2**30, f"{_GPU_SHARE:.0%} of the GPU's {total / 2**30:.0f} GiB"
    elif gib is None:
        gib, bound = _CPU_GIB, "rollout.kv_cache_gib, by default on a CPU,"
    value_bytes = resolve_dtype(config.model.dtype, device).itemsize
    check_cache(limits, prompt=prompt, most=most, value_bytes=value_bytes, gib=gib, bound=bound)
