"""Runs that would go on as other runs, are damaged, or have a live process already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.errors import CheckpointError, ConfigError
from groupwise.launch import run_sft, run_training
from groupwise.lock import hold

Edit = Callable[[Any], None]


@pytest.fixture
def own(task: Any, tmp_path: Path) -> Any:
    """The task with files of its own, which a test may change."""
    folder = tmp_path / "task"
    shutil.copytree(task.model.parent, folder)
    made = type(task)(folder / "model", folder / "rows.jsonl", folder / "worked.jsonl", folder / "rewards.py")
    rows = [{**json.loads(line), "answer": str(n)} for n, line in enumerate(made.rows.read_text().splitlines())]
    made.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def replace(name: str, old: str, new: str) -> Edit:
    def edit(own: Any) -> None:
        file = own.model.parent / name
        content = file.read_bytes()
        assert old.encode() in content
        file.write_bytes(content.replace(old.encode(), new.encode()))

    return edit


def reverse(name: str) -> Edit:
    def edit(own: Any) -> None:
        file = own.model.parent / name
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))

    return edit


def flip_weight(own: Any) -> None:
    file = own.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def drop_ledger(own: Any) -> None:
    (own.model.parent / "run" / "ledger.jsonl").unlink()


def cut_ledger(own: Any) -> None:
    file = own.model.parent / "run" / "ledger.jsonl"
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (replace("rows.jsonl", '"answer": "3"', '"answer": "4"'), "data column answer"),
        (replace("rewards.py", "len(ids) for", "9 for"), "reward 0 code"),
        (replace("model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "model config.json"),
        (flip_weight, "model weights"),
        (drop_ledger, "ledger.jsonl"),
        (cut_ledger, "ledger.jsonl"),
        (replace("run/config.json", '"lr": 0.003', '"lr": 0.004'), "optim.lr"),
    ],
)
def test_what_decides_the_result_is_refused_by_name(own: Any, edit: Edit, name: str) -> None:
    run = own.model.parent / "run"
    run_training(own.config(run, train={"steps": 1}))
    edit(own)
    lr = json.loads((run / "config.json").read_text())["optim"]["lr"]
    config = own.config(run, optim={"lr": lr}, train={"steps": 2})
    with pytest.raises(ConfigError) as caught:
        run_training(config, resume=True)
    assert f"  {name}: was " in str(caught.value)
    assert str(caught.value).count(": was ") == 1
    summary = run_training(config, resume=True, accept_changes=True)
    assert summary["steps"] == 2
    assert summary["accepted_changes"][0]["step"] == 1
    assert summary["accepted_changes"][0]["changes"][0].startswith(f"{name}: was ")
    again = run_training(config, resume=True)
    assert again["accepted_changes"] == summary["accepted_changes"], "the accepted state is the one to compare with"


@pytest.mark.parametrize("edit", [reverse("worked.jsonl"), replace("worked.jsonl", " blue", " tan")])
def test_supervised_rows_in_another_order_or_with_other_answers_are_refused(own: Any, edit: Edit) -> None:
    run = own.model.parent / "run"
    config = own.config(run, data={"train": str(own.worked)}, sft={"rows_per_step": 3}, train={"steps": 2})
    run_sft(config)
    edit(own)
    with pytest.raises(ConfigError, match="data tokens: was "):
        run_sft(config, resume=True)


def test_another_thread_count_is_refused(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    run = own.model.parent / "run"
    run_training(own.config(run, train={"steps": 1}))
    now = torch.get_num_threads()
    torch.set_num_threads(now + 1)
    try:
        with pytest.raises(ConfigError, match=f"threads: was {now}, now {now + 1}"):
            run_training(own.config(run, train={"steps": 2}), resume=True)
    finally:
        torch.set_num_threads(now)


def test_one_digit_of_a_manifest_is_damage_and_the_checkpoint_before_it_is_taken(own: Any) -> None:
    whole, run = own.model.parent / "whole", own.model.parent / "run"
    train = {"steps": 4, "save_every": 1}
    run_training(own.config(whole, train=train))
    shutil.copytree(whole, run)
    manifest = run / "checkpoints" / "step_000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 4', '"step": 7'))
    summary = run_training(own.config(run, train=train), resume=True)
    assert summary["steps"] == 4
    assert "passed over" in (run / "log.txt").read_text()
    for name in ("final/model.safetensors", "ledger.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    for folder in (run / "checkpoints").glob("step_*"):
        (folder / "policy.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected"):
        run_training(own.config(run, train=train), resume=True)


def test_the_summary_keeps_evaluations_from_before(own: Any) -> None:
    run = own.model.parent / "run"
    evaluated = {"data": {"train": str(own.rows), "eval": str(own.rows)}, "eval": {"every": 1, "limit": 2}}
    run_training(own.config(run, **evaluated, train={"steps": 2}))
    summary = run_training(own.config(run, **evaluated, train={"steps": 3}), resume=True)
    assert [found["step"] for found in summary["eval"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_directory_with_a_live_run_is_left_alone(own: Any, flags: dict[str, bool]) -> None:
    run = own.model.parent / "run"
    run_training(own.config(run, train={"steps": 1}))
    with hold(run), pytest.raises(ConfigError, match="a live run writes: process "):
        run_training(own.config(run), **flags)  # pyright: ignore[reportArgumentType]
    assert (run / "final").exists()


def test_by_default_the_first_step_is_saved(own: Any) -> None:
    run = own.model.parent / "run"
    run_training(own.config(run, train={"steps": 3}))
    names = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert names == ["step_000001", "step_000003"]
