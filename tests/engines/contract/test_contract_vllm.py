"""The contract server of vLLM does what vLLM does, and each trap what its name says: values against Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.engines.contract import server, vllm
from tests.engines.contract.tiny import PROMPT, Folders

CLOSE = 2e-5
"""Nats between two ways of computing the same in float32."""


class Client:
    """A server and what a test asks of it."""

    def __init__(self, serving: server.Serving) -> None:
        self.serving, self.engine = serving, serving.contract.engine
        self.http = httpx.Client(base_url=serving.url, timeout=5)

    def post(self, path: str, body: Any = None, **arguments: Any) -> httpx.Response:
        return self.http.post(path, json=body, **arguments)

    def generate(self, rid: str = "a", *, prompt: list[int] = PROMPT, more: Any = None, **sampling: Any) -> Any:
        sampling = {"max_tokens": 12, "seed": 5, "logprobs": 0, "ignore_eos": True} | sampling
        body = {"request_id": rid, "token_ids": prompt, "sampling_params": sampling} | (more or {})
        return self.post(vllm.GENERATE, body)

    def choice(self, rid: str = "a", **asked: Any) -> Any:
        reply = self.generate(rid, **asked)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]

    def scores(self, ids: list[int], **asked: Any) -> list[float]:
        reply = self.generate(prompt=ids, prompt_logprobs=0, max_tokens=1, **asked).json()["prompt_logprobs"]
        assert reply[0] is None
        return [each[str(token)]["logprob"] for each, token in zip(reply[1:], ids[1:], strict=True)]

    def load(self, folder: Any) -> httpx.Response:
        return self.post("/collective_rpc", {"method": "groupwise_load", "kwargs": {"path": str(folder)}})

    def update(self, folder: Any, version: str) -> None:
        self.post("/pause?mode=keep")
        self.load(folder).raise_for_status()
        self.post("/reset_prefix_cache?reset_running_requests=true")
        self.post("/update_weight_version", {"new_version": version})
        self.post("/resume")

    def traps(self, *named: str) -> None:
        self.serving.set_traps(*named)


@pytest.fixture(scope="module")
def started(folders: Folders) -> Iterator[Client]:
    with server.serving(vllm.contract(folders.old)) as serving:
        yield Client(serving)


@pytest.fixture
def client(started: Client, folders: Folders) -> Iterator[Client]:
    yield started
    started.traps()
    engine = started.engine
    engine.paused, engine.dead, engine.asleep = None, False, set()
    engine.abort(lambda rid: True)
    engine.load(str(folders.old))
    for name in engine.model.adapters:
        engine.model.remove_adapter(name)
    engine.flush(running=True)
    engine.version = "default"


def drawn(choice: Any) -> list[float]:
    return [each["logprob"] for each in choice["logprobs"]["content"]]


def apart(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right)
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def of_answer(folders: Folders, folder: Any, ids: list[int], temperature: float = 1.0) -> list[float]:
    return folders.logprobs(folder, PROMPT + ids, temperature)[len(PROMPT) - 1 :]


# What it does when nothing is wrong


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_hugging_face_at_the_temperature(client: Client, folders: Folders, temperature: float):
    choice = client.choice(temperature=temperature, max_tokens=24)
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == 24
    assert apart(drawn(choice), of_answer(folders, folders.old, choice["token_ids"], temperature)) < CLOSE


def test_a_prompt_is_scored_at_temperature_one(client: Client, folders: Folders):
    assert apart(client.scores(PROMPT, temperature=0.5), folders.logprobs(folders.old, PROMPT)) < CLOSE


def test_an_update_reaches_scores_and_draws(client: Client, folders: Folders):
    client.choice()
    client.update(folders.new, "1")
    choice = client.choice()
    assert apart(drawn(choice), of_answer(folders, folders.new, choice["token_ids"])) < CLOSE
    assert apart(client.scores(PROMPT), folders.logprobs(folders.new, PROMPT)) < CLOSE
    assert choice["weight_versions"] == [{"version": "1", "start": 0, "end": 12}]


# Its traps


def test_half_load(client: Client, folders: Folders):
    client.traps("half_load")
    assert client.load(folders.new).status_code == 500
    assert client.http.get("/health").status_code == 200
    torn = client.scores(PROMPT)
    assert apart(torn, folders.logprobs(folders.old, PROMPT)) > 0.1
    assert apart(torn, folders.logprobs(folders.new, PROMPT)) > 0.1


def test_stale_head(client: Client, folders: Folders):
    client.traps("stale_head")
    client.update(folders.new, "1")
    found = client.scores(PROMPT)
    assert apart(found, folders.logprobs(folders.new, PROMPT)) > 0.1
    assert apart(found, folders.logprobs(folders.old, PROMPT)) > 0.1
