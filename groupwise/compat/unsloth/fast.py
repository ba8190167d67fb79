"""FastLanguageModel: models by name, and adapters in them, from Unsloth's arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import peft
import torch
from transformers import PreTrainedModel

from groupwise.compat.hardware import device_name, dtype_name, quantization_name, say_attention
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
from groupwise.config.limits import limits_of
from groupwise.config.lora import AdapterFile, read_adapter_file
from groupwise.config.model_name import named_checkpoint, settled_model
from groupwise.errors import ConfigError
from groupwise.model.borrowing import borrow
from groupwise.model.checkpoints import write_checkpoint_model
from groupwise.model.forward.recompute import recompute_layers
from groupwise.model.loading import load_model, load_tokenizer

logger = logging.getLogger(__name__)


class FastLanguageModel:
    """Unsloth's entry; models are trained by `groupwise.compat.trl`, in place.

    Example:
        model, tokenizer = FastLanguageModel.from_pretrained("Qwen/Qwen3-0.6B", max_seq_length=2048, load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64)
    """

    @staticmethod
    def from_pretrained(model_name: str, **options: Any) -> tuple[Any, Any]:
        """The model, with what `FastModel` adds to transformers' class, and its tokenizer.

        From an adapter's folder or checkpoint: the base with that adapter, a `FastPeftModel`, ready to go on.

        Args:
            options: Unsloth's, see docs/migrate.md: `max_seq_length`, `dtype`, `load_in_4bit`, `fast_inference`,
                `max_lora_rank`, `gpu_memory_utilization`, …

        Raises:
            ConfigError: no such argument or model, or a value that cannot act.
        """
        if not isinstance(model_name, str | Path):
            raise ConfigError(f"from_pretrained: got a {type(model_name).__name__}; expected a folder or a Hub name")
        settled = settled_model(str(model_name))
        if (checkpoint := named_checkpoint(settled)) and checkpoint.has_adapter:
            with TemporaryDirectory() as written:
                write_checkpoint_model(checkpoint, Path(written))
                return FastLanguageModel.from_pretrained(written, **options)
        asked = read_options("from_pretrained", LOADING, options)
        folder = Path(settled)
        name = str(folder.resolve()) if folder.is_dir() else settled
        quantization = _quantization(asked, given=options)
        config = ModelConfig.model_validate(
            {
                "path": name,
                "dtype": dtype_name(asked["dtype"]),
                "device": device_name(asked["device_map"]),
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
        _check_fast("get_peft_model", model)
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
        _check_fast("for_inference", model)
        model.eval()
        recompute_layers(model.base, False)
        return model

    @staticmethod
    def for_training(model: Any) -> Any:
        """The model as it is trained, with gradient checkpointing where that was asked for. Returns it."""
        _check_fast("for_training", model)
        if model.settings.checkpointing:
            recompute_layers(model.base)
        return model


def _check_fast(place: str, model: Any) -> None:
    if not isinstance(model, FastModel | FastPeftModel):
        raise ConfigError(
            f"{place}: got a {type(model).__name__}; expected what FastLanguageModel.from_pretrained returns"
        )


def _adapter_config(asked: Mapping[str, Any]) -> peft.LoraConfig:
    targets = asked["target_modules"]
    if not targets or not isinstance(targets, str | list | tuple | set):
        raise ConfigError(f"get_peft_model: target_modules = {targets!r}: expected names of layers, or all-linear")
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


def _quantization(asked: Mapping[str, Any], *, given: Mapping[str, Any]) -> str:
    if asked["full_finetuning"]:
        if asked["quantization_config"] is not None or given.get("load_in_4bit"):
            logger.warning("load_in_4bit = True: with full_finetuning the weights are trained, and have 16 or 32 bits")
        return "none"
    return quantization_name(asked["quantization_config"], asked["load_in_4bit"])


def _say_what_differs(asked: Mapping[str, Any], *, given: Mapping[str, Any], device: str) -> None:
    if asked["fast_inference"]:
        logger.warning("fast_inference = True: samples come from Groupwise's own engine, on the model's own weights")
    say_attention(asked["attn_implementation"])
    if "gpu_memory_utilization" in given and (device == "cpu" or not torch.cuda.is_available()):
        logger.warning(
            "gpu_memory_utilization = %s changes nothing here: there is no GPU", given["gpu_memory_utilization"]
        )


def _check_length(module: PreTrainedModel, settings: FastSettings) -> None:
    length = settings.max_seq_length
    positions = limits_of(module.config.get_text_config().to_dict()).positions
    if positions is not None and length > positions:
        logger.warning(
            "max_seq_length = %s: the model knows %s positions, and prompts and answers are held to that",
            length,
            positions,
        )
        settings.max_seq_length = positions
