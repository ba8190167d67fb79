"""The rules by name, with the bounds that a config gives them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from groupwise.config import Config
from groupwise.doctor.answers import AnswersCut, AnswersEmpty, AnswersIdentical, LengthCollapsing, LengthExploding
from groupwise.doctor.learning import (
    EntropyCollapse,
    EntropyExplosion,
    ExpertsStrange,
    GradientNorm,
    KlHigh,
    MismatchHigh,
    ThroughputHalved,
)
from groupwise.doctor.rewards import (
    AccuracyFalls,
    GroupsEqual,
    NoUsableSample,
    RewardConstant,
    RewardFailed,
    RewardFlat,
    RewardIsLength,
)
from groupwise.doctor.rules import Rule
from groupwise.errors import ConfigError, nearest

_ALL: tuple[type[Rule], ...] = (
    NoUsableSample,
    RewardFlat,
    GroupsEqual,
    RewardConstant,
    RewardFailed,
    RewardIsLength,
    AccuracyFalls,
    AnswersCut,
    AnswersEmpty,
    AnswersIdentical,
    LengthExploding,
    LengthCollapsing,
    KlHigh,
    EntropyCollapse,
    EntropyExplosion,
    GradientNorm,
    MismatchHigh,
    ExpertsStrange,
    ThroughputHalved,
)
_SUPERVISED: tuple[type[Rule], ...] = (NoUsableSample, GradientNorm, ThroughputHalved)


def rule_names(*, supervised: bool = False) -> list[str]:
    """All that `train.stop_on` may name."""
    return [rule.name for rule in (_SUPERVISED if supervised else _ALL)]


def build_rules(config: Config, *, eval_rows: int = 0, supervised: bool = False) -> list[Rule]:
    """The rules that watch a run of this config.

    Args:
        eval_rows: in one evaluation.
        supervised: worked answers are learned, and nothing is sampled.
    """
    bounds = config.train.doctor
    bounded: list[Rule] = [
        RewardFlat(bounds.flat_steps),
        GroupsEqual(bounds.equal_share),
        AccuracyFalls(eval_rows),
        KlHigh(bounds.max_kl),
        EntropyCollapse(bounds.min_entropy),
        MismatchHigh(bounds.max_mismatch),
    ]
    by_name = {rule.name: rule for rule in bounded}
    kinds = _SUPERVISED if supervised else _ALL
    rules = [by_name[kind.name] if kind.name in by_name else kind() for kind in kinds]
    return [rule for rule in rules if rule.name not in bounds.ignore]


def check_rules(config: Config, *, supervised: bool = False) -> None:
    """Refuse names that no rule has, and rules that could never see anything; cheap, for checks before a model is
    loaded.

    Raises:
        ConfigError: names the nearest rule.
    """
    known = rule_names(supervised=supervised)
    _check_known("train.stop_on", config.train.stop_on, known)
    _check_known("train.doctor.ignore", config.train.doctor.ignore, known)
    for name in config.train.stop_on:
        if name in config.train.doctor.ignore:
            raise ConfigError(f"train.stop_on: got {name!r}, which train.doctor.ignore turns off; take it out of one")
        if not supervised and (blind := _why_blind(name, config)):
            raise ConfigError(f"train.stop_on: got {name!r}, which could never act: {blind}; or take it out")


def _check_known(setting: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            hint = nearest(name, known, "; did you mean {!r}?")
            raise ConfigError(f"{setting}: got {name!r}; expected any of {', '.join(known)}{hint}")


def _why_blind(name: str, config: Config) -> str:
    if name == AccuracyFalls.name and not config.eval.every:
        return "nothing is evaluated; set eval.every"
    if name == KlHigh.name and not config.algorithm.kl.coef:
        return "no KL is measured; set algorithm.kl.coef"
    return ""
