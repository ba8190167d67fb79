"""Weights that reach engines otherwise than by a folder: over servers that behave as the engines do, with vLLM's worker
extension itself in them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor

from groupwise.assembly.engine_check import check_of
from groupwise.config import Config
from groupwise.engines.commands import Command
from groupwise.engines.connection import Connection
from groupwise.engines.dialects.base import KeptOld
from groupwise.engines.dialects.vllm import Vllm
from groupwise.engines.launch import EngineProcess, free_ports
from groupwise.engines.vllm_worker.groupwise_vllm_worker.group import Group
from groupwise.engines.weights import WeightRef
from groupwise.errors import ConfigError, EngineError, EngineLost
from groupwise.launch import Given, run_training
from groupwise.weight_sync import ways
from groupwise.weight_sync.broadcast import Broadcasting
from tests.engines.contract import lmdeploy, server, sglang, vllm
from tests.engines.contract.spoilt import SPOILT
from tests.engines.contract.vllm_workers import Runner

KINDS: dict[str, Any] = {"vllm": vllm, "sglang": sglang, "lmdeploy": lmdeploy}
WAYS = [
    ("vllm", "ipc"),
    ("vllm", "nccl"),
    ("vllm", "delta"),
    ("sglang", "nccl"),
    ("lmdeploy", "nccl"),
]


@contextlib.contextmanager
def served(kind: str, task: Any, *traps: str, flags: Any = None) -> Iterator[server.Serving]:
    with server.serving(KINDS[kind].contract(task.model, flags, *traps)) as serving:
        yield serving


def over(kind: str, way: str, *urls: str, **settings: Any) -> dict[str, Any]:
    return {"engine": kind, "weights_by": way, "urls": list(urls), "engine_timeout": 5.0, **settings}


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(run) if "reward" in row]


@pytest.mark.parametrize(("kind", "way"), WAYS, ids=str)
def test_a_run_learns_over_two_servers(task: Any, tmp_path: Path, kind: str, way: str) -> None:
    with served(kind, task) as one, served(kind, task) as two:
        run_training(task.config(tmp_path / "run", rollout=over(kind, way, one.url, two.url)))
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 4
    assert [row["sync/verified"] for row in steps] == [2.0] * 4
    assert all(0 < row["sync/logp_difference"] < 1e-4 for row in steps)
    assert all(0 < row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in steps)
    size = sum(file.stat().st_size for file in task.model.glob("*.safetensors"))
    times = 2 if way == "nccl" else 1  # each server is sent its own
    assert all(row["sync/bytes"] == pytest.approx(times * size, rel=0.05) for row in steps)
    assert not list(Path("/dev/shm").glob("weights-*/version_*"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ipc", "nccl", "delta"])
def test_every_check_of_the_contract_passes(task: Any, way: str) -> None:
    with served("vllm", task) as serving:
        model = {"path": str(task.model), "dtype": "float32", "device": "cpu"}
        rollout = over("vllm", way, serving.url, max_completion_tokens=200)
        config = Config.model_validate({"model": model, "rollout": rollout})
        found = asyncio.run(check_of(config, tell=lambda line: None).run())
    assert [line.name for line in found if not line.passed] == [], [line.seen for line in found]
    assert len(found) == 10


def test_several_buckets_reach_the_workers_of_several_gpus(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "Broadcasting", partial(Broadcasting, bucket_bytes=50_000))
    flags = replace(vllm.Flags.as_it_should(), tensor_parallel_size=2)
    with served("vllm", task, flags=flags) as serving:
        run_training(task.config(tmp_path / "run", rollout=over("vllm", "nccl", serving.url)))
    steps = steps_of(tmp_path / "run")
    size = sum(file.stat().st_size for file in task.model.glob("*.safetensors"))
    assert all(row["sync/verified"] == 1 for row in steps)
    assert all(row["sync/bytes"] == pytest.approx(2 * 2 * size, rel=0.05) for row in steps)  # workers, and passes


@pytest.mark.parametrize("missing", [False, True], ids=["byte", "missing"])
@pytest.mark.parametrize("way", SPOILT)
def test_what_is_damaged_on_its_way_is_refused_before_the_model_is_touched(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, missing: bool
) -> None:
    SPOILT[way](monkeypatch, {2}, missing)
    loads: list[int] = []
    real = Runner.reload_weights

    def reload_weights(self: Runner, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        loads.append(1)
        real(self, weights_iterator)

    monkeypatch.setattr(Runner, "reload_weights", reload_weights)
    with served("vllm", task) as serving:
        config = task.config(tmp_path / "run", rollout=over("vllm", way, serving.url))
        with pytest.raises(EngineError, match=r"version 2 was not loaded: .*(checksum|torn|sent)"):
            run_training(config)
        assert serving.contract.engine.version == "1"
        assert serving.contract.engine.paused is None  # it serves on
    assert len(loads) == 2  # of version 0 and 1
    assert len(steps_of(tmp_path / "run")) == 1


@pytest.mark.parametrize(("kind", "way"), [pair for pair in WAYS if pair != ("lmdeploy", "nccl")], ids=str)
def test_half_a_load_is_never_served(task: Any, tmp_path: Path, kind: str, way: str) -> None:
    with served(kind, task) as serving:
        calls = 0

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            nonlocal calls
            calls += 1
            if calls == 4:
                serving.set_traps("half_load")
            return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

        config = task.config(tmp_path / "run", reward=[], rollout=over(kind, way, serving.url))
        with pytest.raises(EngineError, match="not loaded"):
            run_training(config, given=Given(rewards=[reward]))
    assert calls == 4


def test_a_session_that_broke_off_is_closed_and_the_weights_come_again(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of SGLang; the second try meets in a new group."""
    real, broken = Group.broadcast, [0]

    def broadcast(group: Group, tensor: Tensor, *words: Any) -> None:
        broken[0] += 1
        if broken[0] == 2:
            group.leave()
            raise RuntimeError("the line broke")
        real(group, tensor, *words)

    monkeypatch.setattr(Group, "broadcast", broadcast)
    with served("sglang", task) as serving:
        run_training(task.config(tmp_path / "run", rollout=over("sglang", "nccl", serving.url)))
        asked = [path for _, path, _ in serving.contract.seen]
    assert len(steps_of(tmp_path / "run")) == 4
    assert asked.count("/init_weights_update_group") == 2
    assert asked.count("/begin_weight_update") == asked.count("/end_weight_update") == 6


