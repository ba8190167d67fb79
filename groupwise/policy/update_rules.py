"""From `optim.name` and the parameters' names to torch optimisers and their parameter groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from groupwise.config import OptimConfig
from groupwise.config.checks import require_bitsandbytes
from groupwise.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rule:
    """A torch optimiser with the names of its parameters.

    Attributes:
        state_bytes: what its moments take once they exist.
    """

    optimizer: torch.optim.Optimizer
    names: tuple[str, ...]
    state_bytes: int


def make_rules(masters: Mapping[str, Tensor], config: OptimConfig, *, ends: Collection[str] = ()) -> list[Rule]:
    """One optimiser for all parameters; under Muon one for the matrices and one for the rest.

    Args:
        masters: what is updated, by parameter name.
        ends: names of embedding and head.

    Raises:
        ConfigError: a pattern of `optim.weight_decay_groups` matches no parameter, or a library is missing.
    """
    _check_patterns(masters, config)
    if config.name == "adamw_8bit":
        return [_adamw_8bit(masters, config)]
    if config.name == "adamw":
        return [_adamw(masters, config)]
    hidden = {name: master for name, master in masters.items() if master.dim() == 2 and name not in ends}
    rest = {name: master for name, master in masters.items() if name not in hidden}
    return [rule(some, config) for rule, some in ((_muon, hidden), (_adamw, rest)) if some]


def _adamw(masters: Mapping[str, Tensor], config: OptimConfig) -> Rule:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
    optimizer = torch.optim.AdamW(
        _groups(masters, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    return Rule(optimizer, tuple(masters), 8 * _size(masters))


def _adamw_8bit(masters: Mapping[str, Tensor], config: OptimConfig) -> Rule:
    """AdamW with moments in 8 bits by blocks of 256 (Dettmers et al. 2022); tensors below 4,096 entries keep 32."""
    require_bitsandbytes("optim.name = 'adamw_8bit'")
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    package: Any = bitsandbytes
    optimizer = package.optim.AdamW8bit(_groups(masters, config), lr=config.lr, betas=config.betas, eps=config.eps)
    return Rule(optimizer, tuple(masters), 2 * _size(masters))


def _muon(masters: Mapping[str, Tensor], config: OptimConfig) -> Rule:
    """Muon (Jordan et al. 2024), each update scaled to AdamW's size so that one `lr` serves both (Liu et al. 2025,
    "Muon is scalable for LLM training", equation 4)."""
    optimizer = torch.optim.Muon(
        _groups(masters, config), lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"
    )
    return Rule(optimizer, tuple(masters), 4 * _size(masters))


def _groups(masters: Mapping[str, Tensor], config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters by their weight decay."""
    by_decay: dict[float, list[Tensor]] = {}
    for name, master in masters.items():
        by_decay.setdefault(_decay_of(name, master, config), []).append(master)
    return [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()]


def _decay_of(name: str, master: Tensor, config: OptimConfig) -> float:
    for pattern, decay in config.weight_decay_groups.items():
        if fnmatchcase(name, pattern):
            return decay
    return config.weight_decay if master.dim() >= 2 and not name.endswith("bias") else 0.0


def _check_patterns(masters: Mapping[str, Tensor], config: OptimConfig) -> None:
    for pattern in config.weight_decay_groups:
        if not any(fnmatchcase(name, pattern) for name in masters):
            shown = ", ".join(list(masters)[:4])
            raise ConfigError(
                f"optim.weight_decay_groups: {pattern!r} matches no trained parameter; their names are like {shown}; "
                "`*` stands for any text"
            )


def _size(masters: Mapping[str, Tensor]) -> int:
    return sum(master.numel() for master in masters.values())
