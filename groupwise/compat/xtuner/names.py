"""XTuner's configuration classes, by XTuner's names and with XTuner's defaults; each field says what it becomes here.

Two generations stand side by side: where a class has fields of both, a program uses those of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from groupwise.compat.xtuner.base import Apart, Becomes, Inert, Names, Only
from groupwise.compat.xtuner.presets import ModelPreset

ONE_PROCESS = "one process trains and samples, on one device; nothing is spread over more"
ONE_MODULE = "the engine samples from the trainer's own module in this process: there is no server, and nothing to send"
LABEL = "a label: a run is named by its folder, and a reward is chosen by the rows' data_source"
OWN_PACKING = "prompts are rendered and packed by groupwise, without a data loader of their own"
OWN_LOGS = "logs go to the run directory, as log.txt"
TRACED = "every rollout, with its tokens and log-probs, is in the run directory's trajectories/"
RETRIES = "the engine is in this process: it loses no sample, so none is asked for again"
BATCHED = "the engine decodes as many samples together as rollout.max_concurrent_samples; no result depends on it"
LEARNED_ONCE = "a sample is learned once, by the weights that drew it"
NO_FILTER = "a recipe has rollout.dynamic_sampling_cap to leave groups of equal rewards out"
IN_THREADS = "rewards run in threads of this process"
NO_LIMIT = 1_000_000


def path(value: Any) -> str | None:
    """A path, or that of a tokenizer that transformers loaded."""
    if value is None or isinstance(value, str | Path):
        return value if value is None else str(Path(value))
    try:
        return str(Path(value.name_or_path))
    except AttributeError:
        raise ValueError("expected a path, or a tokenizer that transformers loaded") from None


def dtype_name(value: Any) -> str | None:
    """The name of a dtype, given as text or as torch's own."""
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in ("bfloat16", "float32"):
        raise ValueError("expected bfloat16 or float32")
    return name


def _ratio(value: float) -> bool:
    """Layers are all recomputed in the backward pass, or none is."""
    return value > 0


def keep(value: int | None) -> int:
    return value if value is not None and value > 0 else NO_LIMIT


def every(value: int | None) -> int:
    return value if value is not None and value > 0 else 0


def all_rows(ratio: float) -> None:
    if ratio not in (0, 1):
        raise ValueError("give eval_sample_num, a number of rows")


def backends(value: str) -> tuple[str, ...]:
    return ("console", "jsonl", "tensorboard") if value == "tensorboard" else ("console", "jsonl")


def _policy_loss(value: str) -> str:
    if value != "vanilla":
        raise ValueError("XTuner has 'vanilla' alone; other losses are algorithm.name in a recipe of groupwise")
    return "ppo_clip"


# --- what is sampled ---


class SampleParams(Names):
    n: Annotated[int, Only("a prompt's samples are counted by prompt_repeat_k")] = 1
    top_k: Annotated[int, Becomes("rollout.top_k", via=lambda k: max(k, 0))] = 0
    top_p: Annotated[float, Becomes("rollout.top_p")] = 1.0
    temperature: Annotated[float, Becomes("rollout.temperature")] = 1.0
    repetition_penalty: Annotated[float, Becomes("rollout.repetition_penalty")] = 1.0
    presence_penalty: Annotated[float, Only("it is not there; repetition_penalty is")] = 0.0
    frequency_penalty: Annotated[float, Only("it is not there; repetition_penalty is")] = 0.0
    min_tokens: Annotated[int, Becomes("rollout.min_completion_tokens")] = 0
    max_tokens: Annotated[int, Becomes("rollout.max_completion_tokens")] = 2048
    stops: Annotated[list[str], Becomes("rollout.stop", via=tuple)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[int], Becomes("rollout.stop_token_ids", via=tuple)] = Field(default_factory=list)
    sampling_seed: Annotated[None, Only("the trainer's seed decides every sample")] = None
    skip_special_tokens: Annotated[bool, Inert("rewards see texts without special tokens")] = True
    return_logprob: Annotated[bool, Inert("log-probs are always kept")] = True
    return_token_ids: Annotated[bool, Inert("token ids are always kept")] = True
    top_logprobs: Annotated[int, Inert("the sampled token's log-prob is kept")] = 1
    stream: Annotated[bool, Inert(ONE_MODULE)] = False
    return_routed_experts: Annotated[bool, Inert(ONE_MODULE)] = True


