"""FastLanguageModel: models by name, and adapters in them, from Unsloth's arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import peft
import torch
from transformers import PreTrainedModel

from groupwise.compat.unsloth.models import (
    FastModel,
    FastPeftModel,
    FastSettings,
    check_rank,
    make_fast,
    make_fast_tokenizer,
)
from groupwise.compat.unsloth.settings import ADAPTER, LOADING, read_options
from groupwise.config import ModelConfig
from groupwise.config.lora import AdapterFile, read_adapter_file
from groupwise.errors import ConfigError
from groupwise.model.borrowing import borrow
from groupwise.model.loading import load_model, load_tokenizer
from groupwise.model.recompute import recompute_layers

logger = logging.getLogger(__name__)

_INITS = (True, "gaussian")
"""Those that leave the base's weights as they are."""


class FastLanguageModel:
    """Unsloth's entry; models are trained by `groupwise.compat.trl`, in place.

    Example:
        model, tokenizer = FastLanguageModel.from_pretrained("Qwen/Qwen3-0.6B", max_seq_length=2048, load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64)
    """

    @staticmethod
    def from_pretrained(model_name: str, **options: Any) -> tuple[Any, Any]:
        """The model, with what `FastModel` adds to transformers' class, and its tokenizer.

        From an adapter's folder: the base with that adapter, a `FastPeftModel`, ready to go on.

        Args:
            options: Unsloth's, see docs/migrate.md: `max_seq_length`, `dtype`, `load_in_4bit`, `fast_inference`,
                `max_lora_rank`, `gpu_memory_utilization`, …

        Raises:
            ConfigError: no such argument or model, or a value that cannot act.
        """
        asked = read_options("from_pretrained", LOADING, options)
        folder = Path(model_name)
        name = str(folder.resolve()) if folder.is_dir() else str(model_name)
        quantization = _quantization(asked, given=options)
        config = ModelConfig.model_validate(
            {
                "path": name,
                "dtype": _dtype(asked["dtype"]),
                "device": _device(asked["device_map"]),
                "quantization": quantization,
                "trust_remote_code": asked["trust_remote_code"],
            }
        )
        _say_what_differs(asked, given=options, device=config.device)
        adapter = read_adapter_file(folder)
        tokenizer = make_fast_tokenizer(load_tokenizer(config))
        base = config if adapter is None else config.model_copy(update={"path": adapter.base})
        module = load_model(base, tokenizer=tokenizer).model
        module.set_attn_implementation("sdpa")
        settings = FastSettings(
            tokenizer,
            max_seq_length=asked["max_seq_length"],
            gpu_memory_utilization=asked["gpu_memory_utilization"],
            random_state=asked["random_state"],
            max_lora_rank=asked["max_lora_rank"] if asked["fast_inference"] else None,
            full_finetuning=asked["full_finetuning"],
            checkpointing=bool(asked["use_gradient_checkpointing"]),
        )
        _check_length(module, settings)
        make_fast(module, settings)
        model = module if adapter is None else _with_saved(module, adapter, settings)
        return FastLanguageModel.for_training(model), tokenizer

    @staticmethod
    def get_peft_model(model: Any, **options: Any) -> Any:
        """The model with a new LoRA adapter around it, a `FastPeftModel`; nothing else of it is trained.

        Args:
            options: Unsloth's, see docs/migrate.md: `r`, `target_modules`, `lora_alpha`, `random_state`, …

        Raises:
            ConfigError: no such argument, a value that cannot act, or the model has another adapter.
        """
        asked = read_options("get_peft_model", ADAPTER, options)
        if not isinstance(model, FastModel | FastPeftModel):
            raise ConfigError(
                f"get_peft_model: got a {type(model).__name__}; expected what FastLanguageModel.from_pretrained returns"
            )
        settings = model.settings
        if settings.full_finetuning:
            logger.warning("get_peft_model changes nothing: the model was loaded with full_finetuning = True")
            return model
        config = _adapter_config(asked)
        if isinstance(model, FastPeftModel):
            return _same_adapter(model, config)
        check_rank(config.r, settings)
        settings.checkpointing = bool(asked["use_gradient_checkpointing"])
        recompute_layers(model.base, False)  # else peft would have gradients for the embedding's output, too
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(asked["random_state"])
            made = _wrapped(model.base, config)
        with borrow(made.base, settings.tokenizer):
            pass  # refuses, now and not in training, what cannot be trained
        return FastLanguageModel.for_training(made)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """The model ready to answer by `generate`; `fast_generate` needs no such call. Returns it."""
        model.eval()
        recompute_layers(model.base, False)
        return model

    @staticmethod
    def for_training(model: Any) -> Any:
        """The model as it is trained, with gradient checkpointing where that was asked for. Returns it."""
        if model.settings.checkpointing:
            recompute_layers(model.base)
        return model


