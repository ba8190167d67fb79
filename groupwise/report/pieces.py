"""What each token of an answer reads as, by the tokenizer that a run directory keeps or names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_KEPT_IN = ("final", "base")


class Pieces:
    """Texts of tokens. Without a tokenizer, which a run that names a model of the Hub does not keep until it saves one,
    tokens are numbers.

    Attributes:
        source: the file; None without one.
    """

    def __init__(self, run: Path) -> None:
        self.source = next((file for file in _places(run) if file.is_file()), None)
        self._tokenizer: Any = None
        if self.source is not None:
            self._tokenizer = _load(self.source)

    def of(self, token_ids: Sequence[int]) -> list[str] | None:
        """`[T]` texts, which together are the answer's: a character of several tokens is its last one's, and what has
        no end is left out. None without a tokenizer."""
        if self._tokenizer is None:
            return None
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        texts: list[str] = []
        for token in token_ids:
            text: str | None = "\N{REPLACEMENT CHARACTER}"
            if self._tokenizer.id_to_token(token) is not None:
                try:
                    text = stream.step(self._tokenizer, token)
                except Exception:  # noqa: BLE001 - the library raises `Exception` itself, where a prefix is no text
                    stream = DecodeStream(skip_special_tokens=False)
            texts.append(text or "")
        return texts


def _places(run: Path) -> list[Path]:
    checkpoints = sorted((run / "checkpoints").glob("step_*/"), reverse=True) if run.is_dir() else []
    folders = [run / name for name in _KEPT_IN] + [folder / name for folder in checkpoints for name in ("", "model")]
    try:
        named = json.loads((run / "config.json").read_bytes())["model"]["path"]
        folders.append(Path(named))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return [folder / "tokenizer.json" for folder in folders]


def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001 - the library raises `Exception` itself for a damaged file
        return None
