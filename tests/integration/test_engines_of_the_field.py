"""Training over servers that behave as vLLM and SGLang do, with what goes wrong in them, and over real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groupwise.assembly.engine_check import Checked, check_of
from groupwise.config import Config
from groupwise.engines.commands import Command
from groupwise.engines.external import reach
from groupwise.engines.launch import EngineProcess
from groupwise.engines.weights import WeightRef
from groupwise.errors import ConfigError, EngineError
from groupwise.launch import Given, run_training
from groupwise.policy import Learner
from tests.engines.contract import lmdeploy, openai, server, sglang, vllm
from tests.made_environment import nods

KINDS: dict[str, Any] = {"vllm": vllm, "sglang": sglang}
SOME = ["vllm", pytest.param("sglang", marks=pytest.mark.slow)]
"""What is the same in both is seen of one, where time is short."""


@contextlib.contextmanager
def served(kind: str, task: Any, *traps: str) -> Iterator[server.Serving]:
    with server.serving(KINDS[kind].contract(task.model, None, *traps)) as serving:
        yield serving


def over(kind: str, *urls: str, **settings: Any) -> dict[str, Any]:
    return {"engine": kind, "urls": list(urls), "engine_timeout": 5.0, **settings}


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.parametrize("lora", [{}, pytest.param({"rank": 2}, marks=pytest.mark.slow)], ids=["whole", "adapter"])
@pytest.mark.parametrize("kind", SOME)
def test_every_check_of_the_contract_passes(task: Any, kind: str, lora: dict[str, Any]) -> None:
    with served(kind, task) as serving:
        model = {"path": str(task.model), "dtype": "float32", "device": "cpu"}
        rollout = over(kind, serving.url, max_completion_tokens=200)
        config = Config.model_validate({"model": model, "rollout": rollout, "lora": lora})
        lines: list[Checked] = []
        found = asyncio.run(check_of(config, tell=lines.append).run())
    assert [line.name for line in found if not line.passed] == [], [line.seen for line in found]
    assert len(found) == len(lines) == 10


@pytest.mark.parametrize("kind", SOME)
def test_a_run_learns_over_it_and_says_how_far_it_was_off(task: Any, tmp_path: Path, kind: str) -> None:
    with served(kind, task) as one, served(kind, task) as two:
        run_training(task.config(tmp_path / "run", rollout=over(kind, one.url, two.url)))
        tokens = [len([s for s in each.contract.seen if "generate" in s[1]]) for each in (one, two)]
    steps = [row for row in rows_of(tmp_path / "run", "metrics.jsonl") if "reward" in row]
    assert len(steps) == 4
    assert all(0 < row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in steps)
    assert all(0 < row["sync/logp_difference"] < 1e-4 for row in steps)
    assert [row["sync/verified"] for row in steps] == [2.0] * 4
    assert all(row["sync/bytes"] > 0 and row["sync/seconds"] > 0 for row in steps)
    assert all(row["correction/weight_mean"] == pytest.approx(1, abs=1e-4) for row in steps)
    assert min(tokens) > 4 * 4, tokens  # both were asked, and not for proofs alone
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["algorithm"]["correction"]["name"] == "truncate"


@pytest.mark.parametrize("kind", SOME)
def test_reward_and_weights_are_those_of_the_native_engine_where_draws_are_certain(
    task: Any, tmp_path: Path, kind: str
) -> None:
    """At a tiny temperature both draw the likeliest token, so they learn from the same samples."""
    cold = {"temperature": 1e-3, "group_size": 2}
    with served(kind, task) as serving:
        run_training(task.config(tmp_path / "there", rollout=over(kind, serving.url, **cold), train={"steps": 1}))
    run_training(task.config(tmp_path / "here", rollout=cold, train={"steps": 1}))
    here, there = (rows_of(tmp_path / run, "metrics.jsonl")[-1]["reward"] for run in ("here", "there"))
    assert here == there


class Sabotage:
    """A reward that switches a trap on after the first step's groups."""

    def __init__(self, serving: server.Serving, trap: str, after: int = 4) -> None:
        self.serving, self.trap, self.after, self.calls = serving, trap, after, 0

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.calls += 1
        if self.calls == self.after:
            self.serving.set_traps(self.trap)
        return [sum(token < 130 for token in ids) / len(ids) + len(ids) / 100 for ids in completion_ids]


def caught(run: Path, trained: bool, said: str, log: str) -> None:
    """It was noticed; and where another load healed it, everything that was learned is right."""
    assert re.search(said, log), log
    steps = [row for row in rows_of(run, "metrics.jsonl") if "reward" in row]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in steps)
    assert len(steps) == (4 if trained else 1)


