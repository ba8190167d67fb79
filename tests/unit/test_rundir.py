from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

import pytest

from groupwise.config import Config
from groupwise.config.loading import load_config, settings
from groupwise.errors import ConfigError, DataError
from groupwise.files import write_json_atomic, write_text_atomic
from groupwise.rundir import RunDirectory, read_run_config, setting_changes, versions


def config(**values: object) -> Config:
    base = {"model.path": "m", "data.train": "t.jsonl", "reward.0.name": "gsm8k"}
    return load_config(None, base | {name.replace("__", "."): value for name, value in values.items()}).config


def fake_checkpoint(run: RunDirectory, step: int) -> None:
    folder = run.checkpoints / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


@pytest.fixture
def used(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.create(tmp_path / "run")
    run.record(config())
    fake_checkpoint(run, 2)
    return run


def test_a_new_run_has_its_config_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    run = RunDirectory.create(tmp_path / "a" / "run")
    run.record(config())
    assert read_run_config(run.path) == config()
    found = json.loads(run.versions_file.read_text())
    assert found == json.loads(json.dumps(versions()))
    assert found["torch"].startswith("2.")
    assert found["threads"] >= 1
    assert not any("hunter2" in file.read_text() for file in run.path.rglob("*") if file.is_file())


def test_a_used_directory_is_refused_naming_both_flags(used: RunDirectory):
    with pytest.raises(ConfigError, match=r"--resume .* --overwrite"):
        RunDirectory.create(used.path)
    with pytest.raises(ConfigError, match="both"):
        RunDirectory.create(used.path, resume=True, overwrite=True)


def test_empty_folders_do_not_count(tmp_path: Path):
    first = RunDirectory.create(tmp_path / "run")
    assert RunDirectory.create(tmp_path / "run") == first


def test_overwrite_removes_the_old_run(used: RunDirectory):
    used.ledger_file.write_text('{"step": 1}\n')
    (used.path / "final").mkdir()
    (used.path / "final" / "config.json").write_text("{}")
    (used.path / ".config.json.tmp").write_text("left by a killed process")
    again = RunDirectory.create(used.path, overwrite=True)
    assert not again.resumed
    assert sorted(path.name for path in used.path.iterdir()) == ["checkpoints", "trajectories"]
    assert not list(used.checkpoints.iterdir())


@pytest.mark.parametrize("foreign", ["thesis.docx", ".git", "größe.txt"])
def test_overwrite_never_touches_a_folder_with_other_things(used: RunDirectory, foreign: str):
    (used.path / foreign).write_text("mine")
    before = sorted(used.path.rglob("*"))
    with pytest.raises(ConfigError, match=foreign.replace(".", r"\.")):
        RunDirectory.create(used.path, overwrite=True)
    assert sorted(used.path.rglob("*")) == before


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"model_type": "qwen3"}', "[]"])
def test_overwrite_needs_a_run_s_own_config(tmp_path: Path, content: str | None):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_text("weights")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"no config\.json of a run"):
        RunDirectory.create(tmp_path, overwrite=True)
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_overwrite_removes_a_link_and_not_what_it_points_to(used: RunDirectory, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (used.path / "final").symlink_to(elsewhere)
    RunDirectory.create(used.path, overwrite=True)
    assert (elsewhere / "precious").exists()
    assert not (used.path / "final").exists()


def test_a_file_in_the_place_of_the_directory(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="got a file"):
        RunDirectory.create(tmp_path / "run", overwrite=True)
    with pytest.raises(ConfigError, match="cannot be made"):
        RunDirectory.create(tmp_path / "run" / "inner")


def test_resume_needs_a_checkpoint(tmp_path: Path, used: RunDirectory):
    with pytest.raises(ConfigError, match="nothing to --resume"):
        RunDirectory.create(tmp_path / "new", resume=True)
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match="nothing to --resume"):
        RunDirectory.create(tmp_path / "new", resume=True)
    assert RunDirectory.create(used.path, resume=True).resumed


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("killed", ["at mkdir", "at config", "before the first checkpoint", "while removed"])
def test_a_run_killed_before_it_saved_is_begun_again_by_every_start(
    tmp_path: Path, used: RunDirectory, flags: dict[str, bool], killed: str
):
    run = used
    if killed == "while removed":
        run.append_ledger([{"step": 9}])
        (run.path / ".removing").write_text("")
        run.config_file.unlink()
    else:
        run = RunDirectory.create(tmp_path / "bare")
    if killed == "at config":
        (run.path / ".config.json.tmp").write_text("{")
    if killed == "before the first checkpoint":
        run.record(config())
        run.append_ledger([{"step": 1}])
        (run.checkpoints / ".tmp-step_000001-77").mkdir()
    again = RunDirectory.create(run.path, **flags)
    assert not again.resumed
    left = [path.name for path in again.path.rglob("*") if path.name not in ("checkpoints", "trajectories")]
    assert not left or (left == [".config.json.tmp"] and killed == "at config")


