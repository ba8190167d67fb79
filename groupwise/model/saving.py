"""Saving a model so that what is loaded again is what was trained.

An adapter's file names its base and holds none of it. Where the weights in memory are not those of the named base (rows
were added to its embedding, an earlier adapter was merged into it, the folder has changed since), the base is written
too, into the folder `base` beside the adapter, which every reader of Groupwise's takes before any other.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from groupwise.config.lora import OWN_BASE, own_base
from groupwise.errors import ConfigError, ExportError
from groupwise.export.source import name_own_base
from groupwise.model.adapters import require_apart
from groupwise.model.quantized import is_packed
from groupwise.model.stored import StoredWeights
from groupwise.protocols import Tokenizer

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_NO_PART = frozenset(
    {
        *("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "quantization_config"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "_name_or_path", "id2label", "label2id"),
        *("output_attentions", "output_hidden_states", "return_dict", "attn_implementation", "vocab_size"),
    }
)
"""What of a model's config decides nothing that its weights compute; sizes are compared as the weights' shapes."""


def complete_adapter(module: PreTrainedModel, folder: Path, *, tokenizer: Tokenizer, home: Path | None = None) -> int:
    """Make an adapter that was just saved into `folder` whole: write its base beside it where it cannot be had
    elsewhere, and compare every weight on disk with the one in memory.

    Args:
        module: of transformers', with the adapter inside.
        tokenizer: goes into such a base, too.
        home: where the folder is to lie in the end, which its files name; the folder itself if not given.

    Returns:
        How many weights were compared, base and adapter; all have the same bits, the base's in the type in memory.

    Raises:
        ConfigError: the adapter is merged into the base and still there, or the base cannot be written.
        ExportError: what is on disk is not what is in memory.
    """
    check_savable(module)
    home = folder if home is None else home
    found = compare_base(module, home=home)
    reason, compared = found.difference, found.compared
    if reason and is_packed(module):
        logger.warning("%s: an adapter alone is saved, on a base of 4 bits: %s", home, reason)
    elif reason:
        logger.warning("%s: the base goes into %s beside the adapter: %s", home, OWN_BASE, reason)
        _replace_base(module, folder, tokenizer)
        name_own_base(folder, home)
        compared = _require_same(module, folder / OWN_BASE)
    elif own_base(folder):  # of the adapter that has just been replaced; it would be read as this one's
        shutil.rmtree(folder / OWN_BASE)
    written = load_file(folder / ADAPTER_WEIGHTS)
    expected = _adapter_weights(module)
    if reason and written.keys() - expected.keys():  # transformers adds an embedding that was resized
        written = {name: tensor for name, tensor in written.items() if name in expected}
        save_file(written, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    wrong = sorted(
        name
        for name in expected.keys() | written.keys()
        if name not in expected or name not in written or not _equal(written[name], expected[name].to("cpu"))
    )
    if wrong:
        raise ExportError(
            f"{folder / ADAPTER_WEIGHTS} is not the adapter in memory: {len(wrong)} of {len(expected)} weights differ, "
            f"{wrong[0]} for one; save again, to another disk if this one damages files"
        )
    return compared + len(expected)


def save_merged(module: PreTrainedModel, folder: Path) -> int:
    """Write base plus adapter as one model, and leave the module as it is; returns how many weights were written.

    Raises:
        ConfigError: the base is packed into 4 bits, or the adapter has what no single weight can hold.
    """
    from peft.tuners.lora import LoraLayer

    if is_packed(module):
        raise ConfigError("an adapter on a base of 4 bits cannot be merged; train on model.dtype = 'bfloat16'")
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in module.state_dict().items()}
    weights = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            change: Tensor = cast(Any, layer).get_delta_weight("default")
            held = f"{name}.weight"
            weights[held] = (weights[held].float() + change.float()).to(weights[held].dtype)
    if module.config.get_text_config().tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    module.config.save_pretrained(folder)
    return len(weights)


def check_whole(module: PreTrainedModel, folder: Path) -> int:
    """Compare every weight of a whole model on disk with the one in memory; returns how many.

    Raises:
        ExportError: one differs.
    """
    return _require_same(module, folder)


@dataclass(frozen=True, slots=True)
class BaseComparison:
    """The weights in memory beside those of the base that an adapter would name.

    Attributes:
        difference: why the adapter alone would not do; empty where it does.
        compared: how many weights were.
        known: whether they could be compared at all.
    """

    difference: str
    compared: int = 0
    known: bool = True


def compare_base(module: PreTrainedModel, *, home: Path | None = None) -> BaseComparison:
    """Whether the base in memory can be had again from where it came from.

    Args:
        home: where an adapter is to be saved.
    """
    name = module.name_or_path or ""
    place = Path(name)
    if not name:
        return BaseComparison("the model names no folder and no Hub name that it came from", known=False)
    if home is not None and place.is_dir() and place.resolve().is_relative_to(home.resolve()):
        return BaseComparison(f"{name} lies in the folder that is written", known=False)
    stored = StoredWeights.find(name)
    if stored is None:
        return BaseComparison(f"the weights of {name} are not here to be compared", known=False)
    if problem := _config_difference(module, name):
        return BaseComparison(problem)
    difference, compared = _difference(module, stored, name)
    return BaseComparison(difference and f"in memory it is not {name}: {difference}", compared)


def check_savable(module: PreTrainedModel) -> None:
    """Refuse what could not be written down: an adapter that is merged and still there, and a base of 4 bits that is
    not what its folder makes of itself, as after a merge.

    Raises:
        ConfigError: says what to do.
    """
    require_apart(module)
    found = compare_base(module) if is_packed(module) else None
    if found is not None and found.known and found.difference:
        raise ConfigError(
            f"the model's frozen weights have 4 bits, and {found.difference}; what is trained on them could not be "
            "saved. Load the base with 16 bits where weights change (load_in_4bit = False), save that whole, and load "
            "the result with 4 bits"
        )


def _replace_base(module: PreTrainedModel, folder: Path, tokenizer: Tokenizer) -> None:
    """Write the module without its adapter. A base that lies there may be what its weights are mapped from, so its
    files are never written into."""
    new = folder / f".{OWN_BASE}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    with _without_mark(module):
        module.save_pretrained(str(new), state_dict=dict(base_weights(module)))
    tokenizer.save_pretrained(str(new))
    shutil.rmtree(folder / OWN_BASE, ignore_errors=True)
    os.replace(new, folder / OWN_BASE)


def base_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a whole model is saved with, by the names that they have without an adapter."""
    for name, tensor in module.state_dict().items():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def _difference(module: PreTrainedModel, stored: StoredWeights, place: str) -> tuple[str, int]:
    """The first weight whose bits are not the stored ones in its type; and how many were compared."""
    compared, strangers, seen = 0, list[str](), set[tuple[int, torch.Size]]()
    tied = [(name, tensor) for name, tensor in base_weights(module) if not _packing(name)]
    known = {_place(tensor) for name, tensor in tied if stored.name_of(name, module)}
    for name, tensor in tied:
        key = _place(tensor)
        found = stored.name_of(name, module)
        if found is None:
            if key not in known:
                strangers.append(name)
            continue
        if key in seen:  # a tied weight that is stored twice is read once
            continue
        seen.add(key)
        if not _same(tensor, stored.read(found), module, name):
            return _describe(name, tensor, stored.shape(found)), compared
        compared += 1
    if strangers:
        return _difference_when_loaded(module, place, strangers, compared)
    return "", compared


