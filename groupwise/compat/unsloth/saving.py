"""Saving and pushing: the model in memory becomes a source for `groupwise.export`, under Unsloth's method names.

A program's own earlier save in the same place is replaced, another program's is moved aside; any other file there is
left alone, and refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from groupwise.compat.keeping import ASIDE, place_of
from groupwise.compat.unsloth.settings import SAVING, read_options
from groupwise.config.lora import OWN_BASE, own_base
from groupwise.errors import ConfigError
from groupwise.export.hf import Dtype, Form, export_hf
from groupwise.export.llama_quantize import K_QUANTS, find_llama_quantize
from groupwise.export.push import check_repo, plan_push, push, require_token
from groupwise.export.record import ExportRecord, record_file
from groupwise.export.source import Source, find_source, name_own_base
from groupwise.protocols import Tokenizer

IN_MEMORY = "the model that was in memory"
"""What the record of an export names as its source, which is no folder."""


class Savable(Protocol):
    """A model of transformers', or peft's around one."""

    def save_pretrained(self, save_directory: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Saved:
    """What is saved: the adapter where there is one, otherwise the whole model; and its tokenizer."""

    model: Savable
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class _Method:
    form: Form
    dtype: Dtype = "auto"


_METHODS: Mapping[str, _Method] = {
    "merged_16bit": _Method("full", "bfloat16"),
    "16bit": _Method("full", "bfloat16"),
    "merged_4bit": _Method("4bit"),
    "merged_4bit_forced": _Method("4bit"),
    "4bit": _Method("4bit"),
    "lora": _Method("adapter"),
}

_ALIASES = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}


def save_merged(saved: Saved, folder: str | Path, *, method: str, options: Mapping[str, Any]) -> Path:
    """Write a model folder, or with `lora` an adapter's.

    Args:
        method: `merged_16bit` is bfloat16, merged in float32; `merged_4bit` quantises that to nf4; `lora` is the
            adapter alone.

    Raises:
        ConfigError: no such method, something else is in the folder, or bitsandbytes is missing.
        ExportError: the merge changed the model's answers.
    """
    read_options("save_pretrained_merged", SAVING, options)
    wanted, out = _method(method), Path(folder)
    _check_replaceable(out)
    with _source(saved) as source, _beside(out) as new:
        _write_folder(source, new, method, wanted)
        if wanted.form == "adapter" and Path(source.base or "").resolve().is_relative_to(out.resolve()):
            shutil.copytree(source.base or "", new / OWN_BASE)  # it lies in what is replaced
        written = [file.name for file in new.iterdir()]
        if out.is_dir():
            earlier = [file.name for file in out.iterdir() if not _stays(file)]
            place_of(out).free([*earlier, *written])
            for file in list(out.iterdir()):
                os.replace(file, new / file.name)
            os.replace(out, new.with_name("before"))
        os.replace(new, out)
        if own_base(out):
            name_own_base(out, out)
    place_of(out).wrote(written)
    return out


def _stays(file: Path) -> bool:
    """GGUF files are saves of their own, and what was moved aside is none."""
    return ".gguf" in file.name or file.name.startswith(ASIDE)


def push_merged(saved: Saved, repo: str, *, method: str, options: Mapping[str, Any]) -> str:
    """As `save_merged`, in one commit to the Hub; returns the commit's address.

    Raises:
        ConfigError: there is no token (`token`, `HF_TOKEN` or `hf auth login`), or the name is no repository's.
    """
    asked, wanted = read_options("push_to_hub_merged", SAVING, options), _method(method)
    _check_pushable(repo, asked)
    with _source(saved) as source, tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        _write_folder(source, folder, method, wanted)
        return _push(folder, repo, asked)


def save_gguf(
    saved: Saved, folder: str | Path, *, methods: str | Sequence[str], options: Mapping[str, Any]
) -> list[Path]:
    """Write `folder/NAME.METHOD.gguf` for each method, NAME being the folder's.

    Args:
        methods: `f16`, `q8_0`, `q4_k_m`, …; Unsloth's `not_quantized`, `fast_quantized` and `quantized` are these.

    Raises:
        ConfigError: no such method, or it needs a program that is not there; nothing is written then.
    """
    read_options("save_pretrained_gguf", SAVING, options)
    kinds, out = _kinds(methods), Path(folder)
    files = {kind: out / f"{out.resolve().name}.{kind.upper()}.gguf" for kind in kinds}
    for file in files.values():
        if file.exists() and not record_file(file).is_file():
            raise ConfigError(f"{file} exists, and no export wrote it; give a new folder, or delete it")
    with _source(saved) as source:
        for kind, file in files.items():
            _write_gguf(source, file, kind)
    return list(files.values())


def push_gguf(saved: Saved, repo: str, *, methods: str | Sequence[str], options: Mapping[str, Any]) -> str:
    """As `save_gguf`, all files in one commit to the Hub; returns the commit's address."""
    asked, kinds = read_options("push_to_hub_gguf", SAVING, options), _kinds(methods)
    _check_pushable(repo, asked)
    with _source(saved) as source, tempfile.TemporaryDirectory() as place:
        for kind in kinds:
            _write_gguf(source, Path(place) / f"{repo.partition('/')[2]}.{kind.upper()}.gguf", kind)
        return _push(Path(place), repo, asked)


