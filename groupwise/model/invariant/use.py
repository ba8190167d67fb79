"""Makes a model batch-invariant: every forward whose sums depend on the number of rows is replaced by a fixed one.

Linear layers, RMS norms, the sums over the vocabulary and attention are; what is left is elementwise, a lookup, or a
maximum. A module that might be something else is refused by name.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from groupwise.errors import ConfigError
from groupwise.model.adapters import FullTileLinear
from groupwise.model.fast_cpu.linear import DnnLinear
from groupwise.model.fast_cpu.norms import LeanNorm
from groupwise.model.heads import Heads
from groupwise.model.invariant.checked_product import forbid_split_sums, library_serves
from groupwise.model.invariant.linear import InvariantLinear
from groupwise.model.invariant.norms import GEMMA_NORMS, InvariantGemmaNorm

SETTING = "model.batch_invariant = true"
_MAX_REPEAT = 32  # query heads of one key head, which are rows of one tile
_MAX_HEAD_SIZE = 256
_DTYPES = (torch.bfloat16, torch.float32)
_KNOWN = (InvariantLinear, LeanNorm, InvariantGemmaNorm, nn.Embedding)


def is_batch_invariant(model: PreTrainedModel) -> bool:
    return isinstance(model.get_output_embeddings(), InvariantLinear)


def require_gpu(device: torch.device) -> None:
    """Refuse the setting where it has nothing to do.

    Raises:
        ConfigError: on a CPU.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"{SETTING}: its kernels are a GPU's, and the model is on the {device.type}, where sampler and trainer "
            "agree to the bit without it; leave it out"
        )


def make_batch_invariant(model: PreTrainedModel) -> None:
    """Swap the modules; names and weights stay, and a second call changes nothing.

    Raises:
        ConfigError: Triton is missing, or the model has parts that no kernel here computes.
    """
    if find_spec("triton") is None:
        raise ConfigError(f"{SETTING} needs triton, which is not installed: `pip install triton`")
    _check_heads(model)
    if model.device.type == "cuda":
        forbid_split_sums()
    for module in list(model.modules()):
        if type(module) in (nn.Linear, DnnLinear, FullTileLinear):
            module.__class__ = InvariantLinear
        for name, child in module.named_children():
            if type(child).__name__ in GEMMA_NORMS:
                module.register_module(name, InvariantGemmaNorm(child).train(child.training))
    _check_modules(model)
    _look_at_products(model)


def _look_at_products(model: PreTrainedModel) -> None:
    """Now, and not in the first step, which may be captured."""
    for module in model.modules():
        if isinstance(module, InvariantLinear):
            library_serves(module.weight, module.bias)


def heads_fit(model: PreTrainedModel) -> bool:
    """Whether the attention kernel takes the model's heads and their type."""
    heads = Heads.of(model.config.get_text_config())
    fits = heads.repeat <= _MAX_REPEAT and heads.size <= _MAX_HEAD_SIZE and not heads.size * model.dtype.itemsize % 16
    return fits and model.dtype in _DTYPES


def _check_heads(model: PreTrainedModel) -> None:
    if heads_fit(model):
        return
    if model.dtype in _DTYPES:
        heads = Heads.of(model.config.get_text_config())
        raise ConfigError(
            f"{SETTING}: {model.config.get_text_config().model_type} has {heads.repeat} query heads to a key head, of "
            f"{heads.size} numbers each; the attention kernel takes up to {_MAX_REPEAT}, and multiples of 8 up to "
            f"{_MAX_HEAD_SIZE}; leave it out"
        )
    raise ConfigError(f"{SETTING} computes in bfloat16 or float32, and the model is {model.dtype}; set model.dtype")


def _check_modules(model: PreTrainedModel) -> None:
    """Refuse what has weights of its own, or is a norm without any, and is not known to compute each row alone."""
    strange = {
        type(module).__name__
        for module in model.modules()
        if not isinstance(module, _KNOWN)
        and ("Norm" in type(module).__name__ or next(module.parameters(recurse=False), None) is not None)
    }
    if strange:
        raise ConfigError(
            f"{SETTING}: {model.config.model_type} computes with {', '.join(sorted(strange))}, for which there is no "
            "kernel; use a model of linear layers and RMS norms (Qwen, Llama, Mistral, Gemma 3), or leave it out"
        )