class DataFlowConfig(Names):
    env: Annotated[str, Inert(LABEL)] = ""
    max_concurrent: Annotated[int, Inert(BATCHED)] = 8
    max_retry_times: Annotated[int, Inert(RETRIES)] = 1
    prompt_repeat_k: Annotated[int, Becomes("rollout.group_size")] = 1
    global_batch_size: Annotated[int, Becomes("rollout.prompts_per_step")] = 8
    enable_partial_rollout: Annotated[int, Only("a sample is drawn whole, by one version of the weights")] = 0
    sample_params: SampleParams = Field(default_factory=SampleParams)
    worker_log_dir: Annotated[Path | None, Inert(OWN_LOGS)] = None


class DatasetConfig(Names):
    anno_path: Annotated[str | Path, Becomes("data.train", via=str)]
    name: Annotated[str, Inert(LABEL)] = "default"
    sample_ratio: Annotated[float, Only("every row is used; cut the file, or repeat its rows")] = 1.0
    cache_dir: Annotated[str | Path | None, Inert("rows are tokenized at each start; nothing is cached")] = None
    class_name: Annotated[str, Only("rows are read from JSONL, JSON, CSV or Parquet, as text")] = "JsonlDataset"
    enable_sequential_sampler: Annotated[bool, Becomes("data.shuffle", via=lambda on: not on)] = False


class RLTextTokenizeFnConfig(Names):
    max_length: Annotated[int | None, Becomes("data.max_prompt_tokens", via=lambda n: n or NO_LIMIT)] = None
    tools_schema: Annotated[None, Only("there are no tools; the conversation has one turn of the model")] = None


class DatasetEntry(Names):
    """`{"dataset": …, "tokenize_fn": …}`."""

    dataset: DatasetConfig
    tokenize_fn: RLTextTokenizeFnConfig | None = None


class DataloaderConfig(Names):
    dataset_config_list: list[DatasetEntry] | None = None
    pack_max_length: Annotated[int, Becomes("train.micro_batch_tokens")] = 32768
    collator: Annotated[str, Inert(OWN_PACKING)] = "fake_collator"
    pack_level: Annotated[str, Inert(OWN_PACKING)] = "none"
    group_by_length: Annotated[bool, Inert(OWN_PACKING)] = True
    num_workers: Annotated[int, Inert(OWN_PACKING)] = 0
    round_up: Annotated[bool, Inert(OWN_PACKING)] = True


class ReplayBufferConfig(Names):
    dataset_cfg: list[DatasetEntry]
    dataloader_cfg: DataloaderConfig | None = None
    tokenizer: Annotated[Any, Becomes("model.path", via=path)]
    postprocessor: Annotated[None, Only(NO_FILTER)] = None
    postprocessor_func: Annotated[None, Only(NO_FILTER)] = None
    replay_ratio: Annotated[float, Only(LEARNED_ONCE)] = 0
    replay_weights: Annotated[dict[str, Any], Only(LEARNED_ONCE)] = Field(default_factory=dict)
    worker_log_dir: Annotated[Path | None, Inert(OWN_LOGS)] = None


class SyncReplayBufferConfig(Names):
    """Groups are learned in the order of the data, each by the weights that drew it: what groupwise always does."""


class SamplerConfig(Names):
    dataloader_cfg: DataloaderConfig
    prompt_repeat_k: Annotated[int, Becomes("rollout.group_size")] = 1


class SyncProduceStrategyConfig(Names):
    is_valid_sample_fn: Annotated[None, Only(NO_FILTER)] = None
    should_continue_fn: Annotated[None, Only("a step has its train_batch_size prompts")] = None


class CPUResourcesConfig(Names):
    num_workers: Annotated[int, Inert(IN_THREADS)] = 1
    num_cpus_per_worker: Annotated[float, Inert(IN_THREADS)] = 1
    cpu_memory_per_worker: Annotated[int, Inert(IN_THREADS)] = 1024**3
    pg_pack_strategy: Annotated[str, Inert(IN_THREADS)] = "SPREAD"


class SingleTurnAgentLoopConfig(Names):
    hf_checkpoint: Annotated[str | Path, Becomes("model.path", via=path)]
    sample_params: SampleParams = Field(default_factory=SampleParams)
    cpu_resources: CPUResourcesConfig | None = None
    enable_batch_judge: Annotated[bool, Inert("a reward always gets the whole group")] = False


