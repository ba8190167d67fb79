from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from groupwise.model.fast_cpu.norms import LLAMA_NORMS, LeanNorm, make_norms_lean

KINDS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)


def made(kind: Any, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    norm = kind(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48, generator=torch.Generator().manual_seed(1)))
    return norm, LeanNorm(copy.deepcopy(norm))


def gradients(norm: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(norm(x), (x, norm.weight), grad)  # type: ignore[arg-type]


def test_every_known_norm_is_tested() -> None:
    assert {kind.__name__ for kind in KINDS} == LLAMA_NORMS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48), (1, 7, 48), (1, 3, 4, 48)])
def test_bits_forward_and_gradients_are_the_modules(kind: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm, lean = made(kind, dtype)
    x, grad = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3 for seed in (2, 3))
    with torch.no_grad():
        assert torch.equal(lean(x), norm(x))
    assert torch.equal(lean(x.requires_grad_()), norm(x))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    # In bfloat16 the module's own gradients are rounded at every operation; the float32 module is the better judge.
    judge = gradients(norm.float(), x.detach().float(), grad.float())
    for got, wanted in zip(gradients(lean, x.detach(), grad), judge, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_the_finite_difference() -> None:
    _, lean = made(LlamaRMSNorm, torch.float32)
    lean = lean.double()
    # The module's statistics are float32 whatever comes in, which the step of the difference must outgrow.
    x = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    assert torch.autograd.gradcheck(lean, (x,), eps=1e-2, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
def test_models_keep_names_and_weights(name: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    make_norms_lean(model)
    make_norms_lean(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    lean = [module for module in model.modules() if isinstance(module, LeanNorm)]
    assert bool(lean) == (name != "gemma3")
