"""The numbers that decide every token: a function of seed, prompt, sample and position, and of nothing else.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is counter-based: position t of a stream
needs no state, so a sample can be drawn again anywhere, alone or in any company, with the same result.
"""

from __future__ import annotations

import hashlib

import numpy as np

from groupwise.inputs import SampleKey


def uniforms(seed: int, key: SampleKey, count: int) -> np.ndarray:
    """`[count]` float64 in [0, 1): one number for each position after the prompt.

    A prompt that comes again has draws of its own: `seed + (draw << 64)` is another seed than any run's.
    """
    seeded = f"{seed + (key.draw << 64)}\x1f{key.uid}\x1f{key.sample_index}"
    digest = hashlib.blake2b(seeded.encode(), digest_size=16).digest()
    # As explicit little-endian numbers, so that the stream is the same on every machine.
    words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    bits = np.asarray(np.random.Philox(key=words).random_raw(count), dtype=np.uint64)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
