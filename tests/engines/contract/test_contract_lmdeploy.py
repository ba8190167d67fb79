"""What LMDeploy's contract server does as LMDeploy does, where the other engines do something else."""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.torch import load_file

from tests.engines.contract import lmdeploy, server
from tests.engines.contract.asking import LmdeployAsking, apart
from tests.engines.contract.tiny import PROMPT, Folders

CLOSE = 2e-5


@pytest.fixture(scope="module")
def started(folders: Folders) -> Iterator[LmdeployAsking]:
    with server.serving(lmdeploy.contract(folders.old)) as serving:
        yield LmdeployAsking(serving, folders)


@pytest.fixture
def asking(started: LmdeployAsking) -> Iterator[LmdeployAsking]:
    yield started
    started.clean()


def test_logprobs_are_those_before_the_temperature(asking: LmdeployAsking, folders: Folders):
    drawn = asking.draw(temperature=0.5)
    assert drawn.apart(folders, folders.old) < CLOSE
    assert drawn.apart(folders, folders.old, 0.5) > 0.1


def test_unset_means_temperature_and_top_k_of_its_own(asking: LmdeployAsking):
    unset = asking.draw(temperature=None, top_k=None, top_p=None)
    assert unset.ids == asking.draw(temperature=0.8, top_k=50).ids
    assert unset.ids != asking.draw().ids


def test_generate_has_no_seed(asking: LmdeployAsking):
    first, second = (asking.generate(seed=5, n=3).json() for _ in range(2))
    assert first["output_ids"] != second["output_ids"]
    assert len(first["meta_info"]["output_token_logprobs"]) == 12


def test_the_token_that_ends_is_dropped_with_its_logprob(asking: LmdeployAsking, folders: Folders):
    every = list(range(300))
    dropped = asking.generate(stop_token_ids=every).json()
    assert dropped["output_ids"] == []
    assert dropped["meta_info"]["output_token_logprobs"] is None
    kept = asking.generate(stop_token_ids=every, include_stop_str_in_output=True).json()
    assert len(kept["output_ids"]) == 1
    assert kept["meta_info"]["finish_reason"] == {"type": "stop"}
    (logprob, token), *none = kept["meta_info"]["output_token_logprobs"]
    assert not none
    assert apart([logprob], folders.logprobs(folders.old, [*PROMPT, token])[-1:]) < CLOSE


def test_ignore_eos_forbids_what_would_end(asking: LmdeployAsking):
    all_but_one = [token for token in range(300) if token != 7]
    reply = asking.generate(stop_token_ids=all_but_one, ignore_eos=True, max_tokens=4).json()
    assert reply["output_ids"] == [7, 7, 7, 7]


def test_logprobs_need_a_mode(folders: Folders):
    with server.serving(lmdeploy.contract(folders.old, lmdeploy.Flags())) as serving:
        asking = LmdeployAsking(serving, folders)
        assert "logprobs_mode" in asking.generate().json()["message"]
        assert asking.post("/abort_request", {"abort_all": True}).status_code == 501


def test_scores_need_no_tokens_and_logprobs(asking: LmdeployAsking):
    assert asking.generate(logprob_start_len=0).status_code == 400
    assert asking.generate(logprob_start_len=0, max_tokens=0, return_logprob=False).status_code == 400
    assert asking.generate(max_tokens=0).status_code == 400


def test_the_head_is_packed_when_the_last_bucket_came(asking: LmdeployAsking, folders: Folders):
    tensors = load_file(folders.new / "model.safetensors")
    head = {name: tensor for name, tensor in tensors.items() if "embed" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in head}
    assert asking.send(head, finished=False).text == "null"
    assert asking.send(rest, finished=False).text == "null"
    assert apart(asking.scores(), folders.logprobs(folders.new, PROMPT)) > 0.05
    asking.send({"model.norm.weight": rest["model.norm.weight"]}, finished=True)
    assert apart(asking.scores(), folders.logprobs(folders.new, PROMPT)) < CLOSE


def test_only_buckets_are_unpickled(asking: LmdeployAsking, folders: Folders):
    body = {"load_format": "flattened_bucket", "finished": True}
    strange = base64.b64encode(pickle.dumps({"metadata": [time.sleep]})).decode()
    reply = asking.post("/update_weights", body | {"serialized_named_tensors": strange})
    assert reply.status_code == 500
    assert "No module named 'time'" in reply.json()["message"]
    assert asking.post("/update_weights", body).status_code == 422
    assert apart(asking.scores(), folders.logprobs(folders.old, PROMPT)) < CLOSE


def test_sessions(asking: LmdeployAsking):
    asking.traps("slow=0.002")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asking.draw, "x" * 32, most=400)
        while not asking.engine.running:
            time.sleep(0.002)
        inner = int(asking.engine.running[0])
        session = int.from_bytes(b"x" * 6, "big")
        occupied = asking.generate(session_id=inner)
        assert (occupied.status_code, "occupied" in occupied.json()["message"]) == (400, True)
        assert asking.generate(session_id=session).status_code == 500
        assert asking.post("/abort_request", {"session_id": 1234567}).status_code == 400
        assert asking.post("/abort_request", {"session_id": session}).status_code == 200
        drawn = waiting.result(5)
    assert drawn.finish == "abort"
    assert 0 < len(drawn.ids) < 400


def test_sleeping(asking: LmdeployAsking):
    assert asking.post("/sleep?level=3").status_code == 400
    assert asking.post("/sleep?level=2").status_code == 200
    assert asking.http.get("/health").json()["status"] == "sleeping"
    asking.post("/wakeup?tags=weights")
    assert asking.http.get("/is_sleeping").json() == {"is_sleeping": True}
    asking.post("/wakeup?tags=kv_cache")
    assert asking.http.get("/health").json()["status"] == "healthy"
    assert len(asking.draw().ids) == 12


def test_what_chat_refuses(asking: LmdeployAsking):
    assert asking.ask("a" * 32, model="other").status_code == 404
    assert asking.ask("a" * 32, prompt=[]).status_code == 400
    assert asking.ask("a" * 32, prompt=[5] * 512).status_code == 400
    assert asking.ask("a" * 32, temperature=2.5).status_code == 400
