"""What tests of mixtures of experts have in common."""

from __future__ import annotations

from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 48,
    "initializer_range": 0.1,
}
"""Of a tiny model, but for its vocabulary and the number of its experts."""
