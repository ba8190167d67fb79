"""A GGUF file as llama.cpp reads it: the proof of what was written. Needs the package llama-cpp-python."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from groupwise.errors import ConfigError, ExportError

PRECISIONS = {
    gguf.LlamaFileType.ALL_F32: "float32",
    gguf.LlamaFileType.MOSTLY_F16: "float16",
    gguf.LlamaFileType.MOSTLY_BF16: "bfloat16",
    gguf.LlamaFileType.MOSTLY_Q8_0: "q8_0",
    gguf.LlamaFileType.MOSTLY_Q5_0: "q5_0",
    gguf.LlamaFileType.MOSTLY_Q4_0: "q4_0",
    gguf.LlamaFileType.MOSTLY_Q5_K_M: "q5_k_m",
    gguf.LlamaFileType.MOSTLY_Q4_K_M: "q4_k_m",
}


class GgufAnswers:
    """A file's greedy answers, with float32 keys and values, on the CPU.

    Args:
        base: of an adapter file: the model that it goes on top of.
        stop_ids: tokens that end an answer.
        context: the longest text, in tokens.

    Raises:
        ConfigError: the package is missing.
        ExportError: llama.cpp does not load the file.
    """

    def __init__(self, file: Path, *, base: str | Path | None, stop_ids: tuple[int, ...], context: int = 1024) -> None:
        if find_spec("llama_cpp") is None:
            raise ConfigError("a GGUF file is read back by llama.cpp; pip install llama-cpp-python (it is compiled)")
        if base is None and is_gguf_adapter(file):
            raise ConfigError(f"{file} is an adapter; name its base's GGUF file with --base-gguf FILE")
        self.precision = gguf_precision(file)
        library = import_module("llama_cpp")
        try:
            self._model: Any = library.Llama(
                model_path=str(file if base is None else base),
                lora_path=None if base is None else str(file),
                n_ctx=context,
                n_gpu_layers=0,
                logits_all=True,
                verbose=False,
                type_k=library.GGML_TYPE_F32,
                type_v=library.GGML_TYPE_F32,
            )
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ExportError(f"{file}: llama.cpp does not load it: {error}") from error
        self._stop_ids = stop_ids

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), add_bos=True, special=True)

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        self._model.reset()
        self._model.eval(prompt)
        answer: list[int] = []
        while len(answer) < max_tokens:
            answer.append(int(np.argmax(self._model.scores[self._model.n_tokens - 1])))
            if answer[-1] in self._stop_ids:
                break
            self._model.eval([answer[-1]])
        return answer

    def likeliest(self, tokens: list[int]) -> list[int]:
        """`[T]`: after each token, the likeliest next one."""
        self._model.reset()
        self._model.eval(tokens)
        return np.argmax(self._model.scores[: len(tokens)], axis=-1).tolist()


def is_gguf_adapter(file: Path) -> bool:
    return gguf_value(file, gguf.Keys.General.TYPE) == gguf.GGUFType.ADAPTER


def gguf_precision(file: Path) -> str:
    """The name under which `verify` knows the file's type; an adapter's own rounding counts as float16."""
    found = gguf_value(file, gguf.Keys.General.FILE_TYPE)
    return "float16" if found is None else PRECISIONS[gguf.LlamaFileType(int(found))]


def gguf_value(file: Path, key: str) -> Any:
    """One value of a file's head, or None.

    Raises:
        ConfigError: it is no GGUF file.
    """
    try:
        field = gguf.GGUFReader(file).get_field(key)
    except (ValueError, OSError, IndexError) as error:
        raise ConfigError(f"{file}: got no GGUF file ({error})") from error
    return None if field is None else field.contents()
