"""The one config tree: typed, frozen, torch-free. See `groupwise.config.loading` for files and overrides."""

from __future__ import annotations

from pydantic import Field, model_validator

from groupwise.config.algorithm import AlgorithmConfig
from groupwise.config.algorithm.corrections import Truncate
from groupwise.config.base import Section
from groupwise.config.data import DataConfig
from groupwise.config.environment import EnvironmentConfig
from groupwise.config.eval import EvalConfig
from groupwise.config.lora import LoraConfig
from groupwise.config.model import ModelConfig
from groupwise.config.optim import OptimConfig
from groupwise.config.reward import RewardConfig
from groupwise.config.rollout import RolloutConfig
from groupwise.config.sft import SftConfig
from groupwise.config.tracking import TrackingConfig
from groupwise.config.train import TrainConfig

__all__ = [
    "AlgorithmConfig",
    "Config",
    "DataConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RolloutConfig",
    "SftConfig",
    "TrackingConfig",
    "TrainConfig",
]


class Config(Section):
    """Everything that decides a run.

    Example:
        Config.model_validate({"model": {"path": "Qwen/Qwen3-0.6B"}, "data": {"train": "train.jsonl"},
                               "reward": [{"name": "gsm8k"}], "optim": {"lr": 1e-6}})
    """

    model: ModelConfig = ModelConfig()  # type: ignore[call-arg]
    lora: LoraConfig = LoraConfig()  # type: ignore[call-arg]
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    reward: tuple[RewardConfig, ...] = Field(())
    rollout: RolloutConfig = RolloutConfig()  # type: ignore[call-arg]
    environment: EnvironmentConfig = EnvironmentConfig()  # type: ignore[call-arg]
    algorithm: AlgorithmConfig = AlgorithmConfig()  # type: ignore[call-arg]
    optim: OptimConfig = OptimConfig()  # type: ignore[call-arg]
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    sft: SftConfig = SftConfig()  # type: ignore[call-arg]
    eval: EvalConfig = EvalConfig()  # type: ignore[call-arg]
    tracking: TrackingConfig = TrackingConfig()  # type: ignore[call-arg]

    def recomputes_logprobs(self, *, exact: bool) -> bool:
        """Whether a forward of the policy gives the old log-probs, beside the sampler's.

        Args:
            exact: the engine's are the policy's own (`EngineCaps.exact_logprobs`).
        """
        chosen = self.algorithm.old_logprobs
        return chosen == "policy" or (chosen == "auto" and not exact)

    def corrected(self, *, exact: bool, logprobs: bool = True) -> Config:
        """With the correction that a run has unless it is given one: weights cut at 2 where the sampler's log-probs
        are close to the policy's and not the same (truncated importance sampling).

        Args:
            exact: as above.
            logprobs: the sampler has any (`EngineCaps.logprobs`); without, there is nothing to weigh by.
        """
        given = self.algorithm.correction.model_fields_set
        if exact or not logprobs or given or not self.recomputes_logprobs(exact=False):
            return self
        level = "sequence" if self.algorithm.loss.per_completion else "token"
        algorithm = self.algorithm.model_copy(update={"correction": Truncate(level=level)})
        return self.model_copy(update={"algorithm": algorithm})

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        rollout = self.rollout
        if rollout.min_completion_tokens > rollout.max_completion_tokens:
            raise ValueError(
                f"rollout.min_completion_tokens = {rollout.min_completion_tokens} is more than "
                f"rollout.max_completion_tokens = {rollout.max_completion_tokens}; lower the first"
            )
        if self.optim.steps_per_batch > rollout.prompts_per_step:
            raise ValueError(
                f"optim.steps_per_batch = {self.optim.steps_per_batch} is more than "
                f"rollout.prompts_per_step = {rollout.prompts_per_step}; each optimiser step "
                "needs a prompt: lower the first"
            )
        return self
