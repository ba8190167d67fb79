"""Functions whose bits must not depend on where an element or a row stands."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from groupwise.model.fast_cpu.evenly import EvenActivation, evenly, make_activations_even, padding_for, row_sums
from groupwise.model.loading import wrap_model

Threads = Callable[[int], None]


def tanh_gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


@pytest.mark.parametrize("function", [silu, tanh_gelu, torch.exp2, torch.sigmoid])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_row_has_the_same_bits_on_any_number_of_threads_and_in_any_company(
    function: Callable[[Tensor], Tensor], count: int, threads: Threads
) -> None:
    # 77 x 1013 elements are shared out unevenly among two threads or more.
    x = torch.randn(77, 1013, generator=torch.Generator().manual_seed(0)) * 4
    threads(1)
    whole = evenly(function, x)
    torch.testing.assert_close(whole, function(x))
    for number in (1, count):
        threads(number)
        assert torch.equal(evenly(function, x), whole)
        for rows in (slice(0, 1), slice(1, 4), slice(5, 69), slice(76, 77)):
            assert torch.equal(evenly(function, x[rows].clone()), whole[rows]), (number, rows)


def test_plain_functions_do_differ() -> None:
    """If this fails, torch has mended its loops, and `groupwise.model.fast_cpu.evenly` can go."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 4
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("seen with AVX only")
    assert any(silu(x[i : i + 1])[0] != silu(x)[i] for i in range(4096))


@pytest.mark.parametrize("number", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 32767, 32768, 32769, 65537, 77824, 98305, 1_000_003])
def test_padding_gives_every_thread_whole_vectors(number: int, count: int, threads: Threads) -> None:
    threads(number)
    padded = count + padding_for(count)
    # Most kernels take a thread for every 32768 elements; GELU's takes all of them from 16384 on.
    for used in (min(number, -(-padded // 32768)), number if padded > 16384 else 1):
        assert padded % (64 * used) == 0
    assert padded - count < 64 if count < 16_000 else padded < count * 1.03 + 2048
    assert padding_for(padded) == 0


def test_shape_strides_and_gradients_survive() -> None:
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: evenly(silu, t), (x,))
    turned = x.detach().transpose(0, 2)
    torch.testing.assert_close(evenly(silu, turned), silu(turned))
    assert evenly(silu, x[:0]).shape == (0, 5, 7)


@pytest.mark.parametrize("columns", [1, 200, 33_000, 151_936])
def test_the_sum_of_a_row_does_not_depend_on_the_others(columns: int, threads: Threads) -> None:
    x = torch.rand(6, columns, generator=torch.Generator().manual_seed(0))
    for number in (1, 2, 3):
        threads(number)
        whole = row_sums(x)
        torch.testing.assert_close(whole, x.sum(-1))
        for start in range(6):
            assert torch.equal(row_sums(x[start : start + 1].clone()), whole[start : start + 1])


def test_activations_are_wrapped_once_and_weights_keep_their_names(
    architecture: str, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(architecture)
    names = list(model.state_dict())
    for _ in range(2):
        model = wrap_model(model, tiny_tokenizer).model  # pyright: ignore[reportArgumentType]
    wrapped = [m for m in model.modules() if isinstance(m, EvenActivation)]
    assert len(wrapped) == model.config.num_hidden_layers
    assert not any(isinstance(m.activation, EvenActivation) for m in wrapped)
    assert list(model.state_dict()) == names
    assert list(copy.deepcopy(model).state_dict()) == names


def test_an_activation_with_weights_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.PReLU(), nn.SiLU())
    names = list(module.state_dict())
    make_activations_even(module)
    assert list(module.state_dict()) == names
    assert isinstance(module[2], EvenActivation)
