"""What all parts share: where results go, how times are taken, what the device can do at most."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu.shapes import ModelShape
from groupwise.model.loading import LoadedModel


def write_record(out: Path | None, section: str, **figures: Any) -> None:
    """One JSON line, printed, and appended to the file."""
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items() if v is not None}
    line = json.dumps({"section": section, **rounded})
    print(line, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass(frozen=True, slots=True)
class Bench:
    """What all sections need.

    Attributes:
        cap: seconds after which a section starts nothing more.
        out: where results are appended as JSON lines, if anywhere.
    """

    shape: ModelShape
    loaded: LoadedModel
    prompt_tokens: int
    tokens: int
    micro_batch_tokens: int
    cap: float
    out: Path | None

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.model.dtype

    def record(self, section: str, **figures: Any) -> None:
        write_record(self.out, section, **figures)

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Measured limits of the device: floating-point operations and bytes per second."""

    flops: float
    bandwidth: float


def median_seconds(work: Callable[[int], None], device: torch.device, *, cap: float, repeats: int = 20) -> float:
    """Median time of `work(i)`, i counting up, after two calls that are not counted: on a GPU by its own events."""
    started = time.perf_counter()
    seconds: list[float] = []
    for i in range(repeats + 2):
        seconds.append(_seconds_of(work, i, device))
        if len(seconds) > 2 and time.perf_counter() - started > cap:
            break
    return statistics.median(seconds[2:])


def _seconds_of(work: Callable[[int], None], i: int, device: torch.device) -> float:
    if device.type != "cuda":
        before = time.perf_counter()
        work(i)
        return time.perf_counter() - before
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    work(i)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def launch_seconds(device: torch.device, count: int = 1000) -> float | None:
    """Seconds of one small kernel in a graph of `count` that wait for each other; None without a GPU."""
    if device.type != "cuda":
        return None
    x = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    seconds = median_seconds(lambda _: graph.replay(), device, cap=5.0)
    assert float(x) >= count, "the graph did not run"
    return seconds / count


def measure_ceiling(bench: Bench, size: int) -> Ceiling:
    """Square matrix products, and copies, over buffers that together exceed any cache; outputs are poisoned first."""
    device, dtype = bench.device, bench.dtype
    pairs = [(torch.randn(size, size, device=device, dtype=dtype) / size**0.5) for _ in range(4)]
    outs = [torch.full((size, size), torch.nan, device=device, dtype=dtype) for _ in range(4)]

    def multiply(i: int) -> None:
        torch.mm(pairs[i % 4], pairs[(i + 1) % 4], out=outs[i % 4])

    def copy(_: int) -> None:
        for out, pair in zip(outs, pairs, strict=True):
            out.copy_(pair)

    flops = 2 * size**3 / median_seconds(multiply, device, cap=bench.cap / 2)
    assert all(bool(out.isfinite().all()) for out in outs), "a matrix product was not computed"
    bandwidth = 4 * 2 * size**2 * dtype.itemsize / median_seconds(copy, device, cap=bench.cap / 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    bench.record(
        "ceiling", device=name, torch=torch.__version__, dtype=str(dtype), size=size,
        tflops=flops / 1e12, copy_tb_per_s=bandwidth / 1e12, us_per_launch=_micro(launch_seconds(device)),
    )  # fmt: skip
    return Ceiling(flops, bandwidth)


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6
