"""Names, recipes and refusals."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from pydantic import ValidationError

from groupwise.algorithms import build_algorithm, describe_algorithms
from groupwise.algorithms.registry import ADVANTAGES, LOSSES
from groupwise.config import AlgorithmConfig
from groupwise.config.algorithm import ADVANTAGE_SETTINGS, CORRECTION_SETTINGS, LOSS_SETTINGS, RECIPES
from groupwise.errors import ConfigError


def config_of(**settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(settings)


def test_the_default_is_grpo():
    config = config_of()
    assert (config.name, config.advantage, config.loss, config.normaliser) == ("grpo", "grpo", "ppo_clip", "token")
    assert (config.clip_low, config.clip_high, config.scale, config.kl_coef) == (0.2, 0.2, "group", 0.0)
    algorithm = build_algorithm(config)
    assert not algorithm.needs_reference
    assert not algorithm.needs_entropy
    assert not algorithm.needs_sampler_logprobs


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_builds_and_survives_a_round_trip_through_json(name):
    config = config_of(name=name)
    assert build_algorithm(config).name == name
    assert AlgorithmConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_config_and_registry_know_the_same_parts_and_settings():
    assert set(ADVANTAGES) == set(ADVANTAGE_SETTINGS)
    assert set(LOSSES) == set(LOSS_SETTINGS)
    for functions, tables in ((ADVANTAGES, ADVANTAGE_SETTINGS), (LOSSES, LOSS_SETTINGS)):
        for name, function in functions.items():
            keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
            assert sorted(keywords) == sorted(tables[name]), name
    assert {recipe.advantage for recipe in RECIPES.values()} == set(ADVANTAGES)
    assert {recipe.loss for recipe in RECIPES.values()} == set(LOSSES)


def test_descriptions_are_complete():
    records = describe_algorithms()
    assert len({record.name for record in records}) == len(records) == len(RECIPES)
    assert all(record.paper and 10 < len(record.summary) < 80 for record in records)


def test_a_recipe_gives_values_and_the_user_overrides_them():
    assert config_of(name="dapo").clip_high == 0.28
    assert config_of(name="dapo", clip_high=0.5).clip_high == 0.5
    assert config_of(name="dr_grpo").scale == "none"
    assert config_of(name="dr_grpo", normaliser="token").normaliser == "token"
    assert config_of(name="gspo").clip_low == 3e-4
    assert config_of(name="pass_k").pass_k == 4
    assert config_of(name="pass_k").scale is None
    assert config_of(name="sapo").clip_low is None


def test_a_recipes_numbers_stay_with_its_own_parts():
    config = config_of(name="dapo", loss="gspo")
    assert (config.clip_low, config.clip_high) == (3e-4, 4e-4)
    assert config_of(name="dr_grpo", advantage="rloo").scale is None
    build_algorithm(config)


@pytest.mark.parametrize("correction", list(CORRECTION_SETTINGS))
def test_corrections_bring_their_defaults(correction):
    config = config_of(correction=correction)
    for key, value in CORRECTION_SETTINGS[correction].items():
        assert getattr(config, key) == value
    rule = build_algorithm(config).correction
    assert rule.kind == correction
    assert rule.high > rule.low >= 0


def test_sequence_losses_are_corrected_by_the_sequence():
    assert config_of(name="gspo", correction="truncate").correction_level == "sequence"
    assert config_of(name="gspo", correction="truncate", correction_level="geometric").correction_level == "geometric"
    assert config_of(name="gspo_token", correction="truncate").correction_level == "token"


def test_switches_bring_the_defaults_of_what_they_switch_on():
    config = config_of(kl_coef=0.1, reference_sync_every=8, entropy_target=0.5)
    assert config.reference_mixup == 0.6
    assert (config.entropy_coef_step, config.entropy_coef_min, config.entropy_coef_max) == (0.005, 0.0, 1.0)
    assert config_of().reference_mixup is None is config_of().entropy_coef_step
    assert config_of(kl_coef=0.1, kl_in="reward").kl_estimator == "k1"
    assert config_of(kl_coef=0.1, kl_in="reward", kl_estimator="k3").kl_estimator == "k3"
    assert config_of(kl_coef=0.1).kl_estimator == "k3"
    assert AlgorithmConfig.model_validate(json.loads(config.model_dump_json())) == config
    control = build_algorithm(config).entropy_control
    assert control is not None
    assert (control.target, control.step, control.low, control.high) == (0.5, 0.005, 0.0, 1.0)


def test_flags_follow_the_settings():
    adaptive = build_algorithm(config_of(entropy_target=0.1))
    assert adaptive.needs_entropy
    assert adaptive.learns_without_advantage
    assert not build_algorithm(config_of(top_entropy_fraction=0.2)).learns_without_advantage
    in_reward = build_algorithm(config_of(kl_coef=0.1, kl_in="reward"))
    assert in_reward.needs_reference
    assert not in_reward.learns_without_advantage
    assert build_algorithm(config_of(kl_coef=0.1)).needs_reference
    assert build_algorithm(config_of(entropy_coef=0.1)).needs_entropy
    assert build_algorithm(config_of(top_entropy_fraction=0.2)).needs_entropy
    assert build_algorithm(config_of(correction="truncate")).needs_sampler_logprobs
    assert build_algorithm(config_of(correction_veto=1e-4)).needs_sampler_logprobs


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "gropo"}, ["algorithm.name = 'gropo'", "did you mean 'grpo'", "dapo"]),
        ({"name": "Ωμέγα"}, ["algorithm.name = 'Ωμέγα'", "it is one of"]),
        ({"name": ""}, ["algorithm.name = ''", "it is one of"]),
        ({"loss": "gpso"}, ["algorithm.loss = 'gpso'", "did you mean 'gspo'"]),
        ({"advantage": "rlo"}, ["algorithm.advantage = 'rlo'", "did you mean 'rloo'"]),
        ({"name": "sapo", "clip_low": 0.2}, ["algorithm.clip_low = 0.2 has no effect", "loss = 'sapo'", "'ppo_clip'"]),
        ({"name": "rloo", "scale": "batch"}, ["algorithm.scale = 'batch'", "advantage = 'rloo'", "'grpo'"]),
        ({"name": "gspo", "dual_clip": 3.0}, ["algorithm.dual_clip = 3.0", "'ppo_clip'"]),
        ({"pass_k": 4}, ["algorithm.pass_k = 4", "'pass_k'"]),
        ({"correction_high": 2.0}, ["algorithm.correction_high = 2.0", "correction = 'none'", "'truncate'", "'mask'"]),
        ({"correction": "truncate", "correction_low": 0.5}, ["algorithm.correction_low", "'mask'"]),
        ({"correction": "mask", "correction_low": 6.0}, ["correction_low = 6.0", "correction_high = 5.0", "lower"]),
        ({"name": "gspo", "correction": "mask", "correction_level": "token"}, ["'gspo'", "'sequence' or 'geometric'"]),
        ({"name": "gmpo", "top_entropy_fraction": 0.2}, ["top_entropy_fraction = 0.2", "'gmpo'", "set it to 1"]),
        ({"kl_in": "reward"}, ["algorithm.kl_in = 'reward'", "kl_coef = 0", "set kl_coef"]),
        ({"reference_sync_every": 5}, ["algorithm.reference_sync_every = 5", "kl_coef = 0"]),
        ({"kl_coef": 0.1, "reference_mixup": 0.5}, ["reference_mixup = 0.5", "set reference_sync_every"]),
        ({"name": "gdpo", "kl_coef": 0.1, "kl_in": "reward"}, ["'gdpo'", "use kl_in = 'loss'"]),
        ({"name": "pass_k", "kl_coef": 0.1, "kl_in": "reward"}, ["'pass_k'", "use kl_in = 'loss'"]),
        ({"entropy_coef_step": 0.1}, ["entropy_coef_step = 0.1", "set entropy_target"]),
        ({"entropy_target": 1.0, "entropy_coef": 2.0}, ["entropy_coef = 2.0", "entropy_coef_max = 1.0"]),
        ({"entropy_target": 1.0, "entropy_coef_min": 0.5, "entropy_coef_max": 0.5, "entropy_coef": 0.5}, ["a range"]),
    ],
)
def test_refusals_name_the_key_the_reason_and_the_remedy(settings, words):
    config = config_of(**settings)
    with pytest.raises(ConfigError) as caught:
        build_algorithm(config)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_low": -0.1},
        {"clip_low": 1.5},
        {"kl_coef": float("nan")},
        {"kl_coef": None},
        {"kl_estimator": "k4"},
        {"normaliser": "rows"},
        {"dual_clip": 1.0},
        {"correction": "trunc"},
        {"correction_veto": 1.0},
        {"top_entropy_fraction": 0.0},
        {"scale": "row"},
        {"loss": ["ppo_clip"]},
        {"typo": 1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        config_of(**settings)
