"""A tracker by other hands may fail, hang or be slow, at any moment; training must not notice more than one warning."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from groupwise.batches import TrainingBatch
from groupwise.inputs import ModelInput, SampleKey
from groupwise.metrics import Last
from groupwise.tracking import Trackers
from groupwise.tracking.background import Background
from groupwise.tracking.base import Sample, SampleTable
from groupwise.tracking.composite import choose_samples
from groupwise.types import Completion, Prompt, Rollout, RolloutGroup


class Recorder:
    def __init__(self, *, fail_at: str = "", wait_at: str = "") -> None:
        self.calls: list[str] = []
        self.fail_at, self.wait_at = fail_at, wait_at
        self.go_on = threading.Event()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name.startswith(self.wait_at or "?"):
            self.go_on.wait(20)
        if name == self.fail_at:
            raise RuntimeError(f"{name} is broken")

    def start(self, config, run_dir) -> None:
        self._call("start")

    def log(self, step, metrics) -> None:
        self._call(f"log {step}")

    def samples(self, step, samples) -> None:
        self._call(f"samples {step}")

    def close(self) -> None:
        self._call("close")


def rollout(index: int, reward: float | None) -> Rollout:
    written = Completion(SampleKey("u", 0, index), (1,), (0.0,), (0,), f"answer {index}", "stop")
    return Rollout.one_turn(written, rewards={"match": reward}, reward=reward)


def batch() -> TrainingBatch:
    groups = tuple(
        RolloutGroup(k, Prompt(f"u{k}", (), f"question {k}", ModelInput.of((1,))), (rollout(0, 1.0), rollout(1, None)))
        for k in range(3)
    )
    return TrainingBatch(groups, ((0.5, -0.5),) * 3, (), {"reward": Last(1.0)})


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_calls_arrive_in_order_and_close_waits_for_them(tmp_path: Path):
    recorder = Recorder()
    trackers = Trackers({"x": Background("x", recorder)}, samples_every=2)
    trackers.start({}, tmp_path)
    for step in (1, 2):
        trackers.samples(step, batch())
        trackers.log(step, {})
    trackers.close()
    assert recorder.calls == ["start", "log 1", "samples 2", "log 2", "close"]


@pytest.mark.parametrize("moment", ["start", "log 2", "samples 2", "close"])
def test_a_failure_in_the_background_is_one_warning(moment: str, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    bad, good = Recorder(fail_at=moment), Recorder()
    trackers = Trackers({"bad": Background("bad", bad), "good": Background("good", good)}, samples_every=1)
    with caplog.at_level(logging.WARNING, logger="groupwise"):
        trackers.start({}, tmp_path)
        for step in range(1, 5):
            trackers.samples(step, batch())
            trackers.log(step, {})
            time.sleep(0.01)
        trackers.close()
    assert good.calls[-2:] == ["log 4", "close"]
    assert bad.calls[-1] == "close", "what it had opened is closed"
    assert trackers.names == ("good",)
    assert len(caplog.records) == 1
    assert f"off for the rest of this run: RuntimeError: {moment} is broken" in caplog.text


def test_a_failure_turns_up_before_the_end_of_the_run(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    bad = Recorder(fail_at="start")
    trackers = Trackers({"bad": Background("bad", bad)})
    trackers.start({}, tmp_path)
    wait_until(lambda: bad.calls[-1:] == ["close"])
    wait_until(lambda: (trackers.log(1, {}), not trackers.names)[1])
    assert "bad tracker failed" in caplog.text


def test_a_slow_tracker_slows_nothing_and_loses_what_it_cannot_take(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    slow = Recorder(wait_at="log")
    trackers = Trackers({"slow": Background("slow", slow, capacity=3)})
    trackers.start({}, tmp_path)
    started = time.monotonic()
    for step in range(1, 1000):
        trackers.log(step, {"reward": 1.0})
    assert time.monotonic() - started < 2
    assert [r.getMessage() for r in caplog.records if "3 calls behind" in r.getMessage()] == [
        "the slow tracker is 3 calls behind; what it cannot take is left out of it (not of the run's files)"
    ]
    slow.go_on.set()
    trackers.close()
    assert slow.calls[-1] == "close"
    assert len(slow.calls) <= 7


@pytest.mark.parametrize("capacity", [1, 100], ids=["queue full", "queue with room"])
@pytest.mark.parametrize("moment", ["start", "log", "close"])
def test_a_stuck_tracker_is_left_behind(moment: str, capacity: int, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    stuck = Recorder(wait_at=moment)
    trackers = Trackers({"stuck": Background("stuck", stuck, capacity=capacity, close_seconds=0.3)})
    trackers.start({}, tmp_path)
    for step in range(5):
        trackers.log(step, {})
        time.sleep(0.01)
    started = time.monotonic()
    trackers.close()
    assert 0.2 < time.monotonic() - started < 1.5
    assert sum("stuck tracker failed" in record.getMessage() for record in caplog.records) == 1
    assert "TimeoutError" in caplog.text
    stuck.go_on.set()


def test_stuck_trackers_are_waited_for_together(tmp_path: Path):
    stuck = {name: Recorder(wait_at="close") for name in ("a", "b", "c", "d")}
    trackers = Trackers({name: Background(name, tracker, close_seconds=0.5) for name, tracker in stuck.items()})
    trackers.start({}, tmp_path)
    started = time.monotonic()
    trackers.close()
    assert time.monotonic() - started < 1.2
    assert all(tracker.calls[-1] == "close" for tracker in stuck.values())
    for tracker in stuck.values():
        tracker.go_on.set()


def test_the_wait_at_the_end_is_what_the_page_says():
    page = (Path(__file__).parents[3] / "docs" / "trackers.md").read_text(encoding="utf-8")
    assert "fifteen seconds in all" in page
    assert Background("x", Recorder())._close_seconds == 15


def test_a_tracker_that_never_started_closes(tmp_path: Path):
    Background("x", Recorder()).close()


def test_a_missing_package_says_how_to_install_it(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    class Missing(Recorder):
        def start(self, config, run_dir) -> None:
            import no_such_tracker  # type: ignore[import-not-found]  # noqa: F401

    trackers = Trackers({"missing": Background("missing", Missing())})
    trackers.start({}, tmp_path)
    trackers.close()
    assert "pip install 'groupwise[trackers]'" in caplog.text


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (5, [5])])
def test_tables_come_when_they_are_due(every: int, steps: list[int]):
    recorder = Recorder()
    trackers = Trackers({"x": recorder}, samples_every=every)
    for step in range(1, 6):
        trackers.samples(step, batch())
    assert recorder.calls == [f"samples {step}" for step in steps]


def test_samples_are_whole_groups_as_far_as_they_go():
    chosen = choose_samples(batch(), 3)
    assert [(s.prompt, s.completion, s.reward, s.advantage) for s in chosen] == [
        ("question 0", "answer 0", 1.0, 0.5),
        ("question 0", "answer 1", None, -0.5),
        ("question 1", "answer 0", 1.0, 0.5),
    ]
    assert len(choose_samples(batch(), 99)) == 6


def test_a_table_has_a_column_for_every_reward():
    samples = [Sample("p", "a", 1.0, {"x": 1.0}, 0.5), Sample("p", "b", None, {"y": 0.5, "x": None}, -0.5)]
    table = SampleTable.of(3, samples)
    assert table.columns == ("step", "prompt", "completion", "reward", "rewards/x", "rewards/y", "advantage")
    assert table.rows == ((3, "p", "a", 1.0, 1.0, None, 0.5), (3, "p", "b", None, None, 0.5, -0.5))
