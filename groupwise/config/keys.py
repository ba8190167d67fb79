"""Every valid dotted name of the config tree, read from its types, and the nearest one to a name that is not valid."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from groupwise.config import Config
from groupwise.config.base import Section
from groupwise.errors import nearest

OTHER_NAMES = {
    "adam_epsilon": "optim.eps",
    "beta": "algorithm.kl_coef",
    "dataset": "data.train",
    "dataset_path": "data.train",
    "dataset_text_field": "sft.text_column",
    "entropy_coef_delta": "algorithm.entropy_coef_step",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "eval_steps": "eval.every",
    "filter_groups": "rollout.dynamic_sampling_cap",
    "gradient_clipping": "optim.max_grad_norm",
    "kl_loss_coef": "algorithm.kl_coef",
    "kl_loss_type": "algorithm.kl_estimator",
    "learning_rate": "optim.lr",
    "load_in_4bit": "model.quantization",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_target_modules": "lora.target_modules",
    "loss_type": "algorithm.name",
    "lr_scheduler_type": "optim.schedule",
    "mask_truncated_completions": "algorithm.overlong",
    "max_completion_length": "rollout.max_completion_tokens",
    "max_new_tokens": "rollout.max_completion_tokens",
    "max_num_gen_batches": "rollout.dynamic_sampling_cap",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_completion_tokens",
    "max_steps": "train.steps",
    "max_tokens": "rollout.max_completion_tokens",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "model_path": "model.path",
    "num_epochs": "train.epochs",
    "num_generations": "rollout.group_size",
    "num_iterations": "optim.passes_per_batch",
    "num_train_epochs": "train.epochs",
    "off_policy_mask_threshold": "algorithm.off_policy_mask",
    "optim": "optim.name",
    "output_dir": "train.output",
    "pack_max_length": "train.micro_batch_tokens",
    "per_device_train_batch_size": "rollout.prompts_per_step",
    "ppo_epochs": "optim.passes_per_batch",
    "prompt_repeat_k": "rollout.group_size",
    "ref_model_mixup_alpha": "algorithm.reference_mixup",
    "ref_model_sync_steps": "algorithm.reference_sync_every",
    "report_to": "tracking.backends",
    "reward_funcs": "reward.N.name",
    "reward_weights": "reward.N.weight",
    "rollout_batch_size": "rollout.prompts_per_step",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "stop_strings": "rollout.stop",
    "sync_ref_model": "algorithm.reference_sync_every",
    "top_entropy_quantile": "algorithm.top_entropy_fraction",
    "torch_dtype": "model.dtype",
    "train_batch_size": "rollout.prompts_per_step",
    "use_adaptive_entropy": "algorithm.entropy_target",
    "use_rslora": "lora.rslora",
    "use_vllm": "rollout.engine",
}
"""What other trainers call a setting -> what it is called here."""


@dataclass(frozen=True, slots=True)
class Key:
    """One setting.

    Attributes:
        name: dotted; an item of a list of tables has the number as `N`.
        required: it has no default (in an item of a list).

    Example:
        Key(name="reward.N.weight", annotation=float, default=1.0, required=False, description="factor in the …")
    """

    name: str
    annotation: Any
    default: Any
    required: bool
    description: str

    @property
    def type_text(self) -> str:
        """The type as users read it: `number or none`, `list of text`, …"""
        return describe_type(self.annotation)


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def item_section(annotation: Any) -> type[Section] | None:
    """The section of `tuple[Section, ...]`, else None."""
    if get_origin(annotation) is tuple and is_section(get_args(annotation)[0]):
        return get_args(annotation)[0]
    return None


def without_none(annotation: Any) -> Any:
    """`X` of `X | None`; anything else as it is."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation


def admits_none(annotation: Any) -> bool:
    return annotation is Any or (
        get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
    )