class RolloutConfig(Names):
    model_path: Annotated[str | Path | None, Becomes("model.path", via=path)] = None
    tokenizer_path: Annotated[str | Path | None, Becomes("model.path", via=path)] = None
    dtype: Annotated[Any, Becomes("model.dtype", via=dtype_name)] = None
    context_length: Annotated[int | None, Apart("at least max_length + max_tokens")] = None
    rollout_max_batch_size: Annotated[int | None, Becomes("rollout.max_concurrent_samples")] = None
    rollout_max_batch_size_per_instance: Annotated[int | None, Becomes("rollout.max_concurrent_samples")] = None
    env: Annotated[str, Inert(LABEL)] = ""
    model_name: Annotated[str | None, Inert(LABEL)] = None
    device: Annotated[str, Inert("model.device is that of training")] = "GPU"
    gpus_per_node: Annotated[int, Inert(ONE_PROCESS)] = 8
    tensor_parallel_size: Annotated[int, Inert(ONE_PROCESS)] = 1
    data_parallel_size: Annotated[int, Inert(ONE_PROCESS)] = 1
    expert_parallel_size: Annotated[int, Inert(ONE_PROCESS)] = 1
    rollout_cross_node_comm: Annotated[bool, Inert(ONE_PROCESS)] = False
    gpu_memory_utilization: Annotated[float, Inert("keys and values get rollout.kv_cache_gib, by itself")] = 0.85
    random_seed: Annotated[int, Inert("the trainer's seed decides every sample")] = 1024
    enable_return_routed_experts: Annotated[bool, Inert(ONE_MODULE)] = False
    skip_load_weights: Annotated[bool, Inert(ONE_MODULE)] = False
    launch_server_method: Annotated[str, Inert(ONE_MODULE)] = "ray"
    weight_transport_type: Annotated[str | None, Inert(ONE_MODULE)] = None
    dist_port_base: Annotated[int, Inert(ONE_MODULE)] = 25000
    api_key: Annotated[Any, Inert(ONE_MODULE)] = Field(default=None, repr=False)
    api_port: Annotated[int | None, Inert(ONE_MODULE)] = None
    enable_float8: Annotated[bool, Inert("samples are drawn in model.dtype, as they are trained")] = False
    fp32_lm_head: Annotated[bool, Inert("logits are float32 in sampling and training alike")] = False
    enable_prefix_caching: Annotated[bool, Inert("a group's prompt is computed once in any case")] = False
    enable_chunked_prefill: Annotated[bool, Inert("the engine divides long prompts by itself")] = False
    chunked_prefill_size: Annotated[int, Inert("the engine divides long prompts by itself")] = 128
    rollout_timeout: Annotated[float, Inert(RETRIES)] = 1200.0
    session_server_timeout: Annotated[float, Inert(RETRIES)] = 1200.0
    max_retry_per_worker: Annotated[int | None, Inert(RETRIES)] = None
    max_retry_per_sample: Annotated[int, Inert(RETRIES)] = 1
    health_check_interval_seconds: Annotated[float, Inert(RETRIES)] = 30.0
    health_check_timeout_seconds: Annotated[float, Inert(RETRIES)] = 15.0
    health_check_failure_threshold: Annotated[int, Inert(RETRIES)] = 3
    extra_rollout_config: Annotated[dict[str, Any], Only("it is of engines that are not used here")] = Field(
        default_factory=dict
    )
    worker_log_dir: Annotated[Path | None, Inert(OWN_LOGS)] = None


# --- how it is judged ---


class JudgerConfig(Names):
    """One judger, or in programs of the first generation a table of them by data source."""

    judger_name: Annotated[str, Apart("the reward's name; in a list of judgers its data_source")] = "judger"
    reward_handler: Annotated[Any, Apart("reward")] = None
    extra_info: Annotated[dict[str, Any], Apart("reward.N.args")] = Field(default_factory=dict)
    request_timeout: Annotated[float, Inert("rewards are functions here, with reward.N.timeout")] = 30.0
    cpu_resources: CPUResourcesConfig | None = None
    reward_judger_configs: Annotated[dict[str, Any] | list[Any] | None, Apart("reward, routed by data_source")] = None
    enable_batch_reward: Annotated[bool, Inert("a reward always gets the whole group")] = False
    enable_weighted_judgers: Annotated[bool, Only("weights are reward.N.weight")] = False


class GSM8KJudgerConfig(JudgerConfig):
    judger_name: Annotated[str, Apart("the reward's name; in a list of judgers its data_source")] = "openai/gsm8k"
    extra_info: Annotated[dict[str, Any], Apart("reward.N.args")] = Field(
        default_factory=lambda: {"score": 1, "format_score": 0}
    )


