"""Programs in TRL's words train for real: models of every kind, callbacks, evaluation, resuming, saving."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM as TransformersModel
from transformers import AutoTokenizer, TrainerCallback

from groupwise.compat.trl import AutoModelForCausalLM, GRPOConfig, GRPOTrainer
from groupwise.errors import ConfigError

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"say {word}:", "answer": word} for word in ("red", "green", "blue", "one", "two", "three")]
SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 2,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def low(completion_ids: Any, **columns: Any) -> list[float]:
    """The share of tokens in the lower half of the vocabulary."""
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


def lora(**settings: Any) -> peft.LoraConfig:
    shape = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**shape, **settings})


def trainer_of(
    model: Any, output: Path, *, rewards: Any = None, callbacks: Any = None, **arguments: Any
) -> GRPOTrainer:
    options = {name: arguments.pop(name) for name in ("peft_config", "eval_dataset") if name in arguments}
    return GRPOTrainer(
        model,
        rewards or [low],
        GRPOConfig(str(output), **{**SMALL, **arguments}),
        Dataset.from_list(ROWS),
        callbacks=callbacks,
        **options,
    )


def module_of(task: Any) -> Any:
    return TransformersModel.from_pretrained(task.model)


def make_model(kind: str, task: Any) -> Any:
    if kind == "folder":
        return str(task.model)
    model = module_of(task)
    if kind == "peft around it":
        return peft.get_peft_model(model, lora())
    if kind == "peft in it":
        model.add_adapter(lora())
    return model


@pytest.mark.parametrize("kind", ["folder", "module", "peft_config", "peft around it", "peft in it"])
def test_a_model_of_each_kind_is_trained_in_place_and_stays_a_model(kind: str, task: Any, tmp_path: Path) -> None:
    model = make_model(kind, task)
    adapter = {"peft_config": lora()} if kind == "peft_config" else {}
    trainer = trainer_of(model, tmp_path / "out", beta=0.05, **adapter)
    if kind not in ("folder", "peft_config"):
        assert trainer.model is model
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    output = trainer.train()
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert moved
    adapted = kind not in ("folder", "module")
    assert all(("lora_" in name) == adapted for name in moved)
    assert output.global_step == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["sampling/sampling_logp_difference/max"] == 0.0

    # What transformers and peft do with it afterwards.
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    asked = tokenizer("say red:", return_tensors="pt")
    said = trainer.model.generate(**asked, max_new_tokens=3, do_sample=False)
    trainer.save_model(tmp_path / "saved")
    again = TransformersModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(**asked, max_new_tokens=3, do_sample=False), said)  # pyright: ignore[reportAttributeAccessIssue]
    if kind in ("peft_config", "peft around it"):
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert (tmp_path / "merged" / "model.safetensors").is_file()
        assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_the_log_has_trls_keys(task: Any, tmp_path: Path) -> None:
    trainer = trainer_of(str(task.model), tmp_path, beta=0.1, logging_steps=2, max_steps=5, logging_first_step=True)
    trainer.train()
    history = trainer.state.log_history
    assert [row["step"] for row in history] == [1, 2, 4, 5]
    assert {
        *("loss", "reward", "reward_std", "rewards/low/mean", "rewards/low/std", "frac_reward_zero_std", "kl"),
        *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "learning_rate", "grad_norm"),
        *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "epoch", "step_time"),
    } <= history[1].keys()
    assert {"train_runtime", "train_loss", "train_steps_per_second"} <= history[-1].keys()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert history[2]["reward"] == pytest.approx((rows[2]["reward"] + rows[3]["reward"]) / 2)
    assert history[2]["learning_rate"] == rows[3]["learning_rate"]
    assert history[2]["epoch"] == pytest.approx(4 * 2 / len(ROWS), abs=1e-3)


class Recorder(TrainerCallback):
    def __init__(self, stop_after: int = 99) -> None:
        self.events: list[tuple[str, int]] = []
        self.stop_after = stop_after

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        assert args.num_generations == 4
        assert objects["model"] is not None
        self.events.append(("begin", state.max_steps))

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.events.append(("step begins", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.events.append(("step", state.global_step))
        control.should_training_stop = control.should_training_stop or state.global_step >= self.stop_after

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> None:
        self.events.append(("log", state.global_step))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **objects: Any) -> None:
        assert 0 <= metrics["eval_rewards/low/mean"] <= 1
        self.events.append(("evaluate", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        assert Path(args.output_dir, "run", "checkpoints", f"step_{state.global_step:06d}").is_dir()
        self.events.append(("save", state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.events.append(("end", state.global_step))


def test_callbacks_hear_what_happens_and_may_end_the_run(task: Any, tmp_path: Path) -> None:
    recorder = Recorder(stop_after=3)
    settings = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 8}
    trainer = trainer_of(
        str(task.model), tmp_path, callbacks=[recorder], logging_steps=3, eval_dataset=ROWS[:2], **settings
    )
    assert trainer.train().global_step == 3
    assert recorder.events == [
        *[("log", 0), ("evaluate", 0), ("begin", 8), ("step begins", 0), ("step", 1), ("step begins", 1), ("step", 2)],
        *[("log", 2), ("evaluate", 2), ("save", 2), ("step begins", 2), ("step", 3), ("log", 3), ("save", 3)],
        *[("log", 3), ("end", 3)],
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_an_error_in_a_callback_ends_the_run_as_it_is(task: Any, tmp_path: Path) -> None:
    class Wrong(TrainerCallback):
        def on_step_end(self, *args: Any, **objects: Any) -> None:
            raise ZeroDivisionError("mine")

    model = module_of(task)
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer_of(model, tmp_path, callbacks=[Wrong]).train()
    assert model.config._attn_implementation != "groupwise"


def test_a_resumed_run_is_the_run(task: Any, tmp_path: Path) -> None:
    whole = trainer_of(str(task.model), tmp_path / "whole", max_steps=4, lr_scheduler_type="constant")
    whole.train()
    first = trainer_of(str(task.model), tmp_path / "cut", max_steps=2, lr_scheduler_type="constant")
    first.train()
    second = trainer_of(str(task.model), tmp_path / "cut", max_steps=4, lr_scheduler_type="constant")
    assert second.train(resume_from_checkpoint=True).global_step == 4
    assert [row["step"] for row in second.state.log_history] == [1, 2, 3, 4, 4]
    for name, value in second.model.named_parameters():
        assert torch.equal(value, dict(whole.model.named_parameters())[name]), name
    with pytest.raises(ConfigError, match="expected True or a checkpoint of output_dir"):
        second.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


def test_stages_on_one_model_in_bfloat16(task: Any, tmp_path: Path) -> None:
    """Each run leaves nothing on the weights that would meet the next one."""
    model = module_of(task)
    seen: list[torch.Tensor] = []
    for stage in ("one", "two"):
        trainer = trainer_of(model, tmp_path / stage, bf16=True, num_iterations=2)
        trainer.train()
        assert model.dtype == torch.bfloat16
        assert trainer.state.global_step == 2
        assert all(
            parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters()
        )
        seen.append(model.get_input_embeddings().weight.detach().clone())
    assert not torch.equal(*seen)


def test_rewards_get_what_trl_gives_them(task: Any, tmp_path: Path) -> None:
    steps: list[int] = []

    async def waits(completions: Any, answer: Any, trainer_state: Any, log_metric: Any, **columns: Any) -> list[Any]:
        await asyncio.sleep(0)
        steps.append(trainer_state.global_step)
        log_metric("answers", float(len(completions)))
        return [None if word == "red" else 1.0 for word in answer]

    def talks(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        assert prompts[0][-1]["role"] == "user"
        return [float(len(completion[0]["content"])) for completion in completions]

    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
    trainer = GRPOTrainer(
        str(task.model),
        [waits, talks, "exact_match"],
        GRPOConfig(str(tmp_path), **SMALL, reward_weights=[1.0, 0.5, 0.1]),
        chats,
        processing_class=AutoTokenizer.from_pretrained(task.model),
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert {"rewards/waits/mean", "rewards/talks/mean", "rewards/exact_match/mean"} <= first.keys()
    assert first["answers"] == 4.0
    assert set(steps) == {0, 1}
    assert trainer.config.reward[0].weight == 0.1


def test_evaluation_and_completions_without_training(task: Any, tmp_path: Path) -> None:
    trainer = trainer_of(str(task.model), tmp_path, num_generations_eval=2, eval_dataset=Dataset.from_list(ROWS[:3]))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    found = trainer.evaluate()
    assert found["eval_reward"] == found["eval_rewards/low/mean"]
    assert trainer.state.log_history[-1]["eval_reward"] == found["eval_reward"]
    assert "test_reward" in trainer.evaluate(ROWS[3:], metric_key_prefix="test")
    groups = trainer.generate_completions(trainer.train_dataset[:2])
    assert [group.prompt.text for group in groups] == [row["prompt"] for row in ROWS[:2]]
    assert all(len(group.rollouts) == 4 for group in groups)
    assert groups[0].rollouts[0].rewards["low"] == groups[0].rollouts[0].reward
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert not (tmp_path / "run").exists()


def test_rows_in_every_form_that_a_data_set_gives(task: Any, tmp_path: Path) -> None:
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}], "tags": ["a"]} for row in ROWS])
    plain = Dataset.from_list(ROWS)
    trainer = trainer_of(str(task.model), tmp_path)
    for rows, count in ((plain[0], 1), (plain[:2], 2), (chats[0], 1), (chats[:3], 3), (plain.select([1]), 1)):
        assert len(trainer.generate_completions(rows)) == count
    for wrong in ({"a": ROWS, "b": ROWS}, {"train": plain}):
        with pytest.raises(ConfigError, match=r"got several data sets, .*; give one of them"):
            trainer.evaluate(wrong)
        with pytest.raises(ConfigError, match="got several data sets"):
            trainer_of("never/loaded", tmp_path, eval_dataset=wrong)
    with pytest.raises(ConfigError, match="ignore_keys = "):
        trainer.evaluate(plain, ["hidden_states"])  # pyright: ignore[reportArgumentType]


def test_functions_that_take_all_columns_get_what_trl_adds(
    task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def logs(completions: Any, **columns: Any) -> list[float]:
        columns["log_metric"]("seen", columns["trainer_state"].global_step)
        columns["log_extra"]("note", ["x"] * len(completions))
        return [1.0] * len(completions)

    trainer = trainer_of(str(task.model), tmp_path, rewards=[logs], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["seen"] == 0
    assert trainer.state.log_history[0]["rewards/logs/mean"] == 1
    assert "log_extra('note', …) changes nothing here" in caplog.text


def test_in_a_notebook(task: Any, tmp_path: Path) -> None:
    """Whose cells run inside of an event loop."""

    async def cell() -> int:
        trainer = trainer_of(str(task.model), tmp_path)
        assert trainer.evaluate(ROWS[:1])["eval_reward"] >= 0
        return trainer.train().global_step

    assert asyncio.run(cell()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_funcs": []}, "got no reward_funcs"),
        ({"reward_funcs": ["no_such_reward"]}, "no_such_reward"),
        ({"reward_funcs": [torch.nn.Linear(1, 1)]}, "got a Linear; .* A reward model is called in a function"),
        ({"train_dataset": None}, "got no train_dataset"),
        ({"train_dataset": {"train": ROWS}}, "one mapping with the keys train"),
        ({"train_dataset": []}, "has no rows"),
        ({"tools": [print]}, "tools is refused: there are no tools"),
        ({"optimizers": (object(), None)}, "optimizers is refused: name one by optim"),
        ({"processor": 1}, "GRPOTrainer has no argument 'processor'"),
        ({"peft_config": {"r": 4}}, "got a dict; expected a peft.LoraConfig"),
        ({"peft_config": lora(use_dora=True)}, "use_dora = True is more than plain LoRA"),
        ({"peft_config": lora(target_modules=["nothing"])}, "peft_config: Target modules"),
        ({"model": 7}, "model: got a int; expected a name, a folder or a transformers model"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"args": GRPOConfig(**{**SMALL, "num_generations": 1})}, "rollout.group_size is GRPOConfig.num_generations"),
        (
            {"args": GRPOConfig(**SMALL, eval_strategy="steps")},
            "eval_strategy has nothing to evaluate; give",
        ),
        ({"args": GRPOConfig(**SMALL, reward_weights=[1.0, 2.0])}, "got 2 for 1 reward functions"),
        ({"args": GRPOConfig(**SMALL, model_init_kwargs={"revision": "x"})}, 'revision = "x" is not taken'),
    ],
)
def test_what_a_trainer_cannot_take_is_a_sentence(options: dict[str, Any], message: str, task: Any) -> None:
    given = {"model": str(task.model), "reward_funcs": [low], "args": GRPOConfig(**SMALL), "train_dataset": ROWS}
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(**{**given, **options})


def test_two_adapters_are_refused(task: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(module_of(task), lora())
    with pytest.raises(ConfigError, match="has an adapter already"):
        trainer_of(model, tmp_path, peft_config=lora())
    model.add_adapter("other", lora())
    with pytest.raises(ConfigError, match="the adapters default, other; expected one"):
        trainer_of(model, tmp_path)


def test_hardware_that_is_not_there_is_a_sentence(task: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(task.model), torch_dtype=torch.float16, attn_implementation="flash_attention_2", device_map="balanced"
    )
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "sdpa")
    for said in ("dtype = float16", "attn_implementation = 'flash_attention_2'", "device_map = 'balanced'"):
        assert said in caplog.text
    assert len(caplog.records) == 3
    with pytest.raises(ConfigError, match="dtype = 'float7': expected"):
        AutoModelForCausalLM.from_pretrained(str(task.model), dtype="float7")
    with pytest.raises(ConfigError, match="load_in_8bit"):
        AutoModelForCausalLM.from_pretrained(str(task.model), quantization_config={"load_in_8bit": True})


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_four_bits_without_bitsandbytes_are_a_sentence(task: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert AutoModelForCausalLM.from_pretrained(str(task.model), load_in_4bit=True).dtype == torch.float32
    assert "bitsandbytes is not installed" in caplog.text


def test_a_model_without_a_name_is_trained_from_a_list_of_rows(task: Any, tmp_path: Path) -> None:
    """The arguments are read again when training begins, where the rows are a list; the model is the program's."""
    model = TransformersModel.from_pretrained(task.model)
    model.config._name_or_path = model.name_or_path = ""
    args = GRPOConfig(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        use_cpu=True,
        report_to="none",
    )
    rows = [{"prompt": "blue"}, {"prompt": "red"}]
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    trainer = GRPOTrainer(model, low, args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().global_step == 2
