"""`groupwise serve` for everybody: OpenAI's routes as clients see them, hostile clients, a run that is followed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from groupwise.checkpoint import read_part, save_checkpoint
from groupwise.cli import main
from groupwise.launch import run_training
from tests.integration.test_http_engine import Served  # the same server, as a process


@pytest.fixture(scope="module")
def served(task: Any) -> Iterator[Served]:
    server = Served(task.model)
    yield server
    server.stop()


def chat(url: str, text: str = "say red:", **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": text}]
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, **body}, timeout=60)


def complete(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "say red:", **body}, timeout=60)


def streamed(url: str, route: str, **body: Any) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{url}{route}", json={**body, "stream": True}, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        told = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert told.pop() == "[DONE]"
    return [json.loads(text) for text in told]


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])


def test_completions_are_tokens_in_and_tokens_out(served: Served) -> None:
    asked = {"prompt": [5, 6, 7], "max_tokens": 6, "seed": 4, "logprobs": 0, "return_token_ids": True}
    answer = complete(served.url, **asked).raise_for_status().json()
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(-9999 < value <= 0 for value in choice["logprobs"]["token_logprobs"])
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": len(choice["token_ids"]),
        "total_tokens": 3 + len(choice["token_ids"]),
    }
    assert complete(served.url, **asked).json()["choices"] == answer["choices"]
    wire = httpx.post(
        f"{served.url}/inference/v1/generate",
        json={"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 6, "temperature": 0}},
    ).json()["choices"][0]
    greedy = complete(served.url, **{**asked, "temperature": 0}).json()["choices"][0]
    assert greedy["token_ids"] == wire["token_ids"]
    assert greedy["logprobs"]["token_logprobs"] == [each["logprob"] for each in wire["logprobs"]["content"]]


def test_several_prompts_and_samples_have_their_places(served: Served) -> None:
    answer = complete(served.url, prompt=["say red:", "say blue:"], n=2, max_tokens=4, seed=1).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0] != answer["choices"][1]
    alone = complete(served.url, prompt="say blue:", n=2, max_tokens=4, seed=1).json()["choices"]
    assert [choice["text"] for choice in alone] == [choice["text"] for choice in answer["choices"][2:]]


def test_without_a_seed_no_two_answers_are_alike(served: Served) -> None:
    texts = {complete(served.url, max_tokens=12).json()["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 4
    asked = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 12}}
    drawn = {
        tuple(httpx.post(f"{served.url}/inference/v1/generate", json=asked).json()["choices"][0]["token_ids"])
        for _ in range(4)
    }
    assert len(drawn) == 4


@pytest.mark.parametrize("stop", [None, "e"], ids=["no stop", "a stop"])
def test_a_stream_is_the_answer_in_parts(served: Served, stop: str | None) -> None:
    asked: dict[str, Any] = {"max_tokens": 40, "seed": 2, "logprobs": 0, "return_token_ids": True, "stop": stop}
    whole = complete(served.url, **asked).json()["choices"][0]
    chunks = streamed(served.url, "/v1/completions", prompt="say red:", stream_options={"include_usage": True}, **asked)
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [token for part in parts for token in part["token_ids"]] == whole["token_ids"]
    values = [value for part in parts for value in part["logprobs"]["token_logprobs"]]
    assert values == whole["logprobs"]["token_logprobs"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == len(whole["token_ids"])
    assert stop is None or stop not in whole["text"]


def test_tools_need_a_place_in_the_template(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    answer = chat(served.url, tools=[tool])
    assert answer.status_code == 400
    assert "chat template has no place for tools" in answer.json()["error"]["message"]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": image})
    assert "reads text alone" in answer.json()["error"]["message"]


TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}{% endfor %}<assistant>"
)


@pytest.fixture(scope="module")
def chatty(task: Any) -> Iterator[Served]:
    server = Served(task.model, "--model.chat_template", TEMPLATE)
    yield server
    server.stop()


def test_chats_are_rendered_with_tools_and_answered(chatty: Served) -> None:
    asked: dict[str, Any] = {"max_tokens": 5, "seed": 2, "logprobs": True, "top_logprobs": 0, "return_token_ids": True}
    plain = chat(chatty.url, **asked).raise_for_status().json()
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    armed = chat(chatty.url, tools=[tool], **asked).raise_for_status().json()
    assert len(armed["prompt_token_ids"]) == len(plain["prompt_token_ids"]) + len("[add]")
    assert chat(chatty.url, tools=[tool], tool_choice="none", **asked).json()["choices"] == plain["choices"]
    (choice,) = plain["choices"]
    content = choice["logprobs"]["content"]
    assert [each["token_id"] for each in content] == choice["token_ids"]
    assert [each["token"] for each in content] == [f"token_id:{token}" for token in choice["token_ids"]]
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    history = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    answer = httpx.post(f"{chatty.url}/v1/chat/completions", json={"messages": history, **asked}, timeout=60)
    rendered = "<user>onetwo<assistant>7<tool>7<assistant>"
    assert answer.raise_for_status().json()["usage"]["prompt_tokens"] == len(rendered.encode())
    chunks = streamed(chatty.url, "/v1/chat/completions", messages=[{"role": "user", "content": "say red:"}], **asked)
    said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert said == choice["message"]["content"]
    assert chunks[0]["prompt_token_ids"] == plain["prompt_token_ids"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "gpt-5"}, 404, "does not exist here"),
        ({"max_tokens": 100_000}, 400, "positions"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": ""}, 400, "no tokens"),
        ({"prompt": [10**9]}, 400, "embeddings for"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"best_of": 4}, 400, "best_of"),
        ({"echo": True}, 400, "echo"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"temprature": 1}, 400, "did you mean 'temperature'?"),
        ({"stop": ""}, 400, "stop"),
        ({"n": 0}, 400, "n:"),
        ({"min_p": 2}, 400, "min_p"),
    ],
    ids=str,
)
def test_what_cannot_act_is_refused_in_openais_form(
    served: Served, body: dict[str, Any], status: int, said: str
) -> None:
    answer = complete(served.url, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[]", b"null", b"\xff\xfe", b'{"prompt": "a"', b'"' + b"a" * 1000], ids=repr
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate"])
def test_what_is_no_request_is_said(served: Served, route: str, content: bytes) -> None:
    answer = httpx.post(f"{served.url}{route}", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_the_likeliest_tokens_are_told_beside_each(chatty: Served) -> None:
    asked: dict[str, Any] = {"prompt": "say red:", "max_tokens": 6, "seed": 3, "return_token_ids": True}
    plain = complete(chatty.url, **asked, logprobs=0).json()["choices"][0]
    (choice,) = complete(chatty.url, **asked, logprobs=3).json()["choices"]
    assert plain["logprobs"]["top_logprobs"] is None
    assert {**choice["logprobs"], "top_logprobs": None} == plain["logprobs"]
    names, values = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
    for name, value, told in zip(names, values, choice["logprobs"]["top_logprobs"], strict=True):
        assert told[name] == value  # the drawn one is among them
        assert len(told) == 3 + (name not in list(told)[:3])
        assert sorted(told.values(), reverse=True) == list(told.values())
    parts = streamed(chatty.url, "/v1/completions", **asked, logprobs=3)
    streamed_ones = [top for part in parts for top in part["choices"][0]["logprobs"]["top_logprobs"]]
    assert streamed_ones == choice["logprobs"]["top_logprobs"]

    talk: dict[str, Any] = {"max_tokens": 5, "seed": 2, "logprobs": True, "return_token_ids": True}
    (answer,) = chat(chatty.url, **talk, top_logprobs=2).json()["choices"]
    (bare,) = chat(chatty.url, **talk).json()["choices"]
    assert answer["token_ids"] == bare["token_ids"]
    for entry, alone in zip(answer["logprobs"]["content"], bare["logprobs"]["content"], strict=True):
        first, second = entry["top_logprobs"]
        assert first["logprob"] >= second["logprob"]
        assert first.keys() == alone.keys() - {"top_logprobs"}
        assert {**entry, "top_logprobs": []} == alone
    refused = chat(chatty.url, top_logprobs=2)
    assert refused.status_code == 400
    assert "set logprobs" in refused.json()["error"]["message"]


@pytest.mark.parametrize("told", [False, True])
def test_a_stream_says_how_much_it_was_so_far_where_it_is_asked(served: Served, told: bool) -> None:
    options = {"continuous_usage_stats": told, "include_usage": True}
    asked = {"prompt": "say red:", "max_tokens": 9, "n": 2, "stream_options": options, "logprobs": 0}
    *chunks, last = streamed(served.url, "/v1/completions", **asked)
    usages = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
    assert usages == sorted(usages)
    assert usages[-1:] == ([last["usage"]["completion_tokens"]] if told else [])


def test_two_hundred_clients_at_once_get_what_each_would_alone(served: Served) -> None:
    def ask(number: int) -> str:
        return complete(served.url, prompt=f"say {number % 10}:", max_tokens=8, seed=number % 20).json()["choices"][0][
            "text"
        ]

    alone = [ask(number) for number in range(20)]
    with ThreadPoolExecutor(200) as pool:
        together = list(pool.map(ask, range(200)))
    assert together == [alone[number % 20] for number in range(200)]


def test_a_key_is_asked_for_everywhere_but_by_probes(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPWISE_API_KEY", "secret")
    server = Served(task.model)
    try:
        assert complete(server.url).status_code == 401
        assert complete(server.url).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        headers = {"Authorization": "Bearer secret"}
        body = {"prompt": "a", "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 200
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["whole", "adapter"])
def test_a_run_is_followed(task: Any, tmp_path: Path, lora: dict[str, Any]) -> None:
    """The server takes each checkpoint as it appears, and draws as the model of that step does."""
    run = tmp_path / "run"
    config = task.config(run, lora=lora, train={"steps": 2, "save_every": 1})
    run_training(config)
    server = Served(run, "--follow")
    try:
        assert httpx.get(f"{server.url}/health").json()["version"] == 2
        longer = task.config(run, lora=lora, train={"steps": 4, "save_every": 1})
        training = threading.Thread(target=lambda: run_training(longer, resume=True, accept_changes=True))
        training.start()
        training.join()
        deadline = time.monotonic() + 20
        while httpx.get(f"{server.url}/health").json()["version"] != 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        asked = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "return_token_ids": True, "logprobs": 0}
        followed = complete(server.url, **asked).json()
        assert followed["system_fingerprint"] == "groupwise-v4"
        update = httpx.post(f"{server.url}/update_weights", json={"version": 9, "path": "/x"})
        assert update.status_code == 403
    finally:
        server.stop()
    final = Served(run / "final")
    try:
        assert complete(final.url, **asked).json()["choices"] == followed["choices"]
    finally:
        final.stop()


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)


class Part:
    """A part of a checkpoint with this state."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("it is only saved")


