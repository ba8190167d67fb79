"""The commands that run a model, on a tiny one that `groupwise model tiny` made."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groupwise.cli import main
from groupwise.cli.models import model_path
from groupwise.config.loading import config_json, load_config
from groupwise.config.model_name import is_run
from groupwise.errors import ConfigError
from groupwise.trajectories import eval_to_json, read_eval_file
from groupwise.trust import prove

REWARD = "from groupwise.rewards import completion_texts\ndef {name}(completions, **columns):\n    {body}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `data.jsonl` with 5 rows, `run/` with the model as its final one, and `rewards.py`."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "answer": str(2 * i)} for i in range(5)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(
        REWARD.format(name="one", body="return [1.0] * len(completions)")
        + REWARD.format(name="broken", body="raise ValueError('no')")
        + REWARD.format(name="odd", body="return [float(len(t) % 2) for t in completion_texts(completions)]")
    )
    arguments = ["--tokenizer-from", str(folder / "data.jsonl"), "--size", "0.1m", "--vocab-size", "280"]
    assert main(["model", "tiny", "--out", str(folder / "model"), *arguments]) == 0
    (folder / "run").mkdir()
    shutil.copytree(folder / "model", folder / "run" / "final")
    config = load_config(
        None,
        {
            "model.path": "elsewhere",
            "data.eval": str(folder / "data.jsonl"),
            "reward": [{"name": f"{folder / 'rewards.py'}:one"}],
            "eval.limit": "3",
            "eval.max_completion_tokens": "4",
        },
    ).config
    (folder / "run" / "config.json").write_text(config_json(config))
    prove(folder / "run")
    return folder


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def evaluated(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> dict[str, object]:
    flags = ("--data", folder / "data.jsonl", "--max-completion-tokens", 5, "--json")
    return json.loads(output(capsys, "eval", folder / "model", *flags, *arguments))


def test_tiny_model_refuses_a_folder_that_holds_something(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(folder / "model"), "--tokenizer-from", str(folder / "data.jsonl")]
    assert main(["model", "tiny", *arguments]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_generate_is_a_function_of_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", folder / "model", "--prompt", "1 + 1?", "--max-tokens", 12)
    first = output(capsys, *command, "--seed", 3)
    assert first == output(capsys, *command, "--seed", 3)
    assert first != output(capsys, *command, "--seed", 4)
    assert first == output(capsys, "generate", folder / "run", *command[2:], "--seed", 3), "a run means its final model"


def test_generate_many_raw_and_greedy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", folder / "model", "--prompt", "1 + 1?", "--max-tokens", 6, "-n", 3)
    out = output(capsys, *command, "--temperature", 0)
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [
        f"--- {i} of 3 (6 tokens)" for i in (1, 2, 3)
    ]
    drawn = ("generate", folder / "model", "--prompt", "1 + 1?", "--max-tokens", 20)
    variants = [
        output(capsys, *drawn),
        output(capsys, *drawn, "--raw"),
        output(capsys, *drawn, "--system", "Be brief."),
    ]
    assert len(set(variants)) == 3


def test_generate_says_when_it_was_cut_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder / "model"), "--prompt", "ä 🦊", "--max-tokens", "2", "--temperature", "0"]) == 0
    assert "cut off after 2 tokens" in capsys.readouterr().err


def test_generate_reads_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", folder / "model", "--max-tokens", 6, "--prompt")
    expected = output(capsys, *command, "several\nlines")
    monkeypatch.setattr("sys.stdin", io.StringIO("several\nlines"))
    assert output(capsys, *command, "-") == expected


def test_generate_without_a_chat_template(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "plain"
    shutil.copytree(folder / "model", model)
    (model / "chat_template.jinja").unlink()
    command = ["generate", str(model), "--prompt", "x", "--max-tokens", "2"]
    assert main(command) == 2
    assert "--raw" in capsys.readouterr().err
    assert main([*command, "--raw"]) == 0
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert main([*command, "--model.chat_template", str(template)]) == 0


def test_chat_keeps_and_clears_the_conversation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replies(*lines: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        return output(capsys, "chat", folder / "model", "--max-tokens", 16)

    fresh = replies("2 + 2?")
    assert len(fresh) > 5
    assert replies("/clear", "", "/nonsense", "2 + 2?", "/exit", "never read") == fresh
    assert replies("2 + 2?", "/clear", "2 + 2?") == fresh * 2
    twice = replies("2 + 2?", "2 + 2?")
    assert twice.startswith(fresh)
    assert twice != fresh * 2, "the second turn sees the first"


def test_chat_names_an_unknown_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/nonsense\n"))
    assert main(["chat", str(folder / "model")]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "unknown command /nonsense; /clear" in captured.err


def test_ctrl_c_ends_the_reply_and_not_the_chat(folder: Path) -> None:
    command = [sys.executable, "-m", "groupwise.cli", "chat", str(folder / "model"), "--temperature", "0"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "3500"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore the signal, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        assert "/exit" in process.stderr.readline()
        process.stdin.write("2 + 2?\n")
        process.stdin.flush()
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "(reply ended)\n"
        process.stdin.write("/exit\n")
        process.stdin.flush()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


def test_eval_counts_what_the_reward_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluated(capsys, folder, "--reward", f"{folder / 'rewards.py'}:one")
    assert (report["accuracy"], report["num_rows"], report["num_failed"]) == (1.0, 5, 0)
    assert report["ci_high"] == 1.0
    assert 0.5 < float(str(report["ci_low"])) < 0.7
    assert report["pass_at_k"] == {"1": 1.0}
    assert report["accuracy_of"] == ["one"]
    report = evaluated(capsys, folder, "--reward", f"{folder / 'rewards.py'}:one", "--eval.threshold", 1)
    assert report["accuracy"] == 0.0


def test_eval_samples_are_reproducible_and_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "new" / "samples.jsonl"
    flags = ("--reward", f"{folder / 'rewards.py'}:odd", "--samples", 4, "--temperature", 1, "--save", saved)
    first = evaluated(capsys, folder, *flags)
    rows = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20
    assert sum(row["correct"] for row in rows) / 20 == pytest.approx(first["accuracy"])
    assert [eval_to_json(row) for row in read_eval_file(saved)] == rows
    assert list(first["pass_at_k"]) == ["1", "2", "4"]  # type: ignore[call-overload]
    again = evaluated(capsys, folder, *flags)
    assert [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()] == rows
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    evaluated(capsys, folder, *flags, "--seed", 9)
    assert [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()] != rows


def test_numbers_are_told_though_they_cannot_be_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    words = ("eval", folder / "run", "--limit", 2, "--save")
    for place, said in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.jsonl", "cannot be written: ")):
        assert main([str(word) for word in (*words, place)]) == 2
        told = capsys.readouterr()
        assert said in told.err
        assert "evaluating" not in told.err
    monkeypatch.setattr(os, "fsync", full_disk)
    assert main([str(word) for word in (*words, tmp_path / "a.jsonl")]) == 1
    told = capsys.readouterr()
    assert "accuracy     1.0000" in told.out
    assert "a.jsonl cannot be written: the disk is full" in told.err


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_eval_of_a_run_takes_its_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(output(capsys, "eval", folder / "run", "--json"))
    assert (report["num_rows"], report["accuracy"], report["model"]) == (3, 1.0, str(folder / "run" / "final"))
    assert report["mean_length"] <= 4
    text = output(capsys, "eval", folder / "run", "--limit", 2, "--reward", f"{folder / 'rewards.py'}:one")
    assert "accuracy     1.0000  (95 % interval 0.3424 to 1.0000, counts one)" in text


def test_an_evaluation_in_which_every_reward_failed_is_a_failure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(folder / "data.jsonl"), "--reward", f"{folder / 'rewards.py'}:broken"]
    assert main(["eval", str(folder / "model"), *flags]) == 1
    done = capsys.readouterr()
    assert "accuracy     not measured: every sample failed" in done.out
    assert "rows         5, 5 failed" in done.out
    assert "error: not one of 5 samples could be judged" in done.err
    assert "ValueError" in done.err
    assert main(["eval", str(folder / "model"), *flags, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["accuracy"], report["num_failed"], report["mean_reward"]) == (None, 5, None)


def test_a_run_from_elsewhere_runs_its_reward_code_after_a_yes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    (run / "trust.json").unlink()
    name = f"{folder / 'rewards.py'}:one"
    for words in (("eval", run), ("train", "--resume", "--output", run), ("train", run / "config.json")):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert f"reward {name}" in said
        assert "--trust-rewards, or the same name with --reward" in said
    for words in (("--trust-rewards",), ("--reward", name)):
        assert json.loads(output(capsys, "eval", run, "--json", *words))["accuracy"] == 1.0
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (run / "checkpoints" / "step_000001" / "manifest.json").touch()
    assert main(["eval", f"{run}@1"]) == 2
    assert "--trust-rewards" in capsys.readouterr().err


def test_a_run_is_told_from_a_model(folder: Path, tmp_path: Path) -> None:
    assert (is_run(folder / "run"), is_run(folder / "model"), is_run(Path("Qwen/Qwen3-0.6B"))) == (True, False, False)
    assert model_path("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    shutil.copy(folder / "run" / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match="without a final model and without a checkpoint"):
        model_path(str(tmp_path))
    (tmp_path / "config.json").write_text("not json")
    assert not is_run(tmp_path)


def test_data_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tokens" in output(capsys, "data", "stats", folder / "data.jsonl", "--model", folder / "model")
    assert "characters" in output(capsys, "data", "stats", folder / "data.jsonl")
    for split in ("train", "test"):
        row = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    out = output(capsys, "data", "gsm8k", "--input-dir", tmp_path, "--out-dir", tmp_path / "rl")
    assert "wrote 1 rows" in out
    assert json.loads((tmp_path / "rl" / "test.jsonl").read_text())["reward_model"]["ground_truth"] == "2"
