from __future__ import annotations

import asyncio
import logging
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupwise.config import RewardConfig
from groupwise.errors import ConfigError, DataError, RewardError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.metrics import resolve
from groupwise.rewards import RewardScorer, Score, load_reward
from groupwise.types import Completion, Prompt, Rollout

ROW = {"answer": "4", "reward_model": {"ground_truth": "4"}}


def prompt(source: str = "math", *, chat: bool = False, **columns: Any) -> Prompt:
    messages = ({"role": "user", "content": "2+2?"},) if chat else ()
    return Prompt("row-7", messages, "2+2?", ModelInput.of((1, 2)), data_source=source, columns=columns or ROW)


def completions(*texts: str) -> list[Rollout]:
    return [
        Rollout.one_turn(
            Completion(SampleKey("row-7", 0, i), tuple(range(len(t))), (0.0,) * len(t), (0,) * len(t), t, "stop")
        )
        for i, t in enumerate(texts)
    ]


def config(name: str, **settings: Any) -> RewardConfig:
    return RewardConfig.model_validate({"name": name, **settings})


def score(scorer: RewardScorer, *texts: str, row: Prompt | None = None) -> list[Score]:
    return asyncio.run(scorer.score(row or prompt(), completions(*texts)))


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RewardConfig]:
    """Write a user's reward file with one function `reward` and give its config."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(body: str, *, head: str = "def reward(completions, **columns):", **settings: Any) -> RewardConfig:
        path = tmp_path / "user_rewards.py"
        path.write_text(f"import asyncio, sys, time\nimport numpy as np\n{head}\n    {body}\n")
        return config(f"{path}:reward", **settings)

    return write


def test_weighted_sum_and_breakdown() -> None:
    scorer = RewardScorer([config("gsm8k"), config("format", weight=0.5)])
    scores = score(scorer, "#### 4", "#### 5", "4", "#### 4 eggs", "")
    assert [s.reward for s in scores] == [1.5, 0.5, 0.0, 1.0, 0.0]
    assert scores[3] == Score(reward=1.0, rewards={"gsm8k": 1.0, "format": 0.0}, failed=False, cause="")


def test_none_is_left_out_of_the_sum_and_all_none_is_none() -> None:
    def sometimes(completions: list[str]) -> list[float | None]:
        return [None if text == "skip" else 2.0 for text in completions]

    scores = score(RewardScorer([], functions=[sometimes]), "skip", "x")
    assert [(s.reward, s.failed) for s in scores] == [(None, False), (2.0, False)]
    both = score(RewardScorer([config("format")], functions=[sometimes], function_weights=[3]), "skip", "x")
    assert [s.reward for s in both] == [0.0, 6.0]
    assert both[0].rewards == {"format": 0.0, "sometimes": None}


def test_what_a_reward_is_given() -> None:
    seen: list[dict[str, Any]] = []

    def everything(**given: Any) -> list[float]:
        seen.append(given)
        given["completions"].clear()
        return [0.0, 0.0]

    def subset(completions: Any, answer: Any, missing: Any = "default") -> list[float]:
        seen.append({"completions": completions, "answer": answer, "missing": missing})
        return [0.0, 0.0]

    scorer = RewardScorer([], functions=[everything, subset])
    asyncio.run(scorer.score(prompt(answer="4", level=np.int64(3)), completions("é", "bb")))
    asyncio.run(scorer.score(prompt(chat=True, answer="4"), completions("é", "bb")))
    text, text_subset, chat, chat_subset = sorted(seen, key=lambda given: isinstance(given.get("answer"), str))
    assert text["prompts"] == ["2+2?", "2+2?"]
    assert text["completion_ids"] == [[0], [0, 1]]
    assert (text["answer"], text["level"]) == (["4", "4"], [3, 3])
    assert text_subset == {"completions": ["é", "bb"], "answer": ["4", "4"], "missing": "default"}
    assert chat["prompts"] == [[{"role": "user", "content": "2+2?"}]] * 2
    assert chat_subset["completions"] == [[{"role": "assistant", "content": c}] for c in ("é", "bb")]


def test_args_reach_the_function(user: Callable[..., RewardConfig]) -> None:
    reward = user("return [scale] * len(completions)", head="def reward(completions, scale=1.0):", args={"scale": 7})
    assert score(RewardScorer([reward]), "a", "b")[1].reward == 7.0


@pytest.mark.parametrize(
    "body",
    [
        "return np.array([1, 0.5])",
        "return [np.float32(1), np.float64(0.5)]",
        "return (True, 0.5)",
        "from fractions import Fraction; return [1, Fraction(1, 2)]",
        "import torch; return [torch.tensor(1), torch.tensor([0.5])]",
        "import torch; return torch.tensor([1.0, 0.5])",
    ],
)
def test_numbers_of_all_kinds(user: Callable[..., RewardConfig], body: str) -> None:
    scores = score(RewardScorer([user(body)]), "a", "b")
    assert [s.reward for s in scores] == [1.0, 0.5], scores
    assert all(type(s.reward) is float for s in scores)


BAD = [
    ("raise ValueError('schlecht: ü')", r"ValueError: schlecht: ü \(at .*user_rewards\.py:4\)"),
    ("import json; json.loads('{')", r"JSONDecodeError: .*user_rewards\.py:4\)"),
    ("sys.exit(3)", "SystemExit: 3"),
    ("raise asyncio.CancelledError()", "CancelledError"),
    ("raise TimeoutError('mine')", "TimeoutError: mine"),
    ("raise StopIteration", "StopIteration|RuntimeError: coroutine raised"),
    ("f = lambda: f(); f()", "RecursionError"),
    ("E = type('E', (Exception,), {'__str__': lambda self: 1 / 0}); raise E()", "E: .*cannot be shown"),
    ("time.sleep(30)", r"no answer within 0\.2 s"),
    ("return [1.0]", "1 values for 2 completions"),
    ("return [1.0] * 3", "3 values for 2 completions"),
    ("return []", "0 values for 2 completions"),
    ("return None", r"None \(NoneType\), expected a list of 2"),
    ("return 1.0", r"1\.0 \(float\), expected a list"),
    ("return '12'", r"'12' \(str\), expected a list"),
    ("return {0: 1.0, 1: 1.0}", r"\(dict\), expected a list"),
    ("return (x for x in [1, 2])", r"\(generator\), expected a list"),
    ("return np.array(1.0)", r"\(ndarray\), expected a list of 2"),
    ("return ['1', '1']", r"'1' \(str\), expected a finite number or None"),
    ("return [float('nan')] * 2", r"nan \(float\)"),
    ("return [float('-inf')] * 2", r"-inf \(float\)"),
    ("return [10 ** 400] * 2", "expected a finite number"),
    ("return [1j, [1]]", "expected a finite number"),
]


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(("body", "cause"), BAD)
def test_bad_rewards(user: Callable[..., RewardConfig], body: str, cause: str, kind: str) -> None:
    head = f"{'async ' if kind == 'async' else ''}def reward(completions, **columns):"
    timeout = 0.2 if "sleep" in body else 5
    failing = RewardScorer([config("gsm8k"), user(body, head=head, timeout=timeout)])
    scores = score(failing, "#### 4", "x")
    for answer, right in zip(scores, (1.0, 0.0), strict=True):
        assert (answer.reward, answer.failed) == (None, True)
        assert answer.rewards == {"gsm8k": right, "reward": None}
    assert all("reward 'reward' failed: " in s.cause for s in scores)
    assert re.search(cause, scores[0].cause), scores[0].cause
    assert resolve(failing.metrics())["rewards/reward/errors"] == 2


def test_zeros_that_stand_for_errors_keep_their_cause(user: Callable[..., RewardConfig]) -> None:
    broken = user("raise ValueError('x')", on_error="zero")
    (alone,) = score(RewardScorer([broken]), "#### 4")
    assert (alone.reward, alone.rewards, alone.failed) == (0.0, {"reward": 0.0}, False)
    assert alone.cause.startswith("reward 'reward' failed: ValueError: x")
    (beside,) = score(RewardScorer([config("gsm8k"), broken]), "#### 4")
    assert (beside.reward, beside.cause) == (1.0, "")  # gsm8k's value is the completion's own


def test_on_error_zero_and_stop(user: Callable[..., RewardConfig]) -> None:
    zero = RewardScorer([config("gsm8k"), user("raise ValueError('x')", on_error="zero")])
    scores = score(zero, "#### 4", "x")
    assert scores[0] == Score(reward=1.0, rewards={"gsm8k": 1.0, "reward": 0.0}, failed=False, cause="")
    numbers = resolve(zero.metrics())
    assert (numbers["rewards/reward/errors"], numbers["rewards/reward/mean"]) == (2, 0.0)
    for body in ("raise ValueError('x')", "return [1.0, float('nan')]", "time.sleep(30)"):
        stop = RewardScorer([user(body, on_error="stop", timeout=0.2)])
        with pytest.raises(RewardError, match="reward 'reward' failed on row 'row-7'"):
            score(stop, "a", "b")


def test_one_bad_value_fails_one_completion(user: Callable[..., RewardConfig]) -> None:
    body = "return [1.0, float('nan'), None]"
    scores = score(RewardScorer([user(body)]), "a", "b", "c")
    assert [(s.reward, s.failed) for s in scores] == [(1.0, False), (None, True), (None, False)]
    scores = score(RewardScorer([user(body, on_error="zero")]), "a", "b", "c")
    assert [s.reward for s in scores] == [1.0, 0.0, None]


def test_sum_that_overflows_fails() -> None:
    def huge(completions: Sequence[str]) -> list[float]:
        return [1e308] * len(completions)

    answer = score(RewardScorer([], functions=[huge], function_weights=[10]), "a")[0]
    assert answer.failed
    assert "weighted sum" in answer.cause


def test_missing_column_names_reward_column_and_those_that_exist(user: Callable[..., RewardConfig]) -> None:
    scorer = RewardScorer([user("return [1.0]", head="def reward(completions, reference):", on_error="zero")])
    with pytest.raises(ConfigError, match=r"'reward' needs the column reference, .*'row-7'.*: answer, reward_model"):
        score(scorer, "a")
    with pytest.raises(ConfigError, match="needs the column reference"):
        scorer.check_prompts([prompt()])


def test_missing_reference_answer_is_never_a_failed_rollout() -> None:
    scorer = RewardScorer([config("gsm8k", on_error="zero")])
    with pytest.raises(ConfigError, match=r"row 'row-7': .*the row has: question"):
        score(scorer, "#### 4", row=prompt(question="2+2?"))
    for bad in (prompt(answer="four"), prompt(answer=None)):
        with pytest.raises(DataError, match="row 'row-7'"):
            score(scorer, "#### 4", row=bad)
        with pytest.raises(DataError, match="row 'row-7'"):
            scorer.check_prompts([prompt(), bad])
    scorer.check_prompts([prompt()])


def test_routing() -> None:
    scorer = RewardScorer([config("gsm8k", data_source=["math"]), config("exact_match", data_source=["math", "geo"])])
    scorer.check_sources(["math", "geo", "geo"])
    with pytest.raises(ConfigError, match=r"data source 'poems'; .*gsm8k: 'math'; exact_match: 'math', 'geo'"):
        scorer.check_sources(["math", "poems"])
    assert score(scorer, "#### 4")[0].rewards == {"gsm8k": 1.0, "exact_match": 0.0}
    assert score(scorer, "4", row=prompt("geo"))[0].rewards == {"exact_match": 1.0}
    with pytest.raises(ConfigError, match="'poems'"):
        score(scorer, "4", row=prompt("poems"))
    RewardScorer([config("gsm8k")]).check_sources(["anything"])


def test_names_are_unique_and_wrong_sets_are_refused() -> None:
    def gsm8k(completions: Sequence[str]) -> list[float]:
        return [9.0] * len(completions)

    scorer = RewardScorer([config("gsm8k"), config("gsm8k", args={"mode": "strict"})], functions=[gsm8k])
    assert scorer.names == ("gsm8k", "gsm8k_2", "gsm8k_3")
    assert score(scorer, "#### 4.0")[0].rewards == {"gsm8k": 1.0, "gsm8k_2": 0.0, "gsm8k_3": 9.0}
    not_callable: Any = 3
    for wrong, message in (
        (lambda: RewardScorer([]), "no reward is set"),
        (lambda: RewardScorer([], functions=[not_callable]), "got 3"),
        (lambda: RewardScorer([], functions=[gsm8k], function_weights=[1, 2]), "2 reward weights for 1"),
        (lambda: RewardScorer([], functions=[gsm8k], function_weights=[math.nan]), "weight = nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong()


def test_no_completions() -> None:
    assert score(RewardScorer([config("gsm8k")])) == []


def test_event_loop_goes_on_while_rewards_block(user: Callable[..., RewardConfig]) -> None:
    async def run(scorer: RewardScorer) -> float:
        task = asyncio.create_task(scorer.score(prompt(), completions("a")))
        longest, last = 0.0, time.perf_counter()
        while not task.done():
            await asyncio.sleep(0.01)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        assert (await task)[0].reward == 1.0
        return longest

    for head in ("def reward(completions):", "async def reward(completions):"):
        blocking = user("time.sleep(0.6); return [1.0]", head=head)
        assert asyncio.run(run(RewardScorer([blocking]))) < 0.5


def test_sync_calls_of_one_reward_never_overlap_and_async_ones_do() -> None:
    busy, most = 0, {"sync": 0, "async": 0}

    def sync(completions: Sequence[str]) -> list[float]:
        nonlocal busy
        busy += 1
        most["sync"] = max(most["sync"], busy)
        time.sleep(0.01)
        busy -= 1
        return [0.0]

    running = 0

    async def overlapping(completions: Sequence[str]) -> list[float]:
        nonlocal running
        running += 1
        most["async"] = max(most["async"], running)
        await asyncio.sleep(0.1)
        running -= 1
        return [0.0]

    scorer = RewardScorer([], functions=[sync, overlapping])

    async def run() -> None:
        await asyncio.gather(*(scorer.score(prompt(), completions("a")) for _ in range(5)))

    asyncio.run(run())
    asyncio.run(run())  # a scorer outlives an event loop
    assert most == {"sync": 1, "async": 5}


def test_a_hung_call_holds_up_nothing_else(user: Callable[..., RewardConfig]) -> None:
    body = "time.sleep(30) if completions == ['hang'] else None; return [1.0]"
    for head in ("def reward(completions):", "async def reward(completions):"):
        scorer = RewardScorer([user(body, head=head, timeout=0.2)])
        started = time.perf_counter()
        assert score(scorer, "hang")[0].failed
        assert score(scorer, "fine")[0].reward == 1.0
        assert time.perf_counter() - started < 5
        assert resolve(scorer.metrics())["rewards/abandoned_threads"] == 1


def test_async_reward_that_only_waits_is_cancelled_and_leaves_no_thread(user: Callable[..., RewardConfig]) -> None:
    body = "await asyncio.sleep(30)"
    scorer = RewardScorer([user(body, head="async def reward(completions):", timeout=0.1)])
    assert all(score(scorer, "a")[0].failed for _ in range(10))
    assert resolve(scorer.metrics())["rewards/abandoned_threads"] == 0


def test_eight_abandoned_threads_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "hanging.py"
    path.write_text("import threading\nGATE = threading.Event()\ndef hangs(completions):\n    GATE.wait(60)\n")
    reward = config(f"{path}:hangs", timeout=0.05, on_error="zero")
    scorer = RewardScorer([reward])
    for count in range(1, 8):
        assert score(scorer, "a")[0].reward == 0.0
        assert resolve(scorer.metrics())["rewards/abandoned_threads"] == count
    with pytest.raises(RewardError, match=r"8 reward calls hang.*hangs \(8\).*timeout"):
        score(scorer, "a")
    load_reward(reward).function.__globals__["GATE"].set()
    deadline = time.perf_counter() + 5
    while resolve(scorer.metrics())["rewards/abandoned_threads"] and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert resolve(scorer.metrics())["rewards/abandoned_threads"] == 0


@pytest.mark.parametrize("head", ["def reward(completions):", "async def reward(completions):"])
def test_interrupt_and_cancellation_pass(user: Callable[..., RewardConfig], head: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(RewardScorer([user("raise KeyboardInterrupt", head=head, on_error="zero")]), "a")

    async def cancelled(scorer: RewardScorer) -> None:
        task = asyncio.create_task(scorer.score(prompt(), completions("a")))
        await asyncio.sleep(0.1)
        task.cancel()
        await task

    body = "await asyncio.sleep(30)" if head.startswith("async") else "time.sleep(3)"
    started = time.perf_counter()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled(RewardScorer([user(body, head=head, on_error="zero")])))
    assert time.perf_counter() - started < 2.5


def test_exit_in_a_task_of_an_async_reward_is_a_failure(user: Callable[..., RewardConfig]) -> None:
    body = """
    async def leave():
        sys.exit(3)
    if completions == ["bad"]:
        await asyncio.gather(leave())
    return [1.0]"""
    scorer = RewardScorer([user(body, head="async def reward(completions):", timeout=0.3)])
    assert score(scorer, "bad")[0].failed
    assert score(scorer, "good")[0].reward == 1.0


def test_hung_reward_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text("import time\ndef hangs(completions):\n    time.sleep(60)\n")
    code = f"""
