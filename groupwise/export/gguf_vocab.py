"""A Hugging Face tokenizer in GGUF's terms, with the same token ids for every text, or a refusal.

llama.cpp splits text before BPE by one of a fixed list of patterns, called by name. Which one fits is found by trial:
the tokenizer is run with each pattern in place of its own over texts that tell them apart.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from groupwise.errors import ConfigError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What llama.cpp does under one name before it merges.

    Attributes:
        patterns: applied one after the other, each to the pieces of the one before.
        whole_words: a piece that is itself a token is not split (Llama 3's `ignore_merges`).
    """

    patterns: tuple[str, ...]
    whole_words: bool = False


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "qwen2": PreTokenizer((rf"{_LETTERS}\p{{N}}{_REST}",)),
    "llama-bpe": PreTokenizer((rf"{_LETTERS}\p{{N}}{{1,3}}{_REST}",), whole_words=True),
    "smaug-bpe": PreTokenizer((rf"{_LETTERS}\p{{N}}{{1,3}}{_REST}",)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
}
"""By the name in `tokenizer.ggml.pre`, in the order in which they are tried."""

TELLING_TEXTS = (
    "What is 12 + 30? It's 42, isn't it; we'll see, I'd say they've won.",
    "1234567890 and 3.14159, 10,000 or 1e-6; x2 = 4y, A1B22C333 ½²",
    "  two  spaces, a\ttab\t\tand   more   \n\n\nthree lines\r\nand one  \n  5  55 \n7",
    "'the' 'sleep 'RE I'M DON'T 'tis it's'",
    '<a href="x">def f(x):\n    return x**2  # ok?\n</a>!!! ...  ---\n\n',
    "Zürich, naïve café — “quotes” … Ελληνικά русский العربية हिन्दी 한국어 日本語の文字、漢字。",
    "👩‍👩‍👧 🙂🙂 ﬁ ² ª º µ\u00a0non-breaking\u3000wide\u200bzero",
    "camelCase snake_case SCREAMING MixedUP (parens)[brackets]{braces} foo.bar/baz\\qux\n(a)(b)\t(c)",
)
"""Contractions, numbers, white space, quotes, code, scripts and signs: where the patterns differ."""


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """Everything that a GGUF file holds of a tokenizer.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece's BPE).
        pre: llama.cpp's name for the splitting pattern; None for `llama`.
        scores: of `llama` alone: higher is merged first.
    """

    model: str
    pre: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    add_space_prefix: bool

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)


def gguf_vocab(tokenizer: Any, *, size: int, pre: str | None = None) -> GgufVocab:
    """The tokenizer's vocabulary, filled up with unused tokens to the `size` rows of the model's embedding.

    Args:
        pre: llama.cpp's name for the splitting pattern, instead of the one that fits.

    Raises:
        ConfigError: the tokenizer is of a kind that GGUF has no place for, or no pattern fits it.
    """
    raw: RawTokenizer = tokenizer.backend_tokenizer
    content = json.loads(raw.to_str())
    kind = content["model"].get("type")
    if kind != "BPE":
        raise ConfigError(f"the tokenizer's model is {kind}; expected BPE, the only one that is written as GGUF here")
    if len(tokenizer) > size:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, and the model's embedding only {size} rows")
    tokens, types = _tokens(tokenizer, content, size)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
    if content["model"].get("byte_fallback"):
        if pre is not None:
            raise ConfigError(f"--pre {pre} has no effect on a tokenizer of SentencePiece's kind; leave it out")
        scores = _scores(tokens, pairs)
        return GgufVocab("llama", None, tokens, types, (), scores, _adds_space(content))
    if "ByteLevel" not in json.dumps(content["decoder"]):
        raise ConfigError("the tokenizer is neither byte-level nor of SentencePiece's kind; GGUF has no place for it")
    merges = tuple(f"{left} {right}" for left, right in pairs)
    return GgufVocab("gpt2", fitting_pre(raw, pre), tokens, types, merges, (), False)


