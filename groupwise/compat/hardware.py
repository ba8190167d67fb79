"""What programs say to `from_pretrained` of hardware: the nearest that is there, and a sentence where it is another.

A boundary: objects of transformers are known by their attributes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from groupwise.errors import ConfigError

logger = logging.getLogger(__name__)

_DTYPES = {None: "auto", "float16": "bfloat16"} | {name: name for name in ("auto", "bfloat16", "float32")}
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def dtype_name(asked: Any) -> str:
    """`model.dtype` of a torch dtype, its name, or None.

    Raises:
        ConfigError: nothing is computed in it.
    """
    name = None if asked is None else str(asked).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype = {asked!r}: expected torch.bfloat16, torch.float32 or auto")
    if name == "float16":
        logger.warning("dtype = float16: training computes in bfloat16, the nearest that needs no loss scaling")
    return _DTYPES[name]


def device_name(device_map: Any) -> str:
    """`model.device` of a `device_map`; one that spreads a model, or names a GPU that is not there, is `auto`."""
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        device_map = places.pop() if len(places) == 1 else "balanced"
    name = f"cuda:{device_map}" if str(device_map).isdecimal() else str(device_map)
    if name in _SPREAD:
        if name not in ("auto", "sequential"):
            logger.warning("device_map = %r: the whole model is on one device", name)
        return "auto"
    return _gpu_name(name) if name.partition(":")[0] == "cuda" else name


def _gpu_name(name: str) -> str:
    """`cuda` or `cuda:N` if it is there, else `auto`; what is no such name is left to the check of `model.device`."""
    number = name.partition(":")[2]
    if number and not number.isdecimal():
        return name
    count = torch.cuda.device_count()
    if count > int(number or 0):
        return name
    there = f"{count} GPUs, from 0 on" if count else "no GPU here"
    logger.warning("device_map = %r: torch sees %s, so the model is where `auto` puts it", name, there)
    return "auto"


def quantization_name(quantization_config: Any, load_in_4bit: bool) -> str:
    """`model.quantization`, where a `quantization_config` wins.

    Raises:
        ConfigError: 8 bits, or it is no such config.
    """
    config = quantization_config
    content: Any = config if config is None or isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    if config is not None and not content:
        raise ConfigError(f"quantization_config: got a {type(config).__name__}; expected a BitsAndBytesConfig")
    if content and content.get("load_in_8bit"):
        raise ConfigError("load_in_8bit: frozen weights have 16, 32 or 4 bits; use load_in_4bit")
    if not (content.get("load_in_4bit") if content else load_in_4bit):
        return "none"
    if find_spec("bitsandbytes") is None:
        logger.warning(
            "load_in_4bit = True: bitsandbytes is not installed, so the weights have 16 bits, or 32 on a CPU"
        )
        return "none"
    return "nf4"


def say_attention(implementation: Any) -> None:
    """A sentence about any but those that transformers computes here."""
    if implementation not in (None, "sdpa", "eager"):
        logger.warning(
            "attn_implementation = %r: training and sampling use Groupwise's own packed attention, and the model has "
            "sdpa outside of them",
            implementation,
        )
