"""LoRA (Hu et al. 2021, equation 3: W x + alpha / r * B A x) by peft, put into the base module itself.

The engine samples from the module that is trained, adapters and all; never from merged weights, whose rounding the
trainer would not see. The base stays in place: without its adapters the module is the base model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from groupwise.config import LoraConfig
from groupwise.config.lora import AdapterFile, AdapterShape, check_plain
from groupwise.errors import ConfigError
from groupwise.installed import require_adapters
from groupwise.model.exact.experts import experts_of
from groupwise.model.fast_cpu.linear import dnn_linear

if TYPE_CHECKING:
    import peft

_NAME = "default"
_COLUMNS = 8


class FullTileLinear(nn.Linear):
    """A linear layer of few outputs, computed in the company of zeros.

    A product with up to 6 columns takes other kernels for a few rows than for many (measured on a CPU, in float32),
    and so its rows would have other bits. torch's own library also shares a deep sum out among threads where there are
    few columns; oneDNN does not.
    """

    def forward(self, input: Tensor) -> Tensor:
        missing = -self.out_features % _COLUMNS
        product = dnn_linear if input.dtype == torch.float32 and input.device.type == "cpu" else linear
        return product(input, pad(self.weight, (0, 0, 0, missing)))[..., : self.out_features].contiguous()


def add_adapter(model: PreTrainedModel, lora: LoraConfig, *, seed: int = 0) -> None:
    """Put a new adapter into the module, and leave nothing else to be trained. Its B is zero: the model computes what
    it did.

    Args:
        seed: of the adapter's A.

    Raises:
        ConfigError: `lora.target_modules` names layers that the model lacks.
    """
    import peft

    targets = _all_linear(model) if lora.target_modules == ("all-linear",) else sorted(set(lora.target_modules))
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scaling_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )
    config.target_modules = targets  # peft makes it a set, which would be saved in any order
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, config)


def continue_adapter(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Check that `lora` describes the adapter that the module has, and take its dropout.

    Raises:
        ConfigError: it describes another one.
    """
    config = adapter_of(model)
    assert config is not None, "the model has no adapter"
    targets = config.target_modules or []
    targets = tuple(sorted([targets] if isinstance(targets, str) else targets))
    shape = AdapterShape(config.r, float(config.lora_alpha), config.use_rslora, targets)
    wrong = shape.disagreements(lora)
    bare = _all_linear(model) if lora.target_modules == ("all-linear",) else []
    if bare:
        wrong.append(f"lora.target_modules = ['all-linear'], but the adapter leaves out {', '.join(bare)}")
    if wrong:
        raise ConfigError(
            f"the model has a LoRA adapter, and training goes on with it: {'; '.join(wrong)}; give {shape.flags}, "
            "or merge the adapter into its base first"
        )
    config.lora_dropout = lora.dropout
    for layer in _layers(model):
        layer.lora_dropout[_NAME] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()


def adopt_adapter(model: PreTrainedModel) -> None:
    """Make ready an adapter that peft put into the module, alone or inside a `peft.PeftModel`.

    Raises:
        ConfigError: it is not one plain LoRA adapter named `default`.
    """
    import peft

    require_adapters()
    configs: dict[str, Any] = model.peft_config
    if list(configs) != [_NAME]:
        raise ConfigError(f"the model has the adapters {', '.join(configs)}; expected one, named {_NAME!r}")
    found, plain = configs[_NAME].to_dict(), peft.LoraConfig().to_dict()
    place = "the model's adapter"
    check_plain(place, found)
    strange = sorted(key for key, value in found.items() if key not in _FREE and value != plain.get(key))
    if strange:
        raise ConfigError(f"{place}: {strange[0]} = {found[strange[0]]!r} is more than plain LoRA; leave it out")
    require_apart(model)
    model._hf_peft_config_loaded = True
    _check_targets(model, configs[_NAME], _linears_without(model))
    settle_adapters(model)


def require_apart(model: nn.Module) -> None:
    """Refuse an adapter that stands beside its layers without acting, or is added to their weights already.

    Raises:
        ConfigError: says which call undoes it.
    """
    layers = _layers(model)
    if any(layer.merged for layer in layers):
        raise ConfigError(
            "the model's adapter is merged into its base and still there, so it would be neither trained nor saved "
            "apart; call unmerge_adapter() to go on with it, or merge_and_unload() to have a whole model"
        )
    if any(layer.disable_adapters for layer in layers):
        raise ConfigError("the model's adapter is switched off, so nothing would be learned; switch it on first")


_FREE = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("task_type", "base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping"),
    }
)
"""What may differ from peft's defaults: how the adapter began, and which layers have it."""


