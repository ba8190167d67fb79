"""SFTTrainer in TRL's words, and the example program with both trainers."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from groupwise.compat.trl import SFTConfig, SFTTrainer
from groupwise.errors import ConfigError

ROOT = Path(__file__).parents[2]
WORDS = ("red", "green", "blue", "one", "two", "three")

TEXTS = [{"text": f"say {word}: {word}", "other": 1} for word in WORDS]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {word}:"}, {"role": "assistant", "content": word}]}
    for word in WORDS
]
PAIRS = [{"prompt": f"say {word}:", "completion": word} for word in WORDS]


@pytest.mark.parametrize(
    ("rows", "arguments", "options"),
    [
        (TEXTS, {"dataset_text_field": "text"}, {}),
        (CHATS, {}, {}),
        (CHATS, {"assistant_only_loss": True}, {}),
        (PAIRS, {}, {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}),
        (PAIRS, {}, {"formatting_func": lambda row: row["prompt"] + row["completion"]}),
    ],
)
def test_supervised_training_lowers_the_loss(
    rows: list[Any], arguments: dict[str, Any], options: dict[str, Any], task: Any, tmp_path: Path
) -> None:
    args = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        warmup_steps=2,
        num_train_epochs=6,
        learning_rate=2e-2,
        logging_steps=1,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        disable_tqdm=True,
        **arguments,
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(task.model), AutoTokenizer.from_pretrained(task.model)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=Dataset.from_list(rows), args=args, **options)
    output = trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6 == output.global_step
    assert losses[-1] < 0.8 * losses[0]
    assert math.isclose(output.training_loss, sum(losses) / 6)
    assert trainer.state.epoch == 6.0
    assert trainer.model.generate(**tokenizer("say", return_tensors="pt"), max_new_tokens=2).shape[1] >= 2


def test_a_callback_ends_supervised_training(task: Any, tmp_path: Path) -> None:
    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> Any:
            control.should_training_stop = state.global_step == 2
            return control

    args = SFTConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=9, disable_tqdm=True)
    trainer = SFTTrainer(str(task.model), args, train_dataset=TEXTS, callbacks=[Enough()])
    assert trainer.train().global_step == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "run" / "checkpoints" / "step_000002").is_dir()


def test_what_supervised_training_cannot_take_is_a_sentence(task: Any, tmp_path: Path) -> None:
    args = SFTConfig(str(tmp_path), dataset_text_field="txt")
    with pytest.raises(ConfigError, match="dataset_text_field = 'txt': the rows have text, other"):
        SFTTrainer(str(task.model), args, train_dataset=TEXTS)
    with pytest.raises(ConfigError, match="eval_dataset is refused"):
        SFTTrainer(str(task.model), train_dataset=TEXTS, eval_dataset=TEXTS)
    with pytest.raises(ConfigError, match="got no train_dataset"):
        SFTTrainer(str(task.model))
    with pytest.raises(ConfigError, match="data_collator is refused"):
        SFTTrainer(str(task.model), train_dataset=TEXTS, data_collator=print)


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_grpo", ROOT / "examples" / "trl_grpo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    rewards = example().main(["--tiny", "--steps", "1", "--warm-up-steps", "2", "--output", str(tmp_path)])
    assert [len(stage) for stage in rewards] == [1, 1]
    assert {"adapter", "form", "sums", "production", "warm-up", "model"} <= {entry.name for entry in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_reward_of_the_example_rises(tmp_path: Path) -> None:
    form, sums = example().main(["--tiny", "--output", str(tmp_path)])
    assert [len(form), len(sums)] == [7, 30]
    assert sum(form[-2:]) / 2 > sum(form[:2]) / 2 + 0.4
    assert sum(sums[-10:]) / 10 > sum(sums[:3]) / 3