class EvaluatorConfig(Names):
    dataset_cfg: list[DatasetEntry] = Field(default_factory=list)
    tokenizer: Annotated[Any, Becomes("model.path", via=path)] = None
    evaluate_step: Annotated[int, Becomes("eval.every")] = 1
    eval_sample_num: Annotated[int, Becomes("eval.limit", via=lambda n: n or None)] = 0
    eval_sample_ratio: Annotated[float, Becomes("eval.limit", via=all_rows)] = 0
    compute_metric_func: Annotated[None, Only("accuracy is the share of answers with a reward above 0")] = None
    sample_params: SampleParams = Field(default_factory=SampleParams)
    max_concurrent: Annotated[int, Inert(BATCHED)] = 8
    max_retry_times: Annotated[int, Inert(RETRIES)] = 2
    worker_log_dir: Annotated[Path | None, Inert(OWN_LOGS)] = None


class TaskSpecConfig(Names):
    task_name: Annotated[str, Inert(LABEL)]
    weight: Annotated[float, Inert("there is one task")] = 1.0
    agent_loop_config: SingleTurnAgentLoopConfig
    judger_config: JudgerConfig | None = None
    produce_strategy_config: SyncProduceStrategyConfig = Field(default_factory=SyncProduceStrategyConfig)
    sampler_config: SamplerConfig


class AgentLoopManagerConfig(Names):
    tasks: TaskSpecConfig | list[TaskSpecConfig]

    @property
    def task(self) -> TaskSpecConfig | None:
        """The first of them: more are refused."""
        first = self.tasks[:1] if isinstance(self.tasks, list) else [self.tasks]
        return first[0] if first else None


# --- how it is trained ---


class AdamWConfig(Names):
    lr: Annotated[float, Becomes("optim.lr")] = 1e-5
    weight_decay: Annotated[float, Becomes("optim.weight_decay")] = 0.01
    betas: Annotated[tuple[float, float], Becomes("optim.betas")] = (0.9, 0.95)
    eps: Annotated[float, Becomes("optim.eps")] = 1e-8
    max_grad_norm: Annotated[float, Becomes("optim.max_grad_norm")] = 1.0
    skip_grad_norm_threshold: Annotated[None, Only("an update is skipped when its gradient is not finite")] = None
    foreach: Annotated[bool | None, Inert("AdamW is torch's fused one, which needs no more memory")] = None
    swap_optimizer: Annotated[bool | None, Inert("moments stay on the device; adamw_8bit makes them small")] = False


class LRConfig(Names):
    lr_type: Annotated[Literal["cosine", "linear", "constant"], Becomes("optim.schedule")] = "constant"
    warmup_ratio: Annotated[float, Becomes("optim.warmup_ratio")] = 0.03
    lr_min: Annotated[float, Apart("optim.min_lr_ratio, as a part of lr")] = 1e-6


class FSDPConfig(Names):
    param_dtype: Annotated[Any, Becomes("model.dtype", via=dtype_name)] = None
    recompute_ratio: Annotated[float, Becomes("model.gradient_checkpointing", via=_ratio)] = 1.0
    tp_size: Annotated[int, Inert(ONE_PROCESS)] = 1
    ep_size: Annotated[int, Inert(ONE_PROCESS)] = 1
    hsdp_sharding_size: Annotated[int | None, Inert(ONE_PROCESS)] = None
    reshard_after_forward: Annotated[bool, Inert(ONE_PROCESS)] = True
    reduce_dtype: Annotated[Any, Inert(ONE_PROCESS)] = None
    cpu_offload: Annotated[bool, Inert("weights stay on the device")] = False
    torch_compile: Annotated[bool, Inert("the module runs uncompiled")] = False
    fp32_lm_head: Annotated[bool, Inert("logits are float32 in sampling and training alike")] = False


class PolicyLossConfig(Names):
    """`policy_loss_cfg = dict(…)`."""

    cliprange_low: Annotated[float, Becomes("algorithm.loss.clip_low")]
    cliprange_high: Annotated[float, Becomes("algorithm.loss.clip_high")]
    loss_type: Annotated[str, Becomes("algorithm.loss.name", via=_policy_loss)] = "vanilla"
    clip_ratio_c: Annotated[float, Becomes("algorithm.loss.dual_clip")] = 3.0
    log_prob_diff_min: Annotated[float, Only("log-ratios are held within ±20")] = -20.0
    log_prob_diff_max: Annotated[float, Only("log-ratios are held within ±20")] = 20.0


