"""GRPO on GSM8K as a program for XTuner's RLTrainer, whose imports are changed to one line; Ray starts nothing.

python examples/xtuner_program.py --model MODEL --train gsm8k/train.jsonl --eval gsm8k/test.jsonl
"""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer

from groupwise.compat.xtuner import (
    AcceleratorResourcesConfig,
    AdamWConfig,
    DataFlowConfig,
    DataloaderConfig,
    DatasetConfig,
    EvaluatorConfig,
    FSDPConfig,
    GRPOLossConfig,
    GSM8KJudgerConfig,
    JudgerConfig,
    LRConfig,
    Qwen3Dense8BConfig,
    ReplayBufferConfig,
    RLTextTokenizeFnConfig,
    RLTrainer,
    RolloutConfig,
    SampleParams,
    WorkerConfig,
    ray,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--work-dir", default="work_dirs/grpo")
    parser.add_argument("--prompt-repeat-k", type=int, default=5)
    parser.add_argument("--global-batch-size", type=int, default=1024, help="prompts in one step")
    parser.add_argument("--optimizer-steps", type=int, default=4)
    parser.add_argument("--max-prompt-length", type=int, default=512)
    parser.add_argument("--max-response-length", type=int, default=2048)
    parser.add_argument("--pack-max-length", type=int, default=32768)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--total-epochs", type=int, default=15)
    parser.add_argument("--enable-evaluate", action="store_true")
    return parser.parse_args()


def worker(args: argparse.Namespace) -> WorkerConfig:
    loss = GRPOLossConfig(
        policy_loss_cfg={"cliprange_high": 0.2, "cliprange_low": 0.2, "loss_type": "vanilla"},
        ignore_idx=-100,
        use_kl_loss=True,
        kl_loss_coef=0.001,
        kl_loss_type="low_var_kl",
        mode="chunk",
        chunk_size=512,
    )
    return WorkerConfig(
        model_cfg=Qwen3Dense8BConfig(),  # where the model folder says otherwise, a line says so, and the folder decides
        optim_cfg=AdamWConfig(lr=args.lr, foreach=False),
        loss_cfg=loss,
        lr_cfg=LRConfig(warmup_ratio=0),
        fsdp_cfg=FSDPConfig(),
        load_from=args.model,
        optimizer_steps=args.optimizer_steps,
        pack_max_length=args.pack_max_length,
    )


def trainer(args: argparse.Namespace) -> RLTrainer:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = {
        "dataset": DatasetConfig(name="gsm8k", anno_path=args.train),
        "tokenize_fn": RLTextTokenizeFnConfig(max_length=args.max_prompt_length),
    }
    loader = DataloaderConfig(pack_max_length=args.pack_max_length, collator="fake_collator", pack_level="none")
    sampling = SampleParams(max_tokens=args.max_response_length)
    return RLTrainer(
        resources=AcceleratorResourcesConfig(
            accelerator="GPU",
            num_accelerators_per_worker=1,
            num_cpus_per_worker=12,
            num_workers=8,
            cpu_memory_per_worker=16 * 1024**3,
        ),
        rollout_config=RolloutConfig(model_path=args.model, model_name="qwen3-8B", tokenizer_path=args.model),
        dataflow_config=DataFlowConfig(
            prompt_repeat_k=args.prompt_repeat_k, global_batch_size=args.global_batch_size, sample_params=sampling
        ),
        judger_config=JudgerConfig(reward_judger_configs={"openai/gsm8k": GSM8KJudgerConfig()}),
        replay_buffer_config=ReplayBufferConfig(dataset_cfg=[prompts], dataloader_cfg=loader, tokenizer=tokenizer),
        evaluator_config=EvaluatorConfig(
            dataset_cfg=[{"dataset": DatasetConfig(name="gsm8k", anno_path=args.eval)}],
            tokenizer=tokenizer,
            evaluate_step=10,
            sample_params=sampling,
        ),
        train_worker_cfg=worker(args),
        tokenizer_path=args.model,
        work_dir=args.work_dir,
        total_epochs=args.total_epochs,
        enable_evaluate=args.enable_evaluate,
    )


if __name__ == "__main__":
    ray.init(num_cpus=128, ignore_reinit_error=True)
    trainer(arguments()).fit()
