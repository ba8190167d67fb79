"""What each argument of TRL's configs becomes: the door's one table, and that of docs/migrate.md.

An argument acts, or its value has to be one that says what Groupwise does anyway, or it is a hint that cannot change
the result and is answered with a sentence. Nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["same", "acts", "refused", "hint"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One argument.

    Attributes:
        default: TRL's.
        kind: `same`: the value of one setting of Groupwise; `acts`: decides settings, alone or with others; `refused`:
            only `default`, None and the values in `fine` (elsewhere, None in `fine` is a value of its own, and not the
            default); `hint`: anything, with a sentence where it is not `default`.
        becomes: the setting or settings; or why it is refused, and what to do; or the sentence.

    Example:
        Setting(1e-6, "same", "optim.lr")
    """

    default: Any
    kind: Kind
    becomes: str
    fine: tuple[Any, ...] = ()

    def says_nothing(self, value: Any) -> bool:
        return value is None or any(value == known for known in (self.default, *self.fine))


def _same(default: Any, becomes: str) -> Setting:
    return Setting(default, "same", becomes)


def _acts(default: Any, becomes: str) -> Setting:
    return Setting(default, "acts", becomes)


def _only(why: str, /, **defaults: Any) -> dict[str, Setting]:
    """Refused, with one reason for all; a tuple holds the default and what else is fine."""
    return {
        name: Setting(value[0], "refused", why, value[1:])
        if isinstance(value, tuple)
        else Setting(value, "refused", why)
        for name, value in defaults.items()
    }


def _hints(why: str, /, **defaults: Any) -> dict[str, Setting]:
    return {name: Setting(value, "hint", why) for name, value in defaults.items()}


_OPTIMISER = {
    "learning_rate": _same(5e-5, "optim.lr"),
    "weight_decay": _same(0.0, "optim.weight_decay"),
    "adam_beta1": _acts(0.9, "optim.betas"),
    "adam_beta2": _acts(0.999, "optim.betas"),
    "adam_epsilon": _same(1e-8, "optim.eps"),
    "max_grad_norm": _same(1.0, "optim.max_grad_norm"),
    "lr_scheduler_type": _acts("linear", "optim.schedule"),
    "lr_scheduler_kwargs": _acts(None, "optim.min_lr_ratio"),
    "warmup_ratio": _acts(0.0, "optim.warmup_ratio"),
    "warmup_steps": _acts(0, "optim.warmup_steps; below 1 it is a ratio"),
    "optim": _acts("adamw_torch_fused", "optim.name: 32-bit AdamW is adamw, 8-bit adamw_8bit; others are refused"),
    **_only("the optimisers take no other settings; see optim.name", optim_args=None, optim_target_modules=None),
    **_only("the loss is the mean over the learned tokens", label_smoothing_factor=0.0, neftune_noise_alpha=None),
}

