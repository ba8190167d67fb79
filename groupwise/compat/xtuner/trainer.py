"""The two trainers of XTuner's: objects that hold a program's configuration, and whose `fit()` calls the one loop."""

from __future__ import annotations

import logging
import re
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from groupwise.compat.xtuner.base import Apart, Becomes, Inert, Names, Only, Translation
from groupwise.compat.xtuner.environment import engine_notes
from groupwise.compat.xtuner.files import TrajectoryLinks
from groupwise.compat.xtuner.judging import Rewards, read_judgers
from groupwise.compat.xtuner.names import (
    OWN_LOGS,
    AcceleratorResourcesConfig,
    AgentLoopManagerConfig,
    DataFlowConfig,
    EvaluatorConfig,
    GRPOAdvantageConfig,
    JudgerConfig,
    OPOAdvantageConfig,
    PassKAdvantageConfig,
    ReplayBufferConfig,
    RLOOAdvantageConfig,
    RolloutConfig,
    SyncReplayBufferConfig,
    TraceConfig,
    WorkerConfig,
    backends,
    every,
    keep,
    path,
)
from groupwise.compat.xtuner.translate import (
    Part,
    build_config,
    check_context,
    preset_warning,
    read_evaluation,
    read_worker,
)
from groupwise.config.loading import LoadedConfig
from groupwise.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the two generations have in different places.

    Attributes:
        evaluation: the objects that say how to evaluate; none is no evaluation.
        advantage: its name here; None leaves GRPO's.
    """

    judger: JudgerConfig | None
    judger_place: str
    _: KW_ONLY
    evaluation: Sequence[Part] = ()
    advantage: str | None = None


@dataclass(frozen=True, slots=True)
class _Output:
    folder: Path
    resume: bool


@dataclass(frozen=True, slots=True)
class _Program:
    loaded: LoadedConfig
    rewards: Rewards
    output: _Output


class _Trainer(Names):
    """What the trainers of both generations take."""

    OVERRIDABLE = frozenset({"fit", "build"})

    resources: AcceleratorResourcesConfig
    rollout_config: RolloutConfig
    train_worker_cfg: WorkerConfig
    evaluator_config: Annotated[EvaluatorConfig | None, Apart("eval")] = None
    load_from: Annotated[str | Path | None, Becomes("model.path", via=path)] = None
    tokenizer_path: Annotated[str | Path | None, Becomes("model.path", via=path)] = None
    total_epochs: Annotated[int | None, Becomes("train.epochs")] = None
    enable_evaluate: Annotated[bool, Apart("eval.every above 0")] = True
    enable_initial_evaluate: Annotated[bool, Becomes("eval.at_start")] = False
    work_dir: Annotated[Path | str | None, Apart("train.output, a folder of this time in it")] = None
    auto_resume: Annotated[bool, Apart("--resume of the newest run in work_dir")] = False
    checkpoint_interval: Annotated[int | None, Becomes("train.save_every", via=every)] = -1
    checkpoint_maxkeep: Annotated[int | None, Becomes("train.keep_checkpoints", via=keep)] = -1
    hf_interval: Annotated[int | None, Inert("final/ is written once, at the end")] = -1
    hf_max_keep: Annotated[int | None, Inert("final/ is written once, at the end")] = -1
    seed: Annotated[int, Becomes("train.seed")] = 42
    log_dir: Annotated[Path | str | None, Inert(OWN_LOGS)] = None

    def to_config(self) -> LoadedConfig:
        """The config that this program amounts to, each value with the field that it came from.

        Raises:
            ConfigError: lists everything that has no equal here.
        """
        return self._translate().loaded

    def fit(self, *, accept_changes: bool = False) -> dict[str, Any]:
        """Train; returns what `summary.json` holds. The run directory is a new folder in `work_dir`, named by the time.

        Args:
            accept_changes: `auto_resume` goes on where data, model or code are others than then.

        Raises:
            ConfigError, DataError: before a model is loaded, wherever that is possible.
            Interrupted: the user stopped the run, and a checkpoint was saved.
        """
        from groupwise.launch import Given, run_training

        program = self._translate()
        config = program.loaded.config
        for line in [*engine_notes(), *_device_note(self.resources)]:
            logger.warning(line)
        given = Given(rewards=program.rewards.functions, watcher=TrajectoryLinks(program.output.folder))
        try:
            resume = program.output.resume
            return run_training(config, resume=resume, accept_changes=accept_changes and resume, given=given)
        except ConfigError as error:
            raise _in_this_programs_words(error, program.loaded) from error

    def build(self) -> Self:
        """The trainer: the object itself."""
        return self

    @abstractmethod
    def _parts(self) -> _Parts:
        """What the two generations have in different places."""

    def _translate(self) -> _Program:
        found, parts = Translation(), self._parts()
        found.take(self)
        read_worker(found, self.train_worker_cfg, place="train_worker_cfg")
        if self.enable_evaluate and not parts.evaluation and "enable_evaluate" in self.model_fields_set:
            found.note("enable_evaluate", "the program gives no rows to evaluate on")
        read_evaluation(found, parts.evaluation if self.enable_evaluate else [])
        if self.resources.accelerator == "CPU":
            found.put("model.device", "cpu", "resources.accelerator")
        if parts.advantage is not None:
            found.put("algorithm.advantage.name", parts.advantage, "advantage_estimator_config")
        if not {"train.steps", "train.epochs"} & set(found.values):
            found.problems.append("total_epochs: got none; expected how often to go through the data")
        check_context(found, self.rollout_config, place="rollout_config")
        rewards = read_judgers(parts.judger, parts.judger_place, found=found)
        output = self._output()
        found.put("train.output", str(output.folder), "work_dir")
        loaded = build_config(found, rewards)
        warning = preset_warning(self.train_worker_cfg.model_cfg, loaded.config.model.path)
        for line in [*found.notes, *([warning] if warning else [])]:
            logger.warning(line)
        return _Program(loaded, rewards, output)

    def _output(self) -> _Output:
        """A new folder, named by the time; with `auto_resume`, that of the newest run that can go on."""
        place = Path(self.work_dir or "work_dir")
        saved = sorted(place.glob("*/checkpoints/*step_*/manifest.json")) if self.auto_resume else []
        if saved:
            return _Output(saved[-1].parents[2], resume=True)
        name = time.strftime("%Y%m%d%H%M%S")
        while (place / name).exists():
            name += "_"
        return _Output(place / name, resume=False)


class RLTrainer(_Trainer):
    """The trainer of the first generation.

    Example:
        RLTrainer(resources=…, rollout_config=…, dataflow_config=…, judger_config=…, replay_buffer_config=…,
                  train_worker_cfg=…, tokenizer_path="model", total_epochs=15, enable_evaluate=False).fit()
    """

    dataflow_config: DataFlowConfig
    judger_config: JudgerConfig
    replay_buffer_config: ReplayBufferConfig
    resume_config: Annotated[None, Only("auto_resume = True goes on with the newest run in work_dir")] = None
    strict_load: Annotated[bool, Inert("a checkpoint is complete, and loads as a whole")] = True
    debug: Annotated[bool, Inert(OWN_LOGS)] = False

    def _parts(self) -> _Parts:
        evaluator = self.evaluator_config
        evaluation = () if evaluator is None else (Part(evaluator, "evaluator_config"),)
        return _Parts(self.judger_config, "judger_config", evaluation=evaluation)


class RLColocateTrainerConfig(_Trainer):
    """The present generation's; what its `build()` gives is the same object here.

    Example:
        RLColocateTrainerConfig(resources=…, rollout_config=…, agent_loop_manager_cfg=…, train_worker_cfg=…,
                                load_from="model", train_batch_size=64, total_train_steps=45).build().fit()
    """

    agent_loop_manager_cfg: AgentLoopManagerConfig
    eval_agent_loop_manager_cfg: Annotated[AgentLoopManagerConfig | None, Apart("eval")] = None
    replay_buffer_config: SyncReplayBufferConfig = Field(default_factory=SyncReplayBufferConfig)
    advantage_estimator_config: (
        GRPOAdvantageConfig | RLOOAdvantageConfig | OPOAdvantageConfig | PassKAdvantageConfig
    ) = Field(default_factory=GRPOAdvantageConfig)
    train_batch_size: Annotated[int, Becomes("rollout.prompts_per_step")]
    total_train_steps: Annotated[int | None, Becomes("train.steps")] = None
    evaluate_step: Annotated[int, Becomes("eval.every")] = 1
    exp_tracker: Annotated[Literal["tensorboard", "jsonl"], Becomes("tracking.backends", via=backends)] = "tensorboard"
    trace_config: TraceConfig = Field(default_factory=TraceConfig)
    sync_weights_interval: Annotated[int, Only("the engine has the trainer's own weights")] = 1
    checkpoint_no_save_optimizer: Annotated[bool, Only("a checkpoint is what a run goes on from, bit for bit")] = False
    checkpoint_no_save_replay_buffer: Annotated[bool, Inert("at a save the buffer is empty")] = False
    skip_checkpoint_validation: Annotated[bool, Inert("checksums are compared in any case")] = False
    debug_rollout: Annotated[bool, Only("every rollout is in trajectories/")] = False
    debug_rollout_dir: Annotated[Path | str | None, Only("every rollout is in trajectories/")] = None
    debug_train: Annotated[bool, Only("training takes what is sampled")] = False

    def _parts(self) -> _Parts:
        manager, task = self.eval_agent_loop_manager_cfg, self.agent_loop_manager_cfg.task
        evaluation = [] if manager is None else [Part(manager, "eval_agent_loop_manager_cfg")]
        if evaluation and self.evaluator_config is not None:
            evaluation.append(Part(self.evaluator_config, "evaluator_config"))
        return _Parts(
            None if task is None else task.judger_config,
            "agent_loop_manager_cfg.tasks.judger_config",
            evaluation=tuple(evaluation),
            advantage=self.advantage_estimator_config.advantage,
        )


def _device_note(resources: AcceleratorResourcesConfig) -> list[str]:
    """One sentence where fewer devices are used than asked for."""
    import torch

    asked = f"resources: {resources.num_workers} x {resources.accelerator} asked for"
    here = torch.cuda.device_count()
    if resources.accelerator == "CPU" or (resources.accelerator, resources.num_workers, here > 0) == ("GPU", 1, True):
        return []
    used = "the CPU" if here == 0 else "one GPU"
    return [f"{asked}, and torch sees {here} GPU(s): one process trains and samples on {used}"]


def _in_this_programs_words(error: ConfigError, loaded: LoadedConfig) -> ConfigError:
    """Add which field of the program each setting is that the message names."""
    message = str(error)
    origins = loaded.origins.items()
    named = [f"  {dotted} is {where}" for dotted, where in origins if re.search(rf"\b{re.escape(dotted)}\b", message)]
    return ConfigError("\n".join([message, *(["in this program:", *named] if named else [])]))