def test_lmdeploy_need_not_be_started_for_each_version(task: Any, tmp_path: Path) -> None:
    """At `rollout.urls` it can be trained over, which a folder does not allow, and it sleeps while it is loaded."""
    with served("lmdeploy", task) as serving:
        for way, settings in (("nccl", {}), ("nccl", {"engine_sleeps": True})):
            name = f"run{len(settings)}"
            run_training(task.config(tmp_path / name, rollout=over("lmdeploy", way, serving.url, **settings)))
            assert all(row["sync/verified"] == 1 for row in steps_of(tmp_path / name))
        refused = task.config(tmp_path / "folder", rollout=over("lmdeploy", "directory", serving.url))
        with pytest.raises(ConfigError, match=r"rollout\.weights_by = 'nccl'"):
            run_training(refused)


@pytest.mark.parametrize(
    ("kind", "way"),
    [("vllm", "ipc"), pytest.param("vllm", "nccl", marks=pytest.mark.slow), ("sglang", "nccl")],
    ids=str,
)
def test_an_engine_that_shares_the_gpu_sleeps_meanwhile(task: Any, tmp_path: Path, kind: str, way: str) -> None:
    with served(kind, task) as serving:
        run_training(task.config(tmp_path / "run", rollout=over(kind, way, serving.url, engine_sleeps=True)))
        asked = [path.partition("?")[0] for _, path, _ in serving.contract.seen]
        assert not serving.contract.engine.asleep
    assert sum(path in ("/sleep", "/release_memory_occupation") for path in asked) == 4
    assert all(row["sync/verified"] == 1 for row in steps_of(tmp_path / "run"))


