"""Rewards that need a main thread, or have a process of their own: they score, fail clearly, and leave nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import RewardConfig
from groupwise.errors import ConfigError, DataError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.metrics import resolve
from groupwise.rewards import RewardScorer, Score
from groupwise.types import Completion, Prompt, Rollout

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of rewards need fork")
DATABASE = sqlite3.connect(":memory:")
LOCAL = threading.local()
LOCAL.right = "4"


def prompt(**columns: Any) -> Prompt:
    return Prompt("row-7", (), "2+2?", ModelInput.of((1, 2)), columns={"answer": "4", **columns})


def completions(*texts: str) -> list[Rollout]:
    return [
        Rollout.one_turn(Completion(SampleKey("r", 0, i), (1,), (0.0,), (0,), text, "stop"))
        for i, text in enumerate(texts)
    ]


def score(scorer: RewardScorer, *texts: str, row: Prompt | None = None) -> list[Score]:
    return asyncio.run(scorer.score(row or prompt(), completions(*texts)))


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RewardConfig]:
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(body: str, *, head: str = "def reward(completions, answer):", top: str = "", **settings: Any) -> Any:
        path = tmp_path / "user_rewards.py"
        path.write_text(
            f"import asyncio, os, re, signal, sys, threading, time\n{top}\n{head}\n{textwrap.indent(body, '    ')}\n"
        )
        return RewardConfig.model_validate({"name": f"{path}:reward", **settings})

    return write


def timed(completions: Any, answer: Any) -> list[float]:
    """Guards itself as Math-Verify does."""
    old = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        signal.alarm(5)
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def timed_and_hushed(completions: Any, answer: Any) -> list[float]:
    """Catches whatever its parser raises, as most rewards do."""
    try:
        return timed(completions, answer)
    except Exception:
        return [0.0] * len(completions)


def chained(completions: Any, answer: Any) -> list[float]:
    try:
        return timed(completions, answer)
    except ValueError as error:
        raise TypeError("the parser failed") from error


def from_database(completions: Any, answer: Any) -> list[float]:
    rights = [DATABASE.execute("select ?", (a,)).fetchone()[0] for a in answer]
    return [float(a == c) for a, c in zip(rights, completions, strict=True)]


def on_an_event_loop(completions: Any, answer: Any) -> list[float]:
    async def judge() -> list[float]:
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    return asyncio.get_event_loop().run_until_complete(judge())


def by_thread_local(completions: Any, answer: Any) -> list[float]:
    return [float(c == LOCAL.right) for c in completions]


async def awaited(completions: Any, answer: Any) -> list[float]:
    await asyncio.sleep(0)
    return timed(completions, answer)


@pytest.mark.parametrize(
    "function",
    [timed, timed_and_hushed, chained, from_database, on_an_event_loop, by_thread_local, awaited],
    ids=lambda function: function.__name__,
)
def test_a_function_that_needs_a_main_thread_moves_there_and_no_sample_is_lost(
    function: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def as_a_closure(completions: Any, answer: Any) -> Any:
        return function(completions, answer)

    async def as_an_async_closure(completions: Any, answer: Any) -> Any:
        return await function(completions, answer)

    given = as_an_async_closure if function is awaited else as_a_closure
    scorer = RewardScorer([], functions=[given, lambda completions: [0.5] * len(completions)])
    with caplog.at_level(logging.WARNING, "groupwise"):
        for _ in range(3):
            scores = score(scorer, "4", "5")
            assert [s.rewards[given.__name__] for s in scores] == [1.0, 0.0], scores[0].cause
            assert [s.rewards["lambda"] for s in scores] == [0.5, 0.5]
    assert resolve(scorer.metrics())[f"rewards/{given.__name__}/errors"] == 0
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1, warnings
    assert f"'{given.__name__}' needs a main thread" in warnings[0]
    scorer.close()
    assert children() == []


def test_a_function_of_a_file_moves_to_a_fresh_process(user: Callable[..., RewardConfig]) -> None:
    body = """
    old = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, old)
    global calls
    calls += 1
    assert "torch" not in sys.modules
    return [calls + (os.getpid() != PARENT) / 2] * len(completions)"""
    scorer = RewardScorer([user(body, top=f"PARENT = {os.getpid()}; calls = 0")])
    assert [score(scorer, "a")[0].reward for _ in range(3)] == [1.5, 2.5, 3.5]  # it keeps its process and its state
    scorer.close()
    assert score(scorer, "a")[0].reward == 1.5
    scorer.close()


def test_a_handler_that_was_set_at_import_moves_the_function_before_an_alarm_can_hit_the_trainer(
    user: Callable[..., RewardConfig],
) -> None:
    top = """
def ring(number, frame):
    raise TimeoutError("rung")
