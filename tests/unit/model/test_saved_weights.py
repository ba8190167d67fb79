"""What a folder would have is told without one, by the same names and with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from groupwise.model.saved_weights import saved_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def dense(tied: bool) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied))


def experts() -> Any:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2))


MODELS = {"tied": lambda: dense(True), "untied": lambda: dense(False), "experts": experts}


@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize("kind", MODELS)
def test_names_and_bits_are_those_of_the_folder(kind: str, loaded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    if loaded:
        model.save_pretrained(tmp_path / "first")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    found = dict(saved_weights(model))
    model.save_pretrained(tmp_path / "second")
    written = load_file(tmp_path / "second" / "model.safetensors")
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_they_are_the_models_own_memory_also_where_weights_lie_side_by_side() -> None:
    model = dense(True)
    attention = model.model.layers[0].self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    whole = torch.cat([part.weight.data for part in parts])
    for part, piece in zip(parts, whole.split([part.weight.shape[0] for part in parts]), strict=True):
        part.weight.data = piece
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    found = dict(saved_weights(model))
    assert "lm_head.weight" not in found
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == {name: places[name] for name in found}
    assert not any(tensor.requires_grad for tensor in found.values())
