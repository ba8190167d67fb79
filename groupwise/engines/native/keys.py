"""The numbers that decide every token: a function of seed, prompt, sample and position, and of nothing else.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is counter-based: position t of a stream needs no
state, so a sample can be drawn again anywhere, alone or in any company, with the same result.
"""

from __future__ import annotations

import hashlib

import numpy as np


def uniforms(seed: int, uid: str, sample_index: int, count: int) -> np.ndarray:
    """`[count]` float64 in [0, 1): one number per completion position."""
    digest = hashlib.blake2b(f"{seed}\x1f{uid}\x1f{sample_index}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)).random_raw(count)
    return (np.asarray(bits, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