def load_adapter(model: PreTrainedModel, file: AdapterFile) -> None:
    """Put a saved adapter into its base, ready to sample and to be trained further.

    Raises:
        ConfigError: its weights are missing, or belong to another model.
    """
    import peft
    from peft.utils.save_and_load import load_peft_weights

    config = peft.LoraConfig.from_pretrained(str(file.folder))
    assert isinstance(config, peft.LoraConfig), "read_adapter_file refuses other kinds"
    config.inference_mode = False  # as saved, it would freeze the adapter
    place = f"model.path = {str(file.folder)!r}: the adapter does not fit {file.base!r}"
    mend = "give the base that it was trained on, in base_model_name_or_path of its adapter_config.json"
    try:
        _inject(model, config)
        state = load_peft_weights(str(file.folder), device="cpu")
        report = peft.set_peft_model_state_dict(model, state, adapter_name=_NAME)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{place}: {' '.join(str(error).split())[:300]}; {mend}") from error
    strangers = [*(name for name in report.missing_keys if ".lora_" in name), *report.unexpected_keys]
    if strangers:
        raise ConfigError(f"{place}: {len(strangers)} weights have no counterpart, {min(strangers)} for one; {mend}")


def adapter_of(model: PreTrainedModel) -> peft.LoraConfig | None:
    """The adapter that the module has; None when it has none."""
    if not model._hf_peft_config_loaded:
        return None
    found: Any = model.peft_config[_NAME]
    return found


def has_adapter_layers(model: nn.Module) -> bool:
    """Whether peft put an adapter into the module, of whatever kind."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) for layer in model.modules())


def adds_nothing(model: PreTrainedModel) -> bool:
    """Whether the adapter is as it was made: without a part in what the model computes."""
    return not any(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)


def dropout_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The adapter's dropout, where there is any: it acts while these modules are in training mode."""
    config = adapter_of(model)
    return [] if config is None or not config.lora_dropout else [layer.lora_dropout for layer in _layers(model)]


def _inject(model: PreTrainedModel, config: peft.LoraConfig) -> None:
    require_adapters()
    linears = _linears_without(model)
    model.requires_grad_(False)
    try:
        model.add_adapter(config, _NAME)
    except ValueError as error:
        raise ConfigError(
            f"lora.target_modules: {error}; the model's linear layers are {', '.join(linears)}"
        ) from error
    _settle_targets(config, linears)
    _check_targets(model, config, linears)
    base = Path(model.name_or_path or "")
    if model.name_or_path and base.is_dir():  # so that the adapter finds it from everywhere
        config.base_model_name_or_path = str(base.resolve())
    settle_adapters(model)


def _settle_targets(config: peft.LoraConfig, linears: list[str]) -> None:
    """Where a family's experts had layers of these names once, peft takes a name for the experts' weights as well; and
    it makes sets of both lists, which would be saved in any order."""
    if config.target_parameters:
        taken = ", ".join(sorted(config.target_parameters))
        raise ConfigError(
            f"lora.target_modules: peft takes some of these names for the experts of this mixture ({taken}), "
            f"which get no adapter; name others of {', '.join(linears)}, or all-linear, which is attention here"
        )
    config.target_parameters = None
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)


def settle_adapters(model: PreTrainedModel) -> None:
    """Adapters compute in the module's dtype, and in full tiles."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # on 4-bit weights peft would compute in float32
            parameter.data = parameter.data.to(model.dtype)
    for layer in _layers(model):
        for inner in layer.lora_A.values():
            if inner.out_features % _COLUMNS:
                inner.__class__ = FullTileLinear


def _check_targets(model: PreTrainedModel, config: peft.LoraConfig, linears: list[str]) -> None:
    """Refuse what peft lets pass: a name that no layer has beside names that some have, and layers at the ends."""
    layers = _layers(model)
    names = [name for name, module in model.named_modules() if module in layers]
    targets = config.target_modules if isinstance(config.target_modules, list | set) else []
    unknown = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))
    if unknown:
        raise ConfigError(
            f"lora.target_modules: got {', '.join(unknown)}, which the model does not have; its linear layers are "
            f"{', '.join(linears)}"
        )
    if any(layer in (model.get_input_embeddings(), model.get_output_embeddings()) for layer in layers):
        raise ConfigError(
            f"lora.target_modules: got the embedding or the head in {', '.join(sorted(targets))}; these may be one "
            f"tensor, and get no adapter; name some of {', '.join(linears)}, or all-linear"
        )


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _all_linear(model: PreTrainedModel) -> list[str]:
    """What `all-linear` is for layers that have no adapter yet; in a mixture of experts those of attention, because
    peft takes the names of others for its experts."""
    return _linears_without(model, within="attn|attention" if experts_of(model) else "")


def _linears_without(model: PreTrainedModel, *, within: str = "") -> list[str]:
    """Last names of the linear layers, the head left out, that have no adapter.

    Args:
        within: a pattern in their whole names.
    """
    inside = {id(part) for layer in _layers(model) for part in layer.modules()} | {id(model.get_output_embeddings())}
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside and re.search(within, name)
        }
    )
