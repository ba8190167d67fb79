"""`groupwise model tiny`."""

from __future__ import annotations

import argparse

from groupwise.cli.models import quiet_loading
from groupwise.cli.parsing import Command, Parser, whole_number


def _arguments(parser: Parser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the model")
    parser.add_argument(
        "--tokenizer-from", required=True, metavar="FILE", help="the tokenizer is trained on this file's texts"
    )
    parser.add_argument("--size", default="5.8m", metavar="NAME", help="a named shape (default 5.8m)")
    parser.add_argument("--vocab-size", type=whole_number(1), metavar="N", help="default: the shape's own")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of the weights (default 0)")


def _tiny(args: argparse.Namespace) -> None:
    from groupwise.quickstart.tiny_model import build_tiny_model, read_texts, tiny_size

    tiny_size(args.size)
    quiet_loading()
    texts = read_texts(args.tokenizer_from)
    path = build_tiny_model(args.out, texts=texts, size=args.size, vocab_size=args.vocab_size, seed=args.seed)
    print(f"wrote a {args.size} Qwen3 with fresh weights to {path}")


TINY = Command(
    name="model tiny",
    summary="make a tiny untrained model with a tokenizer of its own",
    add_arguments=_arguments,
    run=_tiny,
)
