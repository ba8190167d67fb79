from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.fast_cpu import lean_layers
from groupwise.model.fast_cpu.evenly import make_activations_even
from groupwise.model.fast_cpu.flat_layers import flat_norm
from groupwise.model.fast_cpu.lean_layers import LLAMA_LAYERS, LeanDecoder, LeanLayer, Rotation, gated, rotate
from groupwise.model.fast_cpu.linear import DnnLinear, ordered_weights, use_dnn_linear
from groupwise.model.fast_cpu.norms import LeanNorm, make_norms_lean
from groupwise.model.forward.attention import ATTENTION_NAME
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import Packed, pack


def angles(tokens: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.randn(1, tokens, size // 2, generator=torch.Generator().manual_seed(5)) * 3
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotated_plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoFormer's equation 34, with pairs half a head apart."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_has_the_bits_of_its_equation(dtype: torch.dtype) -> None:
    x = torch.randn(1, 7, 3, 16).to(dtype)
    cos, sin = angles(7, 16, dtype)
    assert torch.equal(rotate(x, Rotation.of(cos, sin)), rotated_plainly(x, cos, sin))
    assert torch.equal(rotate(x.requires_grad_(), Rotation.of(cos, sin)), rotated_plainly(x, cos, sin))


def test_gradients_of_rotation_and_gate_are_finite_differences() -> None:
    torch.manual_seed(0)
    rotation = Rotation.of(*angles(3, 8, torch.float64))
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), (x,))
    gate, up = (torch.randn(1, 3, 20, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(gated, (silu, gate, up))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(gated(silu, gate, up), silu(gate) * up)


def packed() -> Packed:
    def row(group: int, tokens: tuple[int, ...]) -> TrainingRow:
        neutral = (0.0,) * len(tokens)
        return TrainingRow(
            group, ModelInput.of((3, 5, 7 + group)), ModelInput.of(tokens), (1,) * len(tokens), neutral, neutral
        )

    return pack([row(0, tuple(range(4, 40))), row(0, (9, 8)), row(1, tuple(range(30, 110)))])


def prepared(model: PreTrainedModel, *, lean: bool) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.set_attn_implementation(ATTENTION_NAME)
    make_activations_even(model)
    make_norms_lean(model)
    if lean:
        lean_layers.make_layers_lean(model)
        lean_layers.make_layers_lean(model)
    use_dnn_linear(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_lean_layers_have_the_bits_of_transformers(
    name: str, dtype: torch.dtype, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model(name).to(dtype)  # pyright: ignore[reportArgumentType]
    plain, lean = (prepared(model, lean=lean) for lean in (False, True))
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert any(isinstance(module, LeanLayer) for module in lean.modules())
    rows = packed()
    with torch.no_grad():
        wanted = packed_hidden_states(plain, rows)
        assert torch.equal(packed_hidden_states(lean, rows), wanted)
        with ordered_weights(lean):
            decoder = lean.get_decoder()
            assert isinstance(decoder, LeanDecoder)
            assert decoder.flat is not None
            assert not any(m.ordered for layer in decoder.layers for m in layer.modules() if isinstance(m, DnnLinear))  # pyright: ignore[reportGeneralTypeIssues]
            assert torch.equal(packed_hidden_states(lean, rows), wanted)
        assert decoder.flat is None
    found: list[dict[str, Tensor]] = []
    for each in (plain, lean):
        hidden = packed_hidden_states(each, rows)
        assert torch.equal(hidden, wanted)
        hidden.float().square().sum().backward()
        found.append({key: value.grad for key, value in each.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        scale = float(grad.abs().max()) + 1e-12
        torch.testing.assert_close(found[1][key].float() / scale, grad.float() / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_a_model_still_serves_transformers(name: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(name)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted = model(ids).logits
    lean_layers.make_layers_lean(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    generated: Any = model.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert generated.shape[1] <= 13


def test_other_architectures_stay_as_they_are(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("gemma3")
    before = {name: type(module) for name, module in model.named_modules()}
    lean_layers.make_layers_lean(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(type(module).__name__ in LLAMA_LAYERS for module in model.modules())


def test_a_norm_that_computes_otherwise_stays_itself() -> None:
    class OtherNorm(LeanNorm):
        """One of somebody's own."""

    plain = LeanNorm(Qwen3RMSNorm(8))
    other = OtherNorm(Qwen3RMSNorm(8))
    assert flat_norm(other) is other
    x = torch.randn(3, 8)
    assert torch.equal(flat_norm(plain)(x), plain(x))


@pytest.mark.parametrize("name", ["model.layers.0.mlp", "model.layers.1.self_attn.o_proj", "model.norm"])
def test_hooks_are_called_while_samples_are_drawn(name: str, make_model: Callable[..., PreTrainedModel]) -> None:
    lean = prepared(make_model("qwen3"), lean=True)
    rows = packed()
    with torch.no_grad():
        wanted = packed_hidden_states(lean, rows)
        called: list[str] = []
        hook = lean.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
        with ordered_weights(lean):
            assert torch.equal(packed_hidden_states(lean, rows), wanted)
        assert called == [name]
        hook.remove()
        with ordered_weights(lean):
            assert torch.equal(packed_hidden_states(lean, rows), wanted)
        assert called == [name]
