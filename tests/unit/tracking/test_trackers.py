from __future__ import annotations

import io
import json
import logging
import math
import time
from pathlib import Path

import pytest

from groupwise.config import TrackingConfig
from groupwise.errors import ConfigError, DataError
from groupwise.tracking import Trackers, build_trackers
from groupwise.tracking.base import Sample
from groupwise.tracking.console import ConsoleTracker
from groupwise.tracking.jsonl import JsonlTracker
from groupwise.tracking.tensorboard import TensorBoardTracker


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Recorder:
    def __init__(self, *, fail_at: str = "") -> None:
        self.calls: list[str] = []
        self.fail_at = fail_at

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fail_at:
            raise RuntimeError(f"{name} is broken")

    def start(self, config, run_dir) -> None:
        self._call("start")

    def log(self, step, metrics) -> None:
        self._call("log")

    def samples(self, step, samples) -> None:
        self._call("samples")

    def close(self) -> None:
        self._call("close")


def rows(folder: Path) -> list[dict[str, object]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_jsonl_writes_one_valid_object_per_step(tmp_path: Path):
    tracker = JsonlTracker()
    tracker.start({}, tmp_path)
    tracker.log(1, {"reward": 0.5, "kl": math.nan, "größe": math.inf})
    assert rows(tmp_path) == [{"step": 1, "reward": 0.5, "kl": None, "größe": None}], "readable before close"
    tracker.log(2, {"reward": 1 / 3})
    tracker.close()
    assert rows(tmp_path)[1] == {"step": 2, "reward": 1 / 3}


def test_jsonl_cuts_what_came_after_the_resumed_step(tmp_path: Path):
    first = JsonlTracker()
    first.start({}, tmp_path)
    for step in range(6):
        first.log(step, {"reward": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    again = JsonlTracker(resumed_step=3)
    again.start({}, tmp_path)
    again.log(4, {"reward": 40.0})
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert rows(tmp_path)[-1]["reward"] == 40.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_resumed_at_step_zero_forgets_later_rows(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    JsonlTracker(resumed_step=0).start({}, tmp_path)
    assert rows(tmp_path) == [{"step": 0}]


@pytest.mark.parametrize("line", ["[1]", "{}", '{"step": "1"}', "{broken", "null", '{"step": true}', "\udcff"])
def test_jsonl_names_a_damaged_line(tmp_path: Path, line: str):
    (tmp_path / "metrics.jsonl").write_bytes(
        f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'.encode("utf-8", "surrogateescape")
    )
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: got a line"):
        JsonlTracker(resumed_step=1).start({}, tmp_path)


def test_console_prints_one_plain_line_per_step():
    file = io.StringIO()
    tracker = ConsoleTracker(title="project/run", total_steps=20, file=file)
    tracker.start({}, Path("runs/[bold]one[/bold]"))
    metrics = {"completions/mean_length": 31.4, "loss": -0.00123, "reward": 0.5, "time/step": 1.25, "kl": math.nan}
    tracker.log(3, {**metrics, "eval/accuracy": 0.25, "throughput/tokens_per_second": 1234.5, "other": 1.0})
    tracker.log(4, metrics)
    tracker.close()
    lines = file.getvalue().splitlines()
    assert lines[0] == "project/run: runs/[bold]one[/bold]"
    assert lines[1] == (
        "step 3/20  reward 0.500  accuracy 25.0%  loss -0.0012  kl nan  length 31  tok/s 1234  seconds 1.2"
    )
    assert lines[2] == "step 4/20  reward 0.500  loss -0.0012  kl nan  length 31  seconds 1.2"
    assert "\x1b" not in file.getvalue()


def test_console_shows_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    tracker = ConsoleTracker(title="t", total_steps=10, resumed_step=4, file=file)
    tracker.start({}, Path("runs/one"))
    tracker.log(7, {"reward": 0.25})
    tracker.close()
    tracker.close()
    assert "resumed after step 4" in file.getvalue()
    assert "7/10" in file.getvalue()
    assert "reward 0.250" in file.getvalue()


def test_tensorboard_scalars_are_read_back_and_resume_hides_old_steps(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardTracker(title="p/one")
    first.start({"optim": {"lr": 1e-6}}, tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"reward": float(step), "kl": math.nan})
    first.close()
    time.sleep(1.1)  # files are read in the order of their names, which hold the second
    again = TensorBoardTracker(title="p/one", resumed_step=1)
    again.start({}, tmp_path)
    again.log(2, {"reward": 20.0})
    again.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("reward")] == [(1, 1.0), (2, 20.0)]


HOSTILE = Sample("2|2\n<b>?", "[bold]日本[/bold]" + "x" * 900, 1.0, {"match": 1.0, "format": None}, -0.5)


def test_samples_of_jsonl_are_rows_and_are_cut_on_resume(tmp_path: Path):
    tracker = JsonlTracker()
    tracker.start({}, tmp_path)
    for step in (1, 2):
        tracker.samples(step, [HOSTILE])
    again = JsonlTracker(resumed_step=1)
    again.start({}, tmp_path)
    [row] = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (row["step"], row["prompt"], row["rewards"]) == (1, "2|2\n<b>?", {"match": 1.0, "format": None})


def test_samples_of_tensorboard_are_a_table_of_one_line_a_row(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(title="p/one")
    tracker.start({}, tmp_path)
    tracker.samples(4, [HOSTILE, HOSTILE])
    tracker.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    [event] = reader.Tensors("samples/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert event.step == 4
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {8}
    assert "2&#124;2<br>&lt;b&gt;?" in lines[2]


def test_samples_of_the_console_are_plain_text_and_whole():
    file = io.StringIO()
    tracker = ConsoleTracker(title="t", file=file)
    tracker.start({}, Path("runs/one"))
    tracker.samples(3, [HOSTILE])
    text = file.getvalue()
    assert "samples of step 3" in text
    assert "[bold]日本[/bold]" in text
    assert text.count("x") == 900


@pytest.mark.parametrize("moment", ["start", "log", "close"])
def test_a_failing_tracker_is_dropped_with_one_warning(moment: str, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    bad, good = Recorder(fail_at=moment), Recorder()
    trackers = Trackers({"bad": bad, "good": good})
    with caplog.at_level(logging.WARNING, logger="groupwise"):
        trackers.start({}, tmp_path)
        trackers.log(1, {})
        trackers.log(2, {})
        trackers.close()
    assert good.calls == ["start", "log", "log", "close"]
    assert bad.calls.count(moment) == (2 if moment == "close" else 1)
    assert bad.calls[-1] == "close"
    assert trackers.names == ("good",)
    assert len(caplog.records) == 1
    assert "bad tracker failed" in caplog.text
    assert f"{moment} is broken" in caplog.text


def test_an_interrupt_is_not_swallowed():
    class Interrupting(Recorder):
        def log(self, step, metrics) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers({"x": Interrupting()}).log(1, {})


def test_backends_by_name(tmp_path: Path):
    trackers = build_trackers(TrackingConfig(backends=("jsonl",)), run_name="one", total_steps=3)  # pyright: ignore[reportCallIssue]
    trackers.start({}, tmp_path)
    trackers.log(1, {"reward": 1.0})
    trackers.close()
    assert rows(tmp_path) == [{"step": 1, "reward": 1.0}]
    assert build_trackers(TrackingConfig(backends=()), run_name="one").names == ()  # pyright: ignore[reportCallIssue]
    assert build_trackers(TrackingConfig(), run_name="one").names == ("console", "jsonl", "tensorboard")  # pyright: ignore[reportCallIssue]


def test_project_and_run_name_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, shown in (("mine", "p/mine"), (None, "p/folder")):
        config = TrackingConfig(backends=("console",), project="p", run_name=name)  # pyright: ignore[reportCallIssue]
        build_trackers(config, run_name="folder").start({}, tmp_path)
        assert f"{shown}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"), [("tensorbord", "did you mean 'tensorboard'"), ("zzz", "expected any of console")]
)
def test_unknown_backend(name: str, hint: str):
    with pytest.raises(ConfigError, match=hint):
        build_trackers(TrackingConfig(backends=("console", name)), run_name="one")  # pyright: ignore[reportCallIssue]


def test_backend_named_twice():
    with pytest.raises(ConfigError, match="twice"):
        build_trackers(TrackingConfig(backends=("jsonl", "jsonl")), run_name="one")  # pyright: ignore[reportCallIssue]


ACTING = "\x1b[2J\x00\udcff\u202e"
WRITTEN = r"\x1b[2J\x00\udcff\u202e"


def test_texts_are_clean_before_they_reach_any_tracker(tmp_path: Path):
    """Third-party trackers and their servers fail on them; a terminal obeys them."""
    from groupwise.tracking.base import SampleTable

    class Keeps(Recorder):
        def start(self, config, run_dir) -> None:
            self.config = config

        def log(self, step, metrics) -> None:
            self.metrics = metrics

    kept = Keeps()
    trackers = Trackers({"x": kept})
    trackers.start({"model": {"path": f"a{ACTING}"}}, tmp_path)
    trackers.log(1, {f"rewards/{ACTING}/mean": 1.0})
    assert json.dumps(kept.config, ensure_ascii=False).encode()
    assert kept.metrics == {f"rewards/{WRITTEN}/mean": 1.0}
    table = SampleTable.of(1, [Sample(f"q{ACTING}", "a" * 10_000_000 + ACTING, 1.0, {ACTING: 1.0}, 0.0)])
    assert table.columns == ("step", "prompt", "completion", "reward", f"rewards/{WRITTEN}", "advantage")
    assert table.rows[0][1] == f"q{WRITTEN}"
    assert len(str(table.rows[0][2])) < 21_000


def test_hostile_samples_reach_every_tracker_of_ours(tmp_path: Path):
    file = Terminal()
    sample = Sample(ACTING, f"[bold]{ACTING}", None, {ACTING: None}, 0.0)
    trackers = Trackers(
        {
            "console": ConsoleTracker(title=f"t{ACTING}", accuracy_of=ACTING, file=file),
            "jsonl": JsonlTracker(),
            "tensorboard": TensorBoardTracker(title="t"),
        },
        samples_every=1,
    )
    trackers.start({"name": ACTING}, tmp_path)
    for tracker in trackers._trackers.values():
        tracker.samples(1, [sample])
    trackers.log(1, {f"rewards/{ACTING}/mean": 1.0, "eval/accuracy": 1.0})
    trackers.close()
    assert trackers.names == ("console", "jsonl", "tensorboard")
    assert "\x1b[2J" not in file.getvalue().replace("\x1b[2K", "")
    assert "\x00" not in file.getvalue()
    [row] = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(row)["prompt"] == "\x1b[2J\x00\\udcff\u202e"


def test_a_file_of_lines_takes_any_text(tmp_path: Path):
    from groupwise.files import append_rows, write_json_atomic, write_text_atomic

    append_rows(tmp_path / "a", [{ACTING: [ACTING, {"deep": ACTING}]}])
    write_json_atomic(tmp_path / "b", {ACTING: ACTING})
    write_text_atomic(tmp_path / "c", ACTING)
    for name in "abc":
        assert r"\udcff" in (tmp_path / name).read_text(encoding="utf-8")
    text = (tmp_path / "a").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["\x1b[2J\x00\\udcff\u202e"]
