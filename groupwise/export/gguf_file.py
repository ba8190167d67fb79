"""GGUF files for llama.cpp, Ollama and the like: whole models and adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from groupwise.errors import ConfigError, ExportError
from groupwise.export.gguf_models import GgufModel
from groupwise.export.gguf_vocab import add_special_tokens, gguf_vocab
from groupwise.export.llama_quantize import K_QUANTS, find_llama_quantize, run_llama_quantize
from groupwise.export.loading import load_adapter_weights, load_base, load_merged
from groupwise.export.record import ExportRecord
from groupwise.export.source import ADAPTER_CONFIG, Source, read_object
from groupwise.export.writing import check_new_file, new_place


@dataclass(frozen=True, slots=True)
class GgufType:
    """A type of file.

    Attributes:
        matrices: what matrices are stored as; embedding and head of the 4 and 5 bit types are stored at 8 bits.
        file_type: llama.cpp's number for it.
    """

    matrices: gguf.GGMLQuantizationType
    file_type: gguf.LlamaFileType


_Q = gguf.GGMLQuantizationType
TYPES: Mapping[str, GgufType] = {
    "f32": GgufType(_Q.F32, gguf.LlamaFileType.ALL_F32),
    "f16": GgufType(_Q.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": GgufType(_Q.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": GgufType(_Q.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_0": GgufType(_Q.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_0": GgufType(_Q.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
TYPE_NAMES = (*TYPES, *K_QUANTS)
BLOCK = 32  # values that share a scale in the quantised types
LARGEST_F16 = 65504.0
_OUTER = ("token_embd.weight", "output.weight")
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def export_gguf(
    source: Source, out: str | Path, *, kind: str = "f16", pre: str | None = None, llama_quantize: str | None = None
) -> ExportRecord:
    """Write a whole model, an adapter merged into it, as one GGUF file with tokenizer and chat template.

    Args:
        kind: one of `TYPE_NAMES`.
        pre: llama.cpp's name for the tokenizer's splitting pattern, instead of the one that fits.
        llama_quantize: the program for q4_k_m and q5_k_m, instead of the one on the PATH.

    Raises:
        ConfigError: the model's kind, the tokenizer or the type cannot be written.
    """
    place = Path(out)
    check_new_file(place)
    quantizer = find_llama_quantize(kind, llama_quantize) if kind in K_QUANTS else None
    if quantizer is None and kind not in TYPES:
        raise ConfigError(f"--type {kind}: unknown; expected one of {', '.join(TYPE_NAMES)}")
    merged = load_merged(source)
    model = GgufModel.of(merged.model.config)
    weights = dict(_weights(merged.model, model))
    vocab = gguf_vocab(merged.tokenizer, size=int(weights["token_embd.weight"].shape[0]), pre=pre)
    plain = TYPES[kind] if quantizer is None else TYPES["f32" if merged.dtype == torch.float32 else "bf16"]
    record = ExportRecord.of(source, form="gguf", precision=kind, merge_difference=merged.difference)
    with new_place(place) as file:
        unquantised = file if quantizer is None else file.with_name("unquantised.gguf")
        writer = gguf.GGUFWriter(unquantised, model.arch_name)
        _add_general(writer, source, plain)
        model.add_parameters(writer)
        vocab.add_to(writer)
        add_special_tokens(writer, merged.tokenizer, _stop_ids(merged.model))
        _write(writer, weights, plain)
        if quantizer is not None:
            run_llama_quantize(quantizer, unquantised, file, kind=kind)
        record.write(place)
    return record


def export_gguf_adapter(source: Source, out: str | Path, *, kind: str = "f16") -> ExportRecord:
    """Write a LoRA adapter alone, for llama.cpp's `--lora` on top of its base's GGUF.

    Raises:
        ConfigError: the source is no adapter, or one that GGUF has no place for (DoRA, trained embeddings, …).
    """
    place = Path(out)
    check_new_file(place)
    if kind not in ("f32", "f16", "bf16"):
        raise ConfigError(f"--type {kind}: an adapter is written as f32, f16 or bf16")
    if not source.is_adapter:
        raise ConfigError(f"{source.folder}: --adapter needs an adapter, and this is a whole model")
    config = read_object(source.folder / ADAPTER_CONFIG)
    model = GgufModel.of(load_base(source).config)
    weights = _adapter_weights(source, model, config)
    record = ExportRecord.of(source, form="gguf-adapter", precision=kind)
    with new_place(place) as file:
        writer = gguf.GGUFWriter(file, model.arch_name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
        _write(writer, weights, TYPES[kind])
        record.write(place)
    return record


def _weights(module: torch.nn.Module, model: GgufModel) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's names and values; a head that is the embedding is left out, as llama.cpp expects."""
    state = module.state_dict()
    embedding = state.get("model.embed_tokens.weight")
    for name, tensor in state.items():
        if name == "lm_head.weight" and embedding is not None and tensor.data_ptr() == embedding.data_ptr():
            continue
        yield model.tensor_name(name), model.transform(name, tensor)
    yield from model.extra_tensors().items()


