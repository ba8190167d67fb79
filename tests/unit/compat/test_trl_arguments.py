"""Every argument of TRL's configs acts, is refused by name, or is answered; none is ignored."""

from __future__ import annotations

import dataclasses
import logging
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from groupwise.compat.trl import GRPOConfig, SFTConfig
from groupwise.compat.trl.reference import render_tables
from groupwise.compat.trl.settings import GRPO, SFT
from groupwise.compat.trl.translate import build_config, grpo_batch, grpo_values, sft_batch, sft_values
from groupwise.config import Config
from groupwise.config.loading import settings
from groupwise.errors import ConfigError

ROOT = Path(__file__).parents[3]
ROWS = 40


def config_of(**arguments: Any) -> Config:
    args = GRPOConfig(**arguments)
    return build_config(args, grpo_values(args, grpo_batch(args), num_rows=ROWS))


def sft_config_of(**arguments: Any) -> Config:
    args = SFTConfig(**arguments)
    return build_config(args, sft_values(args, sft_batch(args), num_rows=ROWS))


EVALUATES = {"eval_strategy": "steps", "eval_steps": 5}
ADAPTS = {"entropy_coef": 0.01, "use_adaptive_entropy": True}
SYNCS = {"beta": 0.1, "sync_ref_model": True}

ACTING: dict[str, tuple[Any, dict[str, Any]]] = {
    "output_dir": ("elsewhere", {}),
    "per_device_train_batch_size": (16, {}),
    "gradient_accumulation_steps": (4, {}),
    "num_train_epochs": (2.5, {}),
    "max_steps": (7, {}),
    "seed": (3, {}),
    "run_name": ("named", {}),
    "project": ("mine", {}),
    "report_to": (["tensorboard"], {}),
    "disable_tqdm": (True, {}),
    "save_strategy": ("no", {}),
    "save_steps": (9, {}),
    "save_total_limit": (3, {}),
    "groupwise": ({"rollout.kv_cache_gib": 2}, {}),
    "learning_rate": (3e-4, {}),
    "weight_decay": (0.1, {}),
    "adam_beta1": (0.8, {}),
    "adam_beta2": (0.99, {}),
    "adam_epsilon": (1e-7, {}),
    "max_grad_norm": (0.1, {}),
    "lr_scheduler_type": ("cosine", {}),
    "lr_scheduler_kwargs": ({"min_lr_rate": 0.1}, {"lr_scheduler_type": "cosine_with_min_lr"}),
    "warmup_ratio": (0.1, {}),
    "warmup_steps": (5, {}),
    "optim": ("muon", {}),
    "bf16": (True, {}),
    "fp16": (True, {}),
    "use_cpu": (True, {}),
    "no_cuda": (True, {}),
    "gradient_checkpointing": (True, {}),
    "eval_strategy": ("epoch", {}),
    "evaluation_strategy": ("epoch", {}),
    "eval_steps": (3, {"eval_strategy": "steps"}),
    "eval_on_start": (True, EVALUATES),
    "trust_remote_code": (True, {}),
    "num_generations": (4, {}),
    "num_generations_eval": (2, {}),
    "max_prompt_length": (256, {}),
    "max_completion_length": (64, {}),
    "generation_batch_size": (32, {}),
    "steps_per_generation": (4, {}),
    "temperature": (0.7, {}),
    "top_p": (0.9, {}),
    "top_k": (20, {}),
    "min_p": (0.1, {}),
    "repetition_penalty": (1.1, {}),
    "generation_kwargs": ({"min_p": 0.05}, {}),
    "vllm_sampling_params": ({"stop": ["\n"]}, {}),
    "chat_template_kwargs": ({"enable_thinking": False}, {}),
    "shuffle_dataset": (False, {}),
    "loss_type": ("dr_grpo", {}),
    "importance_sampling_level": ("sequence", {"loss_type": "grpo"}),
    "log_completions": (True, {}),
    "num_completions_to_print": (3, {"log_completions": True}),
    "beta": (0.04, {}),
    "num_iterations": (2, {}),
    "epsilon": (0.1, {}),
    "epsilon_high": (0.28, {}),
    "delta": (2.0, {}),
    "sapo_temperature_neg": (1.1, {"loss_type": "sapo"}),
    "sapo_temperature_pos": (1.2, {"loss_type": "sapo"}),
    "scale_rewards": (False, {}),
    "multi_objective_aggregation": ("normalize_then_sum", {}),
    "mask_truncated_completions": (True, {}),
    "sync_ref_model": (True, {"beta": 0.1}),
    "ref_model_sync_steps": (64, SYNCS),
    "ref_model_mixup_alpha": (0.9, SYNCS),
    "top_entropy_quantile": (0.2, {}),
    "entropy_coef": (0.01, {}),
    "use_adaptive_entropy": (True, {"entropy_coef": 0.01}),
    "entropy_target": (0.4, ADAPTS),
    "entropy_coef_min": (0.001, ADAPTS),
    "entropy_coef_max": (0.5, ADAPTS),
    "entropy_coef_delta": (0.01, ADAPTS),
    "off_policy_mask_threshold": (0.5, {}),
    "router_aux_loss_coef": (0.001, {}),
}
"""A value that is not TRL's default, and what else it needs."""