def _adapter_config(asked: Mapping[str, Any]) -> peft.LoraConfig:
    if asked["init_lora_weights"] not in _INITS:
        raise ConfigError(
            f"get_peft_model: init_lora_weights = {asked['init_lora_weights']!r} is refused: it changes the base's "
            "weights, which an export merges with; expected True or 'gaussian'"
        )
    if not isinstance(asked["r"], int) or asked["r"] < 1:
        raise ConfigError(f"get_peft_model: r = {asked['r']!r}: expected a whole number above 0")
    targets = asked["target_modules"]
    return peft.LoraConfig(
        r=asked["r"],
        lora_alpha=asked["lora_alpha"],
        lora_dropout=asked["lora_dropout"],
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=asked["layers_to_transform"],
        layers_pattern=asked["layers_pattern"],
        use_rslora=asked["use_rslora"],
        init_lora_weights=asked["init_lora_weights"],
        task_type="CAUSAL_LM",
    )


def _wrapped(module: PreTrainedModel, config: peft.LoraConfig) -> FastPeftModel:
    config.base_model_name_or_path = module.name_or_path
    try:
        return FastPeftModel(cast(Any, module), config)
    except ValueError as error:
        raise ConfigError(f"get_peft_model: {error}") from error


def _with_saved(module: PreTrainedModel, file: AdapterFile, settings: FastSettings) -> FastPeftModel:
    check_rank(file.shape.rank, settings)
    config = peft.LoraConfig.from_pretrained(str(file.folder))
    assert isinstance(config, peft.LoraConfig), "read_adapter_file refuses other kinds"
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        made = _wrapped(module, config)
    made.load_adapter(str(file.folder), "default", is_trainable=True)
    return made


def _same_adapter(model: FastPeftModel, wanted: peft.LoraConfig) -> FastPeftModel:
    found = cast(peft.LoraConfig, model.peft_config["default"])
    for name in ("r", "lora_alpha", "use_rslora", "target_modules"):
        got, has = vars(wanted)[name], vars(found)[name]
        if got != has:
            raise ConfigError(
                f"get_peft_model: {name} = {got!r}, but the model has an adapter already, with {has!r}; leave the call "
                "out to go on with that one"
            )
    logger.warning("get_peft_model changes nothing: the model has that adapter already")
    return model


def _dtype(asked: Any) -> str:
    name = "auto" if asked is None else str(asked).removeprefix("torch.")
    if name == "float16":
        logger.warning("dtype = float16: training computes in bfloat16, the nearest that needs no loss scaling")
        return "bfloat16"
    return name


def _device(device_map: Any) -> str:
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        device_map = places.pop() if len(places) == 1 else "auto"
    name = f"cuda:{device_map}" if str(device_map).isdecimal() else str(device_map)
    if name in ("sequential", "auto", "balanced", "balanced_low_0"):
        return "auto"
    _, _, number = name.partition(":")
    if name.startswith("cuda") and int(number or 0) >= torch.cuda.device_count():
        there = "no GPU here" if not torch.cuda.is_available() else f"{torch.cuda.device_count()} GPUs, from 0 on"
        logger.warning("device_map = %r: torch sees %s, so the model is where `auto` puts it", device_map, there)
        return "auto"
    return name


def _quantization(asked: Mapping[str, Any], *, given: Mapping[str, Any]) -> str:
    config = asked["quantization_config"]
    wanted = asked["load_in_4bit"]
    if config is not None:
        content = dict(config) if isinstance(config, Mapping) else config.to_dict()
        if content.get("load_in_8bit"):
            raise ConfigError(
                "quantization_config: load_in_8bit: frozen weights have 16, 32 or 4 bits; use load_in_4bit"
            )
        wanted = bool(content.get("load_in_4bit"))
    if not wanted:
        return "none"
    if asked["full_finetuning"]:
        if "load_in_4bit" in given:
            logger.warning("load_in_4bit = True: with full_finetuning the weights are trained, and have 16 or 32 bits")
        return "none"
    if find_spec("bitsandbytes") is None:
        logger.warning(
            "load_in_4bit = True: bitsandbytes is not installed, so the weights have 16 bits, or 32 on a CPU"
        )
        return "none"
    return "nf4"


def _say_what_differs(asked: Mapping[str, Any], *, given: Mapping[str, Any], device: str) -> None:
    if asked["fast_inference"]:
        logger.warning("fast_inference = True: samples come from Groupwise's own engine, on the model's own weights")
    if asked["attn_implementation"] not in (None, "sdpa", "eager"):
        logger.warning(
            "attn_implementation = %r: training and sampling use Groupwise's own packed attention, and the model has "
            "sdpa outside of them",
            asked["attn_implementation"],
        )
    if "gpu_memory_utilization" in given and (device == "cpu" or not torch.cuda.is_available()):
        logger.warning(
            "gpu_memory_utilization = %s changes nothing here: there is no GPU", given["gpu_memory_utilization"]
        )


def _check_length(module: PreTrainedModel, settings: FastSettings) -> None:
    length = settings.max_seq_length
    if not isinstance(length, int) or length < 2:
        raise ConfigError(f"from_pretrained: max_seq_length = {length!r}: expected a whole number of tokens, 2 or more")
    positions = module.config.get_text_config().to_dict().get("max_position_embeddings")
    if positions is not None and length > positions:
        logger.warning(
            "max_seq_length = %s: the model knows %s positions, and prompts and answers are held to that",
            length,
            positions,
        )
        settings.max_seq_length = positions