def add_special_tokens(writer: gguf.GGUFWriter, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
    """Which tokens begin, end and pad, and whether the first is put before every text.

    Args:
        stop_ids: the model's own end-of-sequence tokens; the tokenizer's comes first in a file.
    """
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stop_ids), None),
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
        "eot": next((token for token in stop_ids if token != tokenizer.eos_token_id), None),
    }
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
        "eot": writer.add_eot_token_id,
    }
    for name, token in ids.items():
        if token is not None:
            add[name](int(token))
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    start = full.index(plain[0])
    writer.add_add_bos_token(start > 0 and full[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(full) > start + len(plain))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def fitting_pre(raw: RawTokenizer, wanted: str | None = None) -> str:
    """The name of the pattern with which llama.cpp gives this tokenizer's ids for every one of `TELLING_TEXTS`.

    Raises:
        ConfigError: there is none; or `wanted` is unknown (but not if it does not fit: that was asked for).
    """
    if wanted is not None:
        if wanted not in PRE_TOKENIZERS:
            raise ConfigError(f"--pre {wanted}: unknown; expected one of {', '.join(PRE_TOKENIZERS)}")
        return wanted
    failures: list[str] = []
    for name, pre in PRE_TOKENIZERS.items():
        wrong = first_difference(raw, pre)
        if wrong is None:
            return name
        failures.append(f"  {name}: {wrong!r}")
    raise ConfigError(
        "llama.cpp would split text otherwise than this tokenizer, so the GGUF would get other tokens than the model "
        "was trained on; texts that differ, by llama.cpp's name for its pattern:\n"
        + "\n".join(failures)
        + "\nnone is exact; --pre NAME takes one all the same"
    )


def first_difference(raw: RawTokenizer, pre: PreTokenizer) -> str | None:
    """The first of `TELLING_TEXTS` that this pattern would give other ids, or None."""
    other = copy.deepcopy(raw)
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])  # type: ignore[assignment]
    model: Any = other.model
    model.ignore_merges = pre.whole_words
    for text in TELLING_TEXTS:
        ours = raw.encode(text, add_special_tokens=False).ids
        if ours != other.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _tokens(tokenizer: Any, content: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names = {token_id: name for name, token_id in tokenizer.get_vocab().items()}
    added = {item["id"]: bool(item["special"]) for item in content["added_tokens"]}
    fallback = bool(content["model"].get("byte_fallback"))
    unknown = content["model"].get("unk_token")
    tokens: list[str] = []
    types: list[int] = []
    for token_id in range(size):
        name = names.get(token_id)
        tokens.append(f"[UNUSED{token_id}]" if name is None else name)
        types.append(int(_type_of(name, token_id, added, fallback=fallback, unknown=unknown)))
    return tuple(tokens), tuple(types)


def _type_of(
    name: str | None, token_id: int, added: Mapping[int, bool], *, fallback: bool, unknown: str | None
) -> gguf.TokenType:
    if name is None:
        return gguf.TokenType.UNUSED
    if fallback and name == unknown:
        return gguf.TokenType.UNKNOWN
    if token_id in added:
        return gguf.TokenType.CONTROL if added[token_id] else gguf.TokenType.USER_DEFINED
    if fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _scores(tokens: tuple[str, ...], pairs: list[list[str]]) -> tuple[float, ...]:
    """Minus the rank of the first merge that makes a token, as SentencePiece scores the tokens of its BPE."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    return tuple(-float(ranks.get(token, len(pairs))) for token in tokens)


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before the text: by a normaliser that prepends, or by its pre-tokenizer."""
    normalizer, pre = json.dumps(content.get("normalizer")), content.get("pre_tokenizer") or {}
    return '"Prepend"' in normalizer or (pre.get("type") == "Metaspace" and pre.get("prepend_scheme") != "never")
