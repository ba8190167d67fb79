"""4-bit layers: the product is that of the unpacked weights, in any company and in the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'groupwise[lowbit]'")

from groupwise.config import LoraConfig, ModelConfig
from groupwise.model.loading import LoadedModel, load_model, with_adapter


@pytest.fixture(params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, make_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> LoadedModel:
    make_model("qwen3", hidden_size=128, intermediate_size=192).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = {"path": str(tmp_path), "device": "cpu", "dtype": request.param, "quantization": "nf4"}
    return load_model(ModelConfig.model_validate(settings))


def first_layer(loaded: LoadedModel) -> Any:
    return loaded.model.get_decoder().layers[0].self_attn.q_proj  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]


def unpacked(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def test_weights_take_four_bits_and_compute_as_if_unpacked(loaded: LoadedModel) -> None:
    layer = first_layer(loaded)
    assert layer.weight.dtype is torch.uint8
    assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
    x = torch.randn(1, 64, 128).to(loaded.model.dtype)
    weight = unpacked(layer)
    assert weight.dtype is loaded.model.dtype
    assert len(weight.unique()) > 16
    with torch.inference_mode():
        whole = layer(x)
        assert torch.equal(whole, linear(x, weight))
        for count in (4, 8, 12, 32):
            assert torch.equal(layer(x[:, :count].clone()), whole[:, :count])
    for training in (True, False):
        layer.train(training)
        x = x.detach().clone().requires_grad_()
        out = layer(x)
        assert torch.equal(out, whole)  # the very bits of inference
        grad = torch.randn_like(out)
        out.backward(grad)
        assert x.grad is not None
        assert torch.equal(x.grad, grad @ weight)


def test_only_adapters_train_on_them(loaded: LoadedModel) -> None:
    adapted = with_adapter(loaded, LoraConfig.model_validate({"rank": 4}))
    trained = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name and p.dtype is loaded.model.dtype for name, p in trained.items())
    assert first_layer(adapted).base_layer.weight.dtype is torch.uint8
