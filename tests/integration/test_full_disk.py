"""A disk that fills up at any write of a run: a sentence with the file's name; --resume goes on to the same bits."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel

import groupwise.checkpoint.store
import groupwise.files
from groupwise.cli import main

FULL = "I/O error: No space left on device (os error 28)"


def fill(monkeypatch: pytest.MonkeyPatch, name: str, *, after: int) -> None:
    """From the write number `after` on, no file whose path holds `name` can be opened to write."""
    seen = 0

    def refuse(path: Path) -> None:
        nonlocal seen
        seen += name in str(path)
        if name in str(path) and seen > after:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for function in ("open_new", "open_to_append"):
        original = getattr(groupwise.files, function)
        monkeypatch.setattr(
            groupwise.files, function, lambda path, original=original: (refuse(path), original(path))[1]
        )


@pytest.fixture(scope="module")
def whole(task: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The final weights of a run that was never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *task.flags(run, "--train.steps", "3", "--train.save_every", "1")]) == 0
    return (run / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("metrics.jsonl", 1),
        ("ledger.jsonl", 1),
        ("trajectories/step_000002", 0),
        ("policy.json", 1),
        ("manifest.json", 1),
        ("checkpoints/.latest", 1),
        ("summary.json", 0),
    ],
)
def test_a_run_goes_on_once_there_is_room(
    task: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: bytes,
    name: str,
    after: int,
) -> None:
    run = tmp_path / "run"
    flags = ["train", *task.flags(run, "--train.steps", "3", "--train.save_every", "1")]
    with monkeypatch.context() as patch:
        fill(patch, name, after=after)
        assert main(flags) == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message
    assert "Traceback" not in message
    assert "not foreseen" not in message
    assert str(run) in message.splitlines()[-1]
    assert main([*flags, "--resume"]) == 0
    assert (run / "final" / "model.safetensors").read_bytes() == whole
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize("place", ["checkpoint", "final"])
def test_safetensors_own_errors_are_sentences(
    task: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: bytes,
    place: str,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError(FULL)

    run = tmp_path / "run"
    flags = ["train", *task.flags(run, "--train.steps", "3", "--train.save_every", "1")]
    if place == "final":
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "save_pretrained", refuse)
            assert main(flags) == 1
        assert f"{run / 'final'} cannot be written: the disk is full" in capsys.readouterr().err
    else:
        assert main([*flags, "--train.steps", "1"]) == 0
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(groupwise.checkpoint.store, "save_file", refuse)
            assert main([*flags, "--resume"]) == 1
        assert "the disk is full" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0
    assert (run / "final" / "model.safetensors").read_bytes() == whole


def test_a_full_log_is_told_once_and_ends_nothing(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whole: bytes
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill(patch, "log.txt", after=0)
        assert main(["train", *task.flags(run, "--train.steps", "3", "--train.save_every", "1")]) == 0
    message = capsys.readouterr().err
    assert message.count(f"{run / 'log.txt'} cannot be written: the disk is full") == 1
    assert "Traceback" not in message
    assert (run / "final" / "model.safetensors").read_bytes() == whole


def test_a_final_that_leads_out_of_the_run_is_refused(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("mine")
    flags = ["train", *task.flags(run, "--train.steps", "1", "--train.save_every", "1")]
    assert main(flags) == 0
    (run / "final").rename(tmp_path / "moved")
    (run / "final").symlink_to(elsewhere)
    assert main([*flags, "--resume", "--train.steps", "2"]) == 2
    message = capsys.readouterr().err
    assert str(run / "final") in message
    assert "a link that leads out of the run" in message
    assert [file.name for file in elsewhere.iterdir()] == ["precious.txt"]
    assert main([*flags, "--overwrite"]) == 0
    assert not (run / "final").is_symlink()
    assert [file.name for file in elsewhere.iterdir()] == ["precious.txt"]


def test_a_checkpoint_is_not_read_through_a_link(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = ["train", *task.flags(run, "--train.steps", "1", "--train.save_every", "1")]
    assert main(flags) == 0
    part = run / "checkpoints" / "step_000001" / "policy.safetensors"
    part.rename(tmp_path / "part")
    part.symlink_to(tmp_path / "part")
    assert main([*flags, "--resume", "--train.steps", "2"]) == 2
    assert str(part) in capsys.readouterr().err