def test_a_load_that_never_returns_ends_with_its_server(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's, whose worker is killed in it: the call goes on for ever, and only its health says so."""
    monkeypatch.setattr("groupwise.engines.connection._PROBE_SECONDS", 0.2)
    with served("vllm", task, "control_hangs=/collective_rpc") as serving:
        server = Connection(serving.url, most=1, alive="/weight_info")
        call = Vllm(kind="model", stop_token_ids=[])._called(server, "groupwise_hello", group="")

        async def play() -> None:
            asyncio.get_running_loop().call_later(0.5, serving.contract.engine.die)
            started = time.monotonic()
            with pytest.raises(EngineLost):
                await call
            assert 0.4 < time.monotonic() - started < 10
            await server.close()

        asyncio.run(play())
        serving.set_traps()


class OtherNccl:
    """Weights on GPUs, of a process with an NCCL that the engine has not."""

    backend, nccl, buckets, digest = "nccl", "2.99.1", (), ""

    def group_of(self, url: str) -> None:
        """None was made."""


def test_another_release_of_nccl_is_refused_before_a_group_is_made(task: Any) -> None:
    with served("vllm", task) as serving:
        server = Connection(serving.url, most=1, alive="/weight_info")
        dialect = Vllm(kind="model", stop_token_ids=[])
        ref = WeightRef(1, task.model, "model", bytes=1, broadcast=cast(Any, OtherNccl()))

        async def play() -> None:
            with pytest.raises(KeptOld, match=r"has NCCL none, and this process 2\.99\.1"):
                await dialect.load(server, ref, await dialect.reach(server))
            await server.close()

        asyncio.run(play())
        assert serving.contract.engine.paused is None


class Process:
    """The contract server of vLLM as a process that the run starts, with the folder that it is to begin with."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.folders: list[Path] = []

    def __call__(self, ref: WeightRef) -> Command:
        self.folders.append(ref.folder)
        words = (sys.executable, "-m", "tests.engines.contract.vllm", "--model", str(ref.folder))
        words += ("--port", str(self.port), "--enable-scale-out", "--logprobs-mode", "processed_logprobs")
        environment = {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1"}
        return Command((*words, "--served-model-name", "policy"), environment)

    def pids(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                if "tests.engines.contract.vllm" in words and str(self.port) in words:
                    found.append(int(entry.name))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ipc", "nccl", "delta"])
def test_a_server_that_is_killed_comes_back_to_the_newest_weights(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Once while it draws, and once in the middle of a load: it is started from a folder, and gets what is newer."""
    (port,) = free_ports(1)
    process, calls, loads = Process(port), [0], [0]

    def started(config: Any, launched: Any) -> list[Any]:
        url = f"http://127.0.0.1:{port}"
        return [(url, EngineProcess(process, url=url, health="/health", log=tmp_path / "log", ready_seconds=60))]

    def kill() -> None:
        for pid in process.pids():
            os.kill(pid, signal.SIGKILL)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls[0] += 1
        if calls[0] == 6:
            kill()
        return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

    real = Vllm._taken

    async def taken(self: Vllm, server: Any, ref: WeightRef, method: str, **named: Any) -> None:
        loads[0] += 1
        if ref.version == 3 and loads[0] < 100:
            loads[0] = 100
            asyncio.get_running_loop().call_later(0.05, kill)
            await asyncio.sleep(0.06)
        await real(self, server, ref, method, **named)

    monkeypatch.setattr("groupwise.placement.elsewhere.launchers", started)
    monkeypatch.setattr("groupwise.engines.checks._check_where", lambda rollout: None)
    monkeypatch.setattr(Vllm, "_taken", taken)
    rollout = {"engine": "vllm", "weights_by": way, "engine_timeout": 60.0}
    run_training(task.config(tmp_path / "run", reward=[], rollout=rollout), given=Given(rewards=[reward]))
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 4
    assert calls[0] == 16
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in steps)
    assert len(process.folders) == 3
    if way == "delta":
        assert {folder.name[:8] for folder in process.folders} == {"version_"}
    else:
        assert {folder.name for folder in process.folders} == {"start"}
    assert process.pids() == []
