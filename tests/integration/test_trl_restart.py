"""Restarts and reruns: checkpoints lie where transformers looks for them, and nothing that a run wrote is lost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from groupwise.compat.trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from groupwise.errors import CheckpointError, ConfigError

ROWS = [{"prompt": f"say {word}:", "answer": word} for word in ("red", "green", "blue", "one", "two", "three")]
SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def low(completion_ids: Any, **columns: Any) -> list[float]:
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


def trainer_of(task: Any, output: Path, steps: int, *, model: Any = None, **given: Any) -> GRPOTrainer:
    options = {name: given.pop(name) for name in ("callbacks", "peft_config") if name in given}
    args = GRPOConfig(str(output), max_steps=steps, **{**SMALL, **given})
    return GRPOTrainer(model or str(task.model), low, args, ROWS, **options)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Steps(TrainerCallback):
    """Which steps were done, and after which something is to happen."""

    def __init__(self, *, at: int = 0, act: Callable[[], Any] = lambda: None) -> None:
        self.at, self.act = at, act
        self.done: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.done.append(state.global_step)
        if state.global_step == self.at:
            self.act()


@pytest.fixture(scope="module")
def whole(task: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run of four steps that nothing disturbed."""
    trainer = trainer_of(task, tmp_path_factory.mktemp("whole"), 4)
    trainer.train()
    return weights(trainer.model)


def test_the_usual_restart_goes_on_from_the_last_checkpoint(
    whole: dict[str, torch.Tensor], task: Any, tmp_path: Path
) -> None:
    assert trainer_of(task, tmp_path, 2).train(resume_from_checkpoint=get_last_checkpoint(tmp_path)).global_step == 2
    found = get_last_checkpoint(tmp_path)
    assert found == str(tmp_path / "checkpoint-2")
    steps = Steps()
    again = trainer_of(task, tmp_path, 4, callbacks=[steps])
    again.train(resume_from_checkpoint=found)
    assert steps.done == [3, 4]
    assert same(weights(again.model), whole)
    assert [row["step"] for row in again.state.log_history] == [1, 2, 3, 4, 4]  # TRL's, too, begins at the first step
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_checkpoint_is_a_model_with_its_state(task: Any, tmp_path: Path) -> None:
    trainer = trainer_of(task, tmp_path, 2, num_iterations=2)  # two of TRL's steps in one of ours
    trainer.train()
    place = tmp_path / "checkpoint-2"
    assert same(weights(AutoModelForCausalLM.from_pretrained(place)), weights(trainer.model))
    assert AutoTokenizer.from_pretrained(place).decode(trainer.processing_class.encode("red")) == "red"
    state = TrainerState.load_from_json(str(place / "trainer_state.json"))
    assert (state.global_step, state.max_steps) == (2, 2)
    assert json.loads((place / "training_args.json").read_text())["num_iterations"] == 2
    assert trainer_of(task, tmp_path, 4, num_iterations=2).train(resume_from_checkpoint=place).global_step == 4


