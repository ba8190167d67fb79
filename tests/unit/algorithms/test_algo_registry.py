"""Names, recipes and refusals."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from groupwise.algorithms import build_algorithm, describe_algorithms
from groupwise.algorithms.corrections import Correction
from groupwise.algorithms.registry import ADVANTAGES, LOSSES
from groupwise.config import AlgorithmConfig
from groupwise.config.algorithm import RECIPES, advantages, losses
from groupwise.config.algorithm.corrections import NoCorrection
from groupwise.config.algorithm.entropy import AdaptiveEntropy
from groupwise.config.algorithm.kl import KlInLoss, MovingReference


def config_of(**settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(settings)


def test_the_default_is_grpo():
    config = config_of()
    assert (config.name, config.normaliser) == ("grpo", "token")
    assert (config.advantage, config.loss) == (advantages.Grpo(scale="group"), losses.PpoClip(clip_low=0.2))
    assert (config.loss, config.kl) == (losses.PpoClip(clip_high=0.2, dual_clip=None), KlInLoss(coef=0.0))
    algorithm = build_algorithm(config)
    assert not algorithm.needs_reference
    assert not algorithm.needs_entropy
    assert not algorithm.needs_sampler_logprobs


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_builds_and_survives_a_round_trip_through_json(name):
    config = config_of(name=name, **({"teacher": {"path": "a model"}} if name == "distill" else {}))
    assert build_algorithm(config).name == name
    assert AlgorithmConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_config_and_registry_know_the_same_parts_and_settings():
    for functions, settings in ((ADVANTAGES, advantages.AdvantageSettings), (LOSSES, losses.LossSettings)):
        classes = {one.choice: one for one in settings.__subclasses__()}
        assert set(functions) == set(classes)
        for name, function in functions.items():
            keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
            assert {*keywords, "name"} == set(classes[name].model_fields), name
    assert {recipe.advantage.name for recipe in RECIPES.values()} == set(ADVANTAGES)
    assert {recipe.loss.name for recipe in RECIPES.values()} == set(LOSSES)


def test_descriptions_are_complete():
    records = describe_algorithms()
    assert len({record.name for record in records}) == len(records) == len(RECIPES)
    assert all(record.paper and 10 < len(record.summary) < 80 for record in records)


def test_a_recipe_gives_values_and_the_user_overrides_them():
    assert config_of(name="dapo").loss == losses.PpoClip(clip_high=0.28)
    assert config_of(name="dapo", loss={"clip_low": 0.1}).loss == losses.PpoClip(clip_low=0.1, clip_high=0.28)
    assert config_of(name="dapo", loss={"clip_high": 0.5}).loss == losses.PpoClip(clip_high=0.5)
    assert config_of(name="dapo", loss=losses.PpoClip()).loss == losses.PpoClip()
    assert config_of(name="dr_grpo").advantage == advantages.Grpo(scale="none")
    assert config_of(name="dr_grpo", normaliser="token").normaliser == "token"
    assert config_of(name="gspo").loss == losses.Gspo(clip_low=3e-4, clip_high=4e-4)
    assert config_of(name="pass_k").advantage == advantages.PassK(k=4, threshold=0.0)
    assert config_of(name="sapo").loss == losses.Sapo(temperature_positive=1.0, temperature_negative=1.05)
    assert config_of(loss={"name": "gmpo"}).loss == losses.Gmpo(clip_low=1 - math.exp(-0.4))


def test_a_recipes_numbers_stay_with_its_own_parts():
    assert config_of(name="dapo", loss={"name": "gspo"}).loss == losses.Gspo(clip_low=3e-4, clip_high=4e-4)
    assert config_of(name="dr_grpo", advantage={"name": "rloo"}).advantage == advantages.Rloo()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("none", {}),
        ("truncate", {"level": "token", "high": 2.0}),
        ("mask", {"level": "token", "low": 0.5, "high": 5.0}),
        ("decoupled", {"level": "token"}),
    ],
)
def test_corrections_bring_their_defaults(name, settings):
    config = config_of(correction={"name": name})
    assert config.correction.model_dump(exclude_none=True) == {"name": name, **settings}
    rule = build_algorithm(config).correction
    assert rule == Correction(kind=name, **settings)
    assert rule.high > rule.low >= 0


def test_sequence_losses_are_corrected_by_the_sequence():
    def level(name: str, **settings: str) -> str:
        return config_of(name=name, correction={"name": "truncate", **settings}).model_dump()["correction"]["level"]

    assert (level("gspo"), level("gmpo"), level("gspo_token")) == ("sequence", "sequence", "token")
    assert level("gspo", level="geometric") == "geometric"
    assert config_of(name="gspo", correction={"veto": 0.1}).correction == NoCorrection(veto=0.1)


def test_switches_bring_the_defaults_of_what_they_switch_on():
    config = config_of(kl={"coef": 0.1}, reference={"sync_every": 8}, entropy={"target": 0.5})
    assert config.reference == MovingReference(sync_every=8, mixup=0.6)
    assert config.entropy == AdaptiveEntropy(target=0.5, coef_step=0.005, coef_min=0.0, coef_max=1.0)
    assert config_of().reference.model_dump() == {"sync_every": 0}
    assert config_of().entropy.model_dump() == {"coef": 0.0, "target": None, "top_fraction": 1.0}
    assert config_of(kl={"coef": 0.1, "place": "reward"}).kl.estimator == "k1"
    assert config_of(kl={"coef": 0.1, "place": "reward", "estimator": "k3"}).kl.estimator == "k3"
    assert config_of(kl={"coef": 0.1}).kl.estimator == "k3"
    assert AlgorithmConfig.model_validate(json.loads(config.model_dump_json())) == config
    control = build_algorithm(config).entropy_control
    assert control is not None
    assert (control.target, control.step, control.low, control.high) == (0.5, 0.005, 0.0, 1.0)


def test_flags_follow_the_settings():
    adaptive = build_algorithm(config_of(entropy={"target": 0.1}))
    assert adaptive.needs_entropy
    assert adaptive.learns_without_advantage
    assert not build_algorithm(config_of(entropy={"top_fraction": 0.2})).learns_without_advantage
    in_reward = build_algorithm(config_of(kl={"coef": 0.1, "place": "reward"}))
    assert in_reward.needs_reference
    assert not in_reward.learns_without_advantage
    assert build_algorithm(config_of(kl={"coef": 0.1})).needs_reference
    assert build_algorithm(config_of(entropy={"coef": 0.1})).needs_entropy
    assert build_algorithm(config_of(entropy={"top_fraction": 0.2})).needs_entropy
    assert build_algorithm(config_of(correction={"name": "truncate"})).needs_sampler_logprobs
    assert build_algorithm(config_of(correction={"veto": 1e-4})).needs_sampler_logprobs


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "gropo"}, ["got 'gropo', which does not exist", "did you mean 'grpo'", "dapo"]),
        ({"name": "Ωμέγα"}, ["got 'Ωμέγα'", "expected one of"]),
        ({"name": ""}, ["got ''", "expected one of"]),
        ({"loss": {"name": "gpso"}}, ["loss\n", "'gpso'", "'gspo'"]),
        ({"advantage": {"name": "rlo"}}, ["advantage\n", "'rlo'", "'rloo'"]),
        (
            {"name": "sapo", "loss": {"clip_low": 0.2}},
            ["clip_low: got 0.2, which has no effect with name = sapo", "ppo_clip, gspo, gspo_token, cispo or gmpo"],
        ),
        ({"name": "rloo", "advantage": {"scale": "batch"}}, ["scale: got 'batch'", "name = rloo", "set name to grpo"]),
        ({"name": "gspo", "loss": {"dual_clip": 3.0}}, ["dual_clip: got 3.0", "set name to ppo_clip"]),
        ({"advantage": {"k": 4}}, ["k: got 4", "set name to pass_k"]),
        ({"correction": {"high": 2.0}}, ["high: got 2.0", "name = none", "set name to truncate or mask"]),
        ({"correction": {"name": "truncate", "low": 0.5}}, ["low: got 0.5", "set name to mask"]),
        ({"correction": {"name": "mask", "low": 6.0}}, ["low: 6.0 is not below high = 5.0", "lower"]),
        (
            {"name": "gspo", "correction": {"name": "mask", "level": "token"}},
            ["correction.level: got 'token'", "'gspo'", "'sequence' or 'geometric'"],
        ),
        (
            {"name": "gmpo", "entropy": {"top_fraction": 0.2}},
            ["entropy.top_fraction: got 0.2", "'gmpo'", "set it to 1"],
        ),
        ({"kl": {"place": "reward"}}, ["kl.place: got 'reward'", "kl.coef = 0", "set kl.coef"]),
        ({"reference": {"sync_every": 5}}, ["reference.sync_every: got 5", "kl.coef = 0"]),
        (
            {"kl": {"coef": 0.1}, "reference": {"mixup": 0.5}},
            ["mixup: got 0.5", "sync_every = 0", "set sync_every to 1 or more"],
        ),
        ({"name": "gdpo", "kl": {"coef": 0.1, "place": "reward"}}, ["'gdpo'", "use 'loss'"]),
        ({"name": "pass_k", "kl": {"coef": 0.1, "place": "reward"}}, ["'pass_k'", "use 'loss'"]),
        ({"entropy": {"coef_step": 0.1}}, ["coef_step: got 0.1", "target = none", "set target to a number"]),
        ({"entropy": {"target": 1.0, "coef": 2.0}}, ["coef = 2.0", "coef_max = 1.0"]),
        ({"entropy": {"target": 1.0, "coef_min": 0.5, "coef_max": 0.5, "coef": 0.5}}, ["a range"]),
    ],
)
def test_refusals_name_the_key_the_reason_and_the_remedy(settings, words):
    with pytest.raises(ValidationError) as caught:
        config_of(**settings)
    for word in words:
        assert word in str(caught.value)


def test_none_says_nothing_of_what_another_part_takes():
    assert config_of(name="sapo", loss={"dual_clip": None, "clip_low": None}) == config_of(name="sapo")


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": {"clip_low": -0.1}},
        {"loss": {"clip_low": 1.5}},
        {"kl": {"coef": float("nan")}},
        {"kl": {"coef": None}},
        {"kl": {"estimator": "k4"}},
        {"normaliser": "rows"},
        {"loss": {"dual_clip": 1.0}},
        {"correction": {"name": "trunc"}},
        {"correction": {"veto": 1.0}},
        {"entropy": {"top_fraction": 0.0}},
        {"advantage": {"scale": "row"}},
        {"loss": {"name": ["ppo_clip"]}},
        {"loss": ["ppo_clip"]},
        {"loss": None},
        {"kl": 0.1},
        {"reference": 5},
        {"reference": {"sync_every": -1}},
        {"entropy": {"target": 0}},
        {"loss": {"typo": 1}},
        {"typo": 1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        config_of(**settings)
