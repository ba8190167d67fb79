"""What a model's config says that it cannot go beyond, and the checks of plain values against it. One rule for all ways
in; nothing here loads a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.config.optim import OptimConfig
from groupwise.errors import ConfigError

logger = logging.getLogger(__name__)

HIGHEST_RATE = 0.2
"""Above it no model learns: one update of AdamW moves every weight by about the rate, and weights are smaller."""

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_STRETCHED = ("linear", "dynamic", "yarn", "ntk")
_BLOCK = 64  # caches hold tokens in blocks


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Of one model.

    Attributes:
        positions: most tokens of prompt and completion together; None where nothing bounds them.
        key: which entry of config.json says so.
        vocabulary: token numbers are below it; None where that is not known.
        width: of a hidden state; None where that is not known.
        cache_values: numbers that a token's keys and values are, all layers together; 0 where that is not known.

    Example:
        limits_of({"max_position_embeddings": 4096, "vocab_size": 32000, "hidden_size": 4096}).positions == 4096
    """

    positions: int | None = None
    key: str = ""
    vocabulary: int | None = None
    width: int | None = None
    cache_values: int = 0


def limits_of(content: Mapping[str, Any]) -> ModelLimits:
    """From a model's config, as config.json has it; of a model with several parts, from that of its text."""
    text = content.get("text_config")
    content = text if isinstance(text, Mapping) else content
    key = next((name for name in _POSITIONS if _whole(content.get(name))), "")
    positions = _whole(content.get(key)) if key else None
    return ModelLimits(
        positions=None if positions is None else max(positions, _stretched(content, positions)),
        key=key,
        vocabulary=_whole(content.get("vocab_size")),
        width=_whole(content.get("hidden_size")) or _whole(content.get("n_embd")),
        cache_values=_cache_values(content),
    )


def check_lengths(
    token_ids: Sequence[Sequence[int]], limits: ModelLimits, *, most: int, setting: str, prompts: str = "prompts"
) -> None:
    """Refuse sequences that the model has no positions or no embeddings for.

    Args:
        token_ids: of each prompt, or of each whole row where `most` is 0.
        most: tokens that may follow.
        setting: which bounds these.
        prompts: what the sequences are called.

    Raises:
        ConfigError: says how long it may be.
    """
    longest = max(map(len, token_ids))
    highest = max(max(ids, default=0) for ids in token_ids)
    if limits.vocabulary is not None and highest >= limits.vocabulary:
        raise ConfigError(
            f"{prompts} have tokens up to number {highest}, and the model has embeddings for 0 to "
            f"{limits.vocabulary - 1}; use the tokenizer that belongs to the model, or resize its embedding"
        )
    if limits.positions is None or longest + most <= limits.positions:
        return
    known = f"the model knows {limits.positions} positions ({limits.key} of its config.json)"
    if not most:
        raise ConfigError(f"{prompts} have up to {longest} tokens, and {known}; set {setting} to {limits.positions}")
    room = limits.positions - longest
    way = f"set {setting} to at most {room}"
    if room <= 0:
        way = f"leave out longer {prompts} by data.max_prompt_tokens = {max(1, limits.positions - most)}"
    raise ConfigError(
        f"{setting} = {most} after {prompts} of up to {longest} tokens makes {longest + most}, and {known}; {way}, or "
        "give a model whose positions reach as far (rope_scaling in config.json extends rotary ones)"
    )


def check_stop_tokens(stop_token_ids: Sequence[int], limits: ModelLimits, *, setting: str) -> None:
    """Refuse tokens that the model can never draw.

    Raises:
        ConfigError: names the first.
    """
    strange = [token for token in stop_token_ids if token < 0 or token >= (limits.vocabulary or token + 1)]
    if strange:
        raise ConfigError(
            f"{setting}: got {strange[0]}, and the model's tokens are 0 to {(limits.vocabulary or 1) - 1}; it would "
            "never end an answer"
        )


def check_cache(limits: ModelLimits, *, prompt: int, most: int, value_bytes: int, gib: float, bound: str) -> None:
    """Refuse a sample whose keys and values alone are larger than their memory.

    Args:
        prompt, most: tokens of the longest prompt, and of its completion.
        value_bytes: of one number.
        gib: that memory, and `bound` what decides it.

    Raises:
        ConfigError: with the arithmetic.
    """
    tokens = sum(-(-each // _BLOCK) * _BLOCK for each in (prompt, most))
    needed = tokens * limits.cache_values * value_bytes / 2**30
    if needed > gib:
        raise ConfigError(
            f"one sample of {prompt} prompt and {most} completion tokens needs {needed:.2f} GiB of keys and values "
            f"({limits.cache_values * value_bytes / 2**10:.0f} KiB a token), but {bound} allows {gib:.2f}; raise "
            "rollout.kv_cache_gib, or lower rollout.max_completion_tokens"
        )


def rate_problem(optim: OptimConfig) -> str | None:
    """A learning rate at which nothing can be learned."""
    if optim.lr <= HIGHEST_RATE:
        return None
    return (
        f"optim.lr = {optim.lr:g}: one update moves every weight by about that much, and most weights are smaller, so "
        "the first would destroy the model; use 1e-6 to 1e-5, with LoRA 1e-5 to 1e-4, for a tiny model up to 1e-2"
    )


def say_high_rate(optim: OptimConfig, limits: ModelLimits, *, lora: bool) -> None:
    """Warn of a learning rate that is high for a model of this width: what AdamW's updates change in a layer's outputs
    grows with it (Yang et al. 2022, table 3), and an adapter takes about ten times the rate."""
    usual = 1.0 / limits.width if limits.width else None
    if usual is not None and optim.lr > usual * (10 if lora else 1):
        logger.warning(
            "optim.lr = %g is high for a model of width %d: rates above %.1g mostly destroy it; 1e-6 to 1e-5 are "
            "usual, with LoRA 1e-5 to 1e-4",
            *(optim.lr, limits.width, usual * (10 if lora else 1)),
        )


def _stretched(content: Mapping[str, Any], positions: int) -> int:
    """How far rotary positions are stretched beyond what the model was trained on."""
    scaling = content.get("rope_scaling") or content.get("rope_parameters")
    entries = [scaling] if isinstance(scaling, Mapping) else []
    entries += [each for entry in entries for each in entry.values() if isinstance(each, Mapping)]
    reach = [positions]
    for entry in entries:
        factor = entry.get("factor")
        if entry.get("rope_type", entry.get("type")) in _STRETCHED and isinstance(factor, int | float):
            reach.append(int((_whole(entry.get("original_max_position_embeddings")) or positions) * factor))
    return max(reach)


def _cache_values(content: Mapping[str, Any]) -> int:
    layers = _whole(content.get("num_hidden_layers")) or _whole(content.get("n_layer")) or 0
    heads = _whole(content.get("num_attention_heads")) or _whole(content.get("n_head")) or 0
    width = _whole(content.get("hidden_size")) or _whole(content.get("n_embd")) or 0
    size = _whole(content.get("head_dim")) or (width // heads if heads else 0)
    return 2 * layers * (_whole(content.get("num_key_value_heads")) or heads) * size


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
