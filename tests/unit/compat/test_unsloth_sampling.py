"""SamplingParams of the Unsloth door: vLLM's names act or are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from groupwise import types
from groupwise.compat.trl import GRPOConfig
from groupwise.compat.unsloth import LoRARequest, SamplingParams
from groupwise.compat.unsloth.sampling import adapter_path
from groupwise.errors import ConfigError

SEED = {
    "min_p": 0.1,
    "top_p": 1.0,
    "top_k": -1,
    "seed": 3407,
    "stop": ["<|im_end|>"],
    "include_stop_str_in_output": True,
}


def as_vllm(**changed: Any) -> SimpleNamespace:
    """The public attributes that vLLM 0.26's object has, and their values."""
    values: dict[str, Any] = {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "output_text_buffer_length": 0,
        "structured_outputs": None,
        "logit_bias": None,
        "allowed_token_ids": None,
        "extra_args": None,
        "bad_words": [],
        "thinking_token_budget": None,
    }
    return SimpleNamespace(**{**values, **changed})


def test_the_values_reach_the_engine() -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.1, max_tokens=30, min_tokens=2,
        stop="\n", stop_token_ids=[7], seed=3,
    )  # fmt: skip
    assert params.groupwise(room=20, seed=9, own_stop="<eos>") == types.SamplingParams(
        temperature=0.7, top_p=0.9, top_k=0, min_p=0.1, repetition_penalty=1.1, max_tokens=20, min_tokens=2,
        stop=("\n",), stop_token_ids=(7,), seed=3,
    )  # fmt: skip


def test_the_models_own_end_is_no_stop_text_and_no_limit_is_the_room() -> None:
    made = SamplingParams(stop=["<eos>", "x"], max_tokens=None).groupwise(room=20, seed=9, own_stop="<eos>")
    assert (made.stop, made.max_tokens, made.seed) == (("x",), 20, 9)


def test_vllms_own_object_and_a_dict_are_accepted() -> None:
    ours = SamplingParams(top_k=50, max_tokens=1024)
    assert SamplingParams.of(ours) is ours
    read = SamplingParams.of(as_vllm(top_k=50, max_tokens=1024))
    assert read.groupwise(room=99, seed=0, own_stop="") == ours.groupwise(room=99, seed=0, own_stop="")
    assert SamplingParams.of({"top_k": 50, "max_tokens": 1024}) == ours
    assert SamplingParams.of(None) == SamplingParams()


def test_trl_takes_them() -> None:
    given = GRPOConfig("out", vllm_sampling_params=SamplingParams(**SEED)).vllm_sampling_params
    assert given.min_p == 0.1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"presence_penalty": 1.0}, "presence_penalty = 1.0 is refused: use repetition_penalty"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"temperature": None}, "temperature = None: expected a number"),
        ({"temperature": "hot"}, "temperature = 'hot': expected a number"),
        ({"temperature": float("inf")}, "temperature = inf: expected a number"),
        ({"n": 1.5}, "n = 1.5: expected a whole number"),
        ({"top_k": 2.5}, "top_k = 2.5: expected a whole number"),
        ({"seed": "x"}, "seed = 'x': expected a whole number"),
        ({"seed": -1}, "seed = -1: expected 0 or more"),
        ({"max_tokens": True}, "max_tokens = True: expected a whole number, or None"),
        ({"stop": 3}, "stop = 3: expected a text or several"),
        ({"stop": ["a", 3]}, "expected a text or several"),
        ({"stop_token_ids": ["a"]}, "expected a list of token numbers"),
        ({"stop_token_ids": 5}, "expected a list of token numbers"),
        ({"logit_bias": {1: 2.0}}, "logit_bias"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"extra_args": {"a": 1}}, "extra_args"),
        ({"logprobs": 5}, "expected None or 0"),
        ({"temperature": -1.0}, "temperature = -1.0: expected 0 or more"),
        ({"top_p": 0.0}, "top_p = 0.0: expected above 0"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n = 0: expected 1 or more"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens = 5: expected 0 to max_tokens"),
        ({"stop": ["a", ""]}, "texts that are not empty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_what_cannot_act_is_refused(wrong: dict[str, Any], says: str) -> None:
    for make in (
        lambda: SamplingParams(**wrong),
        lambda: SamplingParams.of(as_vllm(**wrong)),
        lambda: SamplingParams.of(wrong),
    ):
        with pytest.raises(ConfigError, match="SamplingParams") as caught:
            make()
        assert says in str(caught.value)


def test_other_things_are_no_sampling_params() -> None:
    with pytest.raises(ConfigError, match="got a int; expected SamplingParams"):
        SamplingParams.of(3)
    with pytest.raises(ConfigError, match="no argument 'heat'"):
        SamplingParams.of({"heat": 1})


def test_a_request_names_a_folder() -> None:
    assert str(adapter_path(SimpleNamespace(lora_path="here"))) == "here"
    assert str(adapter_path(LoRARequest("a", 1, "here"))) == "here"
    with pytest.raises(ConfigError, match="expected what model"):
        adapter_path("here")