def _method(name: str) -> _Method:
    found = _METHODS.get(str(name).lower().replace(" ", "_"))
    if found is None:
        raise ConfigError(f"save_method = {name!r}: expected merged_16bit, merged_4bit or lora")
    return found


def _kinds(methods: str | Sequence[str]) -> list[str]:
    """Names of `groupwise.export.gguf_file`, each checked."""
    if find_spec("gguf") is None:
        raise ConfigError("GGUF files need the package gguf; pip install 'groupwise[gguf]'")
    from groupwise.export.gguf_file import TYPE_NAMES

    asked = [methods] if isinstance(methods, str) or not isinstance(methods, Sequence) else methods
    kinds = list(dict.fromkeys(_ALIASES.get(name, name) for name in (str(each).lower() for each in asked)))
    if not kinds:
        raise ConfigError("quantization_method = []: expected one or several, such as q8_0")
    for kind in kinds:
        if kind not in TYPE_NAMES:
            expected = ", ".join((*TYPE_NAMES, *_ALIASES))
            raise ConfigError(f"quantization_method = {kind!r}: expected one or several of {expected}")
        if kind in K_QUANTS:
            try:
                find_llama_quantize(kind)
            except ConfigError as error:
                raise ConfigError(f"quantization_method = {kind!r}: {error}") from error
    return kinds


def _write_folder(source: Source, folder: Path, name: str, method: _Method) -> None:
    if method.form == "adapter" and not source.is_adapter:
        raise ConfigError(f"save_method = {name!r}: the model has no adapter; call get_peft_model, or save it whole")
    try:
        record = export_hf(source, folder, form=method.form, dtype=method.dtype)
    except ConfigError as error:
        raise ConfigError(f"save_method = {name!r}: {error}") from error
    _record(record, folder)


def _write_gguf(source: Source, file: Path, kind: str) -> None:
    from groupwise.export.gguf_file import export_gguf

    place, names = place_of(file.parent), (file.name, record_file(file).name)
    place.free(names)
    _record(export_gguf(source, file, kind=kind), file)
    place.wrote(names)


def _record(record: ExportRecord, exported: Path) -> None:
    """The source was a folder for a moment; the record must not name it."""
    replace(record, source=IN_MEMORY).write(exported)


@contextmanager
def _source(saved: Saved) -> Iterator[Source]:
    """The model in a folder that lasts as long as the export."""
    with tempfile.TemporaryDirectory(prefix="groupwise-") as folder:
        saved.model.save_pretrained(folder)
        saved.tokenizer.save_pretrained(folder)
        yield find_source(folder)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder's path on the same disk."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        yield Path(place) / "new"


def _check_replaceable(out: Path) -> None:
    """Raises ConfigError where something else than an earlier save, or GGUF files, would be lost."""
    if out.is_dir() and all(_stays(file) for file in out.iterdir()):
        return
    if out.exists() and not (out.is_dir() and record_file(out).is_file()):
        raise ConfigError(f"{out} exists, and no export wrote it; give a new folder, or delete it")


def _check_pushable(repo: str, asked: Mapping[str, Any]) -> None:
    """Before a model is merged for nothing."""
    check_repo(repo)
    require_token(asked["token"])


def _push(folder: Path, repo: str, asked: Mapping[str, Any]) -> str:
    plan = plan_push(folder, repo, private=bool(asked["private"]))
    return push(plan, message=asked["commit_message"], token=asked["token"])
