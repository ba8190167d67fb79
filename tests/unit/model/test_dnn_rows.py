"""A product of oneDNN's whose rows depend on their company is not used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from groupwise.model.fast_cpu import linear


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    linear.rows_agree.cache_clear()
    yield
    linear.rows_agree.cache_clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.parametrize("which", ["dnn_product", "ordered_product"])
def test_a_shape_whose_few_rows_differ_is_computed_by_torch(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(linear, which)

    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = right(x, *rest)
        return out * (1 + 1e-6) if x.shape[0] == 64 and out.shape[1] == 40 else out

    threads = torch.get_num_threads()
    monkeypatch.setattr(linear, which, wrong)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24, bias=False))
    linear.use_dnn_linear(model)
    found = [layer.computes_by_dnn for layer in model if isinstance(layer, linear.DnnLinear)]
    assert found == [False, True]
    x, first = torch.randn(64, 24), model[0]
    assert isinstance(first, nn.Linear)
    assert torch.equal(first(x), nn.functional.linear(x, first.weight, first.bias))
    assert torch.get_num_threads() == threads
