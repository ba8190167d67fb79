"""What vLLM's contract server does as vLLM does, where the other engines do something else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from groupwise.weight_sync.folder import MANIFEST, WEIGHTS, write_weights
from tests.engines.contract import server, vllm
from tests.engines.contract.asking import VllmAsking, apart
from tests.engines.contract.tiny import PROMPT, Folders

CLOSE = 2e-5


@pytest.fixture(scope="module")
def started(folders: Folders) -> Iterator[VllmAsking]:
    with server.serving(vllm.contract(folders.old)) as serving:
        yield VllmAsking(serving, folders)


@pytest.fixture
def asking(started: VllmAsking) -> Iterator[VllmAsking]:
    yield started
    started.clean()


def choice(drawn: Any) -> Any:
    return drawn.reply["choices"][0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_logprobs_are_those_of_the_distribution_drawn_from(asking: VllmAsking, folders: Folders, temperature: float):
    assert asking.draw(temperature=temperature, most=24).apart(folders, folders.old, temperature) < CLOSE


def test_greedy_reports_the_logprob_at_temperature_one(asking: VllmAsking, folders: Folders):
    drawn = asking.draw(temperature=0)
    assert drawn.apart(folders, folders.old) < CLOSE
    assert all(each["rank"] == 1 for each in choice(drawn)["logprobs"]["content"])


def test_truncation_shows_in_processed_logprobs(asking: VllmAsking, folders: Folders):
    drawn = asking.draw(top_k=2, most=24)
    assert max(each["rank"] for each in choice(drawn)["logprobs"]["content"]) <= 2
    assert drawn.apart(folders, folders.old) > 0.1


def test_raw_logprobs_unless_told_otherwise(folders: Folders):
    with server.serving(vllm.contract(folders.old, vllm.Flags(enable_scale_out=True))) as serving:
        drawn = VllmAsking(serving, folders).draw(temperature=0.5)
    assert drawn.apart(folders, folders.old) < CLOSE
    assert drawn.apart(folders, folders.old, 0.5) > 0.1


def test_routes_that_are_not_there_without_their_flags(folders: Folders):
    with server.serving(vllm.contract(folders.old, vllm.Flags())) as serving:
        asking = VllmAsking(serving, folders)
        refused = asking.ask("a")
        assert refused.status_code == 403
        assert "--enable-scale-out" in refused.json()["error"]["message"]
        for path in ("/pause", "/collective_rpc", "/sleep", "/v1/load_lora_adapter"):
            assert asking.post(path, {}).status_code == 404


def test_unknown_sampling_keys_are_ignored(asking: VllmAsking):
    assert asking.draw(sampling_seed=7, max_new_tokens=3).ids == asking.draw().ids


def test_the_token_that_ends_is_kept_with_its_logprob(asking: VllmAsking, folders: Folders):
    whole = asking.draw(most=24).ids
    stop = whole[5]
    first = whole.index(stop)
    drawn = asking.draw(most=24, stop_token_ids=[stop])
    assert drawn.ids == whole[: first + 1]
    assert len(drawn.logprobs) == first + 1
    assert (drawn.finish, choice(drawn)["stop_reason"]) == ("stop", stop)


def test_the_end_of_sequence_has_no_stop_reason(asking: VllmAsking):
    whole = asking.draw(most=24).ids
    asking.engine.model.eos = (whole[5],)
    try:
        drawn = asking.draw(most=24, ignore_eos=False)
        assert drawn.ids == whole[: whole.index(whole[5]) + 1]
        assert (drawn.finish, choice(drawn)["stop_reason"]) == ("stop", None)
    finally:
        asking.engine.model.eos = (2,)


def test_prompts_are_scored_at_temperature_one(asking: VllmAsking, folders: Folders):
    assert apart(asking.scores(temperature=0.5), folders.logprobs(folders.old, PROMPT)) < CLOSE


def test_child_i_draws_with_the_seed_plus_i(asking: VllmAsking):
    children = asking.draw(n=3, seed=5).reply["choices"]
    assert [each["token_ids"] for each in children] == [asking.draw(seed=seed).ids for seed in (5, 6, 7)]
    assert asking.ask("a", n=65).status_code == 400


def test_without_a_seed_it_draws_differently(asking: VllmAsking):
    assert asking.draw(seed=None).ids != asking.draw(seed=None).ids


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (vllm.GENERATE, {"token_ids": [], "sampling_params": {}}, 400),
        (vllm.GENERATE, {"token_ids": [1] * 600, "sampling_params": {}}, 400),
        (vllm.GENERATE, {"token_ids": [5000], "sampling_params": {}}, 400),
        (vllm.GENERATE, {"token_ids": [1], "sampling_params": {"temperature": 3}}, 400),
        (vllm.GENERATE, {"token_ids": [1], "sampling_params": {}, "model": "pol@9"}, 404),
        ("/collective_rpc", {"method": "no_such"}, 500),
        ("/collective_rpc", {"method": "groupwise_load", "kwargs": {"path": "/nowhere"}}, 500),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/nowhere"}, 404),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}, 404),
    ],
)
def test_what_it_refuses(asking: VllmAsking, path: str, body: Any, status: int):
    reply = asking.post(path, body)
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == status


def test_an_abort_needs_the_prefix(asking: VllmAsking):
    asking.traps("slow=0.002")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asking.draw, "r1", most=400)
        while not asking.engine.running:
            time.sleep(0.002)
        for ids in (["r1"], ["generate-tokens-r"]):
            assert asking.post("/abort_requests", {"request_ids": ids}).json() == {"status": "aborted", "aborted": 1}
            time.sleep(0.03)
            assert not waiting.done()
        asking.post("/abort_requests", {"request_ids": ["generate-tokens-r1"]})
        drawn = waiting.result(5)
    assert drawn.finish == "abort"
    assert drawn.reply["request_id"] == "generate-tokens-r1"
    assert 0 < len(drawn.ids) == len(drawn.logprobs) < 400


def test_an_update_amid_a_request_has_two_spans(asking: VllmAsking, folders: Folders):
    asking.traps("slow=0.002")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asking.draw, most=80)
        while not asking.engine.running:
            time.sleep(0.002)
        time.sleep(0.05)
        assert asking.post("/pause?mode=keep").json() == {"status": "paused"}
        assert asking.http.get("/is_paused").json() == {"is_paused": True}
        assert asking.load(folders.new).json() == {"results": [{"tensors": 24, "bytes": 113024}]}
        assert not asking.flush()
        assert asking.post("/reset_prefix_cache?reset_running_requests=true").json() == {"success": True}
        assert asking.http.get("/weight_info").json() == {"weight_version": "default"}
        asking.post("/update_weight_version", {"new_version": "1"})
        assert asking.post("/resume").json() == {"status": "resumed"}
        drawn = waiting.result(5)
    (old, zero, cut), (new, again, end) = [tuple(each.values()) for each in choice(drawn)["weight_versions"]]
    assert (old, zero, new, again, end) == ("default", 0, "1", cut, 80)
    before, after = (
        folders.logprobs(each, PROMPT + drawn.ids)[len(PROMPT) - 1 :] for each in (folders.old, folders.new)
    )
    assert apart(drawn.logprobs, before[:cut] + after[cut:]) < CLOSE


def test_a_pause_aborts_by_default_and_lets_new_requests_wait(asking: VllmAsking):
    asking.traps("slow=0.002")
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(asking.draw, most=400)
        while not asking.engine.running:
            time.sleep(0.002)
        asking.post("/pause")
        assert running.result(5).finish == "abort"
        waiting = pool.submit(asking.draw)
        time.sleep(0.05)
        assert not waiting.done()
        asking.post("/resume")
        assert waiting.result(5).finish == "length"


def test_a_paused_newer_engine_answers_503(folders: Folders):
    flags = vllm.Flags(enable_scale_out=True, dev_mode=True, version="0.33")
    with server.serving(vllm.contract(folders.old, flags)) as serving:
        asking = VllmAsking(serving, folders)
        asking.post("/pause?mode=wait")
        reply = asking.ask("a")
        assert reply.status_code == 503
        assert "Please retry" in reply.json()["error"]["message"]


def test_loading_while_requests_run_ends_the_worker_and_never_returns(asking: VllmAsking, folders: Folders):
    asking.traps("slow=0.002")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asking.ask, "a", most=400)
        while not asking.engine.running:
            time.sleep(0.002)
        asking.http.timeout = httpx.Timeout(0.15)
        try:
            with pytest.raises(httpx.ReadTimeout):
                asking.load(folders.new)
        finally:
            asking.http.timeout = httpx.Timeout(5)
        assert running.result(5).status_code == 500
    assert asking.http.get("/health").status_code == 503
    assert asking.http.get("/weight_info").status_code == 500
    assert asking.ask("b").status_code == 500


def test_a_manifest_is_compared_before_anything_is_touched(asking: VllmAsking, folders: Folders, tmp_path: Any):
    folder = tmp_path / "v3"
    write_weights(folder, folders.model(folders.new).named_parameters(), version=3)
    torn = bytearray((folder / WEIGHTS).read_bytes())
    torn[-1] ^= 1
    good = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(torn)
    load = {"method": "groupwise_load", "kwargs": {"path": str(folder), "version": "3"}}
    [result] = asking.post("/collective_rpc", load).json()["results"]
    assert "torn" in result["error"]
    assert not result["touched"]
    assert apart(asking.scores(), folders.logprobs(folders.old, PROMPT)) < CLOSE
    (folder / WEIGHTS).write_bytes(good)
    assert (folder / MANIFEST).exists()
    assert asking.post("/collective_rpc", load).json()["results"][0]["tensors"] == 24
    assert apart(asking.scores(), folders.logprobs(folders.new, PROMPT)) < CLOSE


def test_sleeping_keeps_requests_waiting(asking: VllmAsking):
    assert asking.post("/sleep?level=1").json() == {"status": "sleeping", "level": 1}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asking.draw)
        time.sleep(0.05)
        assert not waiting.done()
        assert asking.post("/wake_up?tags=weights").json() == {"status": "sleeping", "tags": ["weights"]}
        assert asking.http.get("/is_sleeping").json() == {"is_sleeping": True}
        assert asking.post("/wake_up").json() == {"status": "awake", "tags": None}
        waiting.result(5)


def test_adapters_are_listed(asking: VllmAsking, folders: Folders):
    asking.post("/v1/load_lora_adapter", {"lora_name": "pol@1", "lora_path": str(folders.adapter)})
    base, adapter = asking.http.get("/v1/models").json()["data"]
    assert (base["id"], base["max_model_len"]) == (str(folders.old), 512)
    assert (adapter["id"], adapter["parent"], adapter["root"]) == ("pol@1", base["id"], str(folders.adapter))


def test_an_untied_model_is_loaded_whole(folders: Folders):
    with server.serving(vllm.contract(folders.untied)) as serving:
        asking = VllmAsking(serving, folders)
        assert apart(asking.scores(), folders.logprobs(folders.untied, PROMPT)) < CLOSE
        asking.traps("stale_head")
        assert asking.load(folders.untied).json()["results"][0]["tensors"] == 25
        assert apart(asking.scores(), folders.logprobs(folders.untied, PROMPT)) < CLOSE
