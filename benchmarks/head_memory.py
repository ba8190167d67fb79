"""Peak memory of the loss: forward and backward from hidden states to log-probs, chunked and in one piece.

    python benchmarks/head_memory.py                           # 4k to 32k tokens; about 15 minutes on one CPU core
    python benchmarks/head_memory.py --device cuda --dtype bfloat16

Each measurement is a process of its own. What counts is the peak after weights and hidden states are there: on a CPU
of the resident set, on a GPU of what torch allocated. It holds the weights' gradient, which any loss needs. The loss in
one piece is `cross_entropy` over all logits, as `transformers` computes it. It is measured at `--plain-tokens`; beyond,
only its logits and their gradient are counted: 2 x tokens x vocabulary x 4 bytes. Seconds are of processor time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Work:
    """One measurement.

    Attributes:
        chunk_tokens: rows whose logits exist at one time; 0 computes all of them at once with `cross_entropy`.
        threads: of torch; 0 is torch's own choice.
    """

    tokens: int
    vocabulary: int
    hidden: int
    dtype: str
    device: str
    chunk_tokens: int
    threads: int


def measure(work: Work) -> dict[str, Any]:
    """Peak bytes of one pass above what was there before it, and its seconds of processor time."""
    import torch
    from gpu.shapes import ModelShape, build_model

    from groupwise.model.loading import resolve_device, resolve_dtype

    if work.threads:
        torch.set_num_threads(work.threads)
    device = resolve_device(work.device)
    dtype = resolve_dtype(work.dtype, device)
    shape = ModelShape(work.hidden, layers=1, heads=2, kv_heads=1, head_dim=32, mlp=64, vocab=work.vocabulary)
    head = build_model(shape, device, dtype)
    torch.manual_seed(1)
    hidden = torch.randn(work.tokens, work.hidden, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(work.vocabulary, (work.tokens,), device=device)
    before = _peak(device)
    started = time.process_time()
    loss = _loss(head, hidden, targets, work.chunk_tokens)
    loss.backward()
    value = loss.item()
    seconds = time.process_time() - started
    assert hidden.grad is not None, "the backward pass did not reach the hidden states"
    assert bool(hidden.grad.isfinite().all()), "a gradient is not finite"
    return {"peak_bytes": _peak(device) - before, "seconds": seconds, "loss": value}


def _loss(loaded: Any, hidden: Any, targets: Any, chunk_tokens: int) -> Any:
    from torch.nn.functional import cross_entropy

    from groupwise.model.forward.head import token_scores

    if chunk_tokens:
        return -token_scores(loaded.head, hidden, targets, chunk_tokens=chunk_tokens).logprobs.mean()
    return cross_entropy(loaded.model.get_output_embeddings()(hidden).float(), targets)


def _peak(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's figure counts the parent's memory from before this program was loaded
        (peak,) = (row.split()[1] for row in status.read_text("utf-8").splitlines() if row.startswith("VmHWM:"))
        return int(peak) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def in_fresh_process(work: Work) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(asdict(work))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{work} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return {**asdict(work), **json.loads(ended.stdout.splitlines()[-1])}


def logits_bytes(work: Work) -> int:
    """All logits and their gradient, which the loss in one piece cannot do without; float32 in a model of any type."""
    return 2 * work.tokens * work.vocabulary * 4


def line(result: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    work = Work(**{name: result[name] for name in Work.__dataclass_fields__})
    kind = f"chunks of {work.chunk_tokens:,}" if work.chunk_tokens else "one piece"
    analytic = logits_bytes(work) / GIB
    return f"| {work.tokens:,} | {kind} | {result['peak_bytes'] / GIB:.2f} | {analytic:.2f} | {result['seconds']:.0f} |"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16_384, 32_768])
    parser.add_argument("--plain-tokens", type=int, nargs="*", default=[4096], help="sizes of the loss in one piece")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 is torch's own choice")
    parser.add_argument("--json", type=Path, help="append each result to this file, one JSON object a line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.child:
        print(json.dumps(measure(Work(**json.loads(args.child)))))
        return
    sizes = [(tokens, 0) for tokens in args.plain_tokens] + [(tokens, args.chunk_tokens) for tokens in args.tokens]
    print("| tokens | loss | peak, GiB | logits and gradient in one piece, GiB | seconds |\n|---|---|---|---|---|")
    for tokens, chunk in sizes:
        work = Work(tokens, args.vocabulary, args.hidden, args.dtype, args.device, chunk, args.threads)
        result = in_fresh_process(work)
        print(line(result), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
