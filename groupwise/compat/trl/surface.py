"""What every method and attribute of TRL's trainers is here: the guard's one table, and that of docs/migrate.md.

A name is there and acts, or reads as the argument that it is of, or reads as what it is without several processes,
reward models and the like, or is refused with a reason. No name is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["hook", "here", "argument", "constant", "refused"]


@dataclass(frozen=True, slots=True)
class Member:
    """One name.

    Attributes:
        kind: `hook`: a method that is there, and a subclass may override it; `here`: it is there, and only to be used;
            `argument`: reads as the argument `value` of the config; `constant`: reads as `value`; `refused`.
        why: why it cannot be overridden, set or, when refused, used; and what to do.

    Example:
        Member("argument", "set it in args, before train()", "temperature")
    """

    kind: Kind
    why: str = ""
    value: Any = None


def _each(kind: Kind, why: str, names: str) -> dict[str, Member]:
    return {name: Member(kind, why) for name in names.split()}


def _arguments(names: str) -> dict[str, Member]:
    return {name: Member("argument", _ARGUMENT, name) for name in names.split()}


def _constants(value: Any, why: str, names: str) -> dict[str, Member]:
    return {name: Member("constant", why, value) for name in names.split()}


_LOSS = "the loss is that of loss_type; write another as a file in groupwise/algorithms/losses (docs/architecture.md)"
_REWARDS = "rewards are functions: give reward_funcs, which see whole groups"
_SAMPLING = "samples come from Groupwise's engine: temperature, top_p, max_completion_length and their like decide them"
_DATA = "rows are read, rendered and packed once, at the start: change train_dataset, or a column of it, beforehand"
_OPTIMISER = "the optimiser is optim, learning_rate, lr_scheduler_type and their like; its state is in the checkpoints"
_LOOP = "there is one training loop, without such a part: follow or end it by a TrainerCallback"
_EVALUATION = "evaluation samples answers and scores them by the rewards: call evaluate(), or generate_completions()"
_HARDWARE = "one process trains on one device"
_SAVING = "checkpoints are whole, and are resumed bit for bit: override save_model to write more into them"
_TOOLS = "there are no tools and environments"
_HUB = "call push_to_hub() when training is done"
_SEARCH = "start one run for each setting"
_ARGUMENT = "set it in args, before train()"
_FACT = "it says what is so here"
_OBJECT = "give it to the trainer when it is made"

_HOOKS = (
    "train evaluate save_model log log_metrics save_metrics save_state metrics_format create_model_card push_to_hub "
    "add_callback pop_callback remove_callback generate_completions"
)

_METHODS: Mapping[str, Member] = {
    **_each("hook", "", _HOOKS),
    **_each(
        "here",
        _FACT,
        "is_world_process_zero is_local_process_zero num_examples get_num_trainable_parameters "
        "get_total_train_batch_size get_learning_rates init_hf_repo",
    ),
    **_each(
        "refused",
        _LOSS,
        "compute_loss compute_loss_context_manager _compute_loss get_gamma_weights get_high_entropy_mask "
        "get_off_policy_mask loss_is_scaled_for_ga _get_num_items_in_batch _get_per_token_logps_and_entropies",
    ),
    **_each("refused", _REWARDS, "_calculate_rewards _log_completion_extra _log_metric"),
    **_each(
        "refused",
        _SAMPLING,
        "_generate _generate_and_score_completions _generate_single_turn _tokenize_prompts _get_tool_suffix_ids "
        "_tool_call_loop",
    ),
    **_each(
        "refused",
        _DATA,
        "get_train_dataloader get_eval_dataloader get_test_dataloader get_batch_samples _get_dataloader "
        "_get_eval_sampler _get_train_sampler _get_collator_with_removed_columns _remove_unused_columns "
        "_set_signature_columns_if_needed _prepare_input _prepare_inputs _prepare_dataset "
        "_reject_skip_prepare_without_labels _track_num_input_tokens",
    ),
    **_each(
        "refused",
        _OPTIMISER,
        "create_optimizer create_optimizer_and_scheduler create_scheduler get_decay_parameter_names "
        "get_optimizer_cls_and_kwargs get_optimizer_group _clip_grad_norm _get_grad_norm _get_learning_rate",
    ),
    **_each(
        "refused",
        _LOOP,
        "training_step floating_point_ops store_flos set_initial_training_values end autocast_smart_context_manager "
        "call_model_init _inner_training_loop _run_epoch _init_training_state _finalize_training _prepare_for_training "
        "_maybe_log_save_evaluate _issue_warnings_after_load _update_auto_batch_size _validate_args _send_telemetry",
    ),
    **_each("refused", _EVALUATION, "predict prediction_step evaluation_loop _evaluate _determine_best_metric"),
    **_each(
        "refused",
        _HARDWARE,
        "create_accelerator_and_postprocess get_cp_size get_sp_size get_tp_size _build_accelerator_args "
        "_defer_fsdp_gradient_reduction _has_mixed_mesh_grads _mixed_mesh_grad_norm _move_model_to_device "
        "_prepare_context_parallel_inputs _sync_replicated_trainable_parameters _wrap_model",
    ),
    **_each(
        "refused",
        _SAVING,
        "_save _save_checkpoint _save_optimizer_and_scheduler _save_rng_state _save_scaler _get_output_dir "
        "_load_best_model _load_callback_state _load_from_checkpoint _load_optimizer_and_scheduler _load_rng_state "
        "_load_scaler",
    ),
    **_each("refused", _HUB, "_finish_current_push _push_from_checkpoint"),
    **_each("refused", _SEARCH, "hyperparameter_search _hp_search_setup _report_to_hp_search _tune_save_checkpoint"),
    **_each("refused", "the model card is create_model_card's: override that", "_paper _template_file"),
    **_each("hook", "", "_name _tag_names"),
}

_ATTRIBUTES: Mapping[str, Member] = {
    **_each("here", _OBJECT, "model model_wrapped processing_class callback_handler"),
    **_each("here", "the run decides it", "state control is_in_train"),
    **_each("here", _FACT, "accelerator"),
    **_each("here", "", "args train_dataset eval_dataset"),
    **_each("here", _ARGUMENT, "hub_model_id"),
    **_arguments("label_names router_aux_loss_coef neftune_noise_alpha"),
    **_constants(
        False,
        _HARDWARE,
        "is_deepspeed_enabled is_fsdp_enabled is_fsdp_xla_enabled is_fsdp_xla_v1_enabled is_fsdp_xla_v2_enabled "
        "is_model_parallel is_distributed_loading_by_transformers",
    ),
    **_constants(None, _HARDWARE, "deepspeed"),
    **_constants(True, _HARDWARE, "place_model_on_device"),
    **_constants(None, _SEARCH, "model_init hp_name hp_search_backend hp_space compute_objective objective"),
    **_constants(None, _LOSS, "compute_loss_func label_smoother neftune_hook_handle"),
    **_constants(False, _LOSS, "aux_loss_enabled"),
    **_constants(True, _LOSS, "can_return_loss model_accepts_loss_kwargs"),
    **_constants(None, _EVALUATION, "compute_metrics preprocess_logits_for_metrics"),
    **_constants(None, _OPTIMISER, "optimizer_cls_and_kwargs"),
    **_constants(None, _DATA, "data_collator"),
    **_constants(None, _HUB, "push_in_progress"),
    **_each("refused", _OPTIMISER, "optimizer lr_scheduler"),
    **_each("refused", _HUB, "commit_scheduler"),
    **_each(
        "refused", _LOOP, "current_flos current_gradient_accumulation_steps gather_function model_preparation_time"
    ),
}
"""What both of TRL's trainers have once they are made."""