class GRPOLossConfig(Names):
    policy_loss_cfg: PolicyLossConfig
    use_kl_loss: Annotated[bool, Apart("algorithm.kl.coef above 0")] = False
    kl_loss_coef: Annotated[float, Apart("algorithm.kl.coef")] = 0.001
    kl_loss_type: Annotated[str | None, Apart("algorithm.kl.estimator")] = None
    mode: Annotated[Literal["eager", "chunk"], Apart("train.logprob_chunk_tokens")] = "eager"
    chunk_size: Annotated[int | None, Apart("train.logprob_chunk_tokens")] = Field(default=1024, gt=0)
    rollout_is: Annotated[None, Only("the sampler's log-probs are the trainer's: there is nothing to correct")] = None
    loss_reduction: Annotated[Literal["token"], Becomes("algorithm.normaliser")] = "token"
    ignore_idx: Annotated[int, Inert("tokens without a loss are masked, and have no label")] = -100


class WorkerConfig(Names):
    model_cfg: Annotated[ModelPreset | None, Apart("the config.json of the model folder")] = None
    optim_cfg: AdamWConfig = Field(default_factory=AdamWConfig)
    loss_cfg: GRPOLossConfig
    lr_cfg: LRConfig = Field(default_factory=LRConfig)
    fsdp_cfg: FSDPConfig = Field(default_factory=FSDPConfig)
    load_from: Annotated[str | Path | None, Becomes("model.path", via=path)] = None
    ref_load_from: Annotated[str | Path | None, Becomes("model.path", via=path)] = None
    ref_model_fsdp_cfg: Annotated[FSDPConfig | None, Inert(ONE_PROCESS)] = None
    optimizer_steps: Annotated[int, Becomes("optim.steps_per_batch")] = 1
    pack_max_length: Annotated[int, Becomes("train.micro_batch_tokens")]
    seed: Annotated[int | None, Becomes("train.seed")] = None
    sp_size: Annotated[int, Inert(ONE_PROCESS)] = 1
    update_weight_bucket_size_in_gb: Annotated[float, Inert(ONE_MODULE)] = 0.5
    profile_step: Annotated[Any, Inert("seconds of each phase are in metrics.jsonl, as time/*")] = None
    sft_dataloader_cfg: Annotated[None, Only("supervised training is `groupwise sft`, a run of its own")] = None
    log_dir: Annotated[str | Path | None, Inert(OWN_LOGS)] = None


class GRPOAdvantageConfig(Names):
    advantage: ClassVar[str] = "grpo"
    eps: Annotated[float, Inert("1e-4 is added to the std, and equal rewards give exactly 0")] = 1e-8


class RLOOAdvantageConfig(Names):
    advantage: ClassVar[str] = "rloo"


class OPOAdvantageConfig(Names):
    advantage: ClassVar[str] = "opo"
    eps: Annotated[float, Inert("completions have tokens, so nothing divides by 0")] = 1e-8


class PassKAdvantageConfig(Names):
    advantage: ClassVar[str] = "pass_k"
    k: Annotated[int, Becomes("algorithm.advantage.k")] = 4
    eps: Annotated[float, Inert("a group of equal outcomes gives exactly 0")] = 1e-6


# --- where it runs ---


class AcceleratorResourcesConfig(Names):
    num_workers: Annotated[int, Apart("one process, on one device")] = Field(default=1, ge=1)
    accelerator: Annotated[Literal["GPU", "NPU", "CPU"], Apart("model.device")] = "GPU"
    num_accelerators_per_worker: Annotated[float, Inert(ONE_PROCESS)] = 1
    num_accelerators_per_node: Annotated[int, Inert(ONE_PROCESS)] = 8
    num_cpus_per_worker: Annotated[float, Inert("torch takes its threads from OMP_NUM_THREADS")] = 12
    cpu_memory_per_worker: Annotated[int, Inert("memory is taken as it is needed")] = 16 * 1024**3
    pg_pack_strategy: Annotated[str, Inert(ONE_PROCESS)] = "PACK"


class TraceConfig(Names):
    enabled: Annotated[bool, Inert(TRACED)] = False
    enable_rollout_trace: Annotated[bool, Inert(TRACED)] = False
    output_dir: Annotated[Path | str | None, Inert(TRACED)] = None
    service_name: Annotated[str, Inert(TRACED)] = "xtuner-rollout"
    xtuner_viewer_enabled: Annotated[bool, Inert(TRACED)] = False
    xtuner_viewer_host: Annotated[str, Inert(TRACED)] = "127.0.0.1"
    xtuner_viewer_port: Annotated[int, Inert(TRACED)] = 18080
    xtuner_viewer_jaeger_query_url: Annotated[str | None, Inert(TRACED)] = None
