"""Tiny Qwen3 models with a tokenizer of their own, made from text alone: real Hugging Face folders, no download.

`build_tokenizer` trains a byte-level BPE; `build_tiny_model` writes a folder that transformers loads as it is.
torch and transformers load inside the functions, so that importing this module stays cheap.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from groupwise.errors import ConfigError, DataError, nearest
from groupwise.files import use_umask, writing
from groupwise.texts import encodable

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RawTokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3Config

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIAL_TOKENS = (PAD, TURN_START, TURN_END)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Digits stand alone, as in Qwen's tokenizer, because arithmetic on multi-digit tokens cannot be learned digit by digit;
# the rest is split as GPT-2 does. llama.cpp knows these two steps, so an exported model gets the same tokens there.
_STEPS = (r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

_TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, slots=True)
class TinySize:
    """The shape of a tiny Qwen3; embeddings are tied, so the vocabulary is counted once.

    Attributes:
        initializer_range: standard deviation of the weights at the start; narrow models learn slowly from the 0.02
            that suits wide ones.

    Example:
        TinySize(256, 6, heads=4, kv_heads=2, head_dim=64, mlp=768, vocab_size=4096, initializer_range=0.04)
    """

    hidden: int
    layers: int
    _: KW_ONLY
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab_size: int
    initializer_range: float

    def parameters(self, vocab_size: int) -> int:
        """How many numbers a model of this shape holds with this vocabulary."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        norms = 2 * self.hidden + 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.mlp + norms
        return self.layers * layer + vocab_size * self.hidden + self.hidden


TINY_SIZES: dict[str, TinySize] = {
    "0.1m": TinySize(64, 2, heads=2, kv_heads=1, head_dim=32, mlp=192, vocab_size=512, initializer_range=0.08),
    "0.6m": TinySize(128, 2, heads=4, kv_heads=2, head_dim=32, mlp=512, vocab_size=512, initializer_range=0.06),
    "1.5m": TinySize(192, 4, heads=6, kv_heads=2, head_dim=32, mlp=448, vocab_size=1024, initializer_range=0.05),
    "5.8m": TinySize(256, 6, heads=4, kv_heads=2, head_dim=64, mlp=768, vocab_size=4096, initializer_range=0.04),
}


def build_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, *, chat_template: str = CHATML_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts in the same order give the same tokenizer.

    All 256 bytes are in the vocabulary, so any text survives encode and decode. Digits are split singly. The tokens
    `<|im_start|>`, `<|im_end|>` (end of sequence) and `<|endoftext|>` (padding) are special.

    Args:
        vocab_size: most entries, special tokens included; texts with little variety give fewer.
        chat_template: Jinja source; the default is ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n`.

    Raises:
        ConfigError: the vocabulary cannot hold the 256 bytes and the special tokens.
        DataError: there is no text to learn from.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    raw: RawTokenizer = Tokenizer(models.BPE())
    splits: list[Any] = [pre_tokenizers.Split(Regex(step), "isolated") for step in _STEPS]
    to_bytes: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _NonEmpty(texts)
    raw.train_from_iterator(counted, trainer)
    if not counted.count:
        raise DataError("no text to train the tokenizer on: got none or only empty strings; give at least one text")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=TURN_END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


class _NonEmpty:
    """The texts that hold something, counted as they pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if text:
                self.count += 1
                yield text


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"vocab_size = {vocab_size} is too small: the 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"{SMALLEST_VOCAB}; use {SMALLEST_VOCAB} or more"
        )


def check_new_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; give a new folder, or delete this one")


def tiny_size(name: str) -> TinySize:
    """The named shape.

    Raises:
        ConfigError: no such name; names the nearest.
    """
    size = TINY_SIZES.get(name)
    if size is None:
        hint = nearest(name, TINY_SIZES, "; did you mean {!r}?")
        raise ConfigError(f"unknown tiny model size {name!r}; expected one of {', '.join(TINY_SIZES)}{hint}")
    return size


def read_texts(path: str | Path) -> list[str]:
    """All strings of a file, however deep they lie in its rows: what `--tokenizer-from` trains on.

    Args:
        path: `.txt` or `.md` (one text), or any data file that `groupwise.data` reads (JSONL, JSON, Parquet, CSV, …).

    Raises:
        DataError: the file is missing, unreadable or empty, or holds no text.
    """
    from groupwise.data.files import read_rows

    path = Path(path)
    if path.suffix.lower() in _TEXT_SUFFIXES:
        texts = [_read_plain(path)]
    else:
        texts = [text for row in read_rows(path) for text in strings_in(row.values)]
    texts = [encodable(text) for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path} holds no text; give a file with texts to train the tokenizer on")
    return texts


def _read_plain(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"no file {path}; give a text, JSONL or Parquet file to train the tokenizer on")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line} is not UTF-8 ({error.reason}); save the file as UTF-8") from error


def strings_in(value: Any) -> Iterator[str]:
    """Every string in nested dicts, lists and tuples, in order; keys are not texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings_in(inner)


def build_tiny_model(
    out_dir: str | Path,
    *,
    texts: Iterable[str],
    size: str = "5.8m",
    vocab_size: int | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Write a Hugging Face folder with a fresh Qwen3 and the tokenizer trained on `texts`.

    The folder appears whole or not at all. The weights are a function of `size`, `vocab_size`, `seed` and `dtype`
    alone; the caller's random state is left as it was. The embedding has exactly `vocab_size` rows, as the size's
    name says, also when the texts give a smaller tokenizer (published Qwen3 models have unused rows, too).

    Args:
        out_dir: must not exist, or be an empty folder.
        vocab_size: none is the size's own.

    Returns:
        `out_dir`.

    Raises:
        ConfigError: unknown size, a vocabulary that is too small, or a folder that holds something.
        DataError: there is no text.
        FileError: it cannot be written; nothing is left of it.
    """
    out = Path(out_dir)
    shape = tiny_size(size)
    vocab_size = shape.vocab_size if vocab_size is None else vocab_size
    check_vocab_size(vocab_size)
    check_new_folder(out)
    tokenizer = build_tokenizer(texts, vocab_size)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            _save_model(temp, shape, vocab_size=vocab_size, tokenizer=tokenizer, seed=seed, dtype=dtype)
            tokenizer.save_pretrained(temp)
            use_umask(temp)
            temp.chmod(0o755)  # mkdtemp's 0700 would lock out whoever else may read the parent folder
            os.replace(temp, out)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return out


def _save_model(
    folder: Path,
    shape: TinySize,
    *,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    dtype: Literal["float32", "bfloat16"],
) -> None:
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM

    config = _qwen3_config(shape, vocab_size=vocab_size, tokenizer=tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    expected = shape.parameters(vocab_size)
    actual = sum(parameter.numel() for parameter in model.parameters())
    assert actual == expected, f"the model has {actual} parameters, its shape says {expected}"
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])  # type: ignore[arg-type]
    model.save_pretrained(folder)


def _qwen3_config(shape: TinySize, *, vocab_size: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    from transformers import Qwen3Config

    ids = tokenizer.get_vocab()
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids[TURN_END],
        pad_token_id=ids[PAD],
    )
