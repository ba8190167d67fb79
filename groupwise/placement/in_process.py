"""One process, one device: the policy trains the very module that the native engine samples from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from groupwise.config import Config
from groupwise.engines import is_exact
from groupwise.engines.native import NativeEngine
from groupwise.model.loading import LoadedModel
from groupwise.policy import Learner, LocalPolicy, Objective
from groupwise.policy.adapter_reference import AdapterBase
from groupwise.policy.bundle import BundleWriter
from groupwise.policy.reference import FrozenScorer
from groupwise.protocols import Engine, Policy, WeightSync
from groupwise.rundir import RunDirectory
from groupwise.types import BASE, TEACHER, Prompt
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
        engine = placement.engine(policy, length=1024)
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
        chunk = config.train.logprob_chunk_tokens
        if teacher is not None:
            scorers[TEACHER] = FrozenScorer(teacher, temperature=temperature, chunk_tokens=chunk)
        if self.loaded.adapter is not None and not is_exact(config.rollout):
            scorers[BASE] = AdapterBase(self.loaded, temperature=temperature, chunk_tokens=chunk)
        return LocalPolicy(learner, micro_batch_tokens=config.train.micro_batch_tokens, scorers=scorers)

    def engine(self, policy: LocalPolicy, *, length: int) -> Engine:
        """What samples from the policy: this module, or one in another process that is the same.

        Args:
            length: tokens of the longest prompt and completion together.

        Raises:
            ConfigError: no server answers, or it has another model.
        """
        rollout = self.config.rollout
        if rollout.engine == "native":
            return NativeEngine(self.loaded, rollout, reserved_bytes=policy.bytes_to_come)
        from groupwise.placement.elsewhere import engine_elsewhere

        return engine_elsewhere(self.config, self.loaded, length=length, logs=self.run.path / "engines")

    def sync(self, policy: Policy, engine: Engine, *, prompts: Sequence[Prompt] = ()) -> WeightSync:
        """What makes the engine serve the policy's newest version.

        Args:
            prompts: of the run; the first two prove what an engine elsewhere computes with.
        """
        if isinstance(engine, NativeEngine):
            return InProcessSync(policy, engine)
        from groupwise.engines.http import HttpEngine
        from groupwise.placement.elsewhere import sync_tolerance
        from groupwise.weight_sync.canary import Canary
        from groupwise.weight_sync.publishing import EngineSync
        from groupwise.weight_sync.way import own_folder
        from groupwise.weight_sync.ways import way_of

        assert isinstance(engine, HttpEngine), "a placement syncs the engines that it makes"
        rollout = self.config.rollout
        canary = Canary(
            policy,
            [prompt.token_ids for prompt in prompts[:2]],
            tolerance=sync_tolerance(rollout, self.loaded, exact=engine.caps.exact_logprobs),
            vocabulary=engine.vocabulary,
            told_apart=not rollout.quantized_engine,
        )
        given = rollout.weights_dir
        root = self.run.path / "weights" if given is None else own_folder(Path(given), self.run.path)
        way = way_of(
            rollout, policy, engine, root, adapter=self.loaded.adapter is not None, leaves_none=given is not None
        )
        return EngineSync(policy, engine, way, canary=canary, sleeps=rollout.engine_sleeps)