@pytest.mark.parametrize("name", ["final", "summary.json", "thesis.docx"])
def test_what_a_run_finished_is_never_replaced_unasked(tmp_path: Path, name: str):
    run = RunDirectory.create(tmp_path / "run")
    run.record(config())
    place = run.path / name
    place.mkdir() if name == "final" else place.write_text("{}")
    (place / "model.safetensors").write_text("x") if name == "final" else None
    with pytest.raises(ConfigError, match="not empty"):
        RunDirectory.create(run.path)
    with pytest.raises(ConfigError, match="no checkpoint"):
        RunDirectory.create(run.path, resume=True)
    assert place.exists()


def test_a_long_run_without_a_checkpoint_is_not_replaced_by_a_plain_start(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    run.record(config())
    run.append_ledger([{"step": 1}, {"step": 2}])
    with pytest.raises(ConfigError, match="not empty"):
        RunDirectory.create(run.path)
    assert run.ledger_file.exists()
    assert not RunDirectory.create(run.path, resume=True).ledger_file.exists()


def changes(before: Config, now: Config) -> dict[str, tuple[str, str]]:
    return setting_changes(settings(before), settings(now))


def test_settings_that_would_change_the_run_are_listed_with_both_values():
    changed = config(optim__lr=1e-3, train__seed=5, reward__1__name="format", eval__every=3)
    found = changes(config(), changed)
    assert found["optim.lr"] == ("1e-06", "0.001")
    assert found["train.seed"] == ("0", "5")
    assert found["reward.1.name"] == ("absent", '"format"')
    assert "eval.every" not in found


def test_what_does_not_change_the_maths_is_free():
    free = config(
        train__steps=50, train__save_every=5, train__save_every_minutes=1.5, train__keep_checkpoints=1,
        train__output="x", eval__every=3, tracking__backends=("jsonl",), train__trajectories=False,
        data__eval="test.jsonl",
    )  # fmt: skip
    assert changes(config(), free) == {}


@pytest.mark.parametrize("values", [{"optim__schedule": "cosine"}, {"optim__warmup_ratio": 0.1}])
def test_the_number_of_steps_is_fixed_where_the_learning_rate_depends_on_it(values: dict[str, object]):
    assert "train.steps" in changes(config(train__steps=10, **values), config(train__steps=20, **values))


def test_resume_of_a_damaged_config(used: RunDirectory):
    used.config_file.write_text('{"bogus": 1}')
    with pytest.raises(ConfigError, match="does not know"):
        RunDirectory.create(used.path, resume=True)
    used.config_file.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        RunDirectory.create(used.path, resume=True)
    used.config_file.unlink()
    with pytest.raises(ConfigError, match=r"without config\.json"):
        RunDirectory.create(used.path, resume=True)


def test_truncate_after_forgets_ledger_rows_and_trajectories(used: RunDirectory):
    used.append_ledger([{"step": step, "uid": "é", "reward": math.nan} for step in (1, 1, 2, 3, 3)])
    with used.ledger_file.open("ab") as file:
        file.write(b'{"step": 4, "uid": "\xc3')
    for step in (1, 2, 3):
        used.trajectory_file(step).write_text("{}\n")
    (used.trajectories / "eval_000003.jsonl").write_text("{}\n")
    (used.trajectories / "notes.txt").write_text("kept")
    used.truncate_after(2)
    used.append_ledger([{"step": 3}])
    assert [json.loads(line)["step"] for line in used.ledger_file.read_text().splitlines()] == [1, 1, 2, 3]
    assert sorted(path.name for path in used.trajectories.iterdir()) == [
        "notes.txt", "step_000001.jsonl", "step_000002.jsonl",
    ]  # fmt: skip


def test_truncate_after_names_a_damaged_ledger_row(used: RunDirectory):
    used.ledger_file.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"ledger\.jsonl:2"):
        used.truncate_after(1)


def test_truncate_after_with_nothing_written(used: RunDirectory):
    used.truncate_after(0)
    assert not used.ledger_file.exists()


def test_log_txt_gets_the_package_s_records_and_only_then(used: RunDirectory):
    logger = logging.getLogger("groupwise.some.part")
    with used.logging():
        logger.info("größer \udcff")
        logging.getLogger("elsewhere").warning("not ours")
        logger.debug("too fine")
    logger.warning("too late")
    with used.logging():
        logger.info("appended")
    text = used.log_file.read_text(encoding="utf-8")
    assert "größer \\udcff" in text
    assert "appended" in text
    assert "not ours" not in text
    assert "too" not in text
    assert logging.getLogger("groupwise").level == logging.NOTSET


def test_atomic_writes_leave_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"a": [1.5, math.nan, (2,)], "ü": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1.5, None, [2]], "ü": None}
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        write_text_atomic(path, "new")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_value_that_json_cannot_hold_is_refused_before_writing(tmp_path: Path):
    with pytest.raises(TypeError):
        write_json_atomic(tmp_path / "x.json", {"a": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damaged", ["{torn", "3", "[1]", ""])
def test_damaged_origins_end_no_run(damaged: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, resumed=True)
    run.origins_file.write_text(damaged)
    run.record_origins({"optim.lr": "command line", "train.seed": "default", "train.steps": str(run.config_file)})
    assert json.loads(run.origins_file.read_text()) == {"optim.lr": "command line"}
