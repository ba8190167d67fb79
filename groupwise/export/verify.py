"""Reload what was written, and compare its greedy answers with the source's, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from groupwise.errors import ConfigError, ExportError
from groupwise.export.loading import load_tokenizer, load_whole
from groupwise.export.modelfile import rendered
from groupwise.export.record import read_record
from groupwise.export.source import MODEL_CONFIG, Source, find_source, read_object

LEAST_AGREEMENT: Mapping[str, float] = {
    "float32": 1.0,
    "float16": 0.99,
    "bfloat16": 0.97,
    "q8_0": 0.95,
    "q5_0": 0.85,
    "q5_k_m": 0.85,
    "q4_0": 0.75,
    "q4_k_m": 0.75,
    "nf4": 0.75,
}
"""Share of the source's greedy tokens that are the export's likeliest tokens too, after the same text before them.

A file that is not the model agrees on hardly any; how much rounding costs depends on the model."""

PROMPTS = (
    "What is 12 + 30?",
    "Tom has 3 apples and buys 17 more. How many apples has he?",
    "Name three colours.",
    "Explain why the sky is blue, in one sentence.",
    "Write a Python function that reverses a list.",
    "Was ist die Hauptstadt von Österreich?",
    "Où est la bibliothèque ?",
    "日本の首都はどこですか。",
    "Сколько будет 2 + 2?",
    "ما هي عاصمة مصر؟",
    "Translate 'good morning' to Spanish.",
    "List the first 10 prime numbers:\n2, 3, 5,",
    'Complete the JSON: {"name": "Ada", "born": 1815, "fields": [',
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "It's late, isn't it? We'd better go; they've left.",
    "def fib(n):\n    if n < 2:\n        return n\n",
    "A\tB\tC\n1\t2\t3\n\n  indented\n",
    "🙂🙃 What do these faces mean?",
    "SHOUTING and whispering, CamelCase and snake_case",
    "Once upon a time",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a comparison.

    Attributes:
        same: prompts that were answered with the same tokens.
        agreement: see `LEAST_AGREEMENT`.
        least: what the export's precision asks for.
        misread: prompts that the export's own tokenizer gives other tokens.
    """

    precision: str
    prompts: int
    same: int
    agreement: float
    least: float
    misread: int

    @property
    def passed(self) -> bool:
        return self.agreement >= self.least and not self.misread

    def describe(self) -> str:
        read = f"; {self.misread} prompts were tokenized otherwise" if self.misread else ""
        return (
            f"{self.precision}: {self.same} of {self.prompts} greedy answers are the same; {self.agreement:.2%} of the "
            f"source's tokens are the export's choice too (at least {self.least:.0%} wanted){read}"
        )


def verify(
    path: str | Path, *, source: Source | None = None, base_gguf: str | Path | None = None, max_tokens: int = 32
) -> Verdict:
    """Compare an export with the model that it came from.

    Args:
        path: a model folder, an adapter folder, or a GGUF file.
        source: what to compare with; None is what the export's record names.
        base_gguf: of a GGUF adapter: the file that it goes on top of.
        max_tokens: of each answer.

    Raises:
        ConfigError: there is nothing to compare, or nothing that could read it.
        ExportError: it differs more than its precision explains.
    """
    exported = Path(path)
    if not exported.exists():
        raise ConfigError(f"{exported}: no such file or folder; expected what `groupwise export` wrote")
    source = source or read_record(exported).find_source()
    tokenizer = load_tokenizer(source)
    texts = [_rendered(prompt, tokenizer) for prompt in PROMPTS]
    prompts = [tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template) for text in texts]
    expected = _HfAnswers(source, tokenizer)
    answers = [expected.greedy(prompt, max_tokens) for prompt in prompts]
    if exported.is_dir():
        found = _read_folder(exported)
    else:
        context = max(map(len, prompts)) + max_tokens
        found = _read_gguf(exported, base_gguf, stop_ids=expected.stop_ids, context=context)
    misread = sum(found.tokenize(text) != tokenizer.encode(text) for text in texts)
    verdict = _compare(found, prompts, answers, misread=misread)
    if not verdict.passed:
        raise ExportError(f"{exported} is not the model that it came from; {verdict.describe()}")
    return verdict


class _Answers(Protocol):
    """A model that was reloaded."""

    precision: str

    def tokenize(self, text: str) -> list[int]: ...

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]: ...

    def likeliest(self, tokens: list[int]) -> list[int]:
        """`[T]`: after each token, the likeliest next one."""
        ...


def _compare(found: _Answers, prompts: Sequence[list[int]], answers: Sequence[list[int]], *, misread: int) -> Verdict:
    same, agreed, total = 0, 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        likeliest = found.likeliest(prompt + answer)[len(prompt) - 1 : -1]
        agreed += sum(ours == theirs for ours, theirs in zip(answer, likeliest, strict=True))
        total += len(answer)
        same += found.greedy(prompt, len(answer)) == answer
    return Verdict(found.precision, len(prompts), same, agreed / total, LEAST_AGREEMENT[found.precision], misread)


class _HfAnswers:
    """A folder's model in float32, or at 4 bit if it is stored so."""

    def __init__(self, source: Source, tokenizer: Any, precision: str = "float32") -> None:
        self.precision = precision
        self._tokenizer = tokenizer
        self._model: Any = load_whole(source)
        declared = self._model.generation_config.eos_token_id
        self.stop_ids: tuple[int, ...] = (
            tuple(declared) if isinstance(declared, list) else () if declared is None else (declared,)
        )

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    @torch.inference_mode()
    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """A loop of its own: `generate` would take the model's generation config into account, penalties and all."""
        answer: list[int] = []
        ids, past = torch.tensor([prompt], device=self._model.device), None
        while len(answer) < max_tokens:
            output = self._model(input_ids=ids, past_key_values=past, use_cache=True)
            answer.append(int(output.logits[0, -1].argmax()))
            if answer[-1] in self.stop_ids:
                break
            ids, past = torch.tensor([answer[-1:]], device=self._model.device), output.past_key_values
        return answer

    @torch.inference_mode()
    def likeliest(self, tokens: list[int]) -> list[int]:
        ids = torch.tensor([tokens], device=self._model.device)
        return self._model(input_ids=ids).logits[0].argmax(-1).tolist()


def _read_folder(folder: Path) -> _Answers:
    source = find_source(folder)
    return _HfAnswers(source, load_tokenizer(source), _folder_precision(folder))


def _read_gguf(file: Path, base: str | Path | None, *, stop_ids: tuple[int, ...], context: int) -> _Answers:
    if find_spec("gguf") is None:
        raise ConfigError("GGUF files need the package gguf; pip install 'groupwise[gguf]'")
    from groupwise.export.llama_cpp import GgufAnswers

    return GgufAnswers(file, base=base, stop_ids=stop_ids, context=context)


def _rendered(prompt: str, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return rendered(tokenizer, message, opening=True)


def _folder_precision(folder: Path) -> str:
    config = read_object(folder / MODEL_CONFIG)
    if not config:
        return "float32"  # an adapter, on top of the same base
    if "quantization_config" in config:
        return "nf4"
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
