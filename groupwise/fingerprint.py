"""Fingerprints of what decides a run's result and is no setting: data, model, rewards, versions, machine.

A fact is a short text by name, such as `model config.json` -> `3f9a…`. Files up to 256 MiB and weights in memory up to
1 GiB are hashed whole. Of a larger file that is its size, its first and last MiB and 64 KiB out of every 4 MiB; of a
larger model, 65,536 numbers of each tensor: another model is found with certainty, a few numbers that were changed in
place may not be.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from groupwise import __version__
from groupwise.config import Config
from groupwise.config.lora import read_adapter_file
from groupwise.config.model_name import settled_model

if TYPE_CHECKING:
    from torch import nn

    from groupwise.batches import TrainingRow
    from groupwise.protocols import Tokenizer
    from groupwise.types import Prompt

WHOLE_FILE = 256 << 20
WHOLE_MODEL = 1 << 30
_EDGE, _BLOCK, _STRIDE = 1 << 20, 64 << 10, 4 << 20
_SAMPLED_NUMBERS = 65_536
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "peft", "bitsandbytes")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_TOKENIZER_FILES = ("*token*.json", "*.model", "vocab*", "merges*", "chat_template*", "*.jinja")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")


@runtime_checkable
class _HasBytes(Protocol):
    """An array or an image."""

    def tobytes(self) -> bytes: ...


def prompt_facts(prompts: Sequence[Prompt], *, num_rows: int) -> dict[str, str]:
    """The prompts as the model gets them, and every column that rewards see."""
    facts = {
        "data rows": f"{num_rows} rows, {len(prompts)} prompts",
        "data prompts": _digest(prompt.text for prompt in prompts),
        "data tokens": _digest(prompt.token_ids for prompt in prompts),
        "data order": _digest(prompt.uid for prompt in prompts),
        "data sources": _digest(prompt.data_source for prompt in prompts),
    }
    for name in sorted({name for prompt in prompts for name in prompt.columns}):
        facts[f"data column {name}"] = _digest(
            [prompt.columns[name]] if name in prompt.columns else [] for prompt in prompts
        )
    return facts


def supervised_facts(rows: Sequence[TrainingRow], *, num_rows: int) -> dict[str, str]:
    """The worked answers, in their order, as tokens; `num_rows` were read."""
    return {
        "data rows": f"{num_rows} rows, {len(rows)} used",
        "data tokens": _digest((row.prompt_ids, row.token_ids) for row in rows),
        "data learned tokens": _digest([bool(value) for value in row.loss_mask] for row in rows),
    }


def model_facts(
    config: Config, tokenizer: Tokenizer, given: nn.Module | None = None, *, compared: bool
) -> dict[str, str]:
    """The base model and the tokenizer.

    Args:
        given: a model in memory, which stands for the folder's files. Weights of it that a checkpoint replaces decide
            nothing and are left out.
        compared: its first weights are needed to the end, as a reference.
    """
    facts = {"chat template": _short(_plain_text(tokenizer.chat_template).encode("utf-8", "surrogatepass"))}
    if given is None:
        return facts | _folder_facts(config.model.path)
    return facts | {
        "model config": _short(_plain_text(_without_paths(given.config.to_dict())).encode()),  # pyright: ignore
        "model weights": _weights_in_memory(given, adapter=config.lora.rank > 0, compared=compared),
        "tokenizer": tokenizer_digest(tokenizer),
    }


def teacher_facts(config: Config) -> dict[str, str]:
    """The model that is distilled from, if there is one."""
    path = config.algorithm.teacher.path
    if path is None:
        return {}
    return {f"teacher {name}": value for name, value in _folder_facts(settled_model(path)).items()}


def code_facts(config: Config, functions: Iterable[Callable[..., Any]] = ()) -> dict[str, str]:
    """The code of rewards and of the environment: of one in a file or a module the whole file, of a function given by a
    program its source."""
    facts: dict[str, str] = {}
    for number, reward in enumerate(config.reward):
        place, found, _ = reward.name.strip().rpartition(":")
        file = _code_file(place) if found else None
        if file is not None:
            facts[f"reward {number} code"] = file_digest(file)
    place, found, _ = (config.environment.name or "").strip().rpartition(":")
    if found and (file := _code_file(place)) is not None:
        facts["environment code"] = file_digest(file)
    for number, function in enumerate(functions):
        facts[f"reward function {number}"] = _function_digest(function)
    return facts


def machine_facts(device: str, dtype: str) -> dict[str, str]:
    """What computes: packages, threads, the processor's kind."""
    import torch

    facts = {"python": ".".join(platform.python_version_tuple()[:2]), "groupwise": __version__}
    facts |= {name: _version(name) for name in _PACKAGES}
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else _processor()
    return facts | {"threads": str(torch.get_num_threads()), "device": f"{kind}, {name}", "dtype": dtype}


