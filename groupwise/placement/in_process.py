"""One process, one device: the policy trains the very module that the native engine samples from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from groupwise.config import Config
from groupwise.engines.identity import KEY_VARIABLE, model_identity
from groupwise.engines.native import NativeEngine
from groupwise.errors import ConfigError
from groupwise.model.loading import LoadedModel
from groupwise.policy import Learner, LocalPolicy, Objective
from groupwise.policy.bundle import BundleWriter
from groupwise.policy.reference import FrozenScorer
from groupwise.protocols import Engine, Policy, WeightSync
from groupwise.rundir import RunDirectory
from groupwise.types import TEACHER
from groupwise.weight_sync import InProcessSync


@dataclass(frozen=True, slots=True)
class InProcess:
    """Makes the parts of one run that hold weights.

    Attributes:
        loaded: the model, with its adapter if it has one.
        run: where bundles are written.

    Example:
        placement = InProcess(config, loaded, run)
        policy = placement.policy(algorithm, updates=500, temperature=1.0)
        engine = placement.engine(policy)
    """

    config: Config
    loaded: LoadedModel
    run: RunDirectory

    def policy(
        self,
        objective: Objective,
        *,
        updates: int,
        temperature: float = 1.0,
        supervised: bool = False,
        teacher: LoadedModel | None = None,
    ) -> LocalPolicy:
        """The model being trained.

        Args:
            updates: optimiser steps of the whole run.
            temperature: of sampling.
            teacher: a frozen model that scores beside it.
        """
        config = self.config
        learner = Learner(
            self.loaded,
            objective,
            optim=config.optim,
            train=config.train,
            total_updates=updates,
            temperature=temperature,
            gradient_checkpointing=config.model.gradient_checkpointing,
            bundles=BundleWriter(self.run, config, supervised=supervised),
        )
        scorers: dict[str, FrozenScorer] = {}
        if teacher is not None:
            chunk = config.train.logprob_chunk_tokens
            scorers[TEACHER] = FrozenScorer(teacher, temperature=temperature, chunk_tokens=chunk)
        return LocalPolicy(learner, micro_batch_tokens=config.train.micro_batch_tokens, scorers=scorers)

    def engine(self, policy: LocalPolicy) -> Engine:
        """What samples from the policy: this module, or one in another process that is the same.

        Raises:
            ConfigError: no server answers, or it has another model.
        """
        rollout = self.config.rollout
        if rollout.engine == "native":
            return NativeEngine(self.loaded, rollout, reserved_bytes=policy.bytes_to_come)
        from groupwise.engines.http import HttpEngine

        key = os.environ.get(KEY_VARIABLE)
        engine = HttpEngine(
            rollout,
            decode=self.loaded.decode,
            vocabulary=self.loaded.model.config.get_text_config().vocab_size,
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        _check_same(engine.served.identity, model_identity(self.loaded), url=str(rollout.url))
        return engine

    def sync(self, policy: Policy, engine: Engine) -> WeightSync:
        """What makes the engine serve the policy's newest version."""
        if isinstance(engine, NativeEngine):
            return InProcessSync(policy, engine)
        from groupwise.engines.http import HttpEngine
        from groupwise.weight_sync.directory import DirectorySync

        assert isinstance(engine, HttpEngine), "a placement syncs the engines that it makes"
        given = self.config.rollout.weights_dir
        return DirectorySync(policy, engine, self.run.path / "weights" if given is None else Path(given))


def _check_same(served: dict[str, str], mine: dict[str, str], *, url: str) -> None:
    for name, value in mine.items():
        if served.get(name) != value:
            raise ConfigError(
                f"rollout.url = {url!r} serves another model: {name}: got {served.get(name)}; expected {value}. Start "
                "`groupwise serve` with the recipe of this run"
            )