import asyncio
from groupwise.config.reward import RewardConfig
from groupwise.inputs import ModelInput, SampleKey
from groupwise.rewards import RewardScorer
from groupwise.types import Completion, Prompt, Rollout
scorer = RewardScorer([RewardConfig(name={str(tmp_path / "hanging.py") + ":hangs"!r}, timeout=0.2)])
done = Rollout.one_turn(Completion(SampleKey("r", 0, 0), (1,), (0.0,), (0,), "a", "stop"))
print(asyncio.run(scorer.score(Prompt("u", (), "?", ModelInput.of((1,))), [done]))[0].failed)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_metrics_start_anew_after_each_reading() -> None:
    scorer = RewardScorer([config("gsm8k")])
    score(scorer, "#### 4", "#### 5", "#### 4", "#### 4")
    numbers = resolve(scorer.metrics())
    assert numbers["rewards/gsm8k/mean"] == pytest.approx(0.75)
    assert numbers["rewards/gsm8k/std"] == pytest.approx(0.5)
    assert numbers["rewards/gsm8k/errors"] == 0
    assert 0 < numbers["rewards/gsm8k/seconds"] < 5
    assert resolve(scorer.metrics()) == {
        "rewards/gsm8k/errors": 0,
        "rewards/gsm8k/seconds": 0,
        "rewards/abandoned_threads": 0,
    }
    score(scorer, "#### 5")
    assert resolve(scorer.metrics())["rewards/gsm8k/mean"] == 0


