"""What SGLang's contract server does as SGLang does, where the other engines do something else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engines.contract import server, sglang
from tests.engines.contract.asking import SglangAsking, apart
from tests.engines.contract.tiny import PROMPT, Folders

CLOSE = 2e-5


@pytest.fixture(scope="module")
def started(folders: Folders) -> Iterator[SglangAsking]:
    with server.serving(sglang.contract(folders.old)) as serving:
        yield SglangAsking(serving, folders)


@pytest.fixture
def asking(started: SglangAsking) -> Iterator[SglangAsking]:
    yield started
    started.clean()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def running(asking: SglangAsking, pool: ThreadPoolExecutor, *rids: str, most: int = 400) -> list[Any]:
    asking.traps("slow=0.002")
    found = [pool.submit(asking.draw, rid, most=most) for rid in rids]
    while len(asking.engine.running) < len(rids):
        assert not any(each.done() for each in found), "one ended before all had begun"
        time.sleep(0.002)
    time.sleep(0.02)
    return found


def test_logprobs_are_those_of_logits_over_temperature_before_truncation(asking: SglangAsking, folders: Folders):
    assert asking.draw(temperature=0.5, top_k=3, top_p=0.8).apart(folders, folders.old, 0.5) < CLOSE


def test_seeds_act_only_with_the_deterministic_flag(folders: Folders):
    with server.serving(sglang.contract(folders.old, sglang.Flags())) as serving:
        asking = SglangAsking(serving, folders)
        assert asking.draw().ids != asking.draw().ids


def test_without_a_seed_the_deterministic_engine_takes_42(asking: SglangAsking):
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 12, "ignore_eos": True}, "return_logprob": True}
    assert asking.read(asking.post("/generate", body).json()).ids == asking.draw(sampling_seed=42).ids
    copies = asking.post("/generate", body | {"sampling_params": body["sampling_params"] | {"n": 2}}).json()
    assert copies[0]["output_ids"] == copies[1]["output_ids"]


def test_unknown_sampling_keys_are_refused_and_other_keys_ignored(asking: SglangAsking):
    reply = asking.ask("a" * 32, seed=5)
    assert reply.status_code == 400
    assert "unknown field `seed`" in reply.json()["error"]["message"]
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}, "no_such_key": 1}
    assert asking.post("/generate", body).status_code == 200


def test_stop_tokens_are_kept_and_ignore_eos_switches_them_off(asking: SglangAsking):
    whole = asking.draw(most=24).ids
    stop = whole[5]
    ended = asking.draw(most=24, ignore_eos=False, stop_token_ids=[stop])
    assert ended.ids == whole[: whole.index(stop) + 1]
    assert ended.reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert asking.draw(most=24, stop_token_ids=[stop]).ids == whole


def test_a_list_of_prompts_gives_a_list(asking: SglangAsking):
    params = {"max_new_tokens": 3, "sampling_seed": 5, "ignore_eos": True}
    body = {"rid": ["a" * 32, "b" * 32], "input_ids": [PROMPT, PROMPT[:20]], "sampling_params": [params, params]}
    both = asking.post("/generate", body | {"return_logprob": True}).json()
    assert [each["meta_info"]["id"] for each in both] == ["a" * 32, "b" * 32]
    assert [each["output_ids"] for each in both] == [
        asking.draw(most=3).ids,
        asking.draw(most=3, prompt=PROMPT[:20]).ids,
    ]


def test_an_abort_ends_all_that_begin_alike(asking: SglangAsking, pool: ThreadPoolExecutor):
    first, tenth, other = running(asking, pool, "r1", "r10", "s1")
    asking.post("/abort_request", {"rid": "r"})
    time.sleep(0.03)
    assert len(asking.engine.running) == 3
    assert asking.post("/abort_request", {"rid": "r1"}).status_code == 200
    assert [each.result(30).finish for each in (first, tenth, other)] == ["abort", "abort", "length"]


def test_an_update_whose_cache_is_not_flushed_has_changed_the_weights(
    asking: SglangAsking, pool: ThreadPoolExecutor, folders: Folders
):
    (waiting,) = running(asking, pool, "a" * 32, most=60)
    assert asking.post("/pause_generation", {"mode": "in_place"}).json()["status"] == "ok"
    reply = asking.load(folders.new, flush_cache=True, weight_version="1")
    assert reply.status_code == 400
    assert "Weights were updated, but the cache was not flushed" in reply.json()["message"]
    assert asking.http.get("/model_info").json()["weight_version"] == "default"
    asking.post("/continue_generation", {})
    drawn = waiting.result(5)
    assert [each["version"] for each in drawn.reply["meta_info"]["weight_versions"]] == ["default", "1"]
    assert apart(asking.scores(), folders.logprobs(folders.new, PROMPT)) < CLOSE


def test_a_retracting_pause_lets_the_cache_be_flushed(asking: SglangAsking, pool: ThreadPoolExecutor, folders: Folders):
    (waiting,) = running(asking, pool, "a" * 32, most=60)
    asking.post("/pause_generation", {"mode": "retract"})
    reply = asking.load(folders.new, flush_cache=True, weight_version="1")
    assert reply.json()["success"]
    assert asking.http.get("/get_model_info").json()["weight_version"] == "1"
    asking.post("/continue_generation", {})
    drawn = waiting.result(5)
    cut = drawn.reply["meta_info"]["weight_versions"][0]["end"]
    before, after = (
        folders.logprobs(each, PROMPT + drawn.ids)[len(PROMPT) - 1 :] for each in (folders.old, folders.new)
    )
    assert apart(drawn.logprobs, before[:cut] + after[cut:]) < CLOSE


def test_a_pause_aborts_by_default(asking: SglangAsking, pool: ThreadPoolExecutor):
    (waiting,) = running(asking, pool, "a" * 32)
    asking.post("/pause_generation", {})
    assert waiting.result(5).finish == "abort"
    later = pool.submit(asking.draw)
    time.sleep(0.05)
    assert not later.done()
    asking.post("/continue_generation", {})
    later.result(5)


def test_memory_is_given_back_when_idle(asking: SglangAsking, pool: ThreadPoolExecutor, folders: Folders):
    (waiting,) = running(asking, pool, "a" * 32, most=60)
    assert asking.post("/release_memory_occupation", {}).status_code == 500
    waiting.result(5)
    assert asking.post("/release_memory_occupation", {"tags": ["weights", "kv_cache"]}).status_code == 200
    assert asking.post("/resume_memory_occupation", {"tags": ["weights"]}).status_code == 200
    later = pool.submit(asking.draw)
    time.sleep(0.05)
    assert not later.done()
    asking.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert later.result(5).apart(folders, folders.old) < CLOSE


def test_what_it_says_of_itself(asking: SglangAsking, folders: Folders):
    assert asking.http.get("/get_server_info").json()["version"] == "0.5.23"
    assert asking.http.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    failed = asking.load(folders.old / "nowhere")
    assert failed.status_code == 400
    assert failed.json()["message"].endswith("Rolling back to original weights.")
    assert asking.http.get("/model_info").json()["model_path"].endswith("nowhere")


def test_too_long_is_refused(asking: SglangAsking):
    assert asking.ask("a" * 32, most=500).status_code == 400
    assert asking.ask("a" * 32, prompt=[5] * 512).status_code == 400


def test_a_paused_server_is_not_healthy_in_the_end(folders: Folders):
    with server.serving(sglang.contract(folders.old, sglang.Flags(health_check_timeout=0.1))) as serving:
        asking = SglangAsking(serving, folders)
        assert asking.http.get("/health").status_code == 200
        asking.post("/pause_generation", {"mode": "retract"})
        assert asking.http.get("/health").status_code == 503
        asking.post("/continue_generation", {})
        assert asking.http.get("/health").status_code == 200