def trained_with(config: Config, reward: Any) -> bool:
    """Whether the run came to its end."""
    try:
        run_training(config, given=Given(rewards=[reward]))
    except EngineError:
        return False
    return True


SABOTAGES = [
    ("stale_head", {}, "log-probs differ from the trainer's"),
    ("missing_tensor", {}, "log-probs differ from the trainer's"),
    ("no_effect", {}, "log-probs differ|weights of an earlier version"),
    ("stale_decode", {}, "log-probs differ|draws as before"),
    ("unbound_adapter", {"rank": 2}, "bound to nothing|log-probs differ"),
]


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize(("trap", "lora", "said"), SABOTAGES, ids=[name for name, *_ in SABOTAGES])
def test_a_sabotaged_update_is_caught_before_a_sample_of_it_is_trained(
    task: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    trap: str,
    lora: dict[str, Any],
    said: str,
) -> None:
    with served(kind, task) as serving:
        config = task.config(tmp_path / "run", reward=[], lora=lora, rollout=over(kind, serving.url))
        trained = trained_with(config, Sabotage(serving, trap))
    assert trained == (trap == "stale_decode")  # a second load heals it, as it is played here
    caught(tmp_path / "run", trained, said, caplog.text)


@pytest.mark.parametrize(
    ("trap", "lora"), [("no_effect", {}), ("stale_decode", {}), ("unbound_adapter", {"rank": 2})], ids=str
)
@pytest.mark.parametrize("kind", SOME)
def test_it_is_caught_where_a_step_is_smaller_than_the_tolerance(
    task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, trap: str, lora: dict[str, Any]
) -> None:
    with served(kind, task) as serving:
        small = {"optim": {"lr": 1e-5}, "rollout": over(kind, serving.url, sync_tolerance=0.5)}
        config = task.config(tmp_path / "run", reward=[], lora=lora, **small)
        trained = trained_with(config, Sabotage(serving, trap))
    assert trained == (trap == "stale_decode")
    assert re.search("earlier version|bound to nothing", caplog.text), caplog.text


