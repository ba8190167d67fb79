"""Other people's clients against `groupwise serve`, each in an environment of its own: `make test-clients`."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.test_http_engine import Served

CLIENTS = Path(__file__).parents[1] / "clients"
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

pytestmark = pytest.mark.slow


def python_of(name: str) -> Path:
    found = Path(os.environ.get(f"GROUPWISE_{name.upper()}_PYTHON", f".venv-{name}/bin/python")).absolute()
    if not found.exists():
        pytest.skip(f"no {name} at {found}: make test-clients")
    return found


def run(name: str, script: str, *words: str, **environment: str) -> Any:
    answer = subprocess.run(
        [python_of(name), CLIENTS / script, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(CLIENTS)} | environment,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def served(task: Any) -> Iterator[Served]:
    server = Served(task.model, "--model.chat_template", TEMPLATE)
    yield server
    server.stop()


def test_openai_reads_chats_completions_streams_and_refusals(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    python_of("openenv")
    monkeypatch.setenv("GROUPWISE_API_KEY", "right")
    server = Served(task.model, "--model.chat_template", TEMPLATE)
    try:
        found = run("openenv", "openai_client.py", f"{server.url}/v1", str(task.model))
        deadline = time.monotonic() + 20
        idle = "groupwise_samples_running 0"
        while idle not in httpx.get(f"{server.url}/metrics").text and time.monotonic() < deadline:
            time.sleep(0.1)
        assert idle in httpx.get(f"{server.url}/metrics").text
    finally:
        server.stop()
    assert found["models"] == [str(task.model)]
    assert found["stream"] == found["chat"][0] != found["chat"][1]
    assert sum(found["logprobs"]) == found["usage"]
    assert found["stream_logprobs"] == found["stream_usage"] == found["logprobs"][0]
    assert found["completion"][1] <= 6
    assert found["refused"] == {
        "model": ["NotFoundError", 404],
        "key": ["AuthenticationError", 401],
        "length": ["BadRequestError", 400],
        "format": ["BadRequestError", 400],
    }


def test_openenv_grades_it_for_training_by_tokens(task: Any, served: Served) -> None:
    report = run("openenv", "openenv_probe.py", served.url, str(task.model))
    assert report["ok"]
    assert report["reachable"]
    assert report["capture_level"] == "tokens"
    # A model of random weights does not call tools; nothing else may be found.
    assert all("no_tool_call_emitted" in finding for finding in report["findings"])
    assert report["n_completion_ids"] > 0


@pytest.mark.parametrize(("kind", "agents"), [("single", ["agent"]), ("user", ["user", "assistant"])])
def test_verifiers_gets_every_token_that_was_drawn(task: Any, served: Served, kind: str, agents: list[str]) -> None:
    words = (f"{served.url}/v1", str(task.model), kind)
    episodes = run("verifiers", "verifiers_episodes.py", *words, WORDS_KEY="unused")
    assert len(episodes) == 4
    for episode in episodes:
        assert episode["ok"], episode["errors"]
        assert {trace["agent"] for trace in episode["traces"]} <= {*agents, "solver", "policy"}
        for trace in episode["traces"]:
            for branch in trace["branches"]:
                drawn = [value for value, sampled in zip(branch["logprobs"], branch["sampled"], strict=True) if sampled]
                assert len(branch["tokens"]) == len(branch["sampled"])
                assert drawn
                assert all(-9999 < value <= 0 for value in drawn)
    rewards = [trace["reward"] for episode in episodes for trace in episode["traces"] if trace["reward"]]
    assert rewards
    assert all(reward > 0 for reward in rewards)