SEEN_ELSEWHERE = {
    *("logging_strategy", "logging_steps", "logging_first_step"),  # callbacks
    *("model_init_kwargs", "reward_weights", "data_seed", "dataset_text_field", "assistant_only_loss"),
    "chat_template_path",  # the trainer
    *("overwrite_output_dir", "resume_from_checkpoint", "disable_dropout"),
    *("hub_model_id", "hub_token", "hub_private_repo"),  # push_to_hub
}

SFT_ACTING: dict[str, Any] = {"max_length": 99, "max_seq_length": 77, "shuffle_dataset": False, "warmup_steps": 5}


def test_every_acting_argument_is_tried() -> None:
    acting = {name for table in (GRPO, SFT) for name, s in table.items() if s.kind in ("same", "acts")}
    assert acting == set(ACTING) | set(SFT_ACTING) | SEEN_ELSEWHERE


@pytest.mark.parametrize("name", ACTING)
def test_an_acting_argument_changes_the_config(name: str) -> None:
    value, others = ACTING[name]
    assert config_of(**others, **{name: value}) != config_of(**others)


@pytest.mark.parametrize("name", SFT_ACTING)
def test_an_acting_argument_of_supervised_training_changes_the_config(name: str) -> None:
    assert sft_config_of(**{name: SFT_ACTING[name]}) != sft_config_of()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in (GRPOConfig, SFTConfig)
        for name, setting in kind.SETTINGS.items()
        if setting.kind in ("refused", "hint")
    ],
)
def test_an_argument_that_cannot_act_is_refused_or_answered(
    kind: type[GRPOConfig], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    setting = kind.SETTINGS[name]
    strange = {bool: not setting.default, str: "strange"}.get(type(setting.default), 12345)
    if setting.says_nothing(strange):
        return
    if setting.kind == "refused":
        with pytest.raises(ConfigError, match=rf"{kind.__name__}\.{name} = .* is refused: "):
            kind(**{name: strange})
    else:
        kind(**{name: strange})
        assert f"{kind.__name__}.{name} = " in caplog.text
    caplog.clear()
    kind(**{name: setting.default})
    assert not caplog.text


def test_the_table_has_every_argument_of_trl() -> None:
    trl = pytest.importorskip("trl")
    decided_here = {"gradient_checkpointing", "project", "use_bias_correction_kl", "remove_unused_columns"}
    for theirs, table in ((trl.GRPOConfig, GRPO), (trl.SFTConfig, SFT)):
        fields = {field.name: field.default for field in dataclasses.fields(theirs)}
        assert not fields.keys() - table.keys()
        wrong = {
            name: default
            for name, default in fields.items()
            if default is not dataclasses.MISSING
            and not table[name].says_nothing(default.value if isinstance(default, Enum) else default)
        }
        assert not wrong.keys() - decided_here - {"shuffle_dataset"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_generation": 8}, "no argument 'num_generation'; did you mean num_generations"),
        ({"learning_rate": "fast"}, r"learning_rate = \"fast\": expected a number"),
        ({"bf16": None, "sync_ref_model": 1}, "sync_ref_model = 1: expected True or False"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type = 'polynomial' is not there; expected one of linear"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "expected min_lr_rate or min_lr"),
        ({"optim": "lion_8bit"}, "optim = 'lion_8bit' is not there; expected one of adamw"),
        ({"loss_type": "vespo"}, "loss_type = 'vespo' is not there"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "does not go with loss_type = 'cispo'"),
        ({"loss_type": "sapo", "epsilon": 0.1}, "epsilon has no effect with loss_type = 'sapo'"),
        ({"sapo_temperature_neg": 2.0}, "has no effect with loss_type = 'dapo'"),
        ({"delta": 1.1}, r"delta = 1.1: expected more than 1 \+ epsilon_high = 1.2"),
        ({"ref_model_sync_steps": 10}, "no effect without sync_ref_model"),
        ({"entropy_target": 0.3}, "no effect without use_adaptive_entropy"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch"}, "normalize_then_sum with"),
        ({"max_steps": 0}, "max_steps = 0"),
        ({"max_steps": 2.5}, "max_steps = 2.5: expected a whole number above 0, or None"),
        ({"max_prompt_length": 0}, r"data.max_prompt_tokens \(GRPOConfig.max_prompt_length\): got 0"),
        ({"logging_strategy": "often"}, "logging_strategy = 'often', logging_steps = 10; expected no, epoch, or steps"),
        ({"logging_steps": 1.5}, "logging_steps = 1.5; expected"),
        ({"num_completions_to_print": 3}, "no effect without log_completions"),
        ({"num_generations": 0}, "num_generations = 0: expected a whole number above 0"),
        ({"save_steps": 0}, "save_strategy"),
        ({"eval_strategy": "best"}, "eval_strategy = 'best'"),
        ({"data_seed": 1}, "data_seed = 1 and seed = 42"),
        ({"generation_batch_size": 12}, "no multiple of per_device_train_batch_size = 8"),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, "give one of them"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, "do not divide each other"),
        ({"learning_rate": -1.0}, r"optim.lr \(GRPOConfig.learning_rate\): got -1.0; expected a number above 0"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"groupwise": {"rollout.kv_cach_gib": 1}}, "there is no setting 'rollout.kv_cach_gib'; did you mean"),
        ({"report_to": "tensorbord"}, None),
    ],
)
def test_what_is_wrong_is_refused_in_trls_words(arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert "tensorboard" in config_of(**arguments).tracking.backends
        return
    with pytest.raises(ConfigError, match=message):
        config_of(**arguments)


def test_assignment_is_checked_and_acts() -> None:
    args = GRPOConfig("out")
    args.learning_rate = 1e-3
    assert build_config(args, grpo_values(args, grpo_batch(args), num_rows=ROWS)).optim.lr == 1e-3
    with pytest.raises(ConfigError, match="no argument 'learning_rat'"):
        args.learning_rat = 1.0
    with pytest.raises(ConfigError, match=r"deepspeed = .* is refused: one process"):
        args.deepspeed = "ds.json"
    assert repr(args) == "GRPOConfig(output_dir='out', learning_rate=0.001)"


@pytest.mark.parametrize(
    ("sizes", "prompts", "line"),
    [
        ((1, 4, 8), 1, "4 completions (per_device_train_batch_size = 1 x 4) become 1 prompts"),
        ((4, 2, 16), 1, "so 16 completions"),
        ((1, 1, 4), 1, "so 4 completions"),
        ((3, 4, 8), 2, "12 completions (per_device_train_batch_size = 3 x 4) become 2 prompts"),
        ((8, 4, 8), 4, ""),
    ],
)
def test_batches_are_whole_groups_and_a_line_says_so(
    sizes: tuple[int, int, int], prompts: int, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(
        **dict(
            zip(("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"), sizes, strict=True)
        )
    )
    assert (config.rollout.prompts_per_step, config.optim.steps_per_batch) == (prompts, 1)
    assert line in caplog.text
    assert bool(line) == bool(caplog.records)
    assert len(caplog.records) <= 1


def test_several_optimiser_steps_per_sampling() -> None:
    config = config_of(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        num_iterations=3,
        max_steps=25,
    )
    assert (config.rollout.prompts_per_step, config.optim.steps_per_batch, config.optim.passes_per_batch) == (8, 4, 3)
    assert config.train.steps == 3  # of 12 optimiser steps each


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {},
            {
                "name": "grpo",
                "normaliser": "token",
                "loss.clip_low": 0.2,
                "loss.clip_high": 0.2,
                "advantage.scale": "group",
            },
        ),
        ({"loss_type": "grpo"}, {"name": "grpo", "normaliser": "sequence"}),
        ({"loss_type": "bnpo"}, {"normaliser": "token"}),
        ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"normaliser": "constant", "advantage.scale": "none"}),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, {"loss.clip_low": 0.2, "loss.clip_high": 0.28}),
        (
            {"loss_type": "cispo", "epsilon_high": 5.0},
            {"name": "cispo", "loss.name": "cispo", "loss.clip_high": 4.0, "loss.clip_low": 1.0},
        ),
        ({"loss_type": "cispo"}, {"loss.name": "cispo", "loss.clip_high": 4.0}),
        ({"loss_type": "sapo"}, {"loss.name": "sapo", "normaliser": "sequence", "loss.temperature_negative": 1.05}),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
            {"loss.name": "gspo", "normaliser": "sequence", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4},
        ),
        ({"delta": 4.0}, {"loss.dual_clip": 4.0}),
        ({"beta": 0.04}, {"kl.coef": 0.04, "kl.place": "loss", "kl.estimator": "k3"}),
    ],
)
def test_losses(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    found = settings(config_of(**arguments))
    assert {name: found[f"algorithm.{name}"] for name in expected} == expected


def test_an_earlier_name_in_groupwise_lies_over_the_arguments() -> None:
    assert config_of(beta=0.1, groupwise={"algorithm.kl_coef": 0.2}).algorithm.kl.coef == 0.2
    with pytest.raises(
        ConfigError, match=r"GRPOConfig\.groupwise: algorithm\.kl_coef: it is algorithm\.kl\.coef today"
    ):
        config_of(groupwise={"algorithm.kl_coef": 0.2, "algorithm.kl.coef": 0.2})


def test_warm_up_and_savings_by_parts_of_the_run() -> None:
    assert config_of(warmup_steps=0.25).optim.warmup_ratio == 0.25
    assert config_of(warmup_steps=5, warmup_ratio=0.1).optim.warmup_steps == 5
    assert config_of(max_steps=50, save_steps=0.1).train.save_every == 5
    assert config_of(save_strategy="epoch").train.save_every == ROWS
    assert config_of(max_steps=None).train.steps is None
    assert config_of(save_total_limit=0).train.keep_checkpoints == config_of().train.keep_checkpoints


class SamplingParams:
    """With vLLM's attributes and defaults, as far as they matter here."""

    def __init__(self, **given: Any) -> None:
        numbers = {
            "n": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 16,
            "min_tokens": 0,
        }
        numbers |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
        lists = {"stop": [], "stop_token_ids": [], "bad_words": [], "seed": None}
        switches = {"ignore_eos": False, "include_stop_str_in_output": False, "skip_special_tokens": True}
        defaults = {**numbers, **lists, **switches, "output_text_buffer_length": 0}
        vars(self).update({**defaults, **given})


def test_sampling_parameters_of_vllm() -> None:
    params = SamplingParams(min_p=0.1, top_p=1.0, top_k=-1, seed=3407, stop=["<end>"], include_stop_str_in_output=True)
    config = config_of(vllm_sampling_params=params, temperature=0.9)
    rollout = config.rollout
    assert (rollout.temperature, rollout.min_p, rollout.top_p, rollout.top_k) == (0.9, 0.1, 1.0, 0)
    assert rollout.stop == ("<end>",)
    assert config.train.seed == 3407
    assert config_of(vllm_sampling_params=SamplingParams(top_p=0.9), top_p=0.9).rollout.top_p == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vllm_sampling_params": SamplingParams(seed=1), "seed": 2}, "train.seed = 1, and another argument for 2"),
        ({"vllm_sampling_params": SamplingParams(top_p=0.9), "top_p": 0.8}, "rollout.top_p = 0.9"),
        ({"vllm_sampling_params": SamplingParams(presence_penalty=0.5)}, "presence_penalty = 0.5 cannot act"),
        ({"vllm_sampling_params": SamplingParams(n=4)}, "set num_generations"),
        ({"vllm_sampling_params": SamplingParams(stop=["x"])}, "include_stop_str_in_output = false cannot act"),
        ({"vllm_sampling_params": 7}, "got a int; expected vLLM's SamplingParams"),
        ({"generation_kwargs": {"num_beams": 4}}, "generation_kwargs: num_beams = 4 cannot act"),
        ({"generation_kwargs": {"max_new_tokens": 4}}, "set max_completion_length"),
        ({"top_p": 1.5}, r"rollout.top_p \(GRPOConfig.top_p\)"),
    ],
)
def test_sampling_that_cannot_act_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**arguments)


