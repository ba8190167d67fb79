"""vLLM itself, on a CPU: `make test-engines` makes its environment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from groupwise.assembly.engine_check import _Weights, check_of
from groupwise.cli import main
from groupwise.config import Config
from groupwise.engines.dialects.base import KeptOld
from groupwise.engines.dialects.vllm import Vllm
from groupwise.engines.vllm_worker.groupwise_vllm_worker.group import Group
from groupwise.engines.weights import WeightRef
from groupwise.launch import Given, run_training
from groupwise.model.saved_weights import saved_weights
from groupwise.protocols import Policy
from groupwise.quickstart.tiny_model import build_tiny_model
from groupwise.weight_sync import ways
from groupwise.weight_sync.broadcast import Broadcasting
from groupwise.weight_sync.canary import Canary
from groupwise.weight_sync.publishing import EngineSync
from groupwise.weight_sync.ways import way_of
from tests.engines.contract.spoilt import SPOILT

PYTHON = Path(os.environ.get("GROUPWISE_VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM at {PYTHON}: make test-engines"),
]


@pytest.mark.parametrize(
    "flags",
    [(), ("--lora.rank", "4"), *(("--rollout.weights_by", way) for way in ("ipc", "nccl", "delta"))],
    ids=["whole", "adapter", "ipc", "nccl", "delta"],
)
def test_every_check_of_the_contract_passes(
    task: Any, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["engine", "check", "--engine", "vllm", "--model", str(task.model), "--python", str(PYTHON)]
    assert main([*words, "--model.device", "cpu", "--model.dtype", "float32", *flags]) == 0
    assert "all 10 checks passed" in capsys.readouterr().out


def workers() -> list[int]:
    """Processes of vLLM that hold weights, and that this one has started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if b"VLLM::" in (entry / "cmdline").read_bytes() and started_here(int(entry.name)):
                found.append(int(entry.name))
    return found


def started_here(pid: int) -> bool:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        if pid == os.getpid():
            return True
    return False


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Questions of primary school, and a tiny model of an untied head that knows their letters."""
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = Path("../shared/data/gsm8k/train.jsonl")
    if not rows.exists():
        pytest.skip("no GSM8K here")
    texts = [json.loads(line)["question"] for line in rows.read_text(encoding="utf-8").splitlines()[:64]]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    build_tiny_model(folder / "model", texts=texts, size="0.1m", vocab_size=512)
    return folder / "model", folder / "rows.jsonl"


def digits(completions: list[str], **_: Any) -> list[float]:
    """What a model of any size can learn within twenty steps."""
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


class Killer:
    """Ends vLLM's worker twice, in the middle of sampling."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[str], **row: Any) -> list[float]:
        self.calls += 1
        if self.calls in (18, 50):  # the third and the seventh step: others of their groups are being drawn
            for pid in workers():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        return digits(completions, **row)


def config(task: Any, gsm8k: tuple[Path, Path], output: Path, seed: int, **rollout: Any) -> Any:
    model, rows = gsm8k
    return task.config(
        output,
        model={"path": str(model)},
        data={"train": str(rows)},
        reward=[],
        rollout={"group_size": 4, "prompts_per_step": 8, "max_completion_tokens": 32, **rollout},
        train={"steps": 20, "seed": seed, "micro_batch_tokens": 4096},
    )


def steps_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def test_twenty_steps_learn_what_the_native_engine_learns_though_vllm_is_killed_twice(
    task: Any, gsm8k: tuple[Path, Path], tmp_path: Path
) -> None:
    last = {}
    for seed in (1, 2, 3):
        run_training(config(task, gsm8k, tmp_path / f"native{seed}", seed), given=Given(rewards=[digits]))
        last[seed] = statistics.mean(row["reward"] for row in steps_of(tmp_path / f"native{seed}")[-5:])
    run, killer = tmp_path / "vllm", Killer()
    launch = {"python": str(PYTHON)}
    run_training(config(task, gsm8k, run, 1, engine="vllm", launch=launch), given=Given(rewards=[killer]))
    steps = steps_of(run)
    assert len(steps) == 20
    reached = statistics.mean(row["reward"] for row in steps[-5:])
    spread = max(last.values()) - min(last.values())
    assert reached > 2 * steps[0]["reward"]
    assert abs(reached - statistics.mean(last.values())) < max(2 * spread, 0.1), (reached, last)
    assert all(row["sync/verified"] == 1 for row in steps)
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in steps)
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [row["group"] for row in ledger] == list(range(160))
    assert all(row["samples"] == 4 for row in ledger)
    assert killer.calls == 160
    starts = (run / "log.txt").read_text().count("the engine at")
    assert starts == 3
    deadline = time.monotonic() + 20
    while workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert workers() == []