_RUN = {
    "output_dir": _acts("trainer_output", "train.output is `run` in it; an earlier run there is moved aside"),
    "per_device_train_batch_size": _acts(8, "rollout.prompts_per_step (SFT: sft.rows_per_step)"),
    "gradient_accumulation_steps": _acts(1, "rollout.prompts_per_step (SFT: sft.rows_per_step)"),
    "num_train_epochs": _same(3.0, "train.epochs"),
    "max_steps": _acts(-1, "train.steps; None and -1 leave it to the epochs"),
    "seed": _same(42, "train.seed"),
    "data_seed": _acts(None, "train.seed, which decides both: it has to be the same"),
    "run_name": _acts(None, "tracking.run_name; None is the name of output_dir"),
    "project": _same(None, "tracking.project"),
    "report_to": _acts(
        "none", "tracking.backends, beside console and jsonl; a tracker that is not there is TensorBoard"
    ),
    "disable_tqdm": _acts(None, "tracking.backends: True leaves out console"),
    "logging_strategy": _acts("steps", "when `log_history` and `on_log` get numbers; metrics.jsonl has every step"),
    "logging_steps": _acts(10, "when `log_history` and `on_log` get numbers, the means since the last time"),
    "logging_first_step": _acts(False, "`log_history` and `on_log`"),
    "save_strategy": _acts("steps", "train.save_every; there is always a checkpoint at the end"),
    "save_steps": _acts(500, "train.save_every"),
    "save_total_limit": _acts(None, "train.keep_checkpoints; None keeps all"),
    "overwrite_output_dir": _acts(
        False, "True deletes an earlier run in output_dir, and what save_model replaces; False moves it aside"
    ),
    "resume_from_checkpoint": _acts(None, "what train() goes on from, where it is given nothing"),
    "hub_model_id": _acts(None, "where push_to_hub() sends the model: owner/name"),
    "hub_token": _acts(None, "the token of push_to_hub(); None is HF_TOKEN, or what `hf auth login` kept"),
    "hub_private_repo": _acts(None, "whether push_to_hub() makes a private repository"),
    "groupwise": _acts(None, "not TRL's: a dict of any settings, {'rollout.kv_cache_gib': 4}, which win"),
    **_only("compare `eval_*` of `log_history`, and load that `checkpoint-N`", load_best_model_at_end=False),
    **_only(
        "it belongs to load_best_model_at_end, which is refused", metric_for_best_model=None, greater_is_better=None
    ),
    **_only("a run repeats bit for bit anyway on a CPU", full_determinism=(False, True)),
    **_only("checkpoints always hold the optimiser, to be resumed from", save_only_model=False),
    **_only(
        "a resumed run goes on exactly where it was",
        ignore_data_skip=False,
        restore_callback_states_from_checkpoint=False,
    ),
    **_only("they are for scripts around the trainer; call train() or evaluate()", do_train=(False, True)),
    **_only("call evaluate()", do_eval=(False, True), do_predict=False),
    **_only("numbers that are not finite have no place in a mean", logging_nan_inf_filter=True),
    **_only("the folder `run` of output_dir has the files of all trackers", logging_dir=None),
    **_only(
        "nothing is uploaded while a run goes on; call trainer.push_to_hub() when it is done",
        push_to_hub=False,
        hub_strategy="every_save",
        hub_always_push=False,
        hub_revision=None,
        trackio_space_id=None,
        trackio_bucket_id=None,
        trackio_static_space_id=None,
        log_completions_hub_repo=None,
    ),
}

_HARDWARE = {
    "bf16": _acts(None, "model.dtype = bfloat16; None is bfloat16 on a GPU and float32 on a CPU"),
    "fp16": _acts(False, "model.dtype = bfloat16, the nearest that needs no loss scaling"),
    "use_cpu": _acts(False, "model.device = cpu"),
    "no_cuda": _acts(False, "model.device = cpu"),
    "gradient_checkpointing": _same(None, "model.gradient_checkpointing"),
    **_only("it is never reentrant", gradient_checkpointing_kwargs=(None, {"use_reentrant": False})),
    **_only("use gradient_checkpointing", activation_checkpointing=None, activation_checkpointing_kwargs=None),
    **_only("use gradient_checkpointing", activation_offloading=False),
    **_only("call torch.set_float32_matmul_precision yourself", tf32=None),
    **_hints(
        "evaluation runs the very module that is trained, in its dtype", bf16_full_eval=False, fp16_full_eval=False
    ),
    **_hints("sampling uses CUDA graphs on a GPU; nothing is compiled", torch_compile=False),
    **_hints("nothing is compiled", torch_compile_backend=None, torch_compile_mode=None),
    **_hints(
        "logits never exist for more tokens than train.logprob_chunk_tokens anyway",
        use_liger_kernel=False,
        liger_kernel_config=None,
    ),
    **_hints("batches are cut by train.micro_batch_tokens", auto_find_batch_size=False, torch_empty_cache_steps=None),
    **_hints(
        "rows are read and tokenized once, at the start",
        dataloader_num_workers=0,
        dataloader_pin_memory=True,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        dataloader_in_order=True,
        dataset_num_proc=None,
    ),
    **_only("rows are tokenized once, at the start", dataloader_multiprocessing_context=None, accelerator_config=None),
    **_only("every epoch is as long as the data; batches go on over its end", dataloader_drop_last=False),
    **_only(
        "one process trains on one device; leave it out",
        fsdp=(None, "", []),
        fsdp_config=None,
        deepspeed=None,
        parallelism_config=None,
        local_rank=(-1, 0),
        ddp_backend=None,
        ddp_find_unused_parameters=None,
        ddp_bucket_cap_mb=None,
        ddp_broadcast_buffers=None,
        ddp_static_graph=None,
        ddp_timeout=1800,
        average_tokens_across_devices=True,
        ds3_gather_for_generation=True,
    ),
    **_hints("one process trains", log_on_each_node=True, save_on_each_node=False, log_level_replica="warning"),
    **_hints("set the level of the logger `groupwise`", log_level="passive"),
    **_only("a checkpoint is saved by Ctrl-C and by SIGTERM anyway", enable_jit_checkpoint=(False, True)),
    **_only("use a profiler of torch's", skip_memory_metrics=True, debug=("", [])),
}

