"""Low-rank adapters; and what the adapter_config.json of a saved one says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from groupwise.config.base import Section
from groupwise.errors import ConfigError

ADAPTER_FILE = "adapter_config.json"
OWN_BASE = "base"
"""The folder beside an adapter that holds its base, where that is nowhere else."""


class LoraConfig(Section):
    rank: int = Field(0, ge=0, description="0 trains all weights; above, only adapters of this rank on a frozen model")
    alpha: float | None = Field(
        None, gt=0, description="adapters are scaled by alpha / rank, under rslora by alpha / √rank; none is 2 x rank"
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of adapter inputs, in training alone: the sampler has none, so above 0 the log-prob mismatch is "
        "above 0 too",
    )
    target_modules: tuple[str, ...] = Field(
        ("all-linear",), min_length=1, description="names of the layers that get one; all-linear leaves out the head"
    )
    rslora: bool = Field(False, description="rank-stabilised scaling, which lets high ranks learn")

    @property
    def scaling_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What of an adapter cannot change any more.

    Example:
        AdapterShape(rank=16, alpha=32.0, rslora=False, target_modules=("k_proj", "q_proj"))
    """

    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]

    def disagreements(self, lora: LoraConfig) -> list[str]:
        """What of `lora` is not as it was when the adapter was made: `lora.rank = 8, but the adapter has 16`.

        `all-linear` agrees with any list here: which layers that means, only the model says.
        """
        if not lora.rank:
            return [f"lora.rank = 0, but the adapter has {self.rank}"]
        here: dict[str, Any] = {"rank": lora.rank, "alpha": lora.scaling_alpha, "rslora": lora.rslora}
        there: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "rslora": self.rslora}
        if lora.target_modules != ("all-linear",):
            here["target_modules"], there["target_modules"] = sorted(lora.target_modules), list(self.target_modules)
        return [
            f"lora.{name} = {got}, but the adapter has {there[name]}"
            for name, got in here.items()
            if got != there[name]
        ]

    @property
    def flags(self) -> str:
        """The settings that go on training this adapter."""
        rslora = " --lora.rslora true" if self.rslora else ""
        targets = f" --lora.target_modules {','.join(self.target_modules)}"
        return f"--lora.rank {self.rank} --lora.alpha {self.alpha:g}{rslora}{targets}"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A saved adapter.

    Attributes:
        folder: where adapter_config.json and adapter_model.safetensors are.
        base: folder or Hub name of the model that it was trained on.
    """

    folder: Path
    base: str
    shape: AdapterShape


def read_adapter_file(folder: Path) -> AdapterFile | None:
    """The adapter in this folder; None when there is none.

    Raises:
        ConfigError: it is damaged, of another kind than plain LoRA, or does not name its base.
    """
    file = folder / ADAPTER_FILE
    try:
        content: Any = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; expected what peft writes") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: got {type(content).__name__}, expected what peft writes: a table")
    check_plain(str(file), content)
    targets = content.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    base, rank, alpha = content.get("base_model_name_or_path"), content.get("r"), content.get("lora_alpha")
    base = own_base(folder) or base
    if not (isinstance(rank, int) and isinstance(alpha, int | float) and isinstance(targets, list)) or not all(
        isinstance(name, str) for name in targets
    ):
        raise ConfigError(f"{file}: expected r, lora_alpha and target_modules, as peft writes them")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{file}: base_model_name_or_path is {base!r}; write the folder or Hub name of the model that the adapter "
            "was trained on"
        )
    shape = AdapterShape(rank, float(alpha), bool(content.get("use_rslora")), tuple(sorted(targets)))
    return AdapterFile(folder, _resolved(base, folder), shape)


def own_base(folder: Path) -> str | None:
    """The base that was saved beside the adapter, which comes before any that its file names."""
    found = folder / OWN_BASE
    return str(found) if (found / "config.json").is_file() else None


def check_plain(file: str, content: dict[str, Any]) -> None:
    """Refuse an adapter that is more than plain LoRA.

    Args:
        content: its config, as peft writes it.

    Raises:
        ConfigError: says what it has.
    """
    if content.get("peft_type") != "LORA":
        raise ConfigError(f"{file}: got an adapter of kind {content.get('peft_type')!r}; expected LORA")
    others = {
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_parameters": None,
        "trainable_token_indices": None,
    }
    for name, plain in others.items():
        got = content.get(name, plain)
        if got and got != plain:
            raise ConfigError(
                f"{file}: {name} = {got!r} is more than plain LoRA; merge the adapter into its base with peft's "
                "merge_and_unload, and give the merged model"
            )


def _resolved(base: str, folder: Path) -> str:
    """A relative folder is looked for from here, then from the adapter's folder."""
    beside = folder / base
    return str(beside) if not Path(base).is_dir() and not Path(base).is_absolute() and beside.is_dir() else base
