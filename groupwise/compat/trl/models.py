"""Models as TRL's programs have them: a name, a folder, a module, a module with peft's adapter in or around it.

Whatever it is, the program's object is trained in place, and is a model of transformers' again afterwards. A boundary:
objects of transformers and peft are known by their classes and attributes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from transformers import PreTrainedModel

from groupwise.compat.hardware import device_name, dtype_name, quantization_name, say_attention
from groupwise.compat.trl.arguments import Arguments
from groupwise.config import ModelConfig
from groupwise.config.values import literal
from groupwise.errors import ConfigError
from groupwise.installed import require_adapters
from groupwise.model.adapters import has_adapter_layers
from groupwise.model.borrowing import borrow
from groupwise.model.loading import LoadedModel, load_model, load_tokenizer, resolve_device
from groupwise.model.quantized import is_packed
from groupwise.model.saving import check_savable, check_whole, complete_adapter
from groupwise.protocols import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldModel:
    """The program's model.

    Attributes:
        model: what the program gave, or would have got from TRL: with a `peft_config`, a `PeftModel`.
        module: of transformers', inside it or the same.
    """

    model: PreTrainedModel | peft.PeftModel
    module: PreTrainedModel
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return self.module.name_or_path or ""

    @property
    def lora(self) -> dict[str, Any]:
        """What `lora` is to say of the adapter; nothing without one."""
        if not has_adapter_layers(self.module):
            return {}
        with self.at_work() as loaded:
            adapter = loaded.adapter
        assert adapter is not None, "an adopted adapter is known"
        targets = adapter.target_modules or ()
        return {
            "lora.rank": adapter.r,
            "lora.alpha": float(adapter.lora_alpha),
            "lora.dropout": adapter.lora_dropout,
            "lora.rslora": adapter.use_rslora,
            "lora.target_modules": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        }

    def save(self, folder: Path, *, home: Path | None = None) -> None:
        """Write the model, or its adapter alone, and the base beside it where what is in memory is not what it names.

        Raises:
            ExportError: what is on disk is not what is in memory.
        """
        if not has_adapter_layers(self.module):
            self.model.save_pretrained(str(folder))
            check_whole(self.module, folder)
            return
        check_savable(self.module)
        options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(self.model, peft.PeftModel) else {}
        self.model.save_pretrained(str(folder), **options)
        complete_adapter(self.module, folder, tokenizer=self.tokenizer, home=home)

    def at_work(self) -> AbstractContextManager[LoadedModel]:
        """Within it the module samples and learns; afterwards it is as transformers knows it."""
        return borrow(self.module, self.tokenizer)


class AutoModelForCausalLM:
    """transformers' class of that name, for programs that name hardware which may not be there."""

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> PreTrainedModel:
        """A module of transformers'. Takes `dtype` or `torch_dtype`, `device_map`, `attn_implementation`,
        `quantization_config`, `load_in_4bit` and `trust_remote_code`; a sentence says where the nearest was taken.

        Raises:
            ConfigError: another option, or no such model.
        """
        return _load(ModelConfig.model_validate({"path": str(name), **loading_values(options)}))


def hold_model(
    model: Any, args: Arguments, *, tokenizer: Any, peft_config: Any, config: Mapping[str, Any]
) -> HeldModel:
    """The program's model with its tokenizer, and a new adapter where `peft_config` asks for one.

    Args:
        config: the settings of `model`, by short names, for one that is given by name.

    Raises:
        ConfigError: it is no causal language model, or cannot get that adapter.
    """
    if peft_config is not None:
        require_adapters()
    if isinstance(model, str | Path):
        settings = ModelConfig.model_validate({**config, "path": str(model)})
        held = HeldModel(module := _load(settings), module, tokenizer or load_tokenizer(settings))
    else:
        module = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        if not isinstance(module, PreTrainedModel):
            raise ConfigError(f"model: got a {type(model).__name__}; expected a name, a folder or a transformers model")
        if args.model_init_kwargs:
            raise ConfigError("model_init_kwargs: the model is loaded already; give them where it is loaded")
        _place(module, args)
        path = ModelConfig.model_validate({"path": module.name_or_path or ""})
        held = HeldModel(model, module, tokenizer or load_tokenizer(path))
    if not isinstance(model, str | Path):
        check_savable(held.module)
    if has_adapter_layers(held.module):
        if peft_config is not None:
            raise ConfigError(
                "peft_config: the model has an adapter already; leave peft_config out to go on with it (a second stage "
                "gets `model` of the first one's trainer), or merge it first"
            )
        return held
    if peft_config is None:
        return held
    return HeldModel(_with_new_adapter(held.module, peft_config, seed=args.seed), held.module, held.tokenizer)


def loading_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` was asked for as settings of `model`, by short names.

    Raises:
        ConfigError: an option that cannot act.
    """
    left = {name: value for name, value in options.items() if value is not None}
    values: dict[str, Any] = {"trust_remote_code": bool(left.pop("trust_remote_code", False))}
    older = left.pop("torch_dtype", None)
    values["dtype"] = dtype_name(left.pop("dtype", None) if older is None else older)
    say_attention(left.pop("attn_implementation", None))
    values["device"] = device_name(left.pop("device_map", "auto"))
    asked = left.pop("quantization_config", None)
    values["quantization"] = quantization_name(asked, bool(left.pop("load_in_4bit", False)))
    unknown = sorted(left.keys() - {"use_cache", "low_cpu_mem_usage"})
    if unknown:
        raise ConfigError(
            f"from_pretrained: {unknown[0]} = {literal(left[unknown[0]])} is not taken; download the model, load it "
            "with transformers, and give the module"
        )
    return values


def _load(settings: ModelConfig) -> PreTrainedModel:
    module = load_model(settings).model
    module.set_attn_implementation("sdpa")
    return module


def _with_new_adapter(module: PreTrainedModel, config: Any, *, seed: int) -> peft.PeftModel:
    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(f"peft_config: got a {type(config).__name__}; expected a peft.LoraConfig")
    config = copy.deepcopy(config)  # peft and this function write into it
    if config.target_modules is None:
        logger.warning("peft_config names no target_modules: every linear layer but the head gets an adapter")
        config.target_modules = "all-linear"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = peft.get_peft_model(module, config)
        except ValueError as error:
            raise ConfigError(f"peft_config: {error}") from error
    assert isinstance(made, peft.PeftModel), "one adapter type is one class"
    return made


def _place(module: PreTrainedModel, args: Arguments) -> None:
    """Where the arguments say that it computes, and in what."""
    if is_packed(module):
        from groupwise.model.quantized import unpack_before_products

        unpack_before_products(module)
        return
    device = resolve_device("cpu" if args.use_cpu or args.no_cuda else "auto")
    if module.device.type != device.type:
        cast(torch.nn.Module, module).to(device)
    if module.dtype == torch.float16 or ((args.bf16 or args.fp16) and module.dtype == torch.float32):
        logger.warning("the model's weights become bfloat16, from %s; updates are added up in float32", module.dtype)
        cast(torch.nn.Module, module).to(torch.bfloat16)