def _difference_when_loaded(
    module: PreTrainedModel, place: str, strangers: list[str], compared: int
) -> tuple[str, int]:
    """Where transformers gives weights other names than their files have, it has to load them for a comparison."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, dtype=module.dtype, ignore_mismatched_sizes=True)
    except (OSError, ValueError, SafetensorError):
        return f"{strangers[0]} is not among its weights", compared
    there = dict(base_weights(loaded))
    here = dict(base_weights(module))
    for name in strangers:
        if name not in there or not _equal(there[name], here[name].to("cpu")):
            return f"{name} differs", compared
    return "", compared + len(strangers)


def _same(tensor: Tensor, stored: Tensor, module: PreTrainedModel, name: str) -> bool:
    """Whether a weight is the stored one, in its type; on the way to it, it may have had 16 bits."""
    if not tensor.is_floating_point() and stored.is_floating_point():
        return _same_packed(module, name, stored)
    if tensor.shape != stored.shape:
        return False
    here = tensor.detach().to("cpu")
    ways = (stored, stored.to(torch.bfloat16), stored.to(torch.float16)) if stored.is_floating_point() else (stored,)
    return any(_equal(way.to(here.dtype), here) for way in ways)


def _same_packed(module: PreTrainedModel, name: str, stored: Tensor) -> bool:
    """Whether 4 bits are what bitsandbytes makes of the stored weight on this device."""
    from bitsandbytes.functional import quantize_4bit  # pyright: ignore[reportMissingImports]

    layer = name.rpartition(".")[0]
    inner: Any = module.get_submodule(layer)
    weight: Any = getattr(inner, "base_layer", inner).weight
    state = weight.quant_state
    packed, _ = quantize_4bit(
        stored.to(weight.device, state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=weight.dtype,
    )
    return _equal(packed.view(-1).to("cpu"), weight.detach().view(-1).to("cpu"))


def _packing(name: str) -> bool:
    """Whether it belongs to a packed weight's own numbers, which follow from it."""
    return ".weight." in name or name.endswith((".SCB", ".weight_format"))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _describe(name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
    if tensor.is_floating_point() and tuple(tensor.shape) != shape:
        return f"{name} is {tuple(tensor.shape)} here and {shape} there"
    return f"{name} has other values"


def _config_difference(module: PreTrainedModel, place: str) -> str:
    """A setting of the model that the program has changed, and that decides what the weights compute."""
    try:
        there = AutoConfig.from_pretrained(place).to_dict()
    except (OSError, ValueError, KeyError):
        return f"{place} has no config.json that loads without code of its own"
    here = module.config.to_dict()
    for key in sorted(here.keys() | there.keys()):
        if key in _NO_PART or key.startswith("_") or (key == "text_config" and isinstance(here.get(key), Mapping)):
            continue
        if here.get(key) != there.get(key):
            return f"its config has {key} = {here.get(key)!r:.80}, and that of {place} {there.get(key)!r:.80}"
    return ""


def _require_same(module: PreTrainedModel, folder: Path) -> int:
    stored = StoredWeights.find(str(folder))
    difference, compared = "there are no weights in it", 0
    if stored is not None:
        difference, compared = _difference(module, stored, str(folder))
    if difference:
        raise ExportError(
            f"{folder} is not the model in memory: {difference}; save again, to another disk if this one damages files"
        )
    return compared


def _adapter_weights(module: PreTrainedModel) -> dict[str, Tensor]:
    """By the names that peft's files have."""
    return {
        "base_model.model." + name.replace(".default.", "."): tensor
        for name, tensor in module.state_dict().items()
        if ".lora_" in name
    }


@contextmanager
def _without_mark(module: PreTrainedModel) -> Iterator[None]:
    """transformers saves the adapter alone of a module that bears the mark of one."""
    marked = module._hf_peft_config_loaded
    module._hf_peft_config_loaded = False
    try:
        yield
    finally:
        module._hf_peft_config_loaded = marked