def test_metrics_do_not_depend_on_the_order_of_arrival() -> None:
    values = [0.1, 1e16, -1e16, 0.3, 1e-9, 7.7, 1e8, -3.3]
    waits = {value: 0.01 * i for i, value in enumerate(values)}

    async def slow(completions: Sequence[str]) -> list[float]:
        await asyncio.sleep(waits[float(completions[0])])
        return [float(text) for text in completions]

    async def run(scorer: RewardScorer) -> None:
        await asyncio.gather(*(scorer.score(prompt(), completions(repr(value))) for value in values))

    found = []
    for order in (values, values[::-1], values[3:] + values[:3]):
        waits.update({value: 0.01 * i for i, value in enumerate(order)})
        scorer = RewardScorer([], functions=[slow])
        asyncio.run(run(scorer))
        numbers = resolve(scorer.metrics())
        found.append((numbers["rewards/slow/mean"], numbers["rewards/slow/std"]))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == math.fsum(values) / len(values)


def test_a_function_that_sees_no_answer_is_refused() -> None:
    for name in ("os:system", "os.path:join", "time:sleep"):
        with pytest.raises(ConfigError, match=r"cannot be found out|sees no answer|only be given by position"):
            RewardScorer([config(name)])

    def wrong(answer: Any) -> list[float]:
        return [1.0]

    with pytest.raises(ConfigError, match=r"'wrong' takes \(answer\), so it sees no answer"):
        RewardScorer([], functions=[wrong])


