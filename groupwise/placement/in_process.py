"""One process, one device: the policy trains the very module that the native engine samples from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from groupwise.config import Config
from groupwise.engines import is_exact
from groupwise.engines.identity import model_identity
from groupwise.engines.native import NativeEngine
from groupwise.errors import ConfigError
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
        from groupwise.engines.external import Launched, Speaks, external_engine, launchers, reach

        served = reach(rollout)
        for url, facts in zip(rollout.urls, served, strict=True):
            if facts.positions is not None and facts.positions < length:
                raise ConfigError(
                    f"rollout.urls: {url} takes {facts.positions:,} tokens of prompt and completion, and this run has "
                    f"up to {length:,}; start it with more, or lower rollout.max_completion_tokens"
                )
        if rollout.engine == "http":
            for url, facts in zip(rollout.urls, served, strict=True):
                _check_same(facts.identity, model_identity(self.loaded), url=url)
        return external_engine(
            rollout,
            Speaks(
                stop_token_ids=sorted(self.loaded.stop_token_ids),
                adapter=self.loaded.adapter is not None,
                temperature=rollout.temperature,
                exact=all(facts.exact for facts in served),
            ),
            decode=self.loaded.decode,
            encode=partial(self.loaded.tokenizer.encode, add_special_tokens=False),
            vocabulary=self.loaded.model.config.get_text_config().vocab_size,
            launchers=launchers(
                rollout,
                Launched(
                    base=str(self.loaded.model.config.name_or_path),
                    length=length,
                    dtype=str(self.loaded.model.dtype).removeprefix("torch."),
                    seed=self.config.train.seed,
                    lora_rank=0 if self.loaded.adapter is None else self.loaded.adapter.r,
                    logs=self.run.path / "engines",
                ),
            ),
        )

    def sync(self, policy: Policy, engine: Engine, *, prompts: Sequence[Prompt] = ()) -> WeightSync:
        """What makes the engine serve the policy's newest version.

        Args:
            prompts: of the run; the first two prove what an engine elsewhere computes with.
        """
        if isinstance(engine, NativeEngine):
            return InProcessSync(policy, engine)
        from groupwise.engines.http import HttpEngine
        from groupwise.weight_sync.canary import Canary
        from groupwise.weight_sync.directory import DirectorySync

        assert isinstance(engine, HttpEngine), "a placement syncs the engines that it makes"
        rollout = self.config.rollout
        canary = Canary(
            policy,
            [prompt.token_ids for prompt in prompts[:2]],
            tolerance=self._tolerance(exact=engine.caps.exact_logprobs),
        )
        given = rollout.weights_dir
        root = self.run.path / "weights" if given is None else Path(given)
        return DirectorySync(policy, engine, root, canary=canary)

    def _tolerance(self, *, exact: bool) -> float:
        """Nats. vLLM's are off by 2e-6 in float32 and by 0.02 in bfloat16, at most, where it is right."""
        if self.config.rollout.sync_tolerance is not None:
            return self.config.rollout.sync_tolerance
        if exact:
            return 0.0
        return 1e-4 if self.loaded.model.dtype == torch.float32 else 0.1


def _check_same(served: Mapping[str, str], mine: dict[str, str], *, url: str) -> None:
    for name, value in mine.items():
        if served.get(name) != value:
            raise ConfigError(
                f"rollout.urls: {url!r} serves another model: {name}: got {served.get(name)}; expected {value}. Start "
                "`groupwise serve` with the recipe of this run"
            )