def test_evaluation_samples_as_trl_does() -> None:
    config = config_of(eval_strategy="steps", temperature=0.8, top_p=0.9, logging_steps=4)
    assert (config.eval.every, config.eval.samples, config.eval.temperature, config.eval.top_p) == (4, 8, 0.8, 0.9)
    assert not config.eval.at_start


def test_eight_bits_without_bitsandbytes_are_a_sentence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groupwise.compat.trl.translate.find_spec", lambda name: None)
    assert config_of(optim="adamw_8bit").optim.name == "adamw"
    assert "bitsandbytes is not installed" in caplog.text


def test_trackers_that_are_not_there_are_a_sentence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config_of(report_to="none").tracking.backends == ("console", "jsonl")
    assert config_of(report_to=["clearml"]).tracking.backends == ("console", "jsonl", "tensorboard")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "clearml is no tracker; there are console" in caplog.text
    monkeypatch.setattr("groupwise.compat.trl.translate.find_spec", lambda name: None)
    assert "tensorboard" in config_of(report_to="wandb").tracking.backends
    assert "wandb is not installed" in caplog.text
    monkeypatch.setattr("groupwise.compat.trl.translate.find_spec", lambda name: object())
    assert config_of(report_to="wandb").tracking.backends == ("console", "jsonl", "wandb")


def test_supervised_lengths() -> None:
    config = sft_config_of(per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2)
    assert (config.sft.rows_per_step, config.sft.max_tokens, config.train.epochs) == (6, 1024, 2)
    assert sft_config_of(max_length=None).sft.max_tokens > 1e6
    with pytest.raises(ConfigError, match="supervised training evaluates nothing"):
        sft_config_of(eval_strategy="steps")


def test_the_page_has_the_tables() -> None:
    page = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    assert render_tables() in page, (
        "write the output of `python -m groupwise.compat.trl.reference` into docs/migrate.md"
    )
