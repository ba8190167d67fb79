"""What is in a data file, before a run is spent on it: bad rows, lengths, sources, duplicates, a prompt cap to use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from groupwise.config.data import DataConfig
from groupwise.data.chat import check_template
from groupwise.data.files import Source, SourceRow, read_rows
from groupwise.data.prompts import make_prompt
from groupwise.data.rows import (
    RowProblem,
    check_settings,
    data_source_of,
    prompt_key,
    prompt_problem,
    prompt_value,
    with_context,
)
from groupwise.errors import DataError
from groupwise.protocols import Tokenizer

_SHOWN_PROBLEMS = 5
_CAP_STEP = 64


@dataclass(frozen=True, slots=True)
class Lengths:
    """Quantiles by nearest rank: each is the length of a real prompt."""

    p50: int
    p90: int
    p95: int
    p99: int
    max: int


@dataclass(frozen=True, slots=True)
class DataStats:
    """What one source holds.

    Attributes:
        num_bad: rows that give no prompt; `problems` has the first of them.
        unit: what `lengths` counts: tokens of the rendered prompt, or characters of its messages without a tokenizer.
        lengths: None when no row is good.
        data_sources: good rows per data_source.
        num_duplicates: good rows whose prompt an earlier row had already.
        advised_max_prompt_tokens: the smallest multiple of 64 that keeps at least 99 % of the good rows.
        num_dropped: good rows that `max_prompt_tokens` leaves out; None without a tokenizer, as is the advice.

    Example:
        data_stats("train.jsonl", DataConfig(), tokenizer).advised_max_prompt_tokens
    """

    num_rows: int
    num_bad: int
    problems: tuple[RowProblem, ...]
    unit: Literal["tokens", "characters"]
    lengths: Lengths | None
    data_sources: Mapping[str, int]
    num_duplicates: int
    max_prompt_tokens: int
    advised_max_prompt_tokens: int | None
    num_dropped: int | None

    def render(self) -> str:
        """Several lines for the terminal, without a last newline."""
        lines = [f"rows         {self.num_rows:,}, of which {self.num_bad:,} bad, {self.num_duplicates:,} repeated"]
        lines += [f"  bad        {problem}" for problem in self.problems]
        if self.num_bad > len(self.problems):
            lines.append(f"  bad        … and {self.num_bad - len(self.problems):,} more")
        lines += [f"data source  {name}: {count:,}" for name, count in self.data_sources.items()]
        if self.lengths is not None:
            size = self.lengths
            tail = f"p95 {size.p95:,}  p99 {size.p99:,}  max {size.max:,}"
            lines.append(f"prompt {self.unit}: p50 {size.p50:,}  p90 {size.p90:,}  {tail}")
        if self.unit == "characters":
            lines.append("no tokenizer was given, so lengths are characters; name a model to count tokens")
        if self.num_dropped is not None:
            lines.append(f"data.max_prompt_tokens = {self.max_prompt_tokens:,} leaves out {self.num_dropped:,} rows")
        if self.advised_max_prompt_tokens is not None:
            lines.append(f"advice: {self.advised_max_prompt_tokens:,} is enough for 99 % of the rows")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Measured:
    length: int
    source: str
    content: str


def data_stats(source: Source, config: DataConfig, tokenizer: Tokenizer | None) -> DataStats:
    """Measure the prompts of `source`; bad rows are counted, not raised.

    Raises:
        ConfigError: the `data` section is malformed, or messages meet a tokenizer without a chat template.
        DataError: the source cannot be read at all.
    """
    rows = read_rows(source)
    check_settings(config)
    if tokenizer is not None and any(_is_chat(row, config) for row in rows):
        check_template(tokenizer, config.chat_template_kwargs)
    results = [_measure(row, config, tokenizer=tokenizer) for row in rows]
    problems = [result for result in results if isinstance(result, RowProblem)]
    measured = [result for result in results if isinstance(result, _Measured)]
    lengths = [item.length for item in measured]
    return DataStats(
        num_rows=len(rows),
        num_bad=len(problems),
        problems=tuple(problems[:_SHOWN_PROBLEMS]),
        unit="characters" if tokenizer is None else "tokens",
        lengths=_quantiles(lengths) if lengths else None,
        data_sources=dict(Counter(item.source for item in measured).most_common()),
        num_duplicates=len(measured) - len({item.content for item in measured}),
        max_prompt_tokens=config.max_prompt_tokens,
        advised_max_prompt_tokens=_advice(lengths) if lengths and tokenizer is not None else None,
        num_dropped=None if tokenizer is None else sum(length > config.max_prompt_tokens for length in lengths),
    )


def _is_chat(row: SourceRow, config: DataConfig) -> bool:
    return prompt_problem(row.values, config) is None and not isinstance(prompt_value(row.values, config), str)


def _measure(row: SourceRow, config: DataConfig, *, tokenizer: Tokenizer | None) -> _Measured | RowProblem:
    reason = prompt_problem(row.values, config)
    if reason is not None:
        return RowProblem(row.where, reason)
    asked = prompt_value(row.values, config)
    if tokenizer is None:
        length = len(asked) if isinstance(asked, str) else sum(len(m["content"]) for m in with_context(asked, config))
        return _Measured(length, data_source_of(row.values, config), prompt_key(asked))
    try:
        prompt = make_prompt(row, 0, config=config, tokenizer=tokenizer)
    except DataError as error:
        return RowProblem(row.where, str(error).removeprefix(f"{row.where}: "))
    return _Measured(len(prompt.token_ids), prompt.data_source, prompt_key(asked))


def _quantiles(lengths: Sequence[int]) -> Lengths:
    ordered = sorted(lengths)

    def at(part: float) -> int:
        return ordered[math.ceil(part * len(ordered)) - 1]

    return Lengths(p50=at(0.5), p90=at(0.9), p95=at(0.95), p99=at(0.99), max=ordered[-1])


def _advice(lengths: Sequence[int]) -> int:
    """The smallest multiple of 64 that keeps at least 99 % of the prompts."""
    return math.ceil(_quantiles(lengths).p99 / _CAP_STEP) * _CAP_STEP