@pytest.fixture(scope="module")
def found(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that somebody started as `groupwise engine command` prints it."""
    words = ["engine", "command", "--engine", "vllm", "--model", str(task.model), "--python", str(PYTHON)]
    words += ["--model.dtype", "float32", "--rollout.launch.port", "18451", "--rollout.launch.max_model_len", "256"]
    printed = subprocess.run(
        [sys.executable, "-m", "groupwise.cli", *words],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(["sh", "-c", f"exec env {printed}"], stdout=out, stderr=out, start_new_session=True)
    yield "http://127.0.0.1:18451"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def await_health(url: str) -> None:
    import httpx

    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").is_success:
                break
        time.sleep(0.5)


def test_a_server_that_was_started_by_hand_is_trained_over(task: Any, found: str, tmp_path: Path) -> None:
    await_health(found)
    run_training(task.config(tmp_path / "run", rollout={"engine": "vllm", "urls": [found]}))
    assert all(row["sync/verified"] == 1 for row in steps_of(tmp_path / "run"))


class Moves(_Weights):
    """A policy whose values change here and there, as after a small step in bfloat16."""

    def change(self, share: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, weight in self.source():
                here = torch.rand(weight.shape, generator=generator) < share
                weight[here] = weight[here] * 1.5 + 0.01


@pytest.mark.parametrize("way", ["ipc", "nccl", "delta"])
def test_weights_on_each_way_are_the_trainers_and_damaged_ones_are_refused_before_they_are_loaded(
    task: Any, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Of a tied head, over one server that goes on through all of it."""
    await_health(found)
    monkeypatch.setattr(ways, "Broadcasting", partial(Broadcasting, bucket_bytes=60_000))
    model = {"path": str(task.model), "dtype": "float32", "device": "cpu"}
    rollout = {"engine": "vllm", "urls": [found], "weights_by": way, "max_completion_tokens": 64}
    config = Config.model_validate({"model": model, "rollout": rollout})
    check = check_of(config, tell=lambda line: None)
    assert check.loaded.model.config.tie_word_embeddings
    weights = Moves(check.loaded, chunk_tokens=512)
    policy, engine = cast(Policy, weights), check.engine
    prompts = [prompt.token_ids for prompt in check._prompts()[:2]]
    canary = Canary(policy, prompts, tolerance=1e-5, vocabulary=engine.vocabulary)

    async def play() -> dict[int, float]:
        sync = EngineSync(
            policy,
            engine,
            way_of(config.rollout, policy, engine, tmp_path, adapter=False, leaves_none=False),
            canary=canary,
        )
        seen = {}

        async def published(version: int) -> None:
            await sync.publish(version)
            await sync.wait()
            assert canary.proofs == 1
            seen[version] = sync.metrics()["sync/bytes"].value

        await published(1)
        for version in (2, 3):
            weights.change(0.01, version)
            await published(version)
        before = await engine.members[0].score(prompts[0])
        for version, missing in ((4, False), (5, True)):
            weights.change(0.01, version)
            with monkeypatch.context() as spoilt:
                SPOILT[way](spoilt, {version}, missing)
                with pytest.raises(KeptOld, match=f"version {version} was not loaded"):
                    await sync.publish(version)
            assert await engine.members[0].score(prompts[0]) == before
        await published(6)
        assert await engine.members[0].score(prompts[0]) != before
        await sync.close()
        return seen

    sent = asyncio.run(play())
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in saved_weights(check.loaded.model))
    assert sent[1] == pytest.approx(size * (2 if way == "nccl" else 1), rel=0.05)
    assert sent[3] == pytest.approx(sent[1], rel=0.01) if way != "delta" else sent[3] < sent[1] / 20
    assert sent[6] == pytest.approx(sent[1], rel=0.01)  # nothing is laid over what was refused


@pytest.mark.parametrize("way", ["ipc", "nccl", "delta"])
def test_a_worker_that_is_killed_in_the_middle_of_a_transfer_comes_back_and_the_run_goes_on(
    task: Any, gsm8k: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Of an untied head, and a server of the run's own."""
    monkeypatch.setattr(ways, "Broadcasting", partial(Broadcasting, bucket_bytes=60_000))
    killed = list[int]()

    def kill() -> None:
        if not killed:
            killed.extend(workers())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    taken, broadcast, sent = Vllm._taken, Group.broadcast, [0]

    async def killing(self: Vllm, server: Any, ref: WeightRef, method: str, **named: Any) -> None:
        if ref.version == 2 and way != "nccl":
            asyncio.get_running_loop().call_later(0.01, kill)
        await taken(self, server, ref, method, **named)

    def breaking(group: Group, tensor: Tensor, *words: Any) -> None:
        sent[0] += 1
        if sent[0] == 50:  # of the second or third version, whose buckets are sent twice
            kill()
        broadcast(group, tensor, *words)

    monkeypatch.setattr(Vllm, "_taken", killing)
    monkeypatch.setattr(Group, "broadcast", breaking)
    run = tmp_path / "run"
    given = {"engine": "vllm", "launch": {"python": str(PYTHON)}, "weights_by": way}
    settings = config(task, gsm8k, run, 1, **given)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": 5})})
    run_training(settings, given=Given(rewards=[digits]))
    steps = steps_of(run)
    assert len(steps) == 5
    assert killed
    assert all(row["sync/verified"] == 1 for row in steps)
    assert all(row["sync/logp_difference"] < 1e-5 for row in steps)
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in steps)
    assert (run / "log.txt").read_text().count("the engine at") == 2
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [row["group"] for row in ledger] == list(range(40))


@pytest.mark.parametrize(
    ("flag", "forced", "said"),
    [
        ("--return-sampling-mask", {}, "sampling distribution replay requires Model Runner V2"),
        ("--enable-return-routed-experts", {}, "requires Model Runner V2"),
        ("--enable-return-routed-experts", {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "Model Runner V2 requires Triton"),
    ],
)
def test_on_a_cpu_it_tells_nothing_beside_tokens(task: Any, flag: str, forced: dict[str, str], said: str) -> None:
    """What `rollout.top_p` and `rollout.replay_routes` are refused for, where a run would start it on one."""
    words = ["engine", "command", "--engine", "vllm", "--model", str(task.model), "--python", str(PYTHON)]
    words += ["--model.dtype", "float32", "--rollout.launch.port", "18453", "--rollout.launch.max_model_len", "256"]
    found = [sys.executable, "-m", "groupwise.cli", *words, "--rollout.launch.flags", json.dumps([flag])]
    printed = subprocess.run(found, capture_output=True, text=True, check=True).stdout
    started = subprocess.run(
        ["sh", "-c", f"exec env {printed}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | forced,
    )
    assert started.returncode != 0
    assert said in started.stdout + started.stderr
