"""What vLLM and SGLang tell beside tokens, as they tell it, and their traps; values by Hugging Face."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

from tests.engines.contract import server, sglang, vllm
from tests.engines.contract.asking import Asking, SglangAsking, VllmAsking
from tests.engines.contract.tiny import EOS, PROMPT, VOCAB, Folders

KINDS: dict[str, tuple[Any, type[Asking]]] = {"vllm": (vllm, VllmAsking), "sglang": (sglang, SglangAsking)}
TOKENS = 6
CUT = {"top_k": 20, "top_p": 0.9, "temperature": 0.7}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-4-MoE of two layers, the first of them dense."""
    shape: dict[str, Any] = {"head_dim": 16}
    config = Glm4MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **shape,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        eos_token_id=EOS,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("mixture")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Glm4MoeForCausalLM(config).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def asked(kind: str, model: Path, folders: Folders, **flags: Any) -> Iterator[Asking]:
    module, asking = KINDS[kind]
    with server.serving(module.contract(model, module.Flags.as_it_should(**flags))) as serving:
        yield asking(serving, folders)


def sets_of(asking: Asking) -> tuple[list[int], list[list[int]], list[float]]:
    """Tokens, what filters left for each, and log-probs as drawn."""
    if isinstance(asking, VllmAsking):
        found = asking.draw(most=TOKENS, **CUT)
        return found.ids, found.reply["choices"][0]["sampling_mask"], found.logprobs
    body = {
        "rid": "a" * 32,
        "input_ids": PROMPT,
        "sampling_params": {
            "max_new_tokens": TOKENS,
            "sampling_seed": 5,
            "top_k": 20,
            "top_p": 0.9,
            "temperature": 0.7,
        },
        "return_logprob": True,
        "return_sampling_mask": True,
    }
    reply = asking.post("/generate", body).json()
    meta = reply["meta_info"]
    return reply["output_ids"], meta.get("output_token_sampling_mask"), meta.get("output_token_sampling_logprobs")


def rows_of(asking: Asking, *, prompt: list[int] = PROMPT, start: int = 0) -> tuple[list[int], Any]:
    """Tokens, and the experts `[rows, layers, k]`."""
    if isinstance(asking, VllmAsking):
        found = asking.draw("b" * 32, prompt=prompt, most=TOKENS, routed_experts_prompt_start=start)
        text = found.reply["choices"][0]["routed_experts"]
        return found.ids, None if text is None else np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    body = {"rid": "b" * 32, "input_ids": prompt, "return_logprob": True, "return_routed_experts": True}
    params = {"max_new_tokens": TOKENS, "sampling_seed": 5, "ignore_eos": True}
    reply = asking.post("/generate", body | {"sampling_params": params, "routed_experts_start_len": start}).json()
    text = reply["meta_info"].get("routed_experts")
    rows = None if text is None else np.frombuffer(base64.b64decode(text), np.int32).reshape(-1, 2, 2)
    return reply["output_ids"], rows


@pytest.mark.parametrize("kind", KINDS)
def test_sets_are_what_the_token_was_drawn_from(folders: Folders, kind: str):
    flags = {"return_sampling_mask": True} if kind == "vllm" else {}
    with asked(kind, folders.old, folders, **flags) as asking:
        tokens, sets, logprobs = sets_of(asking)
        asking.traps("lost_mask")
        spoiled = sets_of(asking)
        asking.traps("no_sides")
        assert sets_of(asking)[1] is None
    with torch.inference_mode():
        logits = folders.model(folders.old)(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1] / 0.7
    for row, token, left, logprob in zip(logits, tokens, sets, logprobs, strict=True):
        assert token in left
        assert 1 <= len(left) <= 20
        assert logprob == pytest.approx(float(row[token] - row[left].logsumexp(0)), abs=2e-5)
        outside = torch.ones(VOCAB, dtype=torch.bool)
        outside[left] = False
        assert float(row[left].min()) >= float(row[outside].max())
    assert spoiled[0] == tokens
    assert [token in left for token, left in zip(tokens, spoiled[1], strict=True)] == [True, False] + [True] * (
        len(tokens) - 2
    )


def test_vllm_wants_a_top_k_in_each_request_then_and_sglang_a_bounded_one(folders: Folders):
    with asked("vllm", folders.old, folders, return_sampling_mask=True) as asking:
        assert "requires top_k > 0" in asking.ask("a" * 32).text
        assert "requires temperature > 0" in asking.ask("a" * 32, temperature=0, top_k=1).text
    with asked("sglang", folders.old, folders) as asking:
        body = {"input_ids": PROMPT, "sampling_params": {"top_k": -1}, "return_sampling_mask": True}
        assert "finite 1 < top_k <= 4096" in asking.post("/generate", body).text


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_those_of_every_token_that_was_run(folders: Folders, mixture: Path, kind: str):
    with asked(kind, mixture, folders, enable_return_routed_experts=True) as asking:
        tokens, rows = rows_of(asking)
        _, later = rows_of(asking, start=len(PROMPT))
        asking.traps("zero_routes")
        _, zeros = rows_of(asking)
        asking.traps("wrong_rows")
        _, fewer = rows_of(asking)
        asking.traps("stale_routes")
        _, stale = rows_of(asking, prompt=PROMPT[::-1])
        asking.traps()
        _, right = rows_of(asking, prompt=PROMPT[::-1])
        asking.traps("no_sides")
        assert rows_of(asking)[1] is None
    model: Any = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32, attn_implementation="eager").eval()
    seen: list[Any] = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *call: seen.append(call[-1][-1]))
    with torch.inference_mode():
        model(torch.tensor([PROMPT + tokens[:-1]]))
    assert rows.shape == (len(PROMPT) + TOKENS - 1, 2, 2)
    assert rows.dtype == (np.uint8 if kind == "vllm" else np.int32)
    assert (rows[:, 0] == 0).all(), "the dense layer's"
    assert (np.sort(rows[:, 1], -1) == np.sort(seen[0].numpy(), -1)).all()
    assert (later == rows[len(PROMPT) :]).all()
    assert (zeros == 0).all()
    assert zeros.shape == rows.shape
    assert len(fewer) == len(rows) - 1
    assert (stale == rows).all(), "those of the prompt before"
    assert (right != rows).any()