def describe_type(annotation: Any) -> str:
    if admits_none(annotation) and annotation is not Any:
        return f"{describe_type(without_none(annotation))} or none"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{part}"' for part in parts)
    if origin in (Union, types.UnionType):
        return " | ".join(map(describe_type, parts))
    if origin is tuple and parts[-1] is Ellipsis:
        item = describe_type(parts[0])
        return f"list of {item if item == 'text' else f'{item}s'}"
    if origin is tuple:
        return f"list of {len(parts)} {describe_type(parts[0])}s"
    if origin is dict or is_section(annotation):
        return "table"
    names: dict[Any, str] = {str: "text", bool: "true or false", int: "whole number", float: "number"}
    return names.get(annotation, "any value")


@lru_cache(maxsize=1)
def describe_keys() -> tuple[Key, ...]:
    """All settings, in the order of the tree. Used by `groupwise config` and by the generated reference."""
    return tuple(_walk(Config, ""))


def _walk(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        dotted, item = prefix + name, item_section(field.annotation)
        if is_section(field.annotation):
            yield from _walk(field.annotation, f"{dotted}.")
        elif item is not None:
            yield from _walk(item, f"{dotted}.N.")
        else:
            yield _key(dotted, field)


def _key(dotted: str, field: FieldInfo) -> Key:
    required = field.is_required()
    return Key(
        name=dotted,
        annotation=field.annotation,
        default=None if required else field.get_default(call_default_factory=True, validated_data={}),
        required=required,
        description=field.description or "",
    )


@lru_cache(maxsize=1)
def _by_name() -> dict[str, Key]:
    return {key.name: key for key in describe_keys()}


def generic(dotted: str) -> str:
    """`reward.0.weight` as `reward.N.weight`."""
    return ".".join("N" if part.isdecimal() else part for part in dotted.split("."))


def annotation_of(dotted: str) -> Any | None:
    """The type of a setting, of a section or of an item inside a table setting; None when there is no such name.

    `data.chat_template_kwargs.enable_thinking` is inside a table setting, whose values may be anything.
    """
    key = _by_name().get(generic(dotted))
    if key is not None:
        return key.annotation
    annotation: Any = Config
    for part in dotted.split("."):
        annotation = _child(annotation, part)
        if annotation is None:
            return None
    return annotation


def _child(annotation: Any, part: str) -> Any | None:
    if is_section(annotation):
        return annotation.model_fields[part].annotation if part in annotation.model_fields else None
    if get_origin(annotation) is tuple:
        return item_section(annotation) if part.isdecimal() else None
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    return Any if annotation is Any else None


def nearest_key(dotted: str) -> str:
    """What to do about a name that is not valid: the name that was meant, or else the names there are."""
    wanted, names = generic(dotted), list(_by_name())
    section, _, last = wanted.rpartition(".")
    inside = _inside(section, names)
    near_section = nearest(section, {name.rpartition(".")[0] for name in names})
    meant = (
        _other_name(last, section=section)
        or _nearest_inside(section, last, names)
        or _nearest_inside(near_section, last, names)
        or [name for name in names if _last(name) == last]
        or _other_name(last)
        or [name for near in [nearest(last, map(_last, names))] for name in names if _last(name) == near]
        or [name for name in [nearest(wanted, names)] if name and not inside]
    )
    if meant:
        return "did you mean " + " or ".join(f"`{_numbered(name, dotted)}`" for name in meant) + "?"
    if inside:
        return f"the keys of `{section}` are {', '.join(inside)}"
    return f"the sections are {', '.join(Config.model_fields)}; `groupwise config` lists every key"


def _other_name(last: str, *, section: str | None = None) -> list[str]:
    name = OTHER_NAMES.get(last)
    if name is None or (section is not None and not name.startswith(f"{section}.")):
        return []
    return [name]


def _inside(section: str, names: list[str]) -> list[str]:
    """The keys of a section, without its name."""
    return [name.removeprefix(f"{section}.") for name in names if section and name.startswith(f"{section}.")]


def _nearest_inside(section: str, key: str, names: list[str]) -> list[str]:
    near = nearest(key, _inside(section, names))
    return [f"{section}.{near}"] if near else []


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _numbered(name: str, dotted: str) -> str:
    numbers = [part for part in dotted.split(".") if part.isdecimal()]
    return name.replace(".N.", f".{numbers[0] if numbers else 0}.")
