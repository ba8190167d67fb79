"""What must be the same of a model here and there, for samples of one to be learned from by the other."""

from __future__ import annotations

import hashlib

from groupwise.fingerprint import tokenizer_digest, value_digest, weights_digest
from groupwise.model.loading import LoadedModel

KEY_VARIABLE = "GROUPWISE_API_KEY"
"""The environment variable with the key that a server asks for, and a client sends."""


def model_identity(loaded: LoadedModel) -> dict[str, str]:
    """Facts by name: sizes and types of all weights, the weights that are not trained, the tokenizer, the kernels."""
    named = list(loaded.model.named_parameters())
    shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in named]
    frozen = not all(p.requires_grad for _, p in named)
    return {
        "weights": f"{len(named)} of {loaded.model.dtype}, {_short(shapes)}",
        "weights that are not trained": weights_digest(loaded.model) if frozen else "none",
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "stop tokens": str(sorted(loaded.stop_token_ids)),
        "batch invariant": str(loaded.batch_invariant),
    }


def _short(value: object) -> str:
    return hashlib.blake2b(value_digest(repr(value)).encode(), digest_size=8).hexdigest()