_EVALUATION = {
    "eval_strategy": _acts("no", "eval.every"),
    "evaluation_strategy": _acts(None, "eval.every: the older name of eval_strategy"),
    "eval_steps": _acts(None, "eval.every; None is logging_steps"),
    "eval_on_start": _same(False, "eval.at_start"),
    **_hints("the engine decides what is sampled together", per_device_eval_batch_size=8, eval_accumulation_steps=None),
    **_only("the first evaluation is after eval_steps", eval_delay=0),
    **_only(
        "evaluation samples answers and scores them by the rewards",
        prediction_loss_only=False,
        include_for_metrics=(None, []),
        batch_eval_metrics=False,
        eval_do_concat_batches=True,
        eval_use_gather_object=False,
        label_names=None,
    ),
}

_DATA = {
    **_only("rewards get every column", remove_unused_columns=(None, False)),
    **_only("set shuffle_dataset", train_sampling_strategy="random"),
    **_only("lengths are counted", length_column_name="length", group_by_length=False),
    **_only("tokens are counted: metrics.jsonl", include_num_input_tokens_seen=("no", False)),
}

TRAINING: Mapping[str, Setting] = {**_RUN, **_OPTIMISER, **_HARDWARE, **_EVALUATION, **_DATA}
"""What TRL takes over from transformers' TrainingArguments, older names included."""

_MODEL = {
    "model_init_kwargs": _acts(None, "as in AutoModelForCausalLM.from_pretrained, for a model given by name"),
    "trust_remote_code": _same(False, "model.trust_remote_code"),
    "router_aux_loss_coef": _same(
        None, "algorithm.router_aux_loss_coef; none is 0 here, and in TRL what the model's config.json says"
    ),
    **_only("nothing is padded to a multiple that matters", pad_to_multiple_of=(None, "auto")),
    **_only("models keep no cache in training", use_cache=False),
}

_SAMPLING = {
    "num_generations": _same(8, "rollout.group_size"),
    "num_generations_eval": _acts(None, "eval.samples; None is num_generations"),
    "max_prompt_length": _acts(None, "data.max_prompt_tokens: longer prompts are left out, never cut; None keeps all"),
    "max_completion_length": _same(512, "rollout.max_completion_tokens"),
    "generation_batch_size": _acts(None, "rollout.prompts_per_step, optim.steps_per_batch"),
    "steps_per_generation": _acts(None, "rollout.prompts_per_step, optim.steps_per_batch"),
    "temperature": _acts(1.0, "rollout.temperature"),
    "top_p": _acts(1.0, "rollout.top_p"),
    "top_k": _acts(0, "rollout.top_k"),
    "min_p": _acts(None, "rollout.min_p"),
    "repetition_penalty": _acts(1.0, "rollout.repetition_penalty"),
    "generation_kwargs": _acts(None, "rollout: temperature, top_p, top_k, min_p, stop, min_tokens, …"),
    "vllm_sampling_params": _acts(None, "rollout, as generation_kwargs; its seed is train.seed"),
    "chat_template_kwargs": _same(None, "data.chat_template_kwargs"),
    "shuffle_dataset": _same(True, "data.shuffle"),
    **_hints(
        "samples come from Groupwise's own engine, on the trainer's weights: nothing is copied",
        use_vllm=False,
        vllm_mode="colocate",
        vllm_model_impl="vllm",
        vllm_enable_sleep_mode=False,
        use_transformers_continuous_batching=False,
        transformers_continuous_batching_config=None,
        use_transformers_paged=False,
        cache_implementation=None,
    ),
    **_hints("one device samples", vllm_tensor_parallel_size=1),
    **_hints(
        "caches get what training leaves free; groupwise={'rollout.kv_cache_gib': …} sets it",
        vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=None,
    ),
    **_only(
        "there is no server: samples come from this process",
        vllm_server_base_url=None,
        vllm_server_host="0.0.0.0",
        vllm_server_port=8000,
        vllm_server_timeout=240.0,
        vllm_group_port=51216,
    ),
    **_only("answers are not bound to a pattern; reward the pattern", vllm_structured_outputs_regex=None),
    **_only("there are no tools", max_tool_calling_iterations=None),
}

