"""Each trap on each server that has it: what it does to tokens, log-probs and weights, compared with Hugging Face."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines.contract import server
from tests.engines.contract.asking import ASKING, Asking, LmdeployAsking, SglangAsking, VllmAsking, apart
from tests.engines.contract.tiny import PROMPT, VOCAB, Folders
from tests.engines.contract.traps import TRAPS, Traps

CLOSE = 2e-5
"""Nats between two ways of computing the same in float32."""
FAR = 0.05


@pytest.fixture(scope="module")
def servers(folders: Folders) -> Iterator[dict[str, Asking]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: kind(stack.enter_context(server.serving(module.contract(folders.old))), folders)
            for name, (module, kind) in ASKING.items()
        }


@pytest.fixture(params=list(ASKING))
def asking(request: pytest.FixtureRequest, servers: dict[str, Asking]) -> Iterator[Asking]:
    found = servers[request.param]
    yield found
    found.clean()


@pytest.fixture(params=[name for name, (_, kind) in ASKING.items() if kind.updates])
def loading(request: pytest.FixtureRequest, servers: dict[str, Asking]) -> Iterator[Asking]:
    found = servers[request.param]
    yield found
    found.clean()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def started(asking: Asking, pool: ThreadPoolExecutor, *rids: str, most: int = 400) -> list[Future[Any]]:
    """Long requests that run already."""
    asking.traps("slow=0.002")
    found = [pool.submit(asking.draw, rid, most=most) for rid in rids]
    until(lambda: len(asking.engine.running) == len(rids))
    time.sleep(0.02)
    return found


def until(true: Any, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


# Nothing is wrong


def test_what_is_drawn_has_the_logprobs_of_hugging_face(asking: Asking, folders: Folders):
    drawn = asking.draw(most=24)
    assert len(drawn.ids) == 24
    assert drawn.finish == "length"
    assert drawn.apart(folders, folders.old) < CLOSE


def test_the_same_seed_draws_the_same_in_company(asking: Asking, pool: ThreadPoolExecutor):
    alone = asking.draw()
    together = list(pool.map(lambda index: asking.draw(f"{index:032d}"), range(8)))
    assert all((each.ids, each.logprobs) == (alone.ids, alone.logprobs) for each in together)


def test_an_update_reaches_what_is_scored_and_what_is_drawn(loading: Asking, folders: Folders):
    assert apart(loading.scores(), folders.logprobs(folders.old, PROMPT)) < CLOSE
    loading.draw()
    assert loading.load(folders.new).status_code == 200
    assert loading.flush()
    assert apart(loading.scores(), folders.logprobs(folders.new, PROMPT)) < CLOSE
    assert loading.draw().apart(folders, folders.new) < CLOSE


# The process


def test_trap_names_are_checked(asking: Asking):
    assert asking.post("/_trap", {"no_such_trap": ""}).status_code == 400
    assert asking.post("/_trap", {"slow": 0.001, "nan": None}).json() == {"slow": "0.001", "nan": ""}
    assert asking.http.get("/_trap").json() == {"slow": "0.001", "nan": ""}
    with pytest.raises(ValueError, match=r"half_loaf.*half_load"):
        Traps(["half_loaf"])


def test_what_was_asked_can_be_seen(asking: Asking):
    asking.draw(most=3)
    method, path, body = asking.http.get("/_seen").json()[-1]
    assert (method, path) == ("POST", asking.token_path)
    assert body[next(key for key in ("token_ids", "input_ids", "prompt") if key in body)] == PROMPT


@pytest.mark.parametrize("engine", list(ASKING))
def test_dies_at_the_nth_request(engine: str, folders: Folders):
    module, kind = ASKING[engine]
    with server.serving(module.contract(folders.old)) as serving:
        asking = kind(serving, folders)
        asking.traps("dies=3")
        asking.draw()
        asking.draw()
        with pytest.raises(httpx.TransportError):
            asking.draw()
        until(lambda: not _answers(asking))


def _answers(asking: Asking) -> bool:
    try:
        return httpx.get(f"{asking.serving.url}/health", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def test_hangs_with_health_200(asking: Asking, pool: ThreadPoolExecutor):
    asking.traps("hangs")
    waiting = pool.submit(asking.draw)
    if not isinstance(asking, SglangAsking):
        assert asking.http.get("/health").status_code == 200
    for path in ("/v1/models", *(["/health"] if isinstance(asking, SglangAsking) else [])):
        with pytest.raises(httpx.ReadTimeout):
            asking.http.get(path, timeout=0.1)
    assert not waiting.done()
    asking.traps()
    assert len(waiting.result(5).ids) == 12


def test_control_call_never_returns(loading: Asking, folders: Folders):
    loading.traps("control_hangs")
    loading.http.timeout = httpx.Timeout(0.1)
    try:
        with pytest.raises(httpx.ReadTimeout):
            loading.load(folders.new)
    finally:
        loading.http.timeout = httpx.Timeout(5)
    assert loading.http.get("/health").status_code == 200
    assert loading.draw().apart(folders, folders.old) < CLOSE


def test_slow(asking: Asking):
    asking.traps("slow=0.03")
    begun = time.monotonic()
    asking.draw(most=4)
    assert time.monotonic() - begun > 0.12


# Weights


def test_half_load(loading: Asking, folders: Folders):
    loading.traps("half_load")
    answer = loading.load(folders.new)
    assert answer.status_code == (400 if isinstance(loading, SglangAsking) else 500)
    assert loading.http.get("/health").status_code == 200
    loading.traps()
    found = loading.scores()
    assert apart(found, folders.logprobs(folders.old, PROMPT)) > FAR
    assert apart(found, folders.logprobs(folders.new, PROMPT)) > FAR


def test_success_without_effect(loading: Asking, folders: Folders):
    loading.traps("no_effect")
    assert loading.load(folders.new).status_code == 200
    assert apart(loading.scores(), folders.logprobs(folders.old, PROMPT)) < CLOSE
    assert loading.draw().apart(folders, folders.old) < CLOSE


def test_tied_head_not_refreshed(loading: Asking, folders: Folders):
    loading.traps("stale_head")
    assert loading.load(folders.new).status_code == 200
    stale = folders.mixed(folders.new, {"lm_head.weight": (folders.old, "model.embed_tokens.weight")})
    assert apart(loading.scores(), stale(PROMPT)) < CLOSE
    assert apart(loading.scores(), folders.logprobs(folders.new, PROMPT)) > FAR


def test_one_tensor_missing(loading: Asking, folders: Folders):
    name = "model.layers.0.mlp.down_proj.weight"
    loading.traps(f"missing_tensor={name}")
    assert loading.load(folders.new).status_code == 200
    torn = folders.mixed(folders.new, {name: (folders.old, name)})
    assert apart(loading.scores(), torn(PROMPT)) < CLOSE
    assert apart(loading.scores(), folders.logprobs(folders.new, PROMPT)) > FAR


def test_one_tensor_missing_by_default_is_large(loading: Asking, folders: Folders):
    loading.traps("missing_tensor")
    assert loading.load(folders.new).status_code == 200
    assert apart(loading.scores(), folders.logprobs(folders.new, PROMPT)) > FAR


def test_decode_reads_old_memory(loading: Asking, folders: Folders):
    loading.traps("stale_decode")
    assert loading.load(folders.new).status_code == 200
    assert loading.flush()
    assert apart(loading.scores(), folders.logprobs(folders.new, PROMPT)) < CLOSE
    assert loading.draw().apart(folders, folders.old) < CLOSE
    assert loading.draw().apart(folders, folders.new) > FAR


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_flush_refused_leaves_old_prefixes(engine: str, servers: dict[str, Asking], folders: Folders):
    asking = servers[engine]
    try:
        asking.draw()
        asking.traps("flush_refused=1")
        asking.load(folders.new)
        assert not asking.flush()
        assert asking.draw().apart(folders, folders.new) > FAR
        assert asking.draw(cache_salt="v2").apart(folders, folders.new) < CLOSE
        assert asking.flush()
        assert asking.draw().apart(folders, folders.new) < CLOSE
    finally:
        asking.clean()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_stale_version_label(engine: str, servers: dict[str, Asking], folders: Folders):
    asking = servers[engine]
    assert isinstance(asking, VllmAsking | SglangAsking)

    def spans() -> Any:
        reply = asking.draw().reply
        return reply["meta_info"]["weight_versions"] if engine == "sglang" else reply["choices"][0]["weight_versions"]

    def update(version: str) -> None:
        asking.load(folders.new)
        told = asking.post("/update_weight_version", {"new_version": version}).json()
        assert told["success"]
        assert told["new_version"] == version

    try:
        update("1")
        assert spans() == [{"version": "1", "start": 0, "end": 12}]
        asking.traps("stale_version")
        update("2")
        assert spans() == [{"version": "1", "start": 0, "end": 12}]
    finally:
        asking.clean()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("trap", [None, "unbound_adapter", "stale_decode"])
def test_adapters(engine: str, trap: str | None, servers: dict[str, Asking], folders: Folders):
    asking = servers[engine]
    route = {"vllm": "/v1/load_lora_adapter", "sglang": "/load_lora_adapter"}[engine]
    named: dict[str, Any] = {{"vllm": "model", "sglang": "lora_path"}[engine]: "pol@1"}
    merged = folders.merged()
    try:
        asking.traps(*[trap] if trap else [])
        assert asking.ask("b" * 32, **named).status_code in (400, 404)
        assert asking.post(route, {"lora_name": "pol@1", "lora_path": str(folders.adapter)}).status_code == 200
        assert asking.post(route, {"lora_name": "pol@1", "lora_path": str(folders.adapter)}).status_code == 400
        drawn = asking.draw(**named)
        of_merged = merged(PROMPT + drawn.ids)[len(PROMPT) - 1 :]
        bound = trap is None
        assert (apart(drawn.logprobs, of_merged) < CLOSE) == bound
        assert (drawn.apart(folders, folders.old) < CLOSE) == (not bound)
        assert asking.draw().apart(folders, folders.old) < CLOSE
        asking.post(route.replace("/load_", "/unload_"), {"lora_name": "pol@1"}).raise_for_status()
        assert asking.ask("c" * 32, **named).status_code in (400, 404)
    finally:
        asking.clean()


# Requests


def abort_all(asking: Asking) -> httpx.Response:
    if isinstance(asking, VllmAsking):
        return asking.post("/abort_requests", {})
    return asking.post("/abort_request", {"abort_all": True})


@pytest.mark.parametrize("trap", [None, "lost_abort"])
def test_abort(loading: Asking, trap: str | None, pool: ThreadPoolExecutor, folders: Folders):
    asked = started(loading, pool, "a" * 32, "b" * 32, most=60)
    loading.traps("slow=0.002", *[trap] if trap else [])
    assert abort_all(loading).status_code == 200
    for each in asked:
        drawn = each.result(5)
        assert drawn.finish == ("length" if trap else "abort")
        assert 0 < len(drawn.ids) <= 60
        assert (len(drawn.ids) == 60) == (trap is not None)
        assert drawn.apart(folders, folders.old) < CLOSE


def test_duplicated_answer(asking: Asking):
    first = asking.draw("a" * 32)
    asking.traps("duplicated")
    second = asking.draw("b" * 32, seed=6) if not isinstance(asking, SglangAsking) else asking.draw("b" * 32)
    assert second.reply == first.reply


def test_truncated_by_context(asking: Asking):
    asking.traps(f"short_context={len(PROMPT) + 5}")
    drawn = asking.draw(most=12)
    assert len(drawn.ids) == 5
    assert drawn.finish == "length"


def test_wrong_vocabulary(asking: Asking):
    fine = asking.draw()
    asking.traps("wrong_vocabulary")
    drawn = asking.draw()
    assert drawn.ids[1] >= VOCAB
    assert [*drawn.ids[:1], *drawn.ids[2:]] == [*fine.ids[:1], *fine.ids[2:]]


def test_logprob_that_stands_for_a_missing_one(asking: Asking):
    asking.traps("impossible_logprob")
    assert asking.draw().logprobs[1] == -9999.0


def test_nan_as_each_engine_says_it(asking: Asking):
    asking.traps("nan=3")
    if isinstance(asking, LmdeployAsking):
        assert asking.ask("a" * 32).status_code == 500
        return
    drawn = asking.draw()
    if isinstance(asking, SglangAsking):
        assert drawn.reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": "NaN happened"}
        assert drawn.logprobs[2] is None
        assert len(drawn.ids) == 3
    else:
        assert drawn.logprobs[2] == -9999.0
        assert len(drawn.ids) == 12


def test_logprobs_of_other_length(asking: Asking):
    asking.traps("other_length")
    drawn = asking.draw()
    assert len(drawn.logprobs) == len(drawn.ids) - 1


def test_paused_answers_503(asking: Asking):
    asking.engine.paused = "abort"
    asking.traps("paused_503")
    assert asking.ask("a" * 32).status_code == 503
    asking.engine.paused = None
    assert asking.ask("a" * 32).status_code == 200


def test_paused_lets_requests_wait(asking: Asking, pool: ThreadPoolExecutor):
    asking.engine.paused = "keep"
    waiting = pool.submit(asking.draw)
    until(lambda: asking.engine.running)
    time.sleep(0.05)
    assert not waiting.done()
    asking.engine.paused = None
    assert len(waiting.result(5).ids) == 12


def test_a_client_that_goes_away_ends_its_request(asking: Asking):
    asking.traps("slow=0.01")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(asking.serving.url + asking.token_path, json=_long_body(asking), timeout=0.1)
    until(lambda: not asking.engine.running, 1)


def _long_body(asking: Asking) -> Any:
    asking.draw(most=2)
    body = asking.http.get("/_seen").json()[-1][2]
    for holder in (body, body.get("sampling_params", {})):
        holder |= {key: 400 for key in ("max_tokens", "max_new_tokens", "max_completion_tokens") if key in holder}
    return body


def test_every_trap_is_shown_here_or_beside():
    files = [Path(__file__), Path(__file__).with_name("test_contract_told.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [name for name in TRAPS if f'"{name}' not in text and f'"{name}=' not in text] == []
