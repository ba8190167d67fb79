"""The heads of a decoder's attention, as its config says them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Heads:
    """Of each layer: query heads, heads of keys and of values, and numbers of a head.

    Example:
        Qwen3-0.6B: Heads(queries=16, keys=8, size=128)
    """

    queries: int
    keys: int
    size: int

    @staticmethod
    def of(config: Any) -> Heads:
        """From a model's `config.get_text_config()`; what older architectures leave out follows from the rest."""
        settings: dict[str, Any] = config.to_dict()
        queries = int(config.num_attention_heads)
        return Heads(
            queries=queries,
            keys=int(settings.get("num_key_value_heads") or queries),
            size=int(settings.get("head_dim") or config.hidden_size // queries),
        )

    @property
    def repeat(self) -> int:
        """Query heads of one key head."""
        return self.queries // self.keys
