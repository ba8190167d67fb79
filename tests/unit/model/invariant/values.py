"""Random tensors for the kernels' tests."""

from __future__ import annotations

import torch
from torch import Tensor


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, the same ones for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
