"""What users get wrong, through the command: exit code 2, one message that says what to do, nothing left behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main

Start = Callable[..., subprocess.Popen[str]]


def refused(capsys: pytest.CaptureFixture[str], command: str, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main([command, *arguments]) == 2
    return checked(capsys.readouterr().err)


def checked(errors: str) -> str:
    """The one message of a standard error that holds nothing else."""
    assert errors.startswith("error: ")
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    return errors


def write(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["--data", str(path)]


GOOD = json.dumps({"prompt": "say red:"}) + "\n"
DATA: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["bad.jsonl"]),
    "only blank lines": ("\n\n  \n", ["bad.jsonl"]),
    "broken JSON": (GOOD + GOOD + '{"prompt": "say\n', ["bad.jsonl:3"]),
    "not UTF-8": (GOOD.encode() + b'{"prompt": "\xff\xfe"}\n', ["bad.jsonl:2", "UTF-8"]),
    "not an object": (GOOD + "[1, 2]\n", ["bad.jsonl:2"]),
    "no prompt column": (GOOD + '{"prompts": "say red:"}\n', ["bad.jsonl:2", "prompt"]),
    "a number for a prompt": (GOOD + '{"prompt": 7}\n', ["bad.jsonl:2", "prompt"]),
    "an empty prompt": ('{"prompt": ""}\n', ["bad.jsonl:1"]),
    "messages without roles": ('{"prompt": [{"content": "hi"}]}\n', ["bad.jsonl:1", "role"]),
    "NaN for a prompt": (GOOD + '{"prompt": NaN}\n', ["bad.jsonl:2"]),
    "all too long": ("".join(json.dumps({"prompt": "word " * 2000}) + "\n" for _ in range(3)), ["max_prompt_tokens"]),
}


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize("case", list(DATA))
def test_bad_data_names_file_and_line(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, command: str
) -> None:
    content, wanted = DATA[case]
    if command == "sft":
        if case == "all too long":
            content = '{"prompt": "say", "completion": "%s"}\n' % ("word " * 2000)
            wanted = ["tokens"]
        elif isinstance(content, str):
            content = content.replace('"say red:"', '"say red:", "completion": "red"')
    run = tmp_path / "run"
    flags = task.supervised_flags(run) if command == "sft" else task.flags(run)
    message = refused(capsys, command, [*flags, *write(tmp_path / "bad.jsonl", content)])
    for part in wanted:
        assert part in message, message
    assert not run.exists()


def test_a_byte_order_mark_is_not_bad(task: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + GOOD.encode() * 4)
    assert main(["train", *task.flags(tmp_path / "run", "--train.steps", "1"), *data]) == 0


SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "group of one": (["--rollout.group_size", "1"], ["rollout.group_size = 1", "at least 2"]),
    "unknown setting": (["--rollout.group_sise", "4"], ["rollout.group_size"]),
    "unknown flag": (["--overwrit"], ["--overwrite"]),
    "unknown reward": (["--reward", "gsm9k"], ["gsm9k", "gsm8k"]),
    "no such reward function": (["--reward", "{rewards}:lo"], ["lo"]),
    "no such reward file": (["--reward", "{folder}/none.py:low"], ["none.py"]),
    "unknown algorithm": (["--algorithm.name", "grpoo"], ["grpo"]),
    "unknown engine": (["--rollout.engine", "nativ"], ["native"]),
    "unknown tracker": (["--tracking.backends", "jsonll"], ["jsonl"]),
    "greedy sampling": (["--rollout.temperature", "0"], ["rollout.temperature"]),
    "text for a number": (["--optim.lr", "fast"], ["optim.lr", "fast"]),
    "negative rate": (["--optim.lr", "-1"], ["optim.lr"]),
    "NaN": (["--optim.lr", "nan"], ["optim.lr", "finite"]),
    "more updates than prompts": (["--optim.steps_per_batch", "5"], ["steps_per_batch", "prompts_per_step"]),
    "evaluation of nothing": (["--eval.every", "1"], ["data.eval"]),
    "no such device": (["--model.device", "tpu"], ["model.device", "tpu"]),
    "missing data": (["--data", "{folder}/rows.json"], ["rows.jsonl"]),
    "missing model": (["--model", "{folder}/no/model"], ["model.path"]),
    "a model folder without config": (["--model", "{folder}"], ["config.json"]),
    "both flags": (["--resume", "--overwrite"], ["--overwrite"]),
    "nothing to resume": (["--resume"], ["nothing to --resume"]),
}


@pytest.mark.parametrize("case", list(SETTINGS))
def test_bad_settings_name_the_remedy(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    run = tmp_path / "run"
    flags = task.flags(run)
    if "--reward" in SETTINGS[case][0]:
        flags = flags[: flags.index("--reward")] + flags[flags.index("--reward") + 2 :]
    given = [part.format(rewards=task.rewards, folder=task.model.parent) for part in SETTINGS[case][0]]
    message = refused(capsys, "train", [*flags, *given])
    for part in SETTINGS[case][1]:
        assert part in message, message
    assert not run.exists()


def test_a_directory_that_holds_a_run_is_kept(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *task.flags(run, "--train.steps", "1")]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = refused(capsys, "train", task.flags(run, "--train.steps", "1"))
    assert "--resume" in message
    assert "--overwrite" in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # what a process killed while it saved the model leaves must not make the directory a stranger's
    (run / ".final.tmp").mkdir()
    (run / ".final.tmp" / "model.safetensors").write_text("half")
    assert main(["train", *task.flags(run, "--train.steps", "1", "--overwrite")]) == 0
    assert (run / "ledger.jsonl").read_bytes() == before[run / "ledger.jsonl"]
    assert not (run / ".final.tmp").exists()


def test_a_strangers_folder_is_never_overwritten(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    message = refused(capsys, "train", [*task.flags(tmp_path), "--overwrite"])
    assert "thesis.tex" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_same_in_a_process_of_its_own(task: Any, tmp_path: Path, start_cli: Start) -> None:
    """Exit codes as a shell sees them, and a standard error without a library's chatter."""
    run = tmp_path / "run"
    data = write(tmp_path / "bad.jsonl", GOOD + '{"prompt": \n')
    processes = {
        "bad.jsonl:2": start_cli("train", *task.flags(run), *data),
        "group_size": start_cli("train", *task.flags(run), "--rollout.group_size", "1"),
        "max_prompt_tokens": start_cli("train", *task.flags(run), "--data.max_prompt_tokens", "1"),
    }
    for part, process in processes.items():
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert part in checked(errors)
    assert not run.exists()