_INNER: Mapping[str, Member] = {
    **_each(
        "refused",
        "a reward logs by log_metric, a callback or a subclass by log()",
        "_metrics _logs _pending_metrics _pending_extra_logs",
    ),
    **_each(
        "refused",
        "it is inner work of TRL's trainer, which is not here",
        "_async_tool_dicts _attn_mask_causal_checked _batch_environments _buffered_inputs _created_lr_scheduler "
        "_current_train_step_time _dist _entropy_bonus_enabled _entropy_window_stats _env_tools _environment_pool "
        "_eval_dataloaders _formatting_func _globalstep_last_logged _has_async_funcs _image_pad_token_id "
        "_initial_global_step _initial_num_input_tokens_seen _is_vision_dataset _is_vlm _last_loaded_step "
        "_last_world_entropy _loggers_initialized _loss_shifts_labels _memory_tracker _mixed_mesh_grads "
        "_multi_environment _signature_columns _skip_prepare_dataset _standalone_tools _step _sync_tool_dicts "
        "_tokenizer _total_loss_scalar _total_train_tokens _tp_size _tr_loss _train_batch_size _trial "
        "_video_pad_token_id",
    ),
}

_GRPO_ATTRIBUTES: Mapping[str, Member] = {
    **_each("here", "", "reward_funcs"),
    **_each("here", _FACT, "reward_func_names"),
    **_arguments(
        "beta chat_template_kwargs entropy_coef epsilon_high generation_kwargs importance_sampling_level "
        "log_completions log_multimodal log_unique_prompts loss_type mask_truncated_completions "
        "max_completion_length max_tool_calling_iterations min_p multi_objective_aggregation "
        "num_completions_to_print num_generations num_generations_eval num_iterations off_policy_mask_threshold "
        "pad_to_multiple_of repetition_penalty reward_weights scale_rewards shuffle_dataset temperature "
        "top_entropy_quantile top_k top_p use_adaptive_entropy use_transformers_continuous_batching use_vllm "
        "vllm_gpu_memory_utilization vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_mode vllm_tensor_parallel_size"
    ),
    "epsilon_low": Member("argument", _ARGUMENT, "epsilon"),
    "continuous_batching_config": Member("argument", _ARGUMENT, "transformers_continuous_batching_config"),
    **_constants(None, _TOOLS, "tools environments environment_factories rollout_func"),
    **_constants(None, _REWARDS, "reward_processing_classes async_loop async_loop_ready_event async_loop_thread"),
    **_each("refused", "the reference is the model before training, and moves by sync_ref_model", "ref_model"),
    **_each("refused", _SAMPLING, "generation_config vllm_generation"),
    **_each("refused", "it is processing_class.chat_template", "chat_template"),
    **_each("refused", "it is processing_class.eos_token_id", "eos_token_ids"),
}

_SFT_ATTRIBUTES: Mapping[str, Member] = {
    **_arguments("completion_only_loss padding_free"),
    **_each("refused", "activations are not offloaded", "maybe_activation_offload_context"),
    **_each("refused", "it is processing_class.chat_template", "chat_template"),
}

GRPO_MEMBERS: Mapping[str, Member] = {**_METHODS, **_ATTRIBUTES, **_INNER, **_GRPO_ATTRIBUTES}
SFT_MEMBERS: Mapping[str, Member] = {
    name: member
    for name, member in {**_METHODS, **_ATTRIBUTES, **_INNER, **_SFT_ATTRIBUTES}.items()
    if name != "generate_completions"
}
