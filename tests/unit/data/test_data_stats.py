from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.config.data import DataConfig
from groupwise.data import Lengths, data_stats, load_prompts
from groupwise.errors import ConfigError, DataError


def config(**settings: Any) -> DataConfig:
    return DataConfig.model_validate(settings)


def test_quantiles_advice_and_drops_agree_with_loading(tokenizer: Any) -> None:
    # 99 prompts of 2 tokens (first token and "z"), one far longer.
    rows = [{"prompt": "z"} for _ in range(99)] + [{"prompt": "z" * 200}]
    stats = data_stats(rows, config(max_prompt_tokens=50), tokenizer)
    longest = max(len(p.token_ids) for p in load_prompts(rows, config(), tokenizer).prompts)
    assert stats.lengths == Lengths(p50=2, p90=2, p95=2, p99=2, max=longest)
    assert stats.advised_max_prompt_tokens == 64
    assert stats.num_dropped == load_prompts(rows, config(max_prompt_tokens=50), tokenizer).num_too_long == 1
    assert stats.num_duplicates == 98


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=150))
def test_advice_is_the_smallest_multiple_of_64_that_keeps_99_percent(lengths: list[int]) -> None:
    stats = data_stats([{"prompt": "x" * n} for n in lengths], config(), _Characters())  # pyright: ignore[reportArgumentType]
    advice = stats.advised_max_prompt_tokens
    assert advice is not None
    assert advice % 64 == 0

    def kept(cap: int) -> float:
        return sum(n <= cap for n in lengths) / len(lengths)

    assert kept(advice) >= 0.99
    assert advice == 64 or kept(advice - 64) < 0.99


def test_bad_rows_are_counted_with_places(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "mixed.jsonl"
    good = {"prompt": [{"role": "user", "content": "a"}], "data_source": "one"}
    lines = [good, {"prompt": ""}, {**good, "data_source": "two"}, *[{"promt": "x"}] * 6, good]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    stats = data_stats(path, config(), tokenizer)
    assert (stats.num_rows, stats.num_bad, len(stats.problems)) == (10, 7, 5)
    assert stats.problems[0].where == f"{path}:2"
    assert dict(stats.data_sources) == {"one": 2, "two": 1}
    assert stats.num_duplicates == 2
    text = stats.render()
    assert "10, of which 7 bad, 2 repeated" in text
    assert "mixed.jsonl:2: the column" in text
    assert "and 2 more" in text
    assert "one: 2" in text


def test_rows_that_the_template_refuses_are_bad(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('no') if m.role == 'critic' }}x{% endfor %}"
    rows = [{"prompt": [{"role": role, "content": "x"}]} for role in ("user", "critic")]
    stats = data_stats(rows, config(), tokenizer)
    assert stats.num_bad == 1
    assert str(stats.problems[0]).startswith("row 2: the chat template refuses")


def test_without_a_tokenizer_characters_are_counted_and_said() -> None:
    rows = [{"prompt": "12345"}, {"prompt": [{"role": "user", "content": "1234567"}]}]
    stats = data_stats(rows, config(), None)
    assert stats.unit == "characters"
    assert stats.lengths == Lengths(p50=5, p90=7, p95=7, p99=7, max=7)
    assert stats.advised_max_prompt_tokens is None
    assert stats.num_dropped is None
    assert "prompt characters:" in stats.render()
    assert "no tokenizer was given" in stats.render()
    assert "max_prompt_tokens" not in stats.render()


def test_nothing_good_is_still_a_report() -> None:
    stats = data_stats([{"x": 1}], config(), None)
    assert stats.lengths is None
    assert "1 bad" in stats.render()


def test_no_template_and_no_file(bare: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        data_stats([{"prompt": [{"role": "user", "content": "a"}]}], config(), bare)
    with pytest.raises(DataError, match="does not exist"):
        data_stats(tmp_path / "a.jsonl", config(), bare)


class _Characters:
    """A tokenizer whose tokens are characters, so that lengths are known without arithmetic."""

    eos_token_id: int | None = None
    chat_template: Any = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(token) for token in token_ids)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        raise AssertionError("the rows are text")
