"""What becomes of each of Unsloth's arguments: it acts, it changes nothing and says so, or it is refused and why.

docs/migrate.md shows the same to readers.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from groupwise.errors import ConfigError, nearest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Option:
    """One argument.

    Attributes:
        default: Unsloth's.
        kind: whether another value acts, is said to change nothing, or is refused.
        why: of what does not act.
        fine: more values that say what is done anyway.

    Example:
        Option("sequential", "acts")
    """

    default: Any
    kind: Literal["acts", "hint", "refused"]
    why: str = ""
    fine: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class _Number:
    """What a number has to be."""

    expected: str
    low: float
    high: float = math.inf
    whole: bool = True

    def fits(self, value: Any) -> bool:
        kinds = (int,) if self.whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high


_POSITIVE = sys.float_info.min
_NUMBERS: Mapping[str, _Number] = {
    "max_seq_length": _Number("a whole number of tokens, 2 or more", 2),
    "gpu_memory_utilization": _Number("a number above 0, to 1", _POSITIVE, 1, whole=False),
    "random_state": _Number("a whole number, 0 or more", 0),
    "max_lora_rank": _Number("a whole number above 0", 1),
    "r": _Number("a whole number above 0", 1),
    "lora_alpha": _Number("a number above 0", _POSITIVE, whole=False),
    "lora_dropout": _Number("a number from 0 to 1", 0, 1, whole=False),
}


@dataclass(frozen=True, slots=True)
class _Choice:
    expected: str
    values: tuple[Any, ...]


_CHOICES: Mapping[str, _Choice] = {
    "use_gradient_checkpointing": _Choice("True, False or 'unsloth'", (True, False, "unsloth")),
    "init_lora_weights": _Choice(
        "True or 'gaussian': others change the base's weights, which an export merges with", (True, "gaussian")
    ),
}


def _expected(name: str, option: Option, value: Any) -> str:
    """What a value that acts has to be, and is not; otherwise nothing."""
    if name in _NUMBERS:
        return "" if _NUMBERS[name].fits(value) else _NUMBERS[name].expected
    if name in _CHOICES:
        return "" if value in _CHOICES[name].values else _CHOICES[name].expected
    return "True or False" if isinstance(option.default, bool) and not isinstance(value, bool) else ""


def _acts(**defaults: Any) -> dict[str, Option]:
    return {name: Option(default, "acts") for name, default in defaults.items()}


def _hints(why: str, **defaults: Any) -> dict[str, Option]:
    return {name: Option(default, "hint", why) for name, default in defaults.items()}


def _refused(why: str, *fine: Any, **defaults: Any) -> dict[str, Option]:
    return {name: Option(default, "refused", why, fine) for name, default in defaults.items()}


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

LOADING: Mapping[str, Option] = {
    **_acts(
        max_seq_length=2048,
        dtype=None,
        load_in_4bit=True,
        full_finetuning=False,
        device_map="sequential",
        trust_remote_code=False,
        use_gradient_checkpointing="unsloth",
        fast_inference=False,
        gpu_memory_utilization=0.5,
        random_state=3407,
        max_lora_rank=64,
        attn_implementation=None,
        quantization_config=None,
    ),
    **_hints("one device samples", tensor_parallel_size=1),
    **_hints("keys and values have the weights' dtype", float8_kv_cache=False),
    **_hints("the embedding is where the model is", offload_embedding=False),
    **_hints("updates are added up in float32 anyway", float32_mixed_precision=None),
    **_hints("the last layers are computed in chunks of tokens, the others whole", unsloth_tiled_mlp=False),
    **_hints("the tokenizer is taken as it is", fix_tokenizer=True),
    **_hints("weights that are not asked for at 4 bits have 16, or 32 on a CPU, anyway", load_in_16bit=False),
    **_hints("the engine logs nothing", disable_log_stats=True),
    **_hints("names are taken as they are", use_exact_model_name=False),
    **_refused("frozen weights have 16, 32 or 4 bits; use load_in_4bit", load_in_8bit=False, load_in_fp8=False),
    **_refused("set HF_TOKEN, or run `hf auth login`", "", token=None),
    **_refused("download it with `hf download --revision`, and give the folder", revision=None),
    **_refused("the model keeps the positions that its config.json says", rope_scaling=None),
    **_refused("the vocabulary stays the model's", resize_model_vocab=None),
    **_refused("weights are not quantised while they are trained", qat_scheme=None),
}
"""Of `from_pretrained`, beside the model's name."""

ADAPTER: Mapping[str, Option] = {
    **_acts(
        r=16,
        target_modules=ALL_LINEAR,
        lora_alpha=16,
        lora_dropout=0.0,
        layers_to_transform=None,
        layers_pattern=None,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
    ),
    "init_lora_weights": Option(True, "acts"),
    **_hints("from_pretrained has it", max_seq_length=2048),
    **_hints("nothing is written", temporary_location="_unsloth_temporary_saved_buffers"),
    **_refused("an adapter has no biases", bias="none"),
    **_refused("embedding and head stay as they are", [], modules_to_save=None),
    **_refused("it changes the base's weights, which an export merges with", {}, loftq_config=None),
    **_refused("weights are not quantised while they are trained", qat_scheme=None),
    **_refused("adapters belong to linear layers", target_parameters=None),
}
"""Of `get_peft_model`, beside the model."""

SAVING: Mapping[str, Option] = {
    **_acts(token=None, private=None, commit_message="Trained with Unsloth"),
    **_hints("transformers cuts the weights into files", max_shard_size="5GB"),
    **_hints("weights are merged on the CPU", maximum_memory_usage=0.85),
    **_hints("a folder of its own is used, and removed", temporary_location="_unsloth_temporary_saved_buffers"),
    **_hints("a folder of its own is used, and removed", use_temp_dir=None),
    **_hints("K-quants are made from 16 or 32 bits, as the model has", first_conversion=None),
    **_hints("one process saves", is_main_process=True),
    **_hints("the base is known from its name", save_peft_format=True),
    **_refused("call push_to_hub_merged or push_to_hub_gguf", push_to_hub=False),
    **_refused("weights are safetensors", None, safe_serialization=True),
    **_refused("the model's own weights are saved", state_dict=None, variant=None),
    **_refused("one commit goes to the main branch", create_pr=False, revision=None, commit_description=""),
    **_refused("write them into README.md", datasets=None),
    **_refused("write them into README.md", [], tags=None),
    **_refused("K-quants are made without an importance matrix", imatrix_file=None),
}
"""Of all that saves or pushes, beside place, tokenizer and method."""


def read_options(place: str, table: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """All values by name; a sentence says what changes nothing.

    Args:
        place: the function, for messages.

    Raises:
        ConfigError: a name that Unsloth does not have either, or a value that cannot act.
    """
    for name, value in given.items():
        option = table.get(name)
        if option is None:
            hint = nearest(name, table, "did you mean {}?") or "docs/migrate.md lists all"
            raise ConfigError(f"{place} has no argument {name!r}; {hint}")
        if option.kind == "acts" and (expected := _expected(name, option, value)):
            raise ConfigError(f"{place}: {name} = {value!r}: expected {expected}")
        if option.kind == "acts" or value == option.default or value in option.fine:
            continue
        if option.kind == "refused":
            raise ConfigError(f"{place}: {name} = {value!r} is refused: {option.why}")
        logger.warning("%s: %s = %r changes nothing here: %s", place, name, value, option.why)
    return {name: given.get(name, option.default) for name, option in table.items()}
