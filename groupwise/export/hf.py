"""Hugging Face folders: the whole model at 16 bit or as it is, at 4 bit, or the adapter alone."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from groupwise.config.lora import OWN_BASE, own_base
from groupwise.errors import ConfigError, ExportError
from groupwise.export.card import CARD_FILE, write_card
from groupwise.export.loading import Merged, load_merged, load_tokenizer
from groupwise.export.record import ExportRecord
from groupwise.export.source import Source, name_own_base, read_object
from groupwise.export.writing import check_new_folder, new_place
from groupwise.files import write_json_atomic

Form = Literal["full", "4bit", "adapter"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def export_hf(source: Source, out: str | Path, *, form: Form = "full", dtype: Dtype = "auto") -> ExportRecord:
    """Write a folder that transformers (or peft) loads. It appears whole or not at all.

    Args:
        form: `full` merges an adapter into its base; `4bit` does too, and quantises to nf4 (QLoRA,
            https://arxiv.org/abs/2305.14314, section 3); `adapter` is the adapter alone.
        dtype: of the weights of `full`; `auto` is what the source (an adapter's base) has.

    Raises:
        ConfigError: `out` holds something, or the form does not fit the source.
        ExportError: the merge changed the model's answers, or this machine cannot quantise.
    """
    place = Path(out)
    check_new_folder(place)
    _check_form(source, form, dtype)
    with new_place(place) as folder:
        folder.mkdir()
        if form == "adapter":
            record = _copy_adapter(source, folder, home=place)
        else:
            merged = load_merged(source)
            record = _save_full(source, merged, folder, dtype=dtype)
            if form == "4bit":
                record = _quantise(source, folder)
        if source.run is not None:
            write_card(source, folder / CARD_FILE)
        record.write(folder)
    return record


def _check_form(source: Source, form: Form, dtype: Dtype) -> None:
    if form == "adapter" and not source.is_adapter:
        raise ConfigError(f"{source.folder}: --form adapter needs an adapter, and this is a whole model; use full")
    if form != "full" and dtype != "auto":
        raise ConfigError(f"--dtype {dtype} has no effect on --form {form}; leave it out")
    if form == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("--form 4bit needs the package bitsandbytes; pip install bitsandbytes")


def _save_full(source: Source, merged: Merged, folder: Path, *, dtype: Dtype) -> ExportRecord:
    wanted = merged.dtype if dtype == "auto" else _DTYPES[dtype]
    model: Any = merged.model
    model.to(wanted).save_pretrained(folder)
    merged.tokenizer.save_pretrained(folder)
    name = str(wanted).removeprefix("torch.")
    return ExportRecord.of(source, form="full", precision=name, merge_difference=merged.difference)


def _quantise(source: Source, folder: Path) -> ExportRecord:
    """Replace the whole weights in `folder` by nf4 ones."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        model.save_pretrained(folder)
    # Which of these it is depends on what is missing: the package, its kernels, or a device that they know.
    except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:
        raise ExportError(
            f"bitsandbytes cannot quantise on this machine: {error}; use one with a CUDA GPU, or --form full"
        ) from error
    return ExportRecord.of(source, form="4bit", precision="nf4")


def _copy_adapter(source: Source, folder: Path, *, home: Path) -> ExportRecord:
    for name in ADAPTER_FILES:
        if not (source.folder / name).is_file():
            raise ConfigError(f"{source.folder} has no {name}; expected an adapter that peft wrote")
    shutil.copyfile(source.folder / ADAPTER_FILES[1], folder / ADAPTER_FILES[1])
    config = {**read_object(source.folder / ADAPTER_FILES[0]), "base_model_name_or_path": source.base}
    write_json_atomic(folder / ADAPTER_FILES[0], config)
    load_tokenizer(source).save_pretrained(folder)
    if source.base == own_base(source.folder):  # nowhere else
        shutil.copytree(source.folder / OWN_BASE, folder / OWN_BASE)
        name_own_base(folder, home)
    return ExportRecord.of(source, form="adapter", precision="as trained")
