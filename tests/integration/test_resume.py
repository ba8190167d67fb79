"""Runs that stop — at a step, by a kill, by Ctrl-C — and go on to the same weights, bit by bit, and the same ledger."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main
from groupwise.errors import ConfigError
from groupwise.launch import run_sft, run_training

ReadRows = Callable[[Path], list[dict[str, Any]]]
Start = Callable[..., subprocess.Popen[str]]


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def same_run(one: Path, other: Path) -> None:
    assert weights(one) == weights(other)
    assert (one / "ledger.jsonl").read_bytes() == (other / "ledger.jsonl").read_bytes()
    names = sorted(path.name for path in (one / "trajectories").iterdir())
    assert names == sorted(path.name for path in (other / "trajectories").iterdir())
    for name in names:
        assert (one / "trajectories" / name).read_bytes() == (other / "trajectories" / name).read_bytes()


def wait_for(file: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until the file has that many lines."""
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"{file} did not grow to {count} lines"
        time.sleep(0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings", [{}, {"algorithm": {"kl": {"coef": 0.1}}, "optim": {"lr": 0.003, "steps_per_batch": 2}}]
)
def test_six_steps_are_three_and_three(
    task: Any, tmp_path: Path, read_jsonl: ReadRows, dtype: str, settings: dict[str, Any]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {**settings, "model": {"dtype": dtype}}
    run_training(task.config(whole, **settings, train={"steps": 6}))
    run_training(task.config(parts, **settings, train={"steps": 3}))
    assert weights(parts) != weights(whole)
    run_training(task.config(parts, **settings, train={"steps": 6}), resume=True)
    same_run(whole, parts)
    assert [row["step"] for row in read_jsonl(parts / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_resumed_changes_nothing(task: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(task.config(run, train={"steps": 2}))
    before = weights(run), (run / "ledger.jsonl").read_bytes(), (run / "metrics.jsonl").read_bytes()
    run_training(task.config(run, train={"steps": 2}), resume=True)
    assert (weights(run), (run / "ledger.jsonl").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_what_a_killed_run_wrote_after_its_checkpoint_is_written_again(task: Any, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_training(task.config(whole, train={"steps": 4}))
    run_training(task.config(parts, train={"steps": 2}))
    with (parts / "ledger.jsonl").open("a") as file:
        file.write('{"step": 3, "group": 8, "uid": "of the step that was not saved"}\n{"step": 3, "gro')
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 7.0}\n{"st')
    (parts / "trajectories" / "step_000003.jsonl").write_text('{"step": 3}\n')
    run_training(task.config(parts, train={"steps": 4}), resume=True)
    same_run(whole, parts)


def test_supervised_training_goes_on_bitwise(task: Any, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def config(output: Path, steps: int) -> Any:
        train = {"steps": steps, "save_every": 1}
        return task.config(output, data={"train": str(task.worked)}, sft={"rows_per_step": 3}, train=train)

    run_sft(config(whole, 6))
    run_sft(config(parts, 3))
    run_sft(config(parts, 6), resume=True)
    assert weights(whole) == weights(parts)


def test_a_resume_under_other_settings_or_data_is_refused(task: Any, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_bytes(task.rows.read_bytes())
    run_training(task.config(run, data={"train": str(rows)}, train={"steps": 1}))
    with pytest.raises(ConfigError, match=r"optim\.lr: was 0\.003, now 0\.1"):
        run_training(task.config(run, data={"train": str(rows)}, optim={"lr": 0.1}, train={"steps": 2}), resume=True)
    rows.write_text(rows.read_text(encoding="utf-8").replace("red", "tan"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data prompts: was .*, now .*"):
        run_training(task.config(run, data={"train": str(rows)}, train={"steps": 2}), resume=True)


def test_killed_at_any_step_and_resumed_equals_a_run_that_was_not(task: Any, tmp_path: Path, start_cli: Start) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--train.steps", "12", "--train.save_every", "2")
    assert main(["train", *task.flags(whole, *more)]) == 0
    process = start_cli("train", *task.flags(killed, *more))
    wait_for(killed / "ledger.jsonl", 4 * 5, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert not (killed / "final").exists()
    assert main(["train", "--resume", "--output", str(killed)]) == 0
    same_run(whole, killed)


def test_ctrl_c_once_saves_and_twice_stops_at_once(task: Any, tmp_path: Path, start_cli: Start) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = start_cli("train", *task.flags(once, "--train.steps", "5000"))
    slow = ("--reward", task.reward("slow"), "--train.steps", "9")
    flags = task.flags(twice, *slow)
    second = start_cli("train", *flags)

    wait_for(once / "metrics.jsonl", 2, first)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "Traceback" not in errors
    assert "--resume goes on from there" in errors
    steps = (once / "metrics.jsonl").read_bytes().count(b"\n")
    assert (once / "checkpoints" / "latest").read_text().strip() == f"step_{steps:06d}"
    assert f"stopped after step {steps};" in errors
    assert f"`groupwise eval {once}@{steps}`" in errors
    assert main(["generate", f"{once}@{steps}", "--prompt", "1 + 1", "--raw", "--max-tokens", "2"]) == 0
    assert main(["generate", str(once), "--prompt", "1 + 1", "--raw", "--max-tokens", "2"]) == 0
    assert not (once / "final").exists()

    wait_for(twice / "log.txt", 1, second)
    time.sleep(1.0)  # into the first step, where the reward sleeps
    second.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert second.poll() is None
    second.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = second.communicate(timeout=15)
    assert time.monotonic() - started < 10
    assert second.returncode == 130
    assert "Traceback" not in errors
    assert not (twice / "checkpoints" / "latest").exists()
    assert main(["train", *task.flags(once, "--train.steps", str(steps + 1), "--resume")]) == 0


ENVIRONMENT = '''
from groupwise.types import Done, Reply

class Echo:
    """Says the turn's length back, once, and gives a reward for short turns."""
    stop = ("e", "a")
    def begin(self, prompt, key):
        self.turns = 0
    def answer(self, turn):
        self.turns += 1
        short = 1.0 / len(turn.token_ids)
        return Done(reward=short) if self.turns == 2 else Reply(text=f"{len(turn.token_ids)} ", reward=short)
    def close(self):
        pass
'''


@pytest.mark.parametrize(
    "rewarded", [pytest.param(True, marks=pytest.mark.slow), False], ids=["with a reward", "by the environment alone"]
)
def test_a_killed_run_with_an_environment_goes_on_to_the_same_bits(
    task: Any, tmp_path: Path, start_cli: Start, read_jsonl: ReadRows, rewarded: bool
) -> None:
    file, whole, killed = tmp_path / "echo.py", tmp_path / "whole", tmp_path / "killed"
    file.write_text(ENVIRONMENT)
    more = ("--train.steps", "8", "--environment.name", f"{file}:Echo", "--rollout.max_completion_tokens", "24")
    grouped = ("--rollout.group_size", "4", "--rollout.prompts_per_step", "4")

    def flags(run: Path) -> list[str]:
        if rewarded:
            return [*task.flags(run), *more]
        return [*task.supervised_flags(run), *grouped, *more]

    assert main(["train", *flags(whole)]) == 0
    process = start_cli("train", *flags(killed))
    wait_for(killed / "ledger.jsonl", 4 * 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    assert main(["train", "--resume", "--output", str(killed)]) == 0
    same_run(whole, killed)
    rows = read_jsonl(whole / "metrics.jsonl")
    assert any(row.get("environment/answers_per_episode", 0) > 0 for row in rows)
    assert all(row["sampling/sampling_logp_difference/max"] == 0.0 for row in rows)
    assert all(row["rewards/environment/mean"] > 0 for row in rows)


def test_changed_environment_code_is_refused(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tmp_path / "echo.py", tmp_path / "run"
    file.write_text(ENVIRONMENT)
    environment = ("--environment.name", f"{file}:Echo")
    assert main(["train", *task.flags(run, "--train.steps", "2", *environment)]) == 0
    file.write_text(ENVIRONMENT.replace("1.0 /", "2.0 /"))
    resume = ["train", "--resume", "--output", str(run), "--train.steps", "3"]
    assert main(resume) == 2
    assert "names code that would run here" in capsys.readouterr().err
    assert main([*resume, "--trust-rewards"]) == 2
    assert "environment code" in capsys.readouterr().err