signal.signal(signal.SIGALRM, ring)"""
    before = signal.getsignal(signal.SIGALRM)
    try:
        body = "signal.setitimer(signal.ITIMER_REAL, 0.1)\ntime.sleep(5)\nreturn [1.0]"
        failed = score(RewardScorer([user(body, top=top)]), "a")[0]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "TimeoutError: rung" in failed.cause


BAD = [
    ("raise ValueError('schlecht: ü')", r"ValueError: schlecht: ü \(at .*user_rewards\.py:5\)"),
    ("exit(3)", "SystemExit: 3"),
    ("os._exit(3)", "its process ended with exit code 3 during the call"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "its process was ended by signal SIGSEGV during the call"),
    ("return [1.0]", "1 values for 2 completions"),
    ("return [float('nan')] * 2", r"nan \(float\), expected a finite number"),
    ("os.closerange(3, 200); return [1.0] * 2", "its process ended"),
    ("raise ValueError('\\udcff \\x1b[2J' + 'x' * 10**7)", "ValueError: .*x…"),
    ("raise type('\\x1b[2J' + 'E' * 1000, (Exception,), {})", "E…"),
    ("class E(Exception):\n    def __str__(self): exit(1)\nraise E", "E: .*cannot be shown"),
]


@pytest.mark.parametrize(("body", "cause"), BAD)
def test_bad_rewards_in_a_process(user: Callable[..., RewardConfig], body: str, cause: str) -> None:
    scorer = RewardScorer(
        [user(f"if answer[0] == '4':\n{textwrap.indent(body, '    ')}\nreturn [2.0] * 2", isolated=True)]
    )
    scores = score(scorer, "a", "b")
    assert all(s.failed for s in scores)
    assert re.search(cause, scores[0].cause), scores[0].cause
    assert len(scores[0].cause) < 1200
    assert "\x1b" not in scores[0].cause.partition(":")[0]
    assert [s.reward for s in score(scorer, "a", "b", row=prompt(answer="5"))] == [2.0, 2.0]
    scorer.close()
    assert children() == []


def test_what_ends_a_run_passes_through_a_process(user: Callable[..., RewardConfig]) -> None:
    head = "def reward(completions, answer):\n    from groupwise.errors import ConfigError, DataError"
    for body, error in (
        ("raise KeyboardInterrupt", KeyboardInterrupt),
        ("raise ConfigError('set the key')", ConfigError),
        ("raise DataError('no answer')", DataError),
    ):
        scorer = RewardScorer([user(body, head=head, isolated=True)])
        with pytest.raises(error):
            score(scorer, "a")
        scorer.close()


@pytest.mark.parametrize("named", [True, False])
def test_a_call_that_hangs_is_killed_also_where_it_holds_the_interpreter(
    user: Callable[..., RewardConfig], named: bool
) -> None:
    body = """
if completions == ["hang"]:
    import subprocess; subprocess.Popen(["sleep", "60"])
    re.fullmatch("(x|x)+y", "x" * 60)