@pytest.mark.slow
def test_a_quantised_engine_may_answer_as_before_and_be_off_by_a_nat(
    task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Small steps round to nothing there, as they do in an engine that takes no weights at all."""

    def trained(name: str, lr: float, **settings: Any) -> bool:
        with served("vllm", task) as serving:
            small = {"optim": {"lr": lr}, "rollout": over("vllm", serving.url, **settings)}
            config = task.config(tmp_path / name, reward=[], train={"steps": 3}, **small)
            return trained_with(config, Sabotage(serving, "no_effect"))

    assert trained("quantised", 1e-6, quantized_engine=True)
    steps = [row for row in rows_of(tmp_path / "quantised", "metrics.jsonl") if "reward" in row]
    assert 1e-4 < max(row["sync/logp_difference"] for row in steps) < 1  # more than a plain engine is allowed
    assert not trained("plain", 1e-6, sync_tolerance=1.0)
    assert "earlier version" in caplog.text
    assert not trained("far", 0.05, quantized_engine=True)
    assert "and 1 is allowed (rollout.sync_tolerance)" in caplog.text


@pytest.mark.parametrize(
    ("trap", "said"),
    [
        ("wrong_vocabulary", "of a vocabulary of"),
        ("impossible_logprob", "stands for a missing one|log-probs differ"),
        ("other_length", "log-probs of"),
        ("stale_version", "drew with version"),
        ("short_context=24", "was cut|its context is too short|differ|tokens; 16 were asked"),
        ("nan=3", "NaN|missing|error|refused|ended it|differ"),
    ],
)
@pytest.mark.parametrize("kind", SOME)
def test_an_answer_that_cannot_be_learned_from_ends_the_run(
    task: Any, tmp_path: Path, kind: str, trap: str, said: str
) -> None:
    with served(kind, task) as serving:
        reward = Sabotage(serving, trap)
        config = task.config(tmp_path / "run", reward=[], rollout=over(kind, serving.url, max_completion_tokens=12))
        with pytest.raises(EngineError, match=said):
            run_training(config, given=Given(rewards=[reward]))
    assert {row["step"] for row in rows_of(tmp_path / "run", "ledger.jsonl")} == {1}


@pytest.mark.parametrize(("kind", "trap"), [("vllm", "flush_refused=1"), ("sglang", "flush_refused=1")])
def test_a_cache_that_was_not_forgotten_is_asked_to_again(task: Any, tmp_path: Path, kind: str, trap: str) -> None:
    with served(kind, task) as serving:
        reward = Sabotage(serving, trap)
        config = task.config(tmp_path / "run", reward=[], rollout=over(kind, serving.url))
        run_training(config, given=Given(rewards=[reward]))
    assert reward.calls == 16


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_shares_the_gpu_sleeps_while_the_policy_learns(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is asleep in every backward pass, and awake for every sample."""
    asleep: list[bool] = []
    real = Learner.learn
    with served(kind, task) as serving:

        def watched(self: Learner, *words: Any, **named: Any) -> Any:
            asleep.append(bool(serving.contract.engine.asleep))
            return real(self, *words, **named)

        monkeypatch.setattr(Learner, "learn", watched)
        run_training(task.config(tmp_path / "run", rollout=over(kind, serving.url, engine_sleeps=True)))
        assert not serving.contract.engine.asleep
    assert asleep == [True] * 4
    steps = [row for row in rows_of(tmp_path / "run", "metrics.jsonl") if "reward" in row]
    assert all(row["sync/verified"] == 1 for row in steps)


def test_half_a_load_is_never_served(task: Any, tmp_path: Path) -> None:
    """The server refuses, and is asked for all of it once more; half again ends the run."""
    with served("vllm", task) as serving:
        reward = Sabotage(serving, "half_load")
        config = task.config(tmp_path / "run", reward=[], rollout=over("vllm", serving.url))
        with pytest.raises(EngineError, match="not loaded"):
            run_training(config, given=Given(rewards=[reward]))
    assert reward.calls == 4


def test_a_server_that_dies_and_does_not_come_back_ends_the_run(task: Any, tmp_path: Path) -> None:
    with served("vllm", task) as serving:
        reward = Sabotage(serving, "dies=2", after=2)
        config = task.config(tmp_path / "run", reward=[], rollout=over("vllm", serving.url, engine_timeout=1.0))
        with pytest.raises(EngineError, match=r"does not answer|was lost"):
            run_training(config, given=Given(rewards=[reward]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_is_frozen_behind_its_front_is_noticed(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its health says 200; nothing else answers."""
    monkeypatch.setattr("groupwise.engines.connection._PROBE_SECONDS", 0.5)
    monkeypatch.setattr("groupwise.engines.connection._ALIVE_SECONDS", 1.0)
    with served(kind, task) as serving:
        if kind == "sglang":  # whose health is no front: it waits with the engine
            serving.contract.health_paths = frozenset()
        reward = Sabotage(serving, "hangs", after=2)
        slowly = over(kind, serving.url, engine_timeout=3.0, max_concurrent_samples=4)
        with pytest.raises(EngineError, match="does not answer"):
            run_training(task.config(tmp_path / "run", reward=[], rollout=slowly), given=Given(rewards=[reward]))
        serving.set_traps()


def test_a_server_that_cannot_take_weights_or_has_no_room_is_said_before(task: Any, tmp_path: Path) -> None:
    flags = replace(vllm.Flags.as_it_should(), dev_mode=False)

    def refused(contract: server.Contract, kind: str, said: str, **settings: Any) -> None:
        with server.serving(contract) as serving, pytest.raises(ConfigError, match=said):
            run_training(task.config(tmp_path / "run", rollout=over(kind, serving.url, **settings)))

    refused(vllm.contract(task.model, flags), "vllm", "VLLM_SERVER_DEV_MODE=1")
    long = "tokens of prompt and completion"
    refused(vllm.contract(task.model), "vllm", long, max_completion_tokens=2000)
    refused(lmdeploy.contract(task.model), "lmdeploy", r"only when it starts.*rollout.launch.python")


@pytest.mark.parametrize("module", [lmdeploy, openai], ids=["lmdeploy", "openai"])
def test_a_server_that_wants_a_key_says_so_and_with_it_serves(
    task: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = replace(lmdeploy.Flags.as_it_should() if module is lmdeploy else openai.Flags(), api_key="secret")
    kind = "lmdeploy" if module is lmdeploy else "openai"
    with server.serving(module.contract(task.model, flags)) as serving:
        config = task.config(Path("run"), rollout=over(kind, serving.url)).rollout
        with pytest.raises(ConfigError) as said:
            reach(config, trains=False)
        assert "set GROUPWISE_API_KEY to the key" in str(said.value)
        assert "is a server, but" not in str(said.value)
        monkeypatch.setenv("GROUPWISE_API_KEY", "secret")
        assert [facts.model for facts in reach(config, trains=False)] == [str(task.model)]


@pytest.mark.parametrize("kind", [*KINDS, "lmdeploy", "openai"])
def test_an_evaluation_counts_what_the_server_answers(task: Any, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from groupwise.cli import main

    module = {**KINDS, "lmdeploy": lmdeploy, "openai": openai}[kind]
    words = ["eval", str(task.model), "--data", str(task.rows), "--reward", task.reward("low")]
    short = ["--rollout.max_completion_tokens", "8"]
    with server.serving(module.contract(task.model)) as serving:
        assert main([*words, "--rollout.engine", kind, "--rollout.urls", serving.url, *short]) == 0
    there = capsys.readouterr().out
    assert main([*words, "--model.dtype", "float32", "--model.device", "cpu", *short]) == 0
    here = capsys.readouterr().out

    def counted(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("accuracy", "reward", "length"))]

    assert counted(there) == counted(here), (there, here)


class _Contract:
    """The contract server of vLLM as a process that a run could have started."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.words: tuple[str, ...] = ()

    def __call__(self, ref: WeightRef) -> Command:
        words = (sys.executable, "-m", "tests.engines.contract.vllm", "--model", str(self.task.model), *self.words)
        return Command(words, {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"})


def sessions_of(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if text in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_started_engine_is_watched_restarted_and_leaves_nothing(task: Any, tmp_path: Path) -> None:
    port = "18437"
    contract = _Contract(task)
    contract.words = ("--port", port, "--enable-scale-out", "--logprobs-mode", "processed_logprobs")
    url = f"http://127.0.0.1:{port}"
    process = EngineProcess(contract, url=url, health="/health", log=tmp_path / "log", ready_seconds=60)
    ref = WeightRef(0, task.model, "model", bytes=1)

    async def play() -> None:
        await process.start(ref)
        assert process.alive()
        [pid] = [each for each in sessions_of(f"--port {port}") if each not in sessions_of("watchdog.py")]
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while process.alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert not process.alive()
        await process.start(ref)
        await process.stop()

    asyncio.run(play())
    assert sessions_of(f"--port {port}") == []


def test_an_engine_that_does_not_start_says_why(task: Any, tmp_path: Path) -> None:
    contract = _Contract(task)
    contract.words = ("--model", "/none")
    process = EngineProcess(
        contract, url="http://127.0.0.1:9", health="/health", log=tmp_path / "log", ready_seconds=60
    )
    with pytest.raises(ConfigError, match=r"(?s)it ended after .*says:\n.*(?i:error|no such)"):
        asyncio.run(process.start(WeightRef(0, task.model, "model", bytes=1)))


def test_an_engine_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """The watchdog's pipe closes when its owner is gone, however that came about."""
    program = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from groupwise.engines.launch import EngineProcess\n"
        "from groupwise.engines.commands import Command\n"
        "from groupwise.engines.weights import WeightRef\n"
        "words = (sys.executable, '-m', 'http.server', '18439', '--bind', '127.0.0.1')\n"
        "p = EngineProcess(lambda ref: Command(words, {}), url='http://127.0.0.1:18439', health='/', "
        f"log=Path({str(tmp_path / 'log')!r}), ready_seconds=30)\n"
        "asyncio.run(p.start(WeightRef(0, Path('.'), 'model', 1)))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    assert sessions_of("http.server 18439")
    run.kill()
    run.wait()
    deadline = time.monotonic() + 15
    while sessions_of("http.server 18439") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sessions_of("http.server 18439") == []


def test_samples_that_were_lost_are_neither_missing_nor_counted_twice(task: Any, tmp_path: Path) -> None:
    """Every key of every step is in the ledger once."""
    with served("vllm", task) as serving:
        run_training(task.config(tmp_path / "run", rollout=over("vllm", serving.url)))
    keys = [(row["step"], row["uid"]) for row in rows_of(tmp_path / "run", "ledger.jsonl")]
    assert len(keys) == len(set(keys)) == 16
    assert not math.isnan(sum(row["step"] for row in rows_of(tmp_path / "run", "ledger.jsonl")))


@pytest.mark.parametrize("kind", SOME)
def test_turns_of_an_environment_go_on_where_they_were(task: Any, tmp_path: Path, kind: str) -> None:
    """What follows the prompt is sent again, as tokens, and the next turn has another seed."""
    file = tmp_path / "nods.py"
    file.write_text(nods(turn="len(turn.token_ids) / 10", done="float(self.turns)"))
    with served(kind, task) as serving:
        config = task.config(
            tmp_path / "run",
            reward=[],
            environment={"name": f"{file}:make", "max_turns": 3},
            rollout=over(kind, serving.url, stop_token_ids=list(range(60, 160)), max_completion_tokens=48),
            train={"steps": 1},
        )
        run_training(config)
        asked = [body for _, path, body in serving.contract.seen if "generate" in path]
    lengths = {len(body.get("token_ids") or body.get("input_ids")) for body in asked}
    assert len(lengths) > 3
    [step] = [row for row in rows_of(tmp_path / "run", "metrics.jsonl") if "reward" in row]
    assert 0 < step["sampling/sampling_logp_difference/mean"] < 1e-5