def _adapter_weights(source: Source, model: GgufModel, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`lora_a` is `[r, in]`, `lora_b` is `[out, r]`; the scale that llama.cpp does not compute is put into `lora_b`."""
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise ConfigError(
            f"{source.folder}: the adapter has more than LoRA's two matrices (DoRA, biases or whole modules), which a "
            "GGUF adapter has no place for; export it merged, without --adapter"
        )
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_adapter_weights(source).items():
        match = _LORA.fullmatch(name)
        if match is None:
            raise ConfigError(f"{source.folder}: the weight {name} has no place in a GGUF adapter; export it merged")
        weight = f"{match['module']}.weight"
        if match["side"] == "A":
            found[f"{model.tensor_name(weight)}.lora_a"] = tensor
        else:
            scaled = tensor.float() * _extra_scale(match["module"], tensor.shape[1], config)
            found[f"{model.tensor_name(weight)}.lora_b"] = model.transform(weight, scaled)
    return found


def _extra_scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """The adapter's scale for this module over alpha / rank, which is what llama.cpp takes."""
    alpha = float(config["lora_alpha"])
    own = next(
        (
            float(value)
            for pattern, value in (config.get("alpha_pattern") or {}).items()
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)
        ),
        alpha,
    )
    scale = own / math.sqrt(rank) if config.get("use_rslora") else own / rank
    return scale / (alpha / rank)


def _add_general(writer: gguf.GGUFWriter, source: Source, kind: GgufType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.run.resolve().name if source.run else source.folder.resolve().name)
    writer.add_file_type(kind.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _stop_ids(model: Any) -> tuple[int, ...]:
    declared = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    return tuple(declared) if isinstance(declared, list) else () if declared is None else (int(declared),)


def _stored_as(name: str, tensor: torch.Tensor, kind: GgufType) -> gguf.GGMLQuantizationType:
    """Vectors stay float32; so does what cannot be cut into blocks, at 16 bit."""
    if tensor.ndim < 2:
        return _Q.F32
    wanted = kind.matrices
    if wanted in (_Q.Q4_0, _Q.Q5_0) and name in _OUTER:
        wanted = _Q.Q8_0
    if wanted in (_Q.Q8_0, _Q.Q4_0, _Q.Q5_0) and tensor.shape[-1] % BLOCK:
        return _Q.F16
    return wanted


def _write(writer: gguf.GGUFWriter, weights: Mapping[str, torch.Tensor], kind: GgufType) -> None:
    """Head first, then one tensor after the other, so that only one is in memory twice."""
    stored = {name: _stored_as(name, tensor, kind) for name, tensor in weights.items()}
    try:
        for name, tensor in weights.items():
            count = math.prod(tensor.shape)
            block, size = gguf.GGML_QUANT_SIZES[stored[name]]
            plain = np.dtype(np.float16 if stored[name] == _Q.F16 else np.float32)
            raw = None if stored[name] in (_Q.F16, _Q.F32) else stored[name]
            writer.add_tensor_info(name, list(tensor.shape), plain, count // block * size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None, "it is open from the header on"
        [file] = writer.fout
        writer.write_padding(file, file.tell())
        for name, tensor in weights.items():
            values = _packed(name, tensor, stored[name])
            # The writer's own way, numpy's tofile, says nothing if a full disk cuts the end off.
            file.write(values.data)
            writer.write_padding(file, values.nbytes)
    finally:
        writer.close()


def _packed(name: str, tensor: torch.Tensor, stored: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if stored == _Q.F16 and (np.abs(values) > LARGEST_F16).any():
        raise ExportError(f"{name} has values over {LARGEST_F16:.0f}, which f16 cannot hold; use --type bf16 or f32")
    return gguf.quants.quantize(values, stored)