@pytest.mark.slow
def test_what_goes_wrong_in_a_followed_run_leaves_the_server_as_it_was(task: Any, tmp_path: Path) -> None:
    """Checkpoints whose weights nobody expects: each is passed over, no weight of it is taken, and the next is looked
    at."""
    run, errors = tmp_path / "run", tmp_path / "errors"
    run_training(task.config(run, train={"steps": 1, "save_every": 1}))
    good = run / "checkpoints" / "step_000001"
    masters: dict[str, Any] = read_part(good, "policy", "optimizer", "masters")
    last = max(masters)
    zeros = {name: torch.zeros_like(master) for name, master in masters.items()}
    damaged: dict[int, Any] = {3: ["no table of weights"], 4: {**zeros, last: torch.zeros(3)}}
    asked = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "return_token_ids": True, "logprobs": 0}

    def save(step: int, weights: Any) -> None:
        state = {"dtype": "float32", "optimizer": {"masters": weights}}
        save_checkpoint(run / "checkpoints", step, {"policy": Part(state)}, keep=9)

    with errors.open("w") as stream:
        server = Served(run, "--follow", stderr=stream)
    try:
        before = complete(server.url, **asked).json()["choices"]
        for step, weights in damaged.items():
            said = errors.read_text().count("step 1 goes on")
            save(step, weights)
            wait_until(lambda: errors.read_text().count("step 1 goes on") > said)  # noqa: B023
            assert complete(server.url, **asked).json()["choices"] == before
            assert httpx.get(f"{server.url}/health").json()["version"] == 1
        assert "has no attribute" in errors.read_text()  # nobody expected that
        assert "another model than is served" in errors.read_text()
        save(7, zeros)
        wait_until(lambda: httpx.get(f"{server.url}/health").json()["version"] == 7)
        assert complete(server.url, **asked).json()["choices"] != before
    finally:
        server.stop()


def test_only_a_run_can_be_followed(task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(task.model), "--follow"]) == 2
    assert "no run directory" in capsys.readouterr().err


def resident_mib(pid: int) -> float:
    fields = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return next(int(words[1]) / 1024 for words in fields if words and words[0] == "VmRSS:")


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_requests(task: Any) -> None:
    server = Served(task.model)

    def ask(number: int) -> None:
        body = {"prompt": [5, 6, number % 200 + 3], "max_tokens": 3, "stream": number % 5 == 0}
        answer = clients[number % 32].post("/v1/completions", json=body)
        assert answer.status_code == 200

    try:
        clients = [httpx.Client(base_url=server.url, timeout=60) for _ in range(32)]
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask, range(2_000)))
            before = resident_mib(server.process.pid)
            list(pool.map(ask, range(2_000, 10_000)))
        assert resident_mib(server.process.pid) - before < 20
        assert metric(server.url, "groupwise_samples_running") == 0
    finally:
        server.stop()