def test_what_the_users_file_set_where_it_was_loaded_holds_in_a_call(user: Callable[..., RewardConfig]) -> None:
    import decimal

    before = decimal.getcontext().prec
    try:
        decimal.getcontext().prec = 5
        scorer = RewardScorer([user("from decimal import getcontext as c; c().prec -= 1; return [c().prec]")])
        assert [score(scorer, "a")[0].reward for _ in range(2)] == [4.0, 4.0]
        assert score(RewardScorer([config("gsm8k")]), "#### -1234567", row=prompt(answer="-1234567"))[0].reward == 1.0
        assert score(RewardScorer([config("gsm8k")]), "#### -1234567", row=prompt(answer="-1234568"))[0].reward == 0.0
    finally:
        decimal.getcontext().prec = before


def test_first_failure_of_a_kind_is_logged_with_its_traceback(
    user: Callable[..., RewardConfig], caplog: pytest.LogCaptureFixture
) -> None:
    scorer = RewardScorer([user("raise ValueError(time.time())")])
    with caplog.at_level(logging.WARNING, "groupwise.rewards"):
        for _ in range(3):
            score(scorer, "a")
    assert len(caplog.records) == 1
    assert "Traceback" in caplog.text
    assert "row-7" in caplog.text


def test_catastrophic_pattern_is_stopped_by_the_timeout() -> None:
    scorer = RewardScorer([config("format", args={"pattern": "(x|x)+y"}, timeout=0.3), config("gsm8k")])
    started = time.perf_counter()
    answer = score(scorer, "x" * 60)[0]
    assert time.perf_counter() - started < 3
    assert answer.failed
    assert answer.rewards == {"format": None, "gsm8k": 0.0}
