"""The numbers that decide every token: a function of seed, prompt, sample and position, and of nothing else.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is counter-based: position t of a stream
needs no state, so a sample can be drawn again anywhere, alone or in any company, with the same result.
"""

from __future__ import annotations

import hashlib

import numpy as np


def uniforms(seed: int, uid: str, sample_index: int, count: int) -> np.ndarray:
    """`[count]` float64 in [0, 1): one number per completion position."""
    digest = hashlib.blake2b(f"{seed}\x1f{uid}\x1f{sample_index}".encode(), digest_size=16).digest()
    # As explicit little-endian numbers, so that the stream is the same on every machine.
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    bits = np.asarray(np.random.Philox(key=key).random_raw(count), dtype=np.uint64)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
