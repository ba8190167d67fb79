"""`groupwise serve` and clients that mean no good: each is refused in a sentence, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from groupwise.quickstart.tiny_model import build_tiny_model
from tests.integration.test_http_engine import Served
from tests.integration.test_serve import TEMPLATE, complete, metric, wait_until


@pytest.fixture(scope="module")
def chatty(task: Any) -> Iterator[Served]:
    server = Served(task.model, "--model.chat_template", TEMPLATE)
    yield server
    server.stop()


CALLED = {"role": "assistant", "content": None}
DEEP = "[" * 20_000
HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "top_k": ("/v1/completions", {"top_k": 10**30}, "top_k"),
    "top_k of the wire": ("/inference/v1/generate", {"sampling_params": {"top_k": 2**63}}, "top_k"),
    "negative stop": ("/v1/completions", {"stop_token_ids": [-(10**6)], "min_tokens": 2}, "stop_token_ids.0"),
    "negative stop of the wire": (
        "/inference/v1/generate",
        {"sampling_params": {"stop_token_ids": [-(10**6)], "min_tokens": 2}},
        "stop_token_ids.0",
    ),
    "cold": ("/v1/completions", {"temperature": 1e-40, "logprobs": 0}, "expected 0, which is greedy, or 0.001 to 100"),
    "cold wire": ("/inference/v1/generate", {"sampling_params": {"temperature": 1e-40}}, "expected 0"),
    "not a number": ("/v1/completions", {"temperature": math.nan}, "temperature: got nan"),
    "endless": ("/inference/v1/generate", {"sampling_params": {"temperature": math.inf}}, "temperature: got inf"),
    "penalty": ("/v1/completions", {"repetition_penalty": 1e-300, "logprobs": 0}, "repetition_penalty"),
    "endless penalty": ("/v1/completions", {"repetition_penalty": math.inf}, "repetition_penalty"),
    "seed": ("/v1/completions", {"seed": 10**4000}, "seed"),
    "memory": ("/inference/v1/generate", {"sampling_params": {"max_tokens": 10**9}}, "GiB of keys and values"),
    "more memory": ("/inference/v1/generate", {"sampling_params": {"max_tokens": 10**30}}, "GiB of keys and values"),
    "stops": ("/v1/completions", {"stop": ["x"] * 1000}, "at most 64 items"),
    "long stop": ("/v1/completions", {"stop": "a" * 10**6}, "at most 1024 characters"),
    "empty stop": ("/inference/v1/generate", {"sampling_params": {"stop": [""]}}, "at least 1 character"),
    "draw": ("/inference/v1/generate", {"groupwise": {"uid": "a", "draw": 10**4200, "sample_index": 0}}, "draw"),
    "negative draw": ("/inference/v1/generate", {"groupwise": {"uid": "a", "draw": -1, "sample_index": 0}}, "draw"),
    "continues": (
        "/inference/v1/generate",
        {"groupwise": {"uid": "a", "draw": 0, "sample_index": 0, "continues": 5}},
        "continues = 5 leaves no prompt of 3 token_ids",
    ),
    "no stream": ("/v1/completions", {"stream_options": {"include_usage": True}}, "there is no stream"),
    "stream option": ("/v1/completions", {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    "calls": ("/v1/chat/completions", {"messages": [{**CALLED, "tool_calls": [1]}]}, "list of calls"),
    "calls of text": ("/v1/chat/completions", {"messages": [{**CALLED, "tool_calls": "abc"}]}, "list of calls"),
    "function": (
        "/v1/chat/completions",
        {"messages": [{**CALLED, "tool_calls": [{"function": [1]}]}]},
        "list of calls",
    ),
    "no role": ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "say whose it is"),
    "positions": ("/inference/v1/generate", {"token_ids": [5] * 100_000}, "4096 positions, and 100,000 leave none"),
    "content": ("/v1/chat/completions", {"messages": [{"role": "user", "content": {"a": 1}}]}, "got dict"),
    "part": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "has no text",
    ),
    "surrogate": (
        "/v1/chat/completions",
        {"messages": [{**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]},
        "half a surrogate pair",
    ),
    "template": ("/v1/chat/completions", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "no place for"),
    "required": ("/v1/chat/completions", {"tool_choice": "required"}, "cannot hold an answer to 'required'"),
    "named": (
        "/v1/chat/completions",
        {"tool_choice": {"type": "function", "function": {"name": "add"}}},
        "cannot hold an answer to a call of a named tool",
    ),
    "one call": ("/v1/chat/completions", {"parallel_tool_calls": False}, "cannot hold an answer to one call"),
}


@pytest.mark.parametrize(("route", "body", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_and_harms_no_other(
    chatty: Served, route: str, body: dict[str, Any], said: str
) -> None:
    base = {
        "/v1/completions": {"prompt": "say red:", "max_tokens": 4},
        "/inference/v1/generate": {"token_ids": [5, 6, 7]},
    }
    whole = base.get(route, {"messages": [{"role": "user", "content": "say red:"}], "max_tokens": 4}) | body
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(complete, chatty.url, max_tokens=60, min_tokens=60, seed=1)
        wait_until(lambda: other.done() or metric(chatty.url, "groupwise_samples_running") > 0)
        answer = httpx.post(f"{chatty.url}{route}", content=json.dumps(whole), timeout=60)
        assert other.result().json()["usage"]["completion_tokens"] == 60
    assert answer.status_code == 400, answer.text[:500]
    error = answer.json()["error"]
    assert said in (error if isinstance(error, str) else error["message"])


def test_a_call_that_is_nested_without_end_stays_the_models_own_words(chatty: Served) -> None:
    call = {"function": {"name": "f", "arguments": DEEP}}
    history = [{**CALLED, "tool_calls": [call]}, {"role": "user", "content": "?"}]
    answer = httpx.post(f"{chatty.url}/v1/chat/completions", json={"messages": history, "max_tokens": 2}, timeout=60)
    assert answer.status_code == 200, answer.text


HUGE: dict[str, Any] = {
    "problems": lambda: {"prompt": "a", "stop_token_ids": ["x"] * 1_000_000},
    "keys": lambda: {"prompt": "a"} | {f"k{number}": 1 for number in range(300_000)},
    "keys inside": lambda: {"prompt": "a", "stream_options": {f"k{number}": 1 for number in range(300_000)}},
    "a key": lambda: {"prompt": "a", "k" * 10_000_000: 1},
    "a model": lambda: {"prompt": "a", "model": "k" * 10_000_000},
    "prompts": lambda: {"prompt": ["a"] * 300_000},
    "prompts of tokens": lambda: {"prompt": [[5]] * 300_000},
    "answers": lambda: {"prompt": ["a"] * 4000, "n": 128},
    "text": lambda: {"prompt": "ab cd ef " * 1_500_000},
}


@pytest.mark.parametrize("make", HUGE.values(), ids=HUGE.keys())
def test_a_huge_request_is_refused_in_little_time_and_few_words(chatty: Served, make: Any) -> None:
    content = json.dumps(make()).encode()
    started = time.monotonic()
    answer = httpx.post(f"{chatty.url}/v1/completions", content=content, timeout=60)
    assert answer.status_code in (400, 404), answer.text[:500]
    assert len(answer.content) < 2000
    assert time.monotonic() - started < 10  # of some 25 to 100 seconds that these took


def test_a_long_text_lets_others_pass(tmp_path: Path) -> None:
    """It is cut into tokens beside them."""
    words = ["many words of one text"] * 4
    build_tiny_model(tmp_path / "model", texts=words, size="0.1m", vocab_size=300)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 200_000}))
    server = Served(tmp_path / "model")
    try:
        long = {"prompt": "many words of one text " * 300_000, "max_tokens": 1}
        with ThreadPoolExecutor(1) as pool:
            refused = pool.submit(httpx.post, f"{server.url}/v1/completions", json=long, timeout=60)
            slowest, waited = 0.0, time.monotonic()
            while not refused.done():
                started = time.monotonic()
                httpx.get(f"{server.url}/health", timeout=60)
                slowest = max(slowest, time.monotonic() - started)
            waited = time.monotonic() - waited
        assert refused.result().status_code == 400
        assert slowest < max(1.0, waited / 2)
    finally:
        server.stop()


def test_hostile_clients_leave_nothing_behind(chatty: Served) -> None:
    """A hundred megabytes, bodies that never end, streams that are left, connections that say nothing."""
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(
            httpx.post, f"{chatty.url}/v1/completions", content=b'{"prompt": "' + b"a" * (100 << 20), timeout=60
        )
        with contextlib.suppress(httpx.WriteError):  # the answer came before all of it was sent
            assert large.result().status_code == 413
    host, port = chatty.url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    for each in silent:
        each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    long = {"prompt": "say red:", "max_tokens": 3000, "min_tokens": 3000, "stream": True}
    for _ in range(3):
        with httpx.stream("POST", f"{chatty.url}/v1/completions", json=long, timeout=60) as answer:
            next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{chatty.url}/v1/completions", json={**long, "stream": False}, timeout=0.3)
    for each in silent:
        each.close()
    deadline = time.monotonic() + 20
    while metric(chatty.url, "groupwise_samples_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metric(chatty.url, "groupwise_samples_running") == 0
    assert complete(chatty.url, max_tokens=2).status_code == 200
