"""What one GPU can do, and how much of it Groupwise uses, part by part within a given time.

    python benchmarks/gpu --json gpu.jsonl --seconds 600                     # all parts, each a process of its own
    python benchmarks/gpu model --model-shape 8b --samples 64 --json gpu.jsonl
    python benchmarks/gpu model --batch-invariant                            # and what that option costs
    python benchmarks/gpu model --model-shape tiny --samples 8 --tokens 16 --device cpu
    python benchmarks/gpu vllm --site FOLDER                                 # vLLM at the same lengths

It needs the core dependencies alone. Weights are random and made in memory, so nothing is downloaded. The final norm is
scaled until a token's distribution has about 1 nat of entropy, as a trained model's has: near-uniform ones would hide a
mismatch. Each result is printed and appended to the file as it comes, so that a run that is cut keeps what it had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.shapes import SHAPES


def _shape_arguments(parser: argparse.ArgumentParser) -> None:
    """What is decoded, whoever does it."""
    parser.add_argument("--model-shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[64, 256], help="decoded together; the last are trained on"
    )
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of every completion")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--lora-rank", type=int, default=0, help="train an adapter of this rank, not the weights")
    parser.add_argument("--matmul-size", type=int, help="default: 8192 on a GPU, 512 on a CPU")
    parser.add_argument("--decode-only", action="store_true", help="leave training and mismatch out")
    parser.add_argument("--eager", action="store_true", help="decode without CUDA graphs as well")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="measure a second time with model.batch_invariant, on a GPU"
    )
    parser.add_argument("--cap", type=float, default=120.0, help="seconds after which a section starts nothing more")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu", description=(__doc__ or "").split("\n")[0])
    given = argparse.ArgumentParser(add_help=False)
    given.add_argument("--json", type=Path, help="append each result to this file, one JSON object a line")
    parts = parser.add_subparsers(dest="part", metavar="PART")
    everything = parts.add_parser("all", parents=[given], help="all parts in turn; what no PART means")
    everything.add_argument("--seconds", type=float, default=600.0, help="for all of it")
    everything.add_argument("--only", nargs="+", metavar="NAME", help="some of the parts, by name")
    everything.add_argument("--rehearse", action="store_true", help="the same at tiny sizes on a CPU")
    everything.add_argument("--site", type=Path, help="folder with vLLM's packages; without it vLLM is left out")
    model = parts.add_parser("model", parents=[given], help="ceilings, decoding, mismatch, training")
    _shape_arguments(model)
    _model_arguments(model)
    vllm = parts.add_parser("vllm", parents=[given], help="vLLM's tokens per second at the same lengths")
    _shape_arguments(vllm)
    vllm.add_argument("--site", type=Path, required=True, help="folder that is put before Python's path")
    vllm.add_argument("--memory", type=float, default=0.5, help="share of the GPU's memory that vLLM may take")
    vllm.add_argument("--wait-for", type=Path, help="time nothing before this file is there: a start takes a minute")
    learning = parts.add_parser("learning", parents=[given], help="the quick start's curve, killed once and resumed")
    learning.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    learning.add_argument("--steps", type=int, default=50, help="of GRPO")
    learning.add_argument("--warm-up-steps", type=int, default=320)
    learning.add_argument("--batch-invariant", action="store_true", help="with model.batch_invariant")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "all")
    args = make_parser().parse_args(arguments)
    if args.part == "all":
        from gpu.driver import run
    elif args.part == "model":
        from gpu.model import run
    elif args.part == "vllm":
        from gpu.vllm_side import run
    else:
        from gpu.learning import run
    run(args)


if __name__ == "__main__":
    main()
