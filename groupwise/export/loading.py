"""From a source to a model in memory, and an adapter merged into its base, checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from groupwise.errors import ConfigError, ExportError, GroupwiseError
from groupwise.export.source import Source
from groupwise.installed import require_adapters, require_versions
from groupwise.texts import first_line, one_line

PROBE = "The quick brown fox, 3.14159 and 日本語: does 12 + 30 make 42?\n\nYes — it does."
LOGIT_TOLERANCE = 1e-4
"""Largest difference of logits that a merge may make in float32, as a share of the largest logit."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A whole model.

    Attributes:
        dtype: of the weights on disk, the base's for a merged adapter; the model itself may be in float32.
        difference: what merging changed in the logits of a probe text, as a share of the largest; None if nothing
            was merged.
    """

    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    difference: float | None


def load_tokenizer(source: Source) -> Any:
    """The tokenizer beside the weights; an adapter without one has its base's."""
    has_own = any((source.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    place = str(source.folder) if has_own or source.base is None else source.base
    with _as_config_error(place):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def load_base(source: Source, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model's weights, without the adapter."""
    require_versions()
    if source.is_adapter:
        require_adapters()
    place = source.base or str(source.folder)
    transformers_logging.disable_progress_bar()
    with _as_config_error(place):
        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, trust_remote_code=False).eval()


def load_whole(source: Source) -> PreTrainedModel | PeftModel:
    """The model in float32 with the adapter beside its weights, as it was trained."""
    model = load_base(source, torch.float32)
    if not source.is_adapter:
        return model
    with _as_config_error(str(source.folder)):
        return PeftModel.from_pretrained(model, str(source.folder)).eval()


def load_merged(source: Source) -> Merged:
    """The model with its adapter, if it has one, added to the weights in float32.

    Raises:
        ExportError: the merged model's logits are not those of base plus adapter.
        ConfigError: base or adapter does not load.
    """
    tokenizer = load_tokenizer(source)
    if not source.is_adapter:
        model = load_base(source)
        return Merged(model, tokenizer, model.dtype, None)
    model = load_whole(source)
    assert isinstance(model, PeftModel), "a source with a base loads as a PeftModel"
    before = _logits(model, tokenizer)
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:  # such as weights that are not numbers
        raise ExportError(f"{source.folder}: the adapter cannot be merged: {one_line(first_line(error))}") from error
    after = _logits(merged, tokenizer)
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= LOGIT_TOLERANCE:
        raise ExportError(
            f"{source.folder}: merging changed the logits by {difference:.1e} of the largest; expected at most "
            f"{LOGIT_TOLERANCE:.0e}; the adapter does not belong to {source.base}, or its kind cannot be merged"
        )
    return Merged(merged, tokenizer, _stored_dtype(source), difference)


def load_adapter_weights(source: Source) -> dict[str, torch.Tensor]:
    """The adapter's own matrices, by peft's names."""
    with _as_config_error(str(source.folder)):
        return load_file(source.folder / "adapter_model.safetensors")


@torch.inference_mode()
def _logits(model: PreTrainedModel | PeftModel, tokenizer: Any) -> torch.Tensor:
    """`[T, V]` logits of the probe text."""
    ids = torch.tensor([tokenizer.encode(PROBE)])
    return model(input_ids=ids).logits[0].float()


def stop_texts(source: Source, tokenizer: Any) -> list[str]:
    """The model's own end-of-sequence tokens, and the tokenizer's, as texts."""
    place = source.base or str(source.folder)
    with _as_config_error(place):
        try:
            declared: Any = GenerationConfig.from_pretrained(place).eos_token_id
        except OSError:  # a folder without generation_config.json
            declared = AutoConfig.from_pretrained(place, trust_remote_code=False).eos_token_id
        ids = declared if isinstance(declared, list) else [declared]
        found = [*ids, tokenizer.eos_token_id]
        texts = [tokenizer.convert_ids_to_tokens(token) for token in dict.fromkeys(found) if token is not None]
    return [text for text in texts if isinstance(text, str) and text]


def _stored_dtype(source: Source) -> torch.dtype:
    """What the base's config says; transformers reads a folder that says nothing as float32."""
    place = source.base or str(source.folder)
    with _as_config_error(place):
        found: Any = AutoConfig.from_pretrained(place, trust_remote_code=False).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


@contextmanager
def _as_config_error(place: str) -> Iterator[None]:
    try:
        yield
    except GroupwiseError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{place} comes with code of its own, and an export runs none: it loads models of kinds that "
                "transformers knows; export it with the program that trained it"
            ) from error
        raise ConfigError(f"{place} does not load: {type(error).__name__}: {one_line(first_line(error))}") from error
