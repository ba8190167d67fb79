from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

from groupwise.model.fast_cpu import linear
from groupwise.model.fast_cpu.linear import DnnLinear, ordered_weights, use_dnn_linear

needs_dnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def made(inputs: int, outputs: int, *, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    plain = nn.Linear(inputs, outputs, bias=bias)
    holder = nn.Sequential(copy.deepcopy(plain))
    use_dnn_linear(holder)
    return plain, holder[0]  # type: ignore[return-value]


@needs_dnn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 48), (1, 32, 48), (2, 8, 48)])
def test_values_and_gradients_are_the_layers(shape: tuple[int, ...], bias: bool) -> None:
    plain, dnn = made(48, 33, bias=bias)
    assert type(dnn) is DnnLinear
    x = torch.randn(shape)
    grad = torch.randn(*shape[:-1], 33)
    found = []
    for layer in (plain, dnn):
        inputs = x.clone().requires_grad_()
        layer(inputs).backward(grad)
        found.append([inputs.grad, *(p.grad for p in layer.parameters())])
        with torch.no_grad():
            unrecorded = layer(inputs)
        assert torch.equal(unrecorded, layer(inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert dnn(x.detach()).shape == plain(x).shape


@needs_dnn
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 16), (64, 283), (48, 32), (256, 128), (256, 768), (1000, 64)])
def test_a_row_has_the_same_bits_in_any_company(inputs: int, outputs: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, dnn = made(inputs, outputs, bias=False)
        x = torch.randn(1040, inputs)
        with torch.no_grad():
            whole = dnn(x)
            for rows in (4, 8, 16, 20, 60, 64, 260, 512):
                assert torch.equal(dnn(x[12 : 12 + rows].contiguous()), whole[12 : 12 + rows]), rows
    finally:
        torch.set_num_threads(before)


def test_frozen_layers_and_other_types() -> None:
    plain, dnn = made(48, 33, bias=True)
    x = torch.randn(16, 48)
    dnn.requires_grad_(False)
    assert not dnn(x).requires_grad
    inputs = x.clone().requires_grad_()
    dnn(inputs).sum().backward()
    assert inputs.grad is not None
    assert dnn.weight.grad is None
    assert torch.equal(dnn.double()(x.double()), plain.double()(x.double()))


def test_subclasses_stay_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    holder = nn.Sequential(Own(4, 4))
    use_dnn_linear(holder)
    assert type(holder[0]) is Own


@needs_dnn
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 16), (64, 283), (256, 128), (256, 768), (1000, 64)])
def test_ordered_weights_give_the_same_bits(inputs: int, outputs: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, dnn = made(inputs, outputs, bias=True)
        for rows in (16, 48, 64, 512):
            x = torch.randn(rows, inputs)
            with torch.no_grad():
                plain = dnn(x)
                with ordered_weights(dnn):
                    assert dnn.ordered is not None
                    assert torch.equal(dnn(x), plain)
                    with torch.enable_grad():  # a gradient needs the weight itself
                        assert dnn(x).requires_grad
    finally:
        torch.set_num_threads(before)


@needs_dnn
def test_ordered_weights_are_let_go_and_follow_a_change() -> None:
    _, dnn = made(32, 16, bias=False)
    x = torch.randn(16, 32)
    with torch.no_grad():
        with suppress(KeyboardInterrupt), ordered_weights(dnn):
            raise KeyboardInterrupt
        assert dnn.ordered is None
        dnn.weight.data.mul_(2)
        with ordered_weights(dnn):
            assert torch.equal(dnn(x), dnn(x))
            torch.testing.assert_close(dnn(x), x @ dnn.weight.t())


@needs_dnn
def test_a_large_model_keeps_its_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_ORDERED_BYTES", 100)
    _, dnn = made(32, 16, bias=False)
    with ordered_weights(dnn):
        assert dnn.ordered is None


def test_other_types_are_not_ordered() -> None:
    _, dnn = made(32, 16, bias=False)
    with ordered_weights(dnn.bfloat16()):
        assert not isinstance(dnn, DnnLinear) or dnn.ordered is None
