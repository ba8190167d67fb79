"""What callbacks may ask of a run, and what `log_history` holds: TRL's keys, also of the part before a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from groupwise.compat.trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from groupwise.errors import ConfigError

ROWS = [{"prompt": f"say {word}:", "answer": word} for word in ("red", "green", "blue", "one", "two", "three")]
SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "max_steps": 4,
    "learning_rate": 3e-3,
    "disable_tqdm": True,
    "use_cpu": True,
}
MEASURED_BY_TRL_ALONE = {"entropy"}
"""Here only where a setting needs it."""


def low(completion_ids: Any, **columns: Any) -> list[float]:
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


def trainer_of(task: Any, output: Path, *, eval_rows: Any = None, callbacks: Any = None, **arguments: Any) -> Any:
    args = GRPOConfig(str(output), **{**SMALL, **arguments})
    return GRPOTrainer(str(task.model), low, args, ROWS, eval_rows, callbacks=callbacks)


class Asks(TrainerCallback):
    """Sets a switch after step 2."""

    def __init__(self, switch: str) -> None:
        self.switch = switch
        self.heard: list[tuple[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == 2:
            setattr(control, self.switch, True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **objects: Any) -> None:
        assert 0 <= metrics["eval_reward"] <= 1
        self.heard.append(("evaluate", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.heard.append(("save", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.heard.append(("log", state.global_step))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.heard.append(("epoch", state.global_step))


@pytest.mark.parametrize(
    ("switch", "heard"),
    [
        ("should_evaluate", [("log", 2), ("evaluate", 2)]),
        ("should_save", [("save", 2)]),
        ("should_log", [("log", 2)]),
    ],
)
def test_what_a_callback_asks_for_is_done(switch: str, heard: list[tuple[str, int]], task: Any, tmp_path: Path) -> None:
    callback = Asks(switch)
    trainer = trainer_of(task, tmp_path, callbacks=[callback], eval_rows=ROWS[:2], save_strategy="no")
    assert trainer.train().global_step == 4
    assert callback.heard == [*heard, ("epoch", 4), ("save", 4), ("log", 4)]


def test_what_cannot_be_done_is_a_sentence(task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="set should_evaluate, and the trainer has no eval_dataset"):
        trainer_of(task, tmp_path, callbacks=[Asks("should_evaluate")]).train()
    trainer_of(task, tmp_path, callbacks=[Asks("should_epoch_stop")]).train()
    assert "should_epoch_stop, which ends no epoch here" in caplog.text
    for wrong in ([3], Asks("should_log"), "tensorboard"):
        with pytest.raises(ConfigError, match="callbacks: got a"):
            trainer_of(task, tmp_path, callbacks=wrong)


def test_supervised_runs_save_where_asked(task: Any, tmp_path: Path) -> None:
    callback = Asks("should_save")
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=3, save_strategy="no", use_cpu=True)
    SFTTrainer(str(task.model), args, train_dataset=[{"text": "say red"}] * 4, callbacks=[callback]).train()
    assert [event for event in callback.heard if event[0] == "save"] == [("save", 2), ("save", 3)]


def test_the_log_is_whole_after_a_resume(task: Any, tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if state.global_step == 3:
                raise ZeroDivisionError

    settings: dict[str, Any] = {"logging_steps": 2, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer_of(task, tmp_path / "whole", eval_rows=ROWS[:2], **settings)
    whole.train()
    with pytest.raises(ZeroDivisionError):
        trainer_of(task, tmp_path / "cut", eval_rows=ROWS[:2], callbacks=[Breaks], **settings).train()
    again = trainer_of(task, tmp_path / "cut", eval_rows=ROWS[:2], **settings)
    again.train(resume_from_checkpoint=True)
    assert _without_times(again.state.log_history[:-1]) == _without_times(whole.state.log_history[:-1])
    at_its_end = trainer_of(task, tmp_path / "cut", eval_rows=ROWS[:2], **settings)
    assert at_its_end.train(resume_from_checkpoint=True).global_step == 4
    assert _without_times(at_its_end.state.log_history[:-1]) == _without_times(whole.state.log_history[:-1])


def _without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    names = ("seconds", "time", "throughput/", "per_second")
    return [{key: value for key, value in row.items() if not any(name in key for name in names)} for row in history]


def test_the_log_has_every_key_that_trl_logs(task: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    shared = {"beta": 0.1, "shuffle_dataset": False, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4}
    ours = trainer_of(task, tmp_path / "ours", eval_rows=ROWS[:2], **shared)
    ours.train()
    args = trl.GRPOConfig(str(tmp_path / "theirs"), **{**SMALL, **shared}, bf16=False, report_to="none")
    datasets = pytest.importorskip("datasets")
    rows, held_out = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:2])
    theirs = trl.GRPOTrainer(str(task.model), low, args, rows, held_out)
    theirs.train()
    for index in (0, 3, -1):
        missing = theirs.state.log_history[index].keys() - ours.state.log_history[index].keys()
        assert missing <= MEASURED_BY_TRL_ALONE
    first, other = ours.state.log_history[0], theirs.state.log_history[0]
    assert (first["step"], first["learning_rate"]) == pytest.approx((other["step"], other["learning_rate"]))
    prompts = [row["num_tokens"] - 4 * row["completions/mean_length"] for row in (first, other)]
    assert prompts[0] == pytest.approx(prompts[1])
    evaluation = ours.state.log_history[4]
    assert {"eval_reward", "eval_reward_std", "eval_rewards/low/std", "eval_runtime", "eval_num_tokens"} <= (
        evaluation.keys() & theirs.state.log_history[4].keys()
    )
    assert all(math.isfinite(value) for value in evaluation.values())


def test_epochs_of_a_part_step_log_at_their_ends(task: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": None, "num_train_epochs": 1.5, "logging_strategy": "epoch"}
    trainer = trainer_of(task, tmp_path, **arguments, per_device_train_batch_size=16)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history] == [2, 3, 3]