def value_digest(value: Any) -> str:
    """Of any value that a setting or a column may have."""
    return _digest([value])


def file_digest(path: Path) -> str:
    """Of a file's content; a large file is sampled, see above."""
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE:
            while block := file.read(_STRIDE):
                digest.update(block)
            return digest.hexdigest()
        digest.update(size.to_bytes(8, "little"))
        for start in (0, size - _EDGE):
            file.seek(start)
            digest.update(file.read(_EDGE))
        for start in range(0, size, _STRIDE):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _folder_facts(path: str) -> dict[str, str]:
    folder = Path(path)
    if not folder.is_dir():
        return {"model revision": _hub_revision(path)}
    facts: dict[str, str] = {}
    for file in (folder / "config.json", folder / "generation_config.json", folder / "adapter_config.json"):
        if file.is_file():
            facts[f"model {file.name}"] = file_digest(file)
    tokenizer_files = _matching(folder, _TOKENIZER_FILES)
    facts |= {f"tokenizer {file.name}": file_digest(file) for file in tokenizer_files}
    weights = [file for file in _matching(folder, _WEIGHT_FILES) if file not in tokenizer_files]
    facts["model weights"] = _digest((file.name, file_digest(file)) for file in weights)
    if code := _matching(folder, ("*.py",)):
        facts["model code"] = _digest((file.name, file_digest(file)) for file in code)
    adapter = read_adapter_file(folder)
    if adapter is not None and Path(adapter.base) != folder:
        facts |= {f"base {name}": value for name, value in _folder_facts(adapter.base).items()}
    return facts


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _hub_revision(name: str) -> str:
    """The commit in the Hub's cache; its tokenizer is there, for the data's sake."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer_config.json")
    except HFValidationError:
        return "unknown"
    return Path(found).parent.name if isinstance(found, str) else "unknown"


def weights_digest(module: nn.Module) -> str:
    """Of the weights that are not trained."""
    return _weights_in_memory(module, adapter=False, compared=False)


def _weights_in_memory(module: nn.Module, *, adapter: bool, compared: bool) -> str:
    import torch

    named = {name: p for name, p in module.named_parameters() if "lora_" not in name}
    adapter = adapter or len(named) < sum(1 for _ in module.named_parameters())
    chosen = {name: p for name, p in named.items() if adapter or compared or not p.requires_grad}
    whole = sum(p.nbytes for p in chosen.values()) <= WHOLE_MODEL
    digest = hashlib.blake2b(digest_size=16)
    for name, p in sorted(chosen.items()):
        # Wrapped for an adapter or not, a layer's weight has one name.
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{plain} {p.dtype} {tuple(p.shape)}\n".encode())
        flat = p.detach().reshape(-1)
        if not whole:
            flat = flat[:: max(1, flat.numel() // _SAMPLED_NUMBERS)]
        digest.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return f"{len(named)} tensors, {digest.hexdigest()}"


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of all that decides its tokens."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        return _digest([{**content, "padding": None, "truncation": None}, tokenizer.special_tokens_map])
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return _digest([tokenizer.get_vocab(), tokenizer.special_tokens_map])
    return "unknown"


def _without_paths(content: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config, less what loading writes into it."""
    left_out = ("_name_or_path", "transformers_version", "_attn_implementation", "use_cache")
    return {name: value for name, value in content.items() if name not in left_out}


def _code_file(place: str) -> Path | None:
    if place.endswith(".py") or "/" in place or "\\" in place:
        file = Path(place).expanduser()
    else:
        spec = importlib.util.find_spec(place)
        file = Path(spec.origin) if spec is not None and spec.origin else None
    return file if file is not None and file.is_file() else None


def _function_digest(function: Callable[..., Any]) -> str:
    target: Any = inspect.unwrap(function)
    if not (inspect.isroutine(target) or inspect.isclass(target)):
        target = type(target)
    try:
        return _short(inspect.getsource(target).encode("utf-8", "surrogatepass"))
    except (OSError, TypeError):  # typed into a shell, or compiled
        return "unknown"


def _processor() -> str:
    """Its kind and the instructions that kernels are chosen by."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    wide = sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "sve", "bf16", "asimd")))
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_digest(wide)[:8]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(_plain_text(value).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _short(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _plain_text(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=_plain)
    except (TypeError, ValueError):  # keys of several types, or a value that contains itself
        return _ADDRESS.sub("", repr(value))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return {"bytes": _short(bytes(value))}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(_plain_text, value))
    if isinstance(value, _HasBytes):
        return {"bytes": _short(value.tobytes()), "type": type(value).__qualname__}
    if isinstance(value, Iterable) and isinstance(value, Sequence):
        return list(value)
    return _ADDRESS.sub("", repr(value))
