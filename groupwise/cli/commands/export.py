"""`groupwise export …`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from groupwise.cli.models import quiet_loading
from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, whole_number
from groupwise.cli.sources import open_source, recorded_source
from groupwise.errors import ConfigError

if TYPE_CHECKING:
    from groupwise.export.record import ExportRecord

_GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "q5_k_m", "q4_k_m")


def _add_source(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a run, RUN@STEP, a model folder or an adapter folder")
    parser.add_argument("--base", metavar="PATH", help="an adapter's base model, instead of the one it names")


def _hf_arguments(parser: Parser) -> None:
    _add_source(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--form",
        choices=("full", "4bit", "adapter"),
        default="full",
        help="full merges an adapter into its base (default); 4bit is nf4, by bitsandbytes; adapter is it alone",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of full; auto is the source's, or its base's (default)",
    )


def _hf(args: argparse.Namespace) -> None:
    from groupwise.export.hf import export_hf
    from groupwise.export.writing import check_new_folder

    check_new_folder(Path(args.out))
    quiet_loading()
    with open_source(args.source, base=args.base) as source:
        record = export_hf(source, args.out, form=args.form, dtype=args.dtype)
    _say(record, args.out)


def _gguf_arguments(parser: Parser) -> None:
    _add_source(parser)
    parser.add_argument("--out", required=True, metavar="FILE.gguf", help="a new file")
    parser.add_argument("--type", choices=_GGUF_TYPES, default="f16", help="of the weights (default f16)")
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, for use on its base's GGUF")
    parser.add_argument("--pre", metavar="NAME", help="llama.cpp's name for the tokenizer's pattern; found by itself")
    parser.add_argument("--llama-quantize", metavar="FILE", help="the program for q4_k_m and q5_k_m")


def _gguf(args: argparse.Namespace) -> None:
    _need_gguf()
    from groupwise.export.gguf_file import export_gguf, export_gguf_adapter
    from groupwise.export.writing import check_new_file

    for flag, value in (("--pre", args.pre), ("--llama-quantize", args.llama_quantize)):
        if args.adapter and value is not None:
            raise ConfigError(f"{flag} has no effect with --adapter; leave it out")
    check_new_file(Path(args.out))
    quiet_loading()
    with open_source(args.source, base=args.base) as source:
        if args.adapter:
            record = export_gguf_adapter(source, args.out, kind=args.type)
        else:
            record = export_gguf(source, args.out, kind=args.type, pre=args.pre, llama_quantize=args.llama_quantize)
    _say(record, args.out)


def _modelfile_arguments(parser: Parser) -> None:
    parser.add_argument("gguf", metavar="FILE.gguf", help="what `groupwise export gguf` wrote")
    parser.add_argument("--out", metavar="FILE", help="default: Modelfile beside the GGUF file")
    parser.add_argument("--base-gguf", metavar="FILE", help="if FILE.gguf is an adapter: its base's GGUF file")
    parser.add_argument("--source", metavar="PATH", help="where the tokenizer is; default: what was exported")


def _modelfile(args: argparse.Namespace) -> None:
    from groupwise.export.loading import load_tokenizer, stop_texts
    from groupwise.export.modelfile import write_modelfile
    from groupwise.export.writing import check_new_file

    quiet_loading()
    file = Path(args.gguf)
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; expected a GGUF file, as `groupwise export gguf` writes it")
    out = Path(args.out) if args.out else file.with_name("Modelfile")
    check_new_file(out)
    with open_source(args.source) if args.source else recorded_source(file) as source:
        tokenizer = load_tokenizer(source)
        stops = stop_texts(source, tokenizer)
    write_modelfile(out, gguf_file=file, tokenizer=tokenizer, stops=stops, base_gguf=args.base_gguf)
    print(f"wrote {out}; `ollama create NAME -f {shlex.quote(str(out))}` makes a model of it")


def _card_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, or RUN@STEP")
    parser.add_argument("--out", metavar="FILE.md", help="default: README.md in the run's `final`")


def _card(args: argparse.Namespace) -> None:
    from groupwise.export.card import CARD_FILE, write_card
    from groupwise.export.writing import check_new_file

    if args.out:
        check_new_file(Path(args.out))
    with open_source(args.run) as source:
        if source.step is not None and not args.out:
            raise ConfigError(f"{source.name} is a checkpoint, which holds no card; name a file with --out FILE.md")
        out = Path(args.out) if args.out else source.folder / CARD_FILE
        write_card(source, out)
    print(f"wrote {out}")


def _push_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="an exported folder, or a run's `final`")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is missing")
    parser.add_argument("--private", action="store_true", help="only for you; public without it")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent; needs no token")
    parser.add_argument("--endpoint", metavar="URL", help="another Hub (default: HF_ENDPOINT, or huggingface.co)")


def _push(args: argparse.Namespace) -> None:
    from groupwise.config.model_name import named_checkpoint
    from groupwise.export.push import plan_push, push

    if checkpoint := named_checkpoint(args.folder):
        raise ConfigError(
            f"{args.folder}: got a checkpoint; push a model folder: "
            f"`groupwise export hf {shlex.quote(checkpoint.name)} --out DIR`"
        )
    plan = plan_push(args.folder, args.repo, private=args.private, endpoint=args.endpoint)
    say(plan.describe())
    if args.dry_run:
        print("nothing was sent (--dry-run)")
        return
    print(f"pushed: {push(plan)}")


def _verify_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder or GGUF file that `groupwise export` wrote")
    parser.add_argument("--source", metavar="PATH", help="what to compare with; default: what was exported")
    parser.add_argument("--base", metavar="PATH", help="the source's base model, if it is an adapter")
    parser.add_argument("--base-gguf", metavar="FILE", help="if PATH is an adapter's GGUF: its base's GGUF file")
    parser.add_argument("--max-tokens", type=whole_number(1), default=32, metavar="N", help="of an answer (default 32)")


def _verify(args: argparse.Namespace) -> None:
    from groupwise.export.verify import verify

    quiet_loading()
    if args.base is not None and args.source is None:
        raise ConfigError("--base has no effect without --source; leave it out")
    path = Path(args.path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; expected what `groupwise export` wrote")
    with open_source(args.source, base=args.base) if args.source else recorded_source(path) as source:
        verdict = verify(path, source=source, base_gguf=args.base_gguf, max_tokens=args.max_tokens)
    say(verdict.describe())


def _need_gguf() -> None:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ConfigError("GGUF files need the package gguf; pip install 'groupwise[gguf]'")


def _say(record: ExportRecord, out: str) -> None:
    print(f"wrote {out} ({record.precision})")
    if record.merge_difference is not None:
        print(f"merging the adapter changed the logits by {record.merge_difference:.1e} of the largest")
    print(f"`groupwise export verify {shlex.quote(str(out))}` compares its answers with the source's")


HF = Command("export hf", "a Hugging Face folder: full, merged, 4 bit, or the adapter", _hf_arguments, _hf)
GGUF = Command("export gguf", "a GGUF file for llama.cpp, Ollama and the like", _gguf_arguments, _gguf)
MODELFILE = Command("export modelfile", "an Ollama Modelfile for a GGUF file", _modelfile_arguments, _modelfile)
CARD = Command("export card", "a model card from a run directory", _card_arguments, _card)
PUSH = Command("export push", "a folder to the Hugging Face Hub", _push_arguments, _push)
VERIFY = Command("export verify", "compare what was exported with its source", _verify_arguments, _verify)
COMMANDS = (HF, GGUF, MODELFILE, CARD, PUSH, VERIFY)
