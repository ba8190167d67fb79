"""GRPO on GSM8K as a configuration file for XTuner, whose imports are changed to one line.

    groupwise xtuner examples/xtuner_config.py lmdeploy MODEL gsm8k/train.jsonl gsm8k/test.jsonl

The paths come from the environment, as XTuner's launch script sets it; `--dry-run` shows the recipe that this is.
"""

from __future__ import annotations

import os

from groupwise.compat.xtuner import (
    AcceleratorResourcesConfig,
    AdamWConfig,
    AgentLoopManagerConfig,
    CPUResourcesConfig,
    DataloaderConfig,
    DatasetConfig,
    EvaluatorConfig,
    FSDPConfig,
    GRPOAdvantageConfig,
    GRPOLossConfig,
    GSM8KJudgerConfig,
    LRConfig,
    RLColocateTrainerConfig,
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
    get_model_config_from_hf,
)

MODEL = os.environ["MODEL_PATH"]
NODES = int(os.environ.get("WORLD_SIZE", "1"))
STEPS = int(os.environ.get("TRAIN_STEPS", "45"))
PROMPTS_PER_STEP = int(os.environ.get("TRAIN_BATCH_SIZE", "64"))
LEARNING_RATE = float(os.environ.get("LEARNING_RATE", "1e-6"))
MAX_PROMPT = 512
MAX_RESPONSE = int(os.environ.get("MAX_RESPONSE_LENGTH", "1024"))
PACK = 32 * 1024
GROUP = 5


def prompts(file: str, *, per_prompt: int) -> SamplerConfig:
    dataset = DatasetConfig(name="gsm8k", anno_path=file, sample_ratio=1.0)
    entry = {"dataset": dataset, "tokenize_fn": RLTextTokenizeFnConfig(max_length=MAX_PROMPT)}
    loader = DataloaderConfig(
        dataset_config_list=[entry], pack_max_length=PACK, collator="fake_collator", pack_level="none"
    )
    return SamplerConfig(dataloader_cfg=loader, prompt_repeat_k=per_prompt)


def answers(*, temperature: float, top_k: int) -> SingleTurnAgentLoopConfig:
    sampling = SampleParams(max_tokens=MAX_RESPONSE, top_k=top_k, top_p=1.0, temperature=temperature, min_tokens=0)
    return SingleTurnAgentLoopConfig(hf_checkpoint=MODEL, sample_params=sampling)


judger = GSM8KJudgerConfig(
    judger_name="openai/gsm8k", cpu_resources=CPUResourcesConfig(num_workers=1, num_cpus_per_worker=1)
)
training_task = TaskSpecConfig(
    task_name="train_task",
    agent_loop_config=answers(temperature=1.0, top_k=0),
    judger_config=judger,
    produce_strategy_config=SyncProduceStrategyConfig(),
    sampler_config=prompts(os.environ["DATA_PATH"], per_prompt=GROUP),
)
evaluation_task = TaskSpecConfig(
    task_name="eval_task",
    agent_loop_config=answers(temperature=0.0, top_k=1),
    judger_config=judger,
    sampler_config=prompts(os.environ["EVAL_DATA_PATH"], per_prompt=1),
)

loss = GRPOLossConfig(
    policy_loss_cfg={
        "cliprange_low": 0.2,
        "cliprange_high": 0.28,
        "loss_type": os.environ.get("LOSS_TYPE", "vanilla"),
        "clip_ratio_c": 10.0,
        "log_prob_diff_min": -20.0,
        "log_prob_diff_max": 20.0,
    },
    ignore_idx=-100,
    use_kl_loss=False,
    kl_loss_coef=0.0,
    kl_loss_type="low_var_kl",
    mode=os.environ.get("LOSS_MODE", "chunk"),
    chunk_size=512,
)
worker = WorkerConfig(
    model_cfg=get_model_config_from_hf(MODEL),
    load_from=MODEL,
    optim_cfg=AdamWConfig(lr=LEARNING_RATE, foreach=False, weight_decay=0.1),
    loss_cfg=loss,
    lr_cfg=LRConfig(lr_type="constant", warmup_ratio=0, lr_min=1e-6),
    fsdp_cfg=FSDPConfig(torch_compile=False, cpu_offload=False, ep_size=1),
    sp_size=int(os.environ.get("SP_SIZE", "1")),
    optimizer_steps=1,
    pack_max_length=PACK,
)
resources = AcceleratorResourcesConfig(
    accelerator="GPU", num_workers=8 * NODES, num_cpus_per_worker=12, cpu_memory_per_worker=16 * 1024**3
)
rollout = RolloutConfig(
    env="gsm8k",
    device=resources.accelerator,
    model_path=MODEL,
    dtype="bfloat16",
    tensor_parallel_size=1,
    expert_parallel_size=1,
    gpu_memory_utilization=0.8,
    context_length=MAX_PROMPT + MAX_RESPONSE,
    enable_return_routed_experts=os.environ.get("ENABLE_RETURN_ROUTED_EXPERTS", "0") == "1",
)
trace = TraceConfig(
    enabled=True,
    service_name="rollouts",
    xtuner_viewer_enabled=True,
    xtuner_viewer_host="127.0.0.1",
    xtuner_viewer_port=18080,
    xtuner_viewer_jaeger_query_url="http://127.0.0.1:16686",
    enable_rollout_trace=True,
)

trainer = RLColocateTrainerConfig(
    resources=resources,
    train_worker_cfg=worker,
    rollout_config=rollout,
    tokenizer_path=MODEL,
    replay_buffer_config=SyncReplayBufferConfig(),
    agent_loop_manager_cfg=AgentLoopManagerConfig(tasks=training_task),
    eval_agent_loop_manager_cfg=AgentLoopManagerConfig(tasks=evaluation_task),
    evaluator_config=EvaluatorConfig(compute_metric_func=None),
    load_from=MODEL,
    total_train_steps=STEPS,
    train_batch_size=PROMPTS_PER_STEP,
    advantage_estimator_config=GRPOAdvantageConfig(eps=1e-8),
    enable_evaluate=True,
    enable_initial_evaluate=False,
    evaluate_step=STEPS,
    work_dir=os.environ["WORK_DIR"],
    seed=123,
    debug_rollout=False,
    trace_config=trace,
)
