"""What all tests share: no network, steady hypothesis settings, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Before transformers or datasets are imported: a test that reaches for the Hub must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shared machine makes single examples slow; the suite's own timeout is the bound.
settings.register_profile("groupwise", deadline=None, derandomize=True)
settings.load_profile("groupwise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