return [1.0]"""
    config = user(body, isolated=True, timeout=0.4)
    scorer = RewardScorer([config])
    if not named:
        from groupwise.rewards import load_reward

        scorer._entries[0].runner._call = _unnamed(scorer, load_reward(config).function)  # pyright: ignore[reportAttributeAccessIssue]
    assert score(scorer, "fine")[0].reward == 1.0
    started = time.perf_counter()
    failed = score(scorer, "hang")[0]
    assert "no answer within 0.4 s (reward.timeout); its process was ended" in failed.cause
    assert time.perf_counter() - started < 4
    assert score(scorer, "fine")[0].reward == 1.0
    assert resolve(scorer.metrics())["rewards/abandoned_threads"] == 0
    scorer.close()
    assert children() == []


def _unnamed(scorer: RewardScorer, function: Callable[..., Any]) -> Any:
    import dataclasses

    runner: Any = scorer._entries[0].runner
    return dataclasses.replace(runner._call, function=function, config=None)


def test_the_trainers_own_objects_work_from_a_process() -> None:
    reported: list[tuple[str, float]] = []

    class State:
        step = 1

    state = _State()

    def reward(completions: Any, answer: Any, trainer_state: Any, log_metric: Any) -> list[float]:
        timed(completions, answer)
        log_metric("seen", len(completions))
        return [float(trainer_state.step)] * len(completions)

    extras = {"trainer_state": state, "log_metric": lambda name, value: reported.append((name, value)), "unused": State}
    scorer = RewardScorer([], functions=[reward], extras=extras)
    assert score(scorer, "a", "b")[0].reward == 1.0
    state.step = 2
    assert score(scorer, "a")[0].reward == 2.0
    assert reported == [("seen", 2), ("seen", 1)]
    scorer.close()


class _State:
    step = 1


def test_columns_that_cannot_be_sent_bring_the_call_to_the_trainers_thread(caplog: pytest.LogCaptureFixture) -> None:
    def reward(completions: Any, answer: Any, judge: Any) -> list[float]:
        values = timed(completions, answer)
        assert threading.current_thread() is threading.main_thread()
        return [judge[0](x) for x in values]

    scorer = RewardScorer([], functions=[reward])
    with caplog.at_level(logging.WARNING, "groupwise"):
        for _ in range(2):
            scores = score(scorer, "4", "5", row=prompt(judge=lambda x: x + 1))
            assert [s.reward for s in scores] == [2.0, 1.0], scores[0].cause
    assert [("needs a main thread" in r.getMessage(), "trainer's own" in r.getMessage()) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]


def test_the_trainers_own_thread_runs_signals_and_event_loops(user: Callable[..., RewardConfig]) -> None:
    async def judged(completions: Any, answer: Any) -> list[float]:
        await asyncio.sleep(0)
        return timed(completions, answer)

    body = """
    async def judge():
        await asyncio.sleep(0)
        return float(threading.current_thread() is threading.main_thread())
    return [asyncio.run(judge())] * len(completions)"""
    scorer = RewardScorer([user(body, isolated="main")])
    assert score(scorer, "a")[0].reward == 1.0
    for bad, cause in (("exit(3)", "SystemExit: 3"), ("return [1.0, 2.0]", "2 values for 1")):
        assert cause in score(RewardScorer([user(bad, isolated="main")]), "a")[0].cause
    for error in (KeyboardInterrupt, ConfigError):
        name = error.__name__
        with pytest.raises(error):
            score(
                RewardScorer(
                    [
                        user(
                            f"from groupwise import errors; raise getattr(errors, '{name}', KeyboardInterrupt)",
                            isolated="main",
                        )
                    ]
                ),
                "a",
            )


def test_a_copy_computes_with_torch_though_the_pools_of_its_threads_are_gone(threads: Callable[[int], None]) -> None:
    import torch

    threads(2)
    one = torch.ones(600, 600)
    assert float((one @ one).sum()) == 600**3

    def reward(completions: Any, answer: Any) -> list[float]:
        timed(completions, answer)
        grown = (one @ one).mul(0).add(1).softmax(-1)  # products and elementwise work, both in parallel
        return [float(grown.sum())] * len(completions)

    scorer = RewardScorer([], functions=[reward])
    scores = score(scorer, "a", "b")
    assert scores[1].reward == pytest.approx(600, rel=1e-3), scores[1].cause
    scorer.close()


def test_a_run_in_another_thread_as_in_a_notebook_gives_rewards_a_main_thread() -> None:
    def reward(completions: Any, answer: Any) -> list[float]:
        return timed(completions, answer)

    found: list[Score] = []
    scorer = RewardScorer([], functions=[reward])
    for _ in range(2):  # the process ends with the thread that made it, and is made anew
        thread = threading.Thread(target=lambda: found.extend(score(scorer, "4")))
        thread.start()
        thread.join()
    assert [s.reward for s in found] == [1.0, 1.0], found
    scorer.close()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("auto", "auto"), ("main", "main")])
def test_where_it_runs_is_set_on_the_command_line(text: str, value: Any) -> None:
    from groupwise.config.loading import load_config

    loaded = load_config(None, ["--reward.0.name", "gsm8k", "--reward.0.isolated", text])
    assert loaded.config.reward[0].isolated == value
    with pytest.raises(ConfigError, match="isolated"):
        load_config(None, ["--reward.0.name", "gsm8k", "--reward.0.isolated", "sometimes"])


def test_false_stays_in_a_thread(user: Callable[..., RewardConfig]) -> None:
    failed = score(RewardScorer([user("signal.signal(signal.SIGALRM, signal.SIG_DFL)", isolated=False)]), "a")[0]
    assert "signal only works in main thread" in failed.cause


@pytest.mark.parametrize("how", ["file", "closure"])
def test_nothing_is_left_when_the_run_is_killed(how: str, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(
        "import os, time, re\nfrom pathlib import Path\n"
        f"def hangs(completions):\n    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    re.fullmatch('(x|x)+y', 'x' * 60)\n"
    )
    where = str(tmp_path / "hanging.py")
    code = f"""
import asyncio, dataclasses, sys
sys.path.insert(0, {str(tmp_path)!r})
from groupwise.config.reward import RewardConfig
from groupwise.rewards import RewardScorer
from groupwise.inputs import SampleKey
from groupwise.types import Completion, Prompt, Rollout
scorer = RewardScorer([RewardConfig(name={where + ":hangs"!r}, isolated=True)])
if {how == "closure"}:
    import hanging
    runner = scorer._entries[0].runner
    function = lambda completions: hanging.hangs(completions)
    runner._call = dataclasses.replace(runner._call, function=function, config=None)
done = Completion(SampleKey("r", 0, 0), (1,), (0.0,), (0,), "a", "stop")
asyncio.run(scorer.score(Prompt("u", (), "?", (1,)), [done]))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        pid = _wait_for_number(tmp_path / "pid")
        assert pid != parent.pid
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(pid)


def _wait_for_number(path: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError("the reward was never called")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> list[int]:
    """Processes whose parent this one is."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], check=False, capture_output=True, text=True
    )
    return [
        int(line.split()[0]) for line in found.stdout.splitlines() if " ps " not in f" {line} " and "ps -o" not in line
    ]
