"""Every valid dotted name of the config tree, read from its types, and the nearest one to a name that is not valid."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from groupwise.config import Config
from groupwise.config.base import Section, Variant
from groupwise.config.renamed import RENAMED
from groupwise.errors import nearest

OTHER_NAMES = {
    "adam_epsilon": "optim.eps",
    "beta": "algorithm.kl.coef",
    "dataset": "data.train",
    "dataset_path": "data.train",
    "dataset_text_field": "sft.text_column",
    "entropy_coef_delta": "algorithm.entropy.coef_step",
    "epsilon": "algorithm.loss.clip_low",
    "epsilon_high": "algorithm.loss.clip_high",
    "eval_steps": "eval.every",
    "filter_groups": "rollout.dynamic_sampling_cap",
    "gradient_clipping": "optim.max_grad_norm",
    "kl_loss_coef": "algorithm.kl.coef",
    "kl_loss_type": "algorithm.kl.estimator",
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
    "off_policy_mask_threshold": "algorithm.correction.off_policy_mask",
    "optim": "optim.name",
    "output_dir": "train.output",
    "pack_max_length": "train.micro_batch_tokens",
    "per_device_train_batch_size": "rollout.prompts_per_step",
    "ppo_epochs": "optim.passes_per_batch",
    "prompt_repeat_k": "rollout.group_size",
    "ref_model_mixup_alpha": "algorithm.reference.mixup",
    "ref_model_sync_steps": "algorithm.reference.sync_every",
    "report_to": "tracking.backends",
    "reward_funcs": "reward.N.name",
    "reward_weights": "reward.N.weight",
    "rollout_batch_size": "rollout.prompts_per_step",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "stop_strings": "rollout.stop",
    "sync_ref_model": "algorithm.reference.sync_every",
    "top_entropy_quantile": "algorithm.entropy.top_fraction",
    "torch_dtype": "model.dtype",
    "train_batch_size": "rollout.prompts_per_step",
    "use_adaptive_entropy": "algorithm.entropy.target",
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
        defaults: where several sections may stand in one place, those that have the key, by what chooses them, with its
            default in each; empty elsewhere.

    Example:
        Key(name="reward.N.weight", annotation=float, default=1.0, required=False, description="factor in the …")
    """

    name: str
    annotation: Any
    default: Any
    required: bool
    description: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def type_text(self) -> str:
        """The type as users read it: `number or none`, `list of text`, …"""
        return describe_type(self.annotation)


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def sections_of(annotation: Any) -> tuple[type[Section], ...]:
    """The section, or those that may stand in its place; empty for anything else."""
    if is_section(annotation):
        return (annotation,)
    if get_origin(annotation) is Annotated:
        return sections_of(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, types.UnionType):
        return ()
    each = [sections_of(part) for part in get_args(annotation)]
    return tuple(section for sections in each for section in sections) if all(each) else ()


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
    if sections_of(annotation):
        return "table"
    if origin is Literal:
        return " | ".join(f'"{part}"' for part in parts)
    if origin in (Union, types.UnionType):
        return " | ".join(map(describe_type, parts))
    if origin is tuple and parts[-1] is Ellipsis:
        item = describe_type(parts[0])
        return f"list of {item if item == 'text' else f'{item}s'}"
    if origin is tuple:
        return f"list of {len(parts)} {describe_type(parts[0])}s"
    if origin is dict:
        return "table"
    names: dict[Any, str] = {str: "text", bool: "true or false", int: "whole number", float: "number"}
    return names.get(annotation, "any value")


@lru_cache(maxsize=1)
def describe_keys() -> tuple[Key, ...]:
    """All settings, in the order of the tree. Used by `groupwise config` and by the generated reference."""
    return tuple(_walk((Config,), ""))


def _walk(sections: tuple[type[Section], ...], prefix: str) -> Iterator[Key]:
    for name in dict.fromkeys(name for section in sections for name in section.model_fields):
        having = [section for section in sections if name in section.model_fields]
        dotted, annotation = prefix + name, _joined([section.model_fields[name].annotation for section in having])
        item = item_section(annotation)
        if inside := sections_of(annotation):
            yield from _walk(inside, f"{dotted}.")
        elif item is not None:
            yield from _walk((item,), f"{dotted}.N.")
        else:
            yield _key(dotted, annotation, having, everywhere=len(having) == len(sections))


def _key(dotted: str, annotation: Any, having: list[type[Section]], *, everywhere: bool) -> Key:
    name = dotted.rpartition(".")[2]
    first = having[0].model_fields[name]
    description, defaults = first.description or "", dict[str, Any]()
    if issubclass(having[0], Variant) and having[0].chosen_by != name:
        variants = [section for section in having if issubclass(section, Variant)]
        defaults = {one.choice: _default(one.model_fields[name]) for one in variants}
        description = description if everywhere else f"{having[0].chosen_by} = {', '.join(defaults)}: {description}"
    return Key(
        name=dotted,
        annotation=annotation,
        default=_default(first),
        required=first.is_required(),
        description=description,
        defaults=defaults,
    )


def _default(info: FieldInfo) -> Any:
    return None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})


def _joined(annotations: list[Any]) -> Any:
    return Union[tuple(annotations)]  # noqa: UP007 - of as many as there are; one is itself


@lru_cache(maxsize=1)
def _by_name() -> dict[str, Key]:
    return {key.name: key for key in describe_keys()}


def generic(dotted: str) -> str:
    """`reward.0.weight` as `reward.N.weight`."""
    return ".".join("N" if part.isdecimal() else part for part in dotted.split("."))


def annotation_of(dotted: str) -> Any | None:
    """The type of a setting, of a section or of an item inside a table setting; None when there is no such name.

    `data.chat_template_kwargs.enable_thinking` is inside a table setting, whose values may be anything. A name of an
    earlier version is that of today.
    """
    key = _by_name().get(generic(dotted))
    if key is not None:
        return key.annotation
    annotation: Any = Config
    for part in dotted.split("."):
        annotation = _child(annotation, part)
        if annotation is None:
            return annotation_of(RENAMED[dotted]) if dotted in RENAMED else None
    return annotation


def name_of(location: Sequence[int | str]) -> str:
    """The dotted name of the place of an error, in which a variant's choice stands after its place."""
    names, annotation, chosen = list[str](), Any, False
    for part in map(str, location):
        if not chosen:
            annotation = _child(annotation if names else Config, part)
            names.append(part)
        chosen = not chosen and len(sections_of(annotation)) > 1
    return ".".join(names)


def _child(annotation: Any, part: str) -> Any | None:
    if sections := sections_of(annotation):
        found = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
        return _joined(found) if found else None
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
