"""The weights that a contract server serves: Hugging Face modules in float32, loaded, spoiled and adapted as asked.

Each server has its own. A tied output head is kept as a copy of its own, as engines pack it, and refreshed after each
load; forgetting that is one of the traps.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

from groupwise.engines.vllm_worker.groupwise_vllm_worker import verified
from groupwise.weight_sync.folder import MANIFEST
from tests.engines.contract.traps import Traps

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class LoadFailed(Exception):
    """Weights or an adapter cannot be loaded, or only in part."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as peft saves it: what is added to each weight, `[out, in]`, by the weight's name."""

    path: str
    added: Mapping[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """What came of a load, as the server says it."""

    tensors: int
    bytes: int


def read_folder(folder: Path, *, version: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a folder by name; compared with its manifest where it has one and the version is known.

    Raises:
        LoadFailed: there are no weights, or they are not those of the manifest.
    """
    try:
        if version is not None and (folder / MANIFEST).exists():
            return verified(folder, version)
        files = sorted(folder.glob("*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except Exception as error:  # whatever a reader raises, the server answers it
        raise LoadFailed(f"{type(error).__name__}: {error}") from error
    if not tensors:
        raise LoadFailed(f"no safetensors in {folder}")
    return tensors


class ServedModel:
    """One model and its adapters.

    Args:
        folder: config.json and safetensors, with a tokenizer or without.
        dtype: that it computes in.
    """

    def __init__(self, folder: str | Path, traps: Traps, *, dtype: str = "float32") -> None:
        self.folder = Path(folder)
        self._dtype: torch.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self.traps = traps
        self._live = _module(self.folder, self._dtype)
        self._tied = bool(self._live.config.get_text_config().tie_word_embeddings)
        if self._tied:
            _unpack_head(self._live)
        self._decoding: nn.Module | None = None
        self._adapters: dict[str, Adapter] = {}
        self._merged: dict[str, nn.Module] = {}
        self.tokenizer = _tokenizer(self.folder)
        self.vocab_size: int = self._live.config.get_text_config().vocab_size
        self.eos = _eos(self._live)

    # Weights

    def load_folder(self, folder: str | Path, *, version: int | None = None) -> Loaded:
        """Load the weights of a folder; adapters stay, on the new weights.

        Raises:
            LoadFailed: before anything is touched, or half-way where a trap says so.
        """
        return self.load(read_folder(Path(folder), version=version))

    def load(self, tensors: Mapping[str, Tensor], *, packs: bool = True) -> Loaded:
        """Copy tensors, by their Hugging Face names, into the model; see `load_folder`.

        Args:
            packs: whether a tied head gets its copy of the new embeddings.
        """
        targets = dict(self._live.named_parameters()) | dict(self._live.named_buffers())
        tensors = self._together(tensors)
        if unknown := sorted(set(tensors) - set(targets)):
            raise LoadFailed(f"the model has no {unknown[0]}")
        for name, tensor in tensors.items():
            if tensor.shape != targets[name].shape:
                raise LoadFailed(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(targets[name].shape)}")
        done = Loaded(len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        if "no_effect" in self.traps:
            return done
        self._decoding = copy.deepcopy(self._live) if "stale_decode" in self.traps else None
        self._merged.clear()
        names = sorted(tensors)
        wanted = names[: len(names) // 2] if "half_load" in self.traps else names
        left_out = self._left_out(names)
        with torch.no_grad():
            for name in wanted:
                if name != left_out:
                    targets[name].copy_(tensors[name])
        if "half_load" in self.traps:
            raise LoadFailed(f"could not load {names[len(names) // 2]}: CUDA error: an illegal memory access")
        if self._tied and packs and "stale_head" not in self.traps:
            _unpack_head(self._live)
        return done

    def _together(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Experts are saved one by one, and held together: as transformers puts them."""
        if not any(re.search(r"\.experts\.\d+\.", name) for name in tensors):
            return tensors
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self.folder / "config.json", folder)
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder, "model.safetensors")
            )
            fused = _module(Path(folder), self._dtype)
        return dict(fused.named_parameters()) | dict(fused.named_buffers())

    def _left_out(self, names: list[str]) -> str | None:
        if "missing_tensor" not in self.traps:
            return None
        if named := self.traps.text("missing_tensor"):
            assert named in names, f"missing_tensor={named}: not among {names}"
            return named
        inside = [name for name in names if ".layers." in name]
        if not inside:
            return None
        last = max(inside, key=lambda name: int(name.split(".layers.")[1].split(".")[0]))
        layer = last.split(".layers.")[0] + ".layers." + last.split(".layers.")[1].split(".")[0] + "."
        sizes = {name: tensor.numel() for name, tensor in self._live.named_parameters()}
        return max((name for name in names if name.startswith(layer)), key=lambda name: (sizes[name], name))

    # Adapters

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter folder as peft writes it, to be asked for by `name`.

        Raises:
            LoadFailed: there is none, or it does not fit the model.
        """
        shapes = {name: tensor.shape for name, tensor in self._live.named_parameters()}
        self._adapters[name] = _read_adapter(Path(path), shapes)
        self._merged.pop(name, None)

    def remove_adapter(self, name: str) -> None:
        del self._adapters[name]
        self._merged.pop(name, None)

    @property
    def adapters(self) -> dict[str, Adapter]:
        return dict(self._adapters)

    # Forward

    def scores(self, ids: list[int], adapter: str | None = None) -> Tensor:
        """Log-probs of each token after the first, at temperature 1, `[T - 1]`; no cache is read."""
        with torch.inference_mode():
            logits = self._module(adapter)(torch.tensor([ids])).logits[0].float()
        logprobs = torch.log_softmax(logits[:-1], -1)
        return logprobs.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1).clone()

    def routes(self, ids: list[int], adapter: str | None = None) -> list[Any]:
        """The experts of each token, `[tokens][layers][k]`; zeros in a layer without any, as engines have them."""
        model, seen = self._module(adapter), dict[int, Tensor]()
        routers = [
            (int(name.split(".layers.")[1].split(".")[0]), module)
            for name, module in model.named_modules()
            if type(module).__name__.lower().endswith("topkrouter")
        ]
        hooks = [
            router.register_forward_hook(lambda _, __, out, layer=layer: seen.__setitem__(layer, out[-1]))
            for layer, router in routers
        ]
        try:
            with torch.inference_mode():
                model(torch.tensor([ids]))
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            return []
        none = torch.zeros_like(next(iter(seen.values())))
        depth = self._live.config.get_text_config().num_hidden_layers
        return torch.stack([seen.get(layer, none) for layer in range(depth)], 1).tolist()

    def next_logits(self, ids: list[int], cache: DynamicCache, adapter: str | None = None) -> Tensor:
        """Logits of the token after `ids`, `[V]`; those that `cache` holds are not computed again."""
        if adapter is None:
            module = self._decoding or self._live
        else:
            module = self._module(self._before(adapter) if "stale_decode" in self.traps else adapter)
        with torch.inference_mode():
            fresh = torch.tensor([ids[cache.get_seq_length() :]])
            return module(fresh, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()

    def _before(self, adapter: str) -> str | None:
        """The adapter that was loaded before this one."""
        names = list(self._adapters)
        at = names.index(adapter)
        return names[at - 1] if at else None

    def _module(self, adapter: str | None) -> nn.Module:
        if adapter is None or "unbound_adapter" in self.traps:
            return self._live
        if adapter not in self._merged:
            self._merged[adapter] = _with_adapter(self._live, self._adapters[adapter])
        return self._merged[adapter]


def _module(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    # A copy has its memory aligned, as later copies have: what a file is mapped to is not, and gives other last bits.
    return copy.deepcopy(model).eval().requires_grad_(False)


def _unpack_head(model: Any) -> None:
    """Give the head a copy of the embeddings, as an engine that packs it does."""
    model.get_output_embeddings().weight = nn.Parameter(
        model.get_input_embeddings().weight.detach().clone(), requires_grad=False
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    return AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None


def _eos(model: Any) -> tuple[int, ...]:
    """The ids that end an answer: the config's first, then the generation config's."""
    found: list[int] = []
    for config in (model.config.get_text_config(), model.generation_config):
        ids = config.eos_token_id
        found += [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys(found))


def _read_adapter(folder: Path, shapes: Mapping[str, torch.Size]) -> Adapter:
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        tensors = load_file(folder / "adapter_model.safetensors")
        rank, alpha = config["r"], config["lora_alpha"]
    except Exception as error:
        raise LoadFailed(f"No adapter found for {folder}: {type(error).__name__}: {error}") from error
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    added = {}
    for name in (name for name in tensors if name.endswith(".lora_A.weight")):
        stem = name.removesuffix(".lora_A.weight")
        weight = stem.removeprefix("base_model.model.") + ".weight"
        change = scale * (tensors[stem + ".lora_B.weight"].float() @ tensors[name].float())
        if shapes.get(weight) != change.shape:
            raise LoadFailed(
                f"{weight} of the adapter has shape {tuple(change.shape)}; the model: {shapes.get(weight)}"
            )
        added[weight] = change
    if len(tensors) != 2 * len(added) or not added:
        raise LoadFailed(f"{folder} holds tensors that are no LoRA weights")
    return Adapter(str(folder), added)


def _with_adapter(base: Any, adapter: Adapter) -> nn.Module:
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    for name, change in adapter.added.items():
        parameters[name] += change
    return model
