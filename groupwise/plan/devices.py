"""Devices by name: their makers' figures, and what part of these Groupwise has been seen to reach.

Peaks are of dense matrix products without sparsity, from the makers' data sheets; memory is what programs find there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from groupwise.errors import ConfigError, nearest

GIB = 2**30
PUBLISHED = "published peaks"


@dataclass(frozen=True, slots=True)
class Device:
    """A device to plan for.

    Attributes:
        memory: bytes that a process can have of it.
        bfloat16, float32: operations per second.
        bandwidth: bytes per second.
        on_gpu: whether it is a GPU.
        source: where the figures come from: the maker's sheet, or a measurement of just now.

    Example:
        DEVICES["h100-80gb"].memory == int(79.1 * 2**30)
    """

    name: str
    memory: int
    bfloat16: float
    float32: float
    bandwidth: float
    on_gpu: bool = True
    source: str = PUBLISHED

    def operations(self, each: int) -> float:
        """Per second, in a type of so many bytes."""
        return self.bfloat16 if each == 2 else self.float32


def _gpu(name: str, gib: float, bfloat16: float, float32: float, bandwidth: float) -> Device:
    return Device(name, int(gib * GIB), bfloat16 * 1e12, float32 * 1e12, bandwidth * 1e12)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("h100-80gb", 79.1, 989, 67, 3.35),  # SXM
        _gpu("h200", 139.8, 989, 67, 4.8),
        _gpu("a100-40gb", 39.4, 312, 19.5, 1.555),
        _gpu("a100-80gb", 79.1, 312, 19.5, 2.039),
        _gpu("l4", 22.0, 121, 30.3, 0.300),
        _gpu("rtx4090", 23.5, 165, 82.6, 1.008),  # products that are summed in float32
    )
}

CPU = "cpu"

TRAINING_SHARE = {"full": 0.30, "adapter": 0.48}
"""Of the peak, forward and backward passes. Measured on one H100: 29 to 32 % with all weights of 0.6 billion, 48 % with
LoRA on 8 billion (benchmarks/RESULTS.md, against measured products; those are 78 % of the published peak)."""

PRODUCTS_SHARE = 0.78
"""Of the published peak, a large product: 772 of 989 TFLOP/s on that H100."""

COPY_SHARE = 0.86
"""Of the published bandwidth, a large copy: 2.87 of 3.35 TB/s on that H100."""

DECODE_SHARES = ((64, 0.45), (256, 0.66))
"""Of the floor, decode steps of so many samples, on that H100."""

MEASURED = frozenset({"h100-80gb"})
"""Devices whose shares were measured; figures for others take over the shares, and are computed."""


def decode_share(samples: int) -> float:
    """Of the floor, for steps of so many samples: between those measured by the logarithm, beyond them as they are."""
    (few, low), (many, high) = DECODE_SHARES
    if samples <= few:
        return low
    if samples >= many:
        return high
    place = math.log(samples / few) / math.log(many / few)
    return low + (high - low) * place


def named_device(name: str, memory: int | None) -> Device:
    """The device of this name; `cpu` has the memory that is given, and no speed that is known.

    Raises:
        ConfigError: no such name; `cpu` without memory; memory for a GPU, which has its own.
    """
    if name == CPU:
        if memory is None:
            raise ConfigError("--device cpu needs --memory, such as --memory 32 (GiB); a GPU's is known by its name")
        return Device(CPU, memory, 0.0, 0.0, 0.0, on_gpu=False, source="given")
    if memory is not None:
        raise ConfigError(f"--memory goes with --device cpu; {name} has its own memory: leave --memory out")
    if name not in DEVICES:
        known = ", ".join([*DEVICES, CPU])
        hint = nearest(name, [*DEVICES, CPU], "; did you mean {}?")
        raise ConfigError(f"--device {name} is not known; expected one of {known}{hint}")
    return DEVICES[name]