def test_a_checkpoint_with_an_adapter_is_the_adapter(task: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trainer_of(task, tmp_path, 2, peft_config=config)
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(task.model)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-2")
    assert same(weights(again), weights(trainer.model))
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_an_older_checkpoint_that_is_named_is_gone_on_from(
    whole: dict[str, torch.Tensor], task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(task, tmp_path, 3).train()
    steps = Steps()
    again = trainer_of(task, tmp_path, 4, callbacks=[steps])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "steps 2 to 3 are forgotten" in caplog.text
    assert steps.done == [2, 3, 4]
    assert same(weights(again.model), whole)
    assert [row["step"] for row in again.state.log_history] == [1, 2, 3, 4, 4]
    ledger = [json.loads(line)["step"] for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert sorted(set(ledger)) == [1, 2, 3, 4]


@pytest.mark.parametrize("lost", ["its model folder", "its state", "both of the newest"])
def test_either_half_of_a_checkpoint_is_enough(
    lost: str, whole: dict[str, torch.Tensor], task: Any, tmp_path: Path
) -> None:
    """A kill between the two, or a prune of one of them, is harmless."""
    trainer_of(task, tmp_path, 2).train()
    if lost != "its state":
        shutil.rmtree(tmp_path / "checkpoint-2")
    if lost != "its model folder":
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000002")
    steps = Steps()
    again = trainer_of(task, tmp_path, 4, callbacks=[steps])
    last = get_last_checkpoint(tmp_path)
    again.train(resume_from_checkpoint=True if lost == "its model folder" else last)
    assert steps.done == ([2, 3, 4] if lost == "both of the newest" else [3, 4])
    assert same(weights(again.model), whole)


def test_as_many_checkpoints_are_kept_as_asked(task: Any, tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-x"
    foreign.mkdir()
    (tmp_path / ".checkpoint-1.old").mkdir()  # of a kill while it was removed
    trainer_of(task, tmp_path, 4, save_total_limit=2).train()
    assert not (tmp_path / ".checkpoint-1.old").exists()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4", foreign.name]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        "step_000003",
        "step_000004",
    ]


def test_a_rerun_keeps_the_earlier_run(
    whole: dict[str, torch.Tensor], task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(task, tmp_path, 2)
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", {"a": 1})
    (tmp_path / "mine.txt").write_text("kept")
    first = contents(tmp_path)
    trainer = trainer_of(task, tmp_path, 1, learning_rate=1e-2)  # another run
    trainer.train()
    assert "what an earlier run left is now in" in caplog.text
    trainer.save_model()
    trainer.save_metrics("train", {"a": 2})
    kept = contents(tmp_path / "earlier-1")
    assert all(kept.get(name) == content for name, content in first.items() if name != "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert [row["step"] for row in trainer.state.log_history] == [1, 1]
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), weights(trainer.model))
    # What was moved aside is a run that goes on.
    again = trainer_of(task, tmp_path / "earlier-1", 4)
    again.train(resume_from_checkpoint=get_last_checkpoint(tmp_path / "earlier-1"))
    assert same(weights(again.model), whole)


def test_a_trainer_that_trains_twice_keeps_its_first_run(task: Any, tmp_path: Path) -> None:
    trainer = trainer_of(task, tmp_path, 1)
    trainer.train()
    first = contents(tmp_path)
    trainer.train(resume_from_checkpoint=False)
    assert contents(tmp_path / "earlier-1") == first
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("earlier-*")) == ["earlier-1", "earlier-2"]


def test_a_rerun_that_asks_for_it_replaces(task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(task, tmp_path, 2).train()
    (tmp_path / "mine.txt").write_text("kept")
    trainer_of(task, tmp_path, 1, overwrite_output_dir=True).train()
    assert "deleted, as the program asks: checkpoint-1, checkpoint-2, run" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "mine.txt", "run"]


def test_checkpoints_that_cannot_be_gone_on_from_are_a_sentence(task: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_steps": 1}
    with pytest.raises(ConfigError, match="resume_from_checkpoint = True: there is no checkpoint in"):
        trainer_of(task, tmp_path, 1, **settings).train(resume_from_checkpoint=True)
    trainer_of(task, tmp_path, 2, **settings).train()
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ConfigError, match="no run of Groupwise wrote it"):
        trainer_of(task, tmp_path, 2).train(resume_from_checkpoint=tmp_path / "checkpoint-7")
    for place in (tmp_path / "checkpoint-3", 3, tmp_path.parent):
        with pytest.raises(ConfigError, match=r"expected True or a checkpoint of output_dir = .*checkpoint-1', '"):
            trainer_of(task, tmp_path, 2).train(resume_from_checkpoint=place)  # pyright: ignore[reportArgumentType]
    run = tmp_path / "run"
    for place in (run / "checkpoints" / "step_000002", str(run / "checkpoints"), run, str(tmp_path), True):
        assert trainer_of(task, tmp_path, 2).train(resume_from_checkpoint=place).global_step == 2
    asked = trainer_of(task, tmp_path, 2, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert asked.train().global_step == 2
    assert not list(tmp_path.glob("earlier-*"))


def test_a_disk_without_room_is_a_sentence(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    trainer = trainer_of(task, tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "save_pretrained", full)
        with pytest.raises(CheckpointError, match=r"checkpoint-1 cannot be written: .*model.safetensors"):
            trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    steps = Steps()
    trainer_of(task, tmp_path, 2, callbacks=[steps]).train(resume_from_checkpoint=True)
    assert steps.done == [2]


def test_ctrl_c_leaves_the_trained_model_and_a_checkpoint(
    whole: dict[str, torch.Tensor], task: Any, tmp_path: Path
) -> None:
    stop = Steps(at=2, act=lambda: os.kill(os.getpid(), signal.SIGINT))
    trainer = trainer_of(task, tmp_path / "out", 4, callbacks=[stop], save_strategy="no")
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2"):
        trainer.train()
    assert (trainer.state.global_step, trainer.is_in_train) == (2, False)
    last = get_last_checkpoint(tmp_path / "out")
    assert last == str(tmp_path / "out" / "checkpoint-2")
    trained = weights(trainer.model)
    trainer.save_model(tmp_path / "saved")
    for place in (last, tmp_path / "saved"):
        assert same(weights(AutoModelForCausalLM.from_pretrained(place)), trained)  # pyright: ignore[reportArgumentType]
    again = trainer_of(task, tmp_path / "out", 4)
    again.train(resume_from_checkpoint=last)
    assert same(weights(again.model), whole)


def test_saving_over_another_model_moves_that_aside(
    task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "model"
    shutil.copytree(task.model, place)
    (place / "notes.txt").write_text("kept")
    before = contents(place)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trainer_of(task, tmp_path / "out", 1, model=str(place), peft_config=config)
    trainer.save_model(place)
    assert not (place / "model.safetensors").exists()
    assert (place / "adapter_model.safetensors").is_file()
    after = contents(place)
    for name, content in before.items():
        assert content in (after.get(name), after.get(f"earlier-1/{name}")), name
    assert "what an earlier run left is now in" in caplog.text
    trainer.save_model(place)  # its own save
    assert not (place / "earlier-2").exists()


def test_supervised_runs_are_kept_and_gone_on_from(task: Any, tmp_path: Path) -> None:
    def supervised(output: Path, steps: int) -> SFTTrainer:
        args = SFTConfig(str(output), max_steps=steps, per_device_train_batch_size=2, save_steps=1, use_cpu=True)
        args.lr_scheduler_type = "constant"
        return SFTTrainer(str(task.model), args, train_dataset=[{"text": f"say {k}"} for k in range(6)])

    straight = supervised(tmp_path / "whole", 3)
    straight.train()
    supervised(tmp_path / "cut", 2).train()
    first = contents(tmp_path / "cut")
    again = supervised(tmp_path / "cut", 3)
    assert again.train(get_last_checkpoint(tmp_path / "cut")).global_step == 3
    assert same(weights(again.model), weights(straight.model))
    supervised(tmp_path / "cut", 1).train()
    kept = contents(tmp_path / "cut" / "earlier-1")
    assert {name for name in first if name.startswith("checkpoint-")} <= kept.keys()
    assert "run/checkpoints/step_000003/manifest.json" in kept


def test_hooks_are_called_where_transformers_calls_them(task: Any, tmp_path: Path) -> None:
    class Mine(GRPOTrainer):
        saved: list[str]

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log({**logs, "mine": 7.0})

        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            super().save_model(output_dir, _internal_call)
            (Path(output_dir) / "mine.txt").write_text(str(_internal_call))

    args = GRPOConfig(str(tmp_path), max_steps=2, **SMALL)
    trainer = Mine(str(task.model), low, args, ROWS)
    trainer.train()
    assert [row["mine"] for row in trainer.state.log_history] == [7.0, 7.0, 7.0]
    assert (tmp_path / "checkpoint-1" / "mine.txt").read_text() == "True"
    trainer.log({"later": 1.0})
    assert trainer.state.log_history[-1]["later"] == 1.0


def test_arguments_that_change_between_runs_act(task: Any, tmp_path: Path) -> None:
    change = Steps(at=1)
    trainer = trainer_of(task, tmp_path / "one", 1, callbacks=[change])
    trainer.train()
    trainer.args.output_dir, trainer.args.max_steps = str(tmp_path / "two"), 3
    trainer.reward_funcs = [low, low]
    assert trainer.train().global_step == 3
    assert get_last_checkpoint(tmp_path / "two") == str(tmp_path / "two" / "checkpoint-3")
    assert {"rewards/low/mean"} < {key for key in trainer.state.log_history[0] if key.startswith("rewards/")}
    trainer.args.max_steps = 1
    change.act = lambda: setattr(trainer.args, "learning_rate", 1.0)
    with pytest.raises(ConfigError, match="learning_rate cannot change while a run is going on"):
        trainer.train()
    change.act = lambda: setattr(trainer, "train_dataset", ROWS)
    with pytest.raises(ConfigError, match="train_dataset cannot be set while a run is going on"):
        trainer.train()


def test_a_programs_own_objects_are_as_they_were(task: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_dropout=0.5, task_type="CAUSAL_LM")
    described = dict(vars(config))
    rows = [dict(row) for row in ROWS]
    model = AutoModelForCausalLM.from_pretrained(task.model).train()
    model.config.use_cache = True
    args = GRPOConfig(str(tmp_path), max_steps=1, disable_dropout=True, **SMALL)
    given = args.to_dict()
    place, level = Path.cwd(), logging.getLogger().level
    attention, modes = model.config._attn_implementation, {name: part.training for name, part in model.named_modules()}
    trainer = GRPOTrainer(model, low, args, rows, peft_config=config)
    assert trainer.config.lora.dropout == 0.0
    trainer.train()
    assert dict(vars(config)) == described
    assert (args.to_dict(), rows) == (given, ROWS)
    assert (Path.cwd(), logging.getLogger().level) == (place, level)
    assert (model.config._attn_implementation, model.config.use_cache) == (attention, True)
    now = {name: part.training for name, part in model.named_modules()}
    assert {name: now[name] for name in modes if name in now} == {name: modes[name] for name in modes if name in now}
    assert all(value.requires_grad == ("lora_" in name) for name, value in model.named_parameters())
