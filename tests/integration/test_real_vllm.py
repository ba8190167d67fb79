"""vLLM itself, on a CPU: `make test-engines` makes its environment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main
from groupwise.launch import Given, run_training
from groupwise.quickstart.tiny_model import build_tiny_model

PYTHON = Path(os.environ.get("GROUPWISE_VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM at {PYTHON}: make test-engines"),
]


@pytest.mark.parametrize("flags", [(), ("--lora.rank", "4")], ids=["whole", "adapter"])
def test_every_check_of_the_contract_passes(
    task: Any, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["engine", "check", "--engine", "vllm", "--model", str(task.model), "--python", str(PYTHON)]
    assert main([*words, "--model.device", "cpu", "--model.dtype", "float32", *flags]) == 0
    assert "all 10 checks passed" in capsys.readouterr().out


def workers() -> list[int]:
    """Processes of vLLM that hold weights."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if b"VLLM::" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


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


def test_a_server_that_was_started_by_hand_is_trained_over(task: Any, found: str, tmp_path: Path) -> None:
    import httpx

    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{found}/health").is_success:
                break
        time.sleep(0.5)
    run_training(task.config(tmp_path / "run", rollout={"engine": "vllm", "urls": [found]}))
    assert all(row["sync/verified"] == 1 for row in steps_of(tmp_path / "run"))


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
