"""Engines in other processes, for a model that is in memory here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from groupwise.config import Config, RolloutConfig
from groupwise.engines import has_logprobs
from groupwise.engines.dialects.base import Facts, Tells
from groupwise.engines.external import Launched, Speaks, external_engine, launchers, reach
from groupwise.engines.http import HttpEngine
from groupwise.engines.identity import model_identity
from groupwise.engines.tellings import why_no_routes
from groupwise.errors import ConfigError
from groupwise.model.forward.mixture import mixture_of, required_mixture
from groupwise.model.loading import LoadedModel
from groupwise.sides import Mixture

logger = logging.getLogger(__name__)

_FLOAT32, _LESS, _QUANTIZED = 1e-4, 0.1, 1.0
"""Nats. vLLM's log-probs are off by 2e-6 in float32, and by 0.02 in bfloat16, at most, where its weights are right."""


def engine_elsewhere(config: Config, loaded: LoadedModel, *, length: int, logs: Path) -> HttpEngine:
    """The engine that `rollout` names, found or to be started, for weights of this model.

    Args:
        length: tokens of the longest prompt and completion together.
        logs: folder for what started servers print.

    Raises:
        ConfigError: a server does not answer, has another model, or has no room.
    """
    rollout = config.rollout
    mixture = _replayed(rollout, loaded)
    tells = Tells(routes=mixture is not None, kept=rollout.learns_cut)
    served = reach(rollout, tells=tells)
    if mixture is not None and not _tell_routes(rollout, served):
        mixture, tells = None, Tells(kept=tells.kept)
    mine = model_identity(loaded) if rollout.engine == "http" else {}
    for url, facts in zip(rollout.urls, served, strict=True):
        if facts.positions is not None and facts.positions < length:
            raise ConfigError(
                f"rollout.urls: {url} takes {facts.positions:,} tokens of prompt and completion, and this run has up "
                f"to {length:,}; start it with more, or lower rollout.max_completion_tokens"
            )
        if rollout.engine == "http":
            _check_same(facts.identity, mine, url=url)
    longest = rollout.launch.max_model_len
    if longest is not None and longest < length:
        raise ConfigError(
            f"rollout.launch.max_model_len = {longest:,}: this run has up to {length:,} tokens of prompt and "
            "completion; raise it, leave it out, or lower rollout.max_completion_tokens"
        )
    launched = Launched(
        base=str(loaded.model.config.name_or_path),
        length=length,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        seed=config.train.seed,
        lora_rank=0 if loaded.adapter is None else loaded.adapter.r,
        logs=logs,
        routes=tells.routes,
    )
    return external_engine(
        rollout,
        Speaks(
            stop_token_ids=sorted(loaded.stop_token_ids),
            adapter=loaded.adapter is not None,
            logprobs=has_logprobs(rollout),
            exact=bool(served) and all(facts.exact for facts in served),
            broadcasts=rollout.weights_by == "nccl",
            tells=tells,
        ),
        decode=loaded.decode,
        encode=partial(loaded.tokenizer.encode, add_special_tokens=False),
        vocabulary=loaded.model.config.get_text_config().vocab_size,
        launchers=launchers(rollout, launched),
        mixture=mixture,
    )


def _replayed(rollout: RolloutConfig, loaded: LoadedModel) -> Mixture | None:
    """The routers whose choices are to be replayed; None where there are none, or none are to be.

    Raises:
        ConfigError: they are to be, and cannot.
    """
    if rollout.replay_routes is True:
        return required_mixture(loaded.model)
    try:
        mixture = mixture_of(loaded.model)
    except ConfigError as error:
        _say_not_replayed(rollout, str(error))
        return None
    if mixture is None:
        return None
    if rollout.engine == "http":  # it has the trainer's own model, and chooses what the trainer does
        return None
    why = "rollout.replay_routes = false" if rollout.replay_routes is False else why_no_routes(rollout)
    if why:
        _say_not_replayed(rollout, why)
        return None
    return mixture


def _tell_routes(rollout: RolloutConfig, served: Sequence[Facts]) -> bool:
    """Whether the servers that were found tell which experts they chose.

    Raises:
        ConfigError: one does not, and has to.
    """
    silent = next((facts.silent for facts in served if facts.silent), "")
    if silent and rollout.replay_routes is True:
        raise ConfigError(f"rollout.urls: {silent}")
    if silent:
        _say_not_replayed(rollout, silent)
    return not silent


def _say_not_replayed(rollout: RolloutConfig, why: str) -> None:
    logger.warning(
        "rollout.engine = %r chooses experts by itself, and its choices are not replayed in training (%s); see how far "
        "sampling/sampling_logp_difference/mean is from 0, and use 'native' where that is too far",
        rollout.engine,
        why,
    )


def sync_tolerance(rollout: RolloutConfig, loaded: LoadedModel, *, exact: bool) -> float:
    """How far an engine's log-probs may be from the trainer's, in nats, for its weights to count as arrived."""
    if rollout.sync_tolerance is not None:
        return rollout.sync_tolerance
    if exact:
        return 0.0
    if rollout.quantized_engine:
        return _QUANTIZED
    return _FLOAT32 if loaded.model.dtype == torch.float32 else _LESS


def _check_same(served: Mapping[str, str], mine: Mapping[str, str], *, url: str) -> None:
    for name, value in mine.items():
        if served.get(name) != value:
            raise ConfigError(
                f"rollout.urls: {url!r} serves another model: {name}: got {served.get(name)}; expected {value}. Start "
                "`groupwise serve` with the recipe of this run"
            )
