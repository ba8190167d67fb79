"""The architectures that can be written as GGUF: their hyper-parameters in llama.cpp's names, and how weights differ.

Names and meanings are those of the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch

from groupwise.errors import ConfigError

ARCHITECTURES: Mapping[str, gguf.MODEL_ARCH] = {
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
GEMMA_PERIOD = 6  # llama.cpp takes every sixth layer of a Gemma 3 for one with full attention
GEMMA_27B_LAYERS = 62  # by which llama.cpp knows the one size that scales attention by another width
_ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """One model's architecture.

    Attributes:
        config: the text model's Hugging Face config, as plain values.

    Example:
        GgufModel.of(model.config).tensor_name("model.layers.0.mlp.up_proj.weight") == "blk.0.ffn_up.weight"
    """

    config: Mapping[str, Any]
    arch: gguf.MODEL_ARCH
    names: gguf.TensorNameMap

    @classmethod
    def of(cls, config: Any) -> GgufModel:
        """The architecture of a Hugging Face config.

        Raises:
            ConfigError: it is none that can be written, or has a part that llama.cpp would compute otherwise.
        """
        text: Mapping[str, Any] = config.get_text_config().to_dict()
        kind = text["model_type"]
        arch = ARCHITECTURES.get(kind)
        if arch is None:
            raise ConfigError(
                f"models of type {kind!r} cannot be written as GGUF here; expected one of "
                f"{', '.join(ARCHITECTURES)}; llama.cpp's convert_hf_to_gguf.py knows more"
            )
        problem = _problem(text)
        if problem:
            raise ConfigError(f"this {kind} {problem}, which its GGUF architecture has no place for")
        return cls(text, arch, gguf.get_tensor_name_map(arch, text["num_hidden_layers"]))

    @property
    def arch_name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    def tensor_name(self, name: str) -> str:
        """llama.cpp's name for a tensor of the Hugging Face model."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"the weight {name} has no place in a GGUF of the architecture {self.arch_name}")
        return found

    def transform(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The values as llama.cpp wants them."""
        rotated = _ROTATED.search(name)
        if self.arch == gguf.MODEL_ARCH.LLAMA and rotated:
            heads = self.config["num_attention_heads"] if rotated[1] == "q" else self.config["num_key_value_heads"]
            return interleave(tensor, heads)
        if self.arch == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            return tensor.float() + 1  # Gemma multiplies by 1 + w, llama.cpp by w
        return tensor

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that are no weights: what the frequencies of Llama 3's rotation are divided by."""
        rope = self._rope()
        if rope.get("rope_type") != "llama3":
            return {}
        return {"rope_freqs.weight": llama3_divisors(rope, self.head_dim)}

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        config = self.config
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        self._add_rope(writer)
        if self.arch == gguf.MODEL_ARCH.GEMMA3:
            writer.add_sliding_window(config["sliding_window"])
            writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))

    def _rope(self) -> Mapping[str, Any]:
        """Of the layers with full attention."""
        rope = self.config["rope_parameters"]
        return rope.get("full_attention", rope)

    def _add_rope(self, writer: gguf.GGUFWriter) -> None:
        rope = self._rope()
        kind = rope.get("rope_type", "default")
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        elif kind == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(rope["factor"]))
            length = rope.get("original_max_position_embeddings") or self.config["max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(int(length))


def _problem(config: Mapping[str, Any]) -> str:
    rope = config["rope_parameters"]
    kinds = {part.get("rope_type", "default") for part in (rope.get("full_attention", rope),)}
    sliding = [kind == "sliding_attention" for kind in config.get("layer_types") or ()]
    if unknown := kinds - {"default", "linear", "yarn", "llama3"}:
        return f"scales its rotation by {unknown.pop()!r}"
    if config["model_type"] != "gemma3_text":
        return "has sliding attention" if any(sliding) else ""
    if sliding != [(layer + 1) % GEMMA_PERIOD != 0 for layer in range(len(sliding))]:
        return f"has full attention in other layers than every {GEMMA_PERIOD}th"
    if config.get("final_logit_softcapping") or config.get("attn_logit_softcapping"):
        return "caps its logits"
    scale = config["head_dim"]
    if config["num_hidden_layers"] == GEMMA_27B_LAYERS:
        scale = config["hidden_size"] // config["num_attention_heads"]
    if config["query_pre_attn_scalar"] != scale:
        return f"scales attention by {config['query_pre_attn_scalar']} and not by {scale}"
    return ""


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Llama's query and key projections in the order of llama.cpp's rotation.

    Hugging Face turns element i of a head with i + d/2, llama.cpp element 2i with 2i + 1.
    """
    rows = tensor.shape[0]
    halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """`[head_dim / 2]`, 1 for short wavelengths, `factor` for long ones, and a smooth step between.

    The rule of Llama 3.1's reference code: https://github.com/meta-llama/llama-models.
    """
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(rope["original_max_position_embeddings"])
    found: list[float] = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (pair / head_dim)
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32)
