"""Tiny models for the doors; everything is made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.compat.unsloth import FastLanguageModel, FastPeftModel
from groupwise.quickstart.tiny_model import build_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["red green blue one two three"] * 4
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "base", texts=words, size="0.1m", vocab_size=280)


@pytest.fixture
def fast_load(tiny_folder: Path) -> Callable[..., Any]:
    """`from_pretrained` of the tiny model; returns the model alone."""

    def load(**options: Any) -> Any:
        given = {"model_name": str(tiny_folder), "load_in_4bit": False, "max_seq_length": 64, **options}
        return FastLanguageModel.from_pretrained(**given)[0]

    return load


@pytest.fixture
def peft_model(fast_load: Callable[..., Any]) -> FastPeftModel:
    """With an adapter that says something: its B is not zero."""
    model = FastLanguageModel.get_peft_model(fast_load(), r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.data.normal_(std=0.4)
    return model
