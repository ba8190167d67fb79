"""Settings of the algorithm that do not exist, could not act, or do not go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from groupwise.config.algorithm import (
    ADVANTAGE_SETTINGS,
    LOSS_SETTINGS,
    PART_SETTINGS,
    RECIPES,
    SEQUENCE_LOSSES,
    SWITCHED_SETTINGS,
    AlgorithmConfig,
)
from groupwise.errors import ConfigError, nearest


def check_algorithm(config: AlgorithmConfig) -> None:
    """Refuse unknown names and settings that could not act. Light: needs no torch.

    Raises:
        ConfigError: names the key, the reason and what to do.
    """
    _known(config.name, RECIPES, key="name")
    _known(config.advantage, ADVANTAGE_SETTINGS, key="advantage")
    _known(config.loss, LOSS_SETTINGS, key="loss")
    _check_conditional(config)
    _check_switched(config)
    _check_bounds(config)
    _check_kl(config)
    _check_sequence_loss(config)


def _check_conditional(config: AlgorithmConfig) -> None:
    values: Mapping[str, Any] = config.model_dump()
    chosen = {part_key: str(values[part_key]) for part_key in PART_SETTINGS}
    for key in sorted({key for table in PART_SETTINGS.values() for part in table.values() for key in part}):
        if values[key] is None or _is_used(key, chosen):
            continue
        own = ", ".join(f"{part_key} = {part!r}" for part_key, part in chosen.items() if _takes(part_key, key))
        users = [
            f"{part_key} = {part!r}"
            for part_key, table in PART_SETTINGS.items()
            for part in table
            if key in table[part]
        ]
        raise ConfigError(
            f"algorithm.{key} = {values[key]!r} has no effect with {own}; remove it, or choose {' or '.join(users)}"
        )


def _check_switched(config: AlgorithmConfig) -> None:
    values: Mapping[str, Any] = config.model_dump()
    for switch, dependents in SWITCHED_SETTINGS.items():
        for key in dependents:
            if values[key] is not None and not values[switch]:
                raise ConfigError(
                    f"algorithm.{key} = {values[key]!r} has no effect while algorithm.{switch} is off; "
                    f"remove it, or set {switch}"
                )


def _check_bounds(config: AlgorithmConfig) -> None:
    low, high = config.correction_low, config.correction_high
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"algorithm.correction_low = {low} is not below correction_high = {high}; lower the first")
    least, most = config.entropy_coef_min, config.entropy_coef_max
    if least is not None and most is not None and not (least < most and least <= config.entropy_coef <= most):
        raise ConfigError(
            f"algorithm.entropy_target moves entropy_coef between entropy_coef_min = {least} and entropy_coef_max = "
            f"{most}, and starts at entropy_coef = {config.entropy_coef}; give a range, and a start within it"
        )


def _check_kl(config: AlgorithmConfig) -> None:
    values: Mapping[str, Any] = config.model_dump()
    for key, neutral in (("kl_in", "loss"), ("reference_sync_every", 0)):
        if config.kl_coef == 0 and values[key] != neutral:
            raise ConfigError(
                f"algorithm.{key} = {values[key]!r} has no effect with kl_coef = 0, which has no reference; "
                "remove it, or set kl_coef"
            )
    reason = _NO_KL_IN_REWARD.get(config.advantage)
    if config.kl_in == "reward" and reason is not None:
        raise ConfigError(
            f"algorithm.kl_in = 'reward' does not go with advantage = {config.advantage!r}, which {reason}; "
            "use kl_in = 'loss'"
        )


_NO_KL_IN_REWARD = {
    "gdpo": "compares each reward function's own values, and not their sum",
    "pass_k": "only asks whether an answer is right, and a KL must not decide that",
}


def _check_sequence_loss(config: AlgorithmConfig) -> None:
    """A loss with one ratio per completion has no tokens to weigh or to choose among."""
    if config.loss not in SEQUENCE_LOSSES:
        return
    if config.correction_level == "token":
        raise ConfigError(
            f"algorithm.correction_level = 'token' does not go with loss = {config.loss!r}: its ratio is the "
            "completion's, and a weight of each token's would not correct it; use 'sequence' or 'geometric'"
        )
    if config.top_entropy_fraction < 1:
        raise ConfigError(
            f"algorithm.top_entropy_fraction = {config.top_entropy_fraction} does not go with loss = {config.loss!r}: "
            "every token of a completion has the same loss, so leaving tokens out would only scale it; set it to 1"
        )


def _is_used(key: str, parts: Mapping[str, Any]) -> bool:
    return any(key in table.get(str(parts[part_key]), {}) for part_key, table in PART_SETTINGS.items())


def _takes(part_key: str, key: str) -> bool:
    return any(key in settings for settings in PART_SETTINGS[part_key].values())


def _known(name: str, names: Iterable[str], *, key: str) -> None:
    known = sorted(names)
    if name in known:
        return
    hint = nearest(name, known, "did you mean {!r}? It is") or "it is"
    raise ConfigError(f"algorithm.{key} = {name!r} does not exist; {hint} one of {', '.join(known)}")
