"""XTuner's names, all in one module: a program for XTuner runs here with its imports changed.

The objects build the one config and call the one loop, `groupwise.launch.run.run_training`. What every name and
argument becomes is in docs/migrate.md.

Example:
    from groupwise.compat.xtuner import RLTrainer, RolloutConfig  # and the others that the program uses
"""

from __future__ import annotations

from groupwise.compat.xtuner.cluster import ray
from groupwise.compat.xtuner.names import (
    AcceleratorResourcesConfig,
    AdamWConfig,
    AgentLoopManagerConfig,
    CPUResourcesConfig,
    DataFlowConfig,
    DataloaderConfig,
    DatasetConfig,
    EvaluatorConfig,
    FSDPConfig,
    GRPOAdvantageConfig,
    GRPOLossConfig,
    GSM8KJudgerConfig,
    JudgerConfig,
    LRConfig,
    OPOAdvantageConfig,
    PassKAdvantageConfig,
    ReplayBufferConfig,
    RLOOAdvantageConfig,
    RLTextTokenizeFnConfig,
    RolloutConfig,
    SampleParams,
    SamplerConfig,
    SingleTurnAgentLoopConfig,
    SyncProduceStrategyConfig,
    SyncReplayBufferConfig,
    TaskSpecConfig,
    TraceConfig,
    WorkerConfig,
)
from groupwise.compat.xtuner.presets import (
    Qwen2Dense7BConfig,
    Qwen2DenseConfig,
    Qwen3Dense0P6BConfig,
    Qwen3Dense4BConfig,
    Qwen3Dense8BConfig,
    Qwen3DenseConfig,
    get_model_config_from_hf,
)
from groupwise.compat.xtuner.trainer import RLColocateTrainerConfig, RLTrainer
from groupwise.errors import ConfigError, nearest

__all__ = [
    "AcceleratorResourcesConfig",
    "AdamWConfig",
    "AgentLoopManagerConfig",
    "CPUResourcesConfig",
    "DataFlowConfig",
    "DataloaderConfig",
    "DatasetConfig",
    "EvaluatorConfig",
    "FSDPConfig",
    "GRPOAdvantageConfig",
    "GRPOLossConfig",
    "GSM8KJudgerConfig",
    "JudgerConfig",
    "LRConfig",
    "OPOAdvantageConfig",
    "PassKAdvantageConfig",
    "Qwen2Dense7BConfig",
    "Qwen2DenseConfig",
    "Qwen3Dense0P6BConfig",
    "Qwen3Dense4BConfig",
    "Qwen3Dense8BConfig",
    "Qwen3DenseConfig",
    "RLColocateTrainerConfig",
    "RLOOAdvantageConfig",
    "RLTextTokenizeFnConfig",
    "RLTrainer",
    "ReplayBufferConfig",
    "RolloutConfig",
    "SampleParams",
    "SamplerConfig",
    "SingleTurnAgentLoopConfig",
    "SyncProduceStrategyConfig",
    "SyncReplayBufferConfig",
    "TaskSpecConfig",
    "TraceConfig",
    "WorkerConfig",
    "get_model_config_from_hf",
    "ray",
]

REFUSED = {
    "AsyncProduceStrategyConfig": "every sample is drawn by the newest weights; use SyncProduceStrategyConfig",
    "AsyncReplayBufferConfig": "every sample is drawn by the newest weights; use SyncReplayBufferConfig",
    "ComposedJudgerConfig": "give JudgerConfig(reward_judger_configs={data_source: judger}), which routes",
    "DapoMathJudgerConfig": "give JudgerConfig(reward_handler=your_function)",
    "DrGRPOAdvantageConfig": "XTuner's multiplies by length, which the paper does not; a recipe has name = 'dr_grpo'",
    "GEO3KJudgerConfig": "models are text models; give JudgerConfig(reward_handler=your_function)",
    "GSM8KToolAgentLoopConfig": "a conversation has one turn of the model; use SingleTurnAgentLoopConfig",
    "MuonConfig": "a recipe has optim.name = 'muon'",
    "OrealLossConfig": "there is no such loss; use GRPOLossConfig",
    "RLDisaggregatedTrainerConfig": "one process trains and samples; use RLColocateTrainerConfig",
    "RolloutImportanceSampling": "the sampler's log-probs are the trainer's, so there is nothing to correct",
}
"""Names of XTuner's that have no equal here, and what to do."""


def __getattr__(name: str) -> object:
    if name in REFUSED:
        raise ConfigError(f"XTuner's {name} has no equal here: {REFUSED[name]}")
    hint = nearest(name, __all__, "; did you mean {!r}?")
    raise AttributeError(f"module {__name__!r} has no name {name!r}{hint}")
