"""A table of runs in every state, of any version, and of none."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main
from groupwise.runs import SORTED_BY, differing, find_runs, read_run, sort_runs, table
from groupwise.runs.plot import chosen_panels, read_metrics

CONFIG: dict[str, Any] = {
    section: {}
    for section in ("model", "data", "rollout", "algorithm", "optim", "train", "sft", "eval", "tracking", "lora")
}


def make(root: Path, name: str, *, steps: int = 3, lock: dict[str, Any] | None = None, **settings: Any) -> Path:
    run = root / name
    run.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    config |= {"train": {"steps": 5, "output": str(run)}, "optim": {"lr": settings.get("lr", 1e-6)}, "reward": []}
    (run / "config.json").write_text(json.dumps(config))
    rows = [{"step": 0, "eval/accuracy": 0.25}]
    rows += [
        {"step": n, "reward": n / 10, "time/step": 2.0, "eval/accuracy": 0.25 + n / 10} for n in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "rew')
    if settings.get("summary"):
        (run / "summary.json").write_text(json.dumps({"steps": steps, "seconds": 12.5, "findings": [{}, {}]}))
    if lock is not None:
        (run / ".lock.1").write_text(json.dumps({"released": True}))
        (run / ".lock.2").write_text(json.dumps(lock))
    return run


def test_a_run_is_read_as_it_is(tmp_path: Path) -> None:
    run = make(tmp_path, "one", lock={"released": False})
    found = read_run(run)
    assert (found.state, found.steps, found.of_steps) == ("running", 3, 5)
    assert (found.first, found.best, found.accuracy, found.reward) == (0.25, 0.55, 0.55, 0.3)
    assert found.seconds == 6.0
    before = {each: each.stat().st_mtime_ns for each in run.iterdir()}
    read_run(run)
    assert {each: each.stat().st_mtime_ns for each in run.iterdir()} == before


def test_states_are_told_apart(tmp_path: Path) -> None:
    silent = make(tmp_path, "killed", lock={"released": False})
    hour = time.time() - 3600
    os.utime(silent / ".lock.2", (hour, hour))
    make(tmp_path, "stopped", lock={"released": True})
    make(tmp_path, "finished", lock={"released": True}, summary=True)
    torn = make(tmp_path, "torn")
    (torn / "versions.json").write_text("{}")
    (torn / "config.json").write_text('{"train": ')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen3"}')
    found = {path.name: read_run(path).state for path in find_runs(tmp_path)}
    assert found == {"killed": "killed", "stopped": "stopped", "finished": "finished", "torn": "unreadable"}
    assert read_run(tmp_path / "finished").findings == 2
    assert read_run(tmp_path / "finished").seconds == 12.5


def test_runs_are_found_below_and_not_inside(tmp_path: Path) -> None:
    run = make(tmp_path, "a/b")
    make(run, "final")  # whatever lies in a run is the run's
    make(tmp_path, "c")
    assert [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)] == ["c", "a/b"] or [
        path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)
    ] == ["a/b", "c"]
    assert list(find_runs(run)) == [run]


def test_they_are_sorted_and_their_differences_named(tmp_path: Path) -> None:
    make(tmp_path, "slow", lr=1e-6, steps=2)
    make(tmp_path, "fast", lr=1e-5, steps=4)
    (make(tmp_path, "new", lr=1e-5) / "metrics.jsonl").unlink()
    runs = [read_run(path) for path in find_runs(tmp_path)]
    assert [run.path.name for run in sort_runs(runs, "accuracy")] == ["fast", "slow", "new"]
    assert [run.path.name for run in sort_runs(runs, "name")] == ["fast", "new", "slow"]
    assert differing(runs) == ["optim.lr"]
    for width in (40, 80, 200):
        lines = table(runs, root=tmp_path, width=width)
        assert len(lines) == 4
        assert all(len(line) <= width for line in lines)
    assert "optim.lr = 1e-05" in table(runs, root=tmp_path, width=200)[1]


def test_the_command_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "one", summary=True)
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "one  finished" in out
    assert "55.0 %" in out
    assert main(["runs", str(tmp_path), "--json", "--sort", "reward"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["state"], row["best"], row["seconds"]) == ("finished", 0.55, 12.5)
    assert main(["runs", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert "no run below" in capsys.readouterr().out


def test_every_key_of_the_command_sorts() -> None:
    from groupwise.cli.commands.runs import _KEYS

    assert tuple(SORTED_BY) == _KEYS


def test_a_thousand_are_listed_within_seconds(tmp_path: Path) -> None:
    for number in range(1000):
        make(tmp_path, f"run{number:04d}", steps=20)
    started = time.perf_counter()
    runs = [read_run(path) for path in find_runs(tmp_path)]
    table(runs, root=tmp_path, width=120)
    assert len(runs) == 1000
    assert time.perf_counter() - started < 10


def test_runs_are_drawn_and_the_same_run_gives_the_same_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    one, two = make(tmp_path, "one", steps=20), make(tmp_path, "two", steps=9)
    assert main(["plot", str(one)]) == 0
    first = (one / "plot.svg").read_bytes()
    assert main(["plot", str(one)]) == 0
    assert (one / "plot.svg").read_bytes() == first
    deep = tmp_path / "deep" / "both.png"
    assert main(["plot", str(one), str(two), "--metrics", "reward,time/step", "--output", str(deep)]) == 0
    assert deep.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for words, said in (
        ([str(one), "--metrics", "rewad"], "did you mean 'reward'?"),
        ([str(one), "--output", "x.gif"], "ends in .svg"),
        ([str(tmp_path)], "holds no metrics.jsonl"),
    ):
        assert main(["plot", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_curve_leaves_out_what_is_missing_and_is_smoothed(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval/accuracy": 0.1}, *({"step": k, "reward": k / 10} for k in range(1, 9))]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 9, "reward": None}])
    )
    curve = read_metrics(tmp_path).curve("reward")
    assert curve.steps == tuple(range(1, 9))
    assert curve.smoothed(2)[:3] == pytest.approx((0.1, 0.15, 0.25))
    assert chosen_panels([read_metrics(tmp_path)], ()) == [("reward", "eval/accuracy")]


def test_without_matplotlib_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("groupwise.runs.plot.find_spec", lambda name: None)
    assert main(["plot", str(make(tmp_path, "one"))]) == 2
    assert "pip install 'groupwise[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["1" + 400 * "0", "1e999", "NaN", "-Infinity", "true", '"0.5"'])
def test_a_number_that_is_none_ends_nothing(number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "one")
    (run / "summary.json").write_text(f'{{"steps": {number}, "seconds": {number}}}')
    rows = [
        f'{{"step": {step}, "reward": {number}, "eval/accuracy": {number}, "time/step": {number}}}' for step in "12"
    ]
    (run / "metrics.jsonl").write_text("\n".join([*rows, f'{{"step": {number}, "reward": 0.5}}', ""]))
    record = read_run(run)
    assert (record.steps, record.reward, record.accuracy, record.seconds) == (2, 0.5, None, None)
    assert main(["runs", str(tmp_path)]) == main(["plot", str(run)]) == 0
    assert capsys.readouterr().err == ""


def test_a_row_of_metrics_ends_at_its_newline_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a\u2028b": 2.0}\n[]\n"x"\n{"step": 2', encoding="utf-8")
    assert read_metrics(tmp_path).curve("a\u2028b").values == (2.0,)


def test_a_full_disk_leaves_the_picture_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run, out = make(tmp_path, "one"), tmp_path / "kept.png"
    out.write_bytes(b"earlier")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["plot", str(run), "--output", str(out)]) == 1
    assert f"{out} cannot be written: the disk is full" in capsys.readouterr().err
    assert out.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "one"]
