"""Limits of a model, from its config alone, and the values that are held against them."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from groupwise.config import Config, OptimConfig
from groupwise.config.checks import check_supervised
from groupwise.config.limits import (
    ModelLimits,
    check_cache,
    check_lengths,
    check_stop_tokens,
    limits_of,
    rate_problem,
    say_high_rate,
)
from groupwise.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "positions", "key"),
    [
        ({"n_positions": 64, "n_ctx": 32}, 64, "n_positions"),
        ({"max_position_embeddings": 4096}, 4096, "max_position_embeddings"),
        ({"text_config": {"max_position_embeddings": 12}, "max_position_embeddings": 9}, 12, "max_position_embeddings"),
        ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 400, None),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "dynamic", "factor": 1.5}}, 150, None),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
            None,
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
            None,
        ),
        (
            {
                "max_position_embeddings": 100,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}},
            },
            800,
            None,
        ),
        ({"hidden_size": 8}, None, ""),
        ({"max_position_embeddings": None, "n_positions": True}, None, ""),
    ],
)
def test_positions(content: dict[str, Any], positions: int | None, key: str | None) -> None:
    found = limits_of(content)
    assert found.positions == positions
    assert key is None or found.key == key


def test_a_token_in_the_cache_is_counted_as_the_engine_counts_it() -> None:
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    assert limits_of(llama).cache_values == 2 * 32 * 8 * 128
    assert limits_of({"n_layer": 2, "n_head": 2, "n_embd": 64}).cache_values == 2 * 2 * 64


LIMITS = ModelLimits(positions=64, key="n_positions", vocabulary=100, width=64, cache_values=1024)


def test_room_is_counted_to_the_token() -> None:
    check_lengths([(1, 2, 3), (1,)], LIMITS, most=61, setting="x")
    with pytest.raises(ConfigError, match=r"x = 62 after prompts of up to 3 tokens makes 65.* 64 positions .* most 61"):
        check_lengths([(1, 2, 3), (1,)], LIMITS, most=62, setting="x")
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens = 54"):
        check_lengths([(1,) * 64], LIMITS, most=10, setting="x")
    check_lengths([(1,) * 10_000], ModelLimits(), most=10_000, setting="x")


def test_rows_without_an_answer_to_come() -> None:
    check_lengths([(1,) * 64], LIMITS, most=0, setting="sft.max_tokens", prompts="conversations")
    with pytest.raises(ConfigError, match=r"conversations have up to 65 tokens.*set sft\.max_tokens to 64"):
        check_lengths([(1,) * 65], LIMITS, most=0, setting="sft.max_tokens", prompts="conversations")


def test_tokens_of_another_tokenizer() -> None:
    check_lengths([(99,)], LIMITS, most=1, setting="x")
    with pytest.raises(ConfigError, match="up to number 100, and the model has embeddings for 0 to 99"):
        check_lengths([(1, 100)], LIMITS, most=1, setting="x")
    check_stop_tokens((0, 99), LIMITS, setting="x")
    check_stop_tokens((10**9,), ModelLimits(), setting="x")
    for bad in (100, -1):
        with pytest.raises(ConfigError, match=f"x: got {bad}, and the model's tokens are 0 to 99"):
            check_stop_tokens((3, bad), LIMITS, setting="x")


def test_a_sample_larger_than_the_cache() -> None:
    """64 + 128 tokens of 4 KiB are 0.000732 GiB."""
    check_cache(LIMITS, prompt=10, most=100, value_bytes=4, gib=0.00074, bound="b")
    with pytest.raises(ConfigError, match=r"10 prompt and 100 .* 0\.00 GiB .*\(4 KiB a token\), but b allows 0\.00"):
        check_cache(LIMITS, prompt=10, most=100, value_bytes=4, gib=0.00073, bound="b")


def optim(lr: float) -> OptimConfig:
    return OptimConfig.model_validate({"lr": lr})


def test_a_rate_at_which_nothing_is_learned_is_refused_by_every_command() -> None:
    assert rate_problem(optim(0.2)) is None
    assert "0.21" in (rate_problem(optim(0.21)) or "")
    config = Config.model_validate({"model": {"path": "a/b"}, "optim": {"lr": 1.0}})
    with pytest.raises(ConfigError, match=r"optim\.lr = 1: one update moves every weight"):
        check_supervised(config, provided=["data.train"])


@pytest.mark.parametrize(
    ("lr", "width", "lora", "warns"),
    [
        (1e-6, 4096, False, False),
        (1e-3, 4096, False, True),
        (1e-4, 4096, True, False),
        (1e-2, 4096, True, True),
        (1e-3, 1024, False, True),
        (3e-3, 128, False, False),
        (2e-2, 128, True, False),
        (0.1, None, False, False),
    ],
)
def test_a_high_rate_is_said_by_width(
    lr: float, width: int | None, lora: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        say_high_rate(optim(lr), ModelLimits(width=width), lora=lora)
    assert bool(caplog.records) == warns


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("rollout", {"stop": ["", "x"]}, "empty text"),
        ("rollout", {"stop_token_ids": [-1]}, "numbered from 0"),
        ("rollout", {"temperature": 1e-9}, "0, which is greedy, or 0.001 to 100"),
        ("rollout", {"temperature": 1e6}, "0, which is greedy"),
        ("rollout", {"temperature": float("nan")}, "0, which is greedy|finite"),
        ("eval", {"temperature": 1e-5}, "0, which is greedy"),
    ],
)
def test_values_that_could_not_act(section: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config.model_validate({section: values})


def test_values_that_act() -> None:
    for temperature in (0, 0.001, 0.6, 100):
        Config.model_validate({"rollout": {"temperature": temperature}, "eval": {"temperature": temperature}})
