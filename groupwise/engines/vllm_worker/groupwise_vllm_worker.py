"""What Groupwise adds to each worker of vLLM: `--worker-extension-cls groupwise_vllm_worker.GroupwiseWorker`.

One file of a name that nothing else has, which imports nothing of Groupwise: it runs in vLLM's environment. Seen with
vLLM 0.32 on a CPU; the calls that it makes are those of 0.33, too, where they were read and not run.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

FORMAT = 1


class GroupwiseWorker:
    """Mixed into vLLM's worker, whose `model_runner` has the model.

    Methods answer with data, because an exception in a worker ends the whole engine.
    """

    model_runner: Any

    def groupwise_load(self, path: str, version: int) -> dict[str, Any]:
        """Take the weights of a Hugging Face folder, once every byte is what its manifest says.

        Returns:
            `tensors`, `bytes` and `seconds`; or `error`, and `touched`: whether the model may have changed.
        """
        started = time.perf_counter()
        try:
            found = verified(Path(path), version)
        except Exception as error:  # noqa: BLE001 - see above
            return {"error": f"{type(error).__name__}: {error}", "touched": False}
        try:
            self.model_runner.reload_weights(weights_iterator=iter(found.items()))
            _pack_tied_head(self.model_runner.get_model())
        except Exception as error:  # noqa: BLE001
            return {"error": f"{type(error).__name__}: {error}", "touched": True}
        size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        return {"tensors": len(found), "bytes": size, "seconds": time.perf_counter() - started}


def _pack_tied_head(model: Any) -> None:
    """A head that shares the embedding's weights has a packed copy of them on a CPU, which a reload does not renew:
    greedy answers change, and log-probs are off by up to 0.74 nat."""
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if method is not None and model.config.get_text_config().tie_word_embeddings:
        method.process_weights_after_loading(head)


def verified(folder: Path, version: int) -> dict[str, Tensor]:
    """Every tensor of the folder.

    Raises:
        ValueError: it is not what the manifest says.
    """
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if (manifest["format"], manifest["version"]) != (FORMAT, version):
        raise ValueError(
            f"{folder} has version {manifest['version']!r} in format {manifest['format']!r}; expected {version} in "
            f"{FORMAT}"
        )
    expected: dict[str, dict[str, Any]] = manifest["tensors"]
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    if found.keys() != expected.keys():
        raise ValueError(f"{folder} is torn: {sorted(found.keys() ^ expected.keys())[:3]} are missing or too many")
    for name, tensor in found.items():
        content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        fact = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "digest": hashlib.blake2b(content, digest_size=16).hexdigest(),
        }
        if fact != expected[name]:
            raise ValueError(f"{folder} is torn: {name} is {fact}, and its manifest says {expected[name]}")
    return found