_ALGORITHM = {
    "loss_type": _acts(
        "dapo", "algorithm.name and normaliser: grpo, bnpo, dr_grpo, dapo, cispo, sapo; luspo and vespo are refused"
    ),
    "importance_sampling_level": _acts("token", "algorithm.name: sequence is gspo"),
    "beta": _same(0.0, "algorithm.kl.coef"),
    "num_iterations": _same(1, "optim.passes_per_batch"),
    "epsilon": _acts(0.2, "algorithm.loss.clip_low, clip_high"),
    "epsilon_high": _acts(None, "algorithm.loss.clip_high; for cispo the ratio itself, so one more than clip_high"),
    "delta": _acts(None, "algorithm.loss.dual_clip"),
    "sapo_temperature_neg": _acts(1.05, "algorithm.loss.temperature_negative"),
    "sapo_temperature_pos": _acts(1.0, "algorithm.loss.temperature_positive"),
    "reward_weights": _acts(None, "reward.N.weight"),
    "scale_rewards": _acts("group", "algorithm.advantage.scale; True is group, False none"),
    "multi_objective_aggregation": _acts("sum_then_normalize", "algorithm.advantage.name: normalize_then_sum is gdpo"),
    "mask_truncated_completions": _acts(False, "algorithm.overlong = mask"),
    "sync_ref_model": _acts(False, "algorithm.reference.sync_every"),
    "ref_model_sync_steps": _acts(512, "algorithm.reference.sync_every"),
    "ref_model_mixup_alpha": _acts(0.6, "algorithm.reference.mixup"),
    "top_entropy_quantile": _same(1.0, "algorithm.entropy.top_fraction; of each completion, not of the batch"),
    "entropy_coef": _same(0.0, "algorithm.entropy.coef"),
    "use_adaptive_entropy": _acts(False, "algorithm.entropy.target"),
    "entropy_target": _acts(0.2, "algorithm.entropy.target"),
    "entropy_coef_min": _acts(0.0, "algorithm.entropy.coef_min"),
    "entropy_coef_max": _acts(1.0, "algorithm.entropy.coef_max"),
    "entropy_coef_delta": _acts(0.005, "algorithm.entropy.coef_step"),
    "off_policy_mask_threshold": _same(None, "algorithm.correction.off_policy_mask"),
    **_only("the KL is k3 as it stands", use_bias_correction_kl=(None, False)),
    **_only("VESPO is not there", vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0),
    **_only("log-probs come from the head in float32 already", cast_lm_head_to_fp32=(False, True)),
    "disable_dropout": _acts(False, "lora.dropout = 0; nothing else drops out anyway"),
    **_hints(
        "the sampler's log-probs are the trainer's own: there is nothing to correct",
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_clip_max=3.0,
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_cap=None,
    ),
    "log_completions": _acts(False, "tracking.samples_every = logging_steps; run/trajectories has all, always"),
    "num_completions_to_print": _acts(None, "tracking.samples"),
    **_hints("every completion is in run/trajectories", log_unique_prompts=False, log_multimodal=True),
}

GRPO: Mapping[str, Setting] = {
    **TRAINING,
    **_MODEL,
    **_SAMPLING,
    **_ALGORITHM,
    "learning_rate": _same(1e-6, "optim.lr"),
}

SFT: Mapping[str, Setting] = {
    **TRAINING,
    **_MODEL,
    "learning_rate": _same(2e-5, "optim.lr"),
    "dataset_text_field": _acts("text", "sft.text_column, where the rows have it"),
    "assistant_only_loss": _acts(False, "True: data with `messages` is learned in the assistant's turns alone"),
    **_only("an answer is learned without its prompt; give `text` to learn both", completion_only_loss=(None, True)),
    "max_length": Setting(
        1024, "acts", "sft.max_tokens: longer rows are left out and counted, never cut; None keeps all", (None,)
    ),
    "max_seq_length": _acts(None, "sft.max_tokens: the older name of max_length"),
    "shuffle_dataset": _acts(None, "data.shuffle; None is True: an order for each epoch"),
    "chat_template_path": _same(None, "model.chat_template, for a model given by name"),
    **_only("longer rows are left out, never cut", truncation_mode="keep_start"),
    **_only("set it in the tokenizer", eos_token=None, pad_token=None),
    **_only("map the data set beforehand", dataset_kwargs=None),
    **_only("the loss is the mean over the learned tokens", loss_type="nll"),
    **_hints(
        "rows are packed without padding anyway, each for itself; a batch counts rows, so an epoch has more steps than "
        "with TRL's packing",
        packing=False,
        packing_strategy="bfd",
        padding_free=False,
        eval_packing=None,
    ),
}
