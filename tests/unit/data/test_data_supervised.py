from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from groupwise.batches import TrainingRow
from groupwise.config.data import DataConfig
from groupwise.data import check_supervised_rows, load_supervised, read_rows
from groupwise.errors import ConfigError, DataError

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "four"}
PROMPT_TEXT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def config(**settings: Any) -> DataConfig:
    return DataConfig.model_validate(settings)


def only(row: Any, tokenizer: Any, **settings: Any) -> TrainingRow:
    loaded = load_supervised([row], config(**settings), tokenizer, max_tokens=2048)
    assert len(loaded.rows) == 1
    return loaded.rows[0]


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": [USER, FOUR]}, {}),
        ({"prompt": [USER, FOUR]}, {}),
        ({"chat": [USER, FOUR]}, {"prompt_column": "chat"}),
        ({"prompt": "2+2?", "messages": [USER, FOUR]}, {}),
        ({"prompt": [USER], "completion": [FOUR]}, {}),
        ({"prompt": [USER], "completion": "four"}, {}),
        ({"prompt": [USER], "solution": "four"}, {"answer_column": "solution"}),
        ({"q": "2+2?", "a": "four"}, {"question_column": "q", "answer_column": "a"}),
        ({"prompt": [USER], "reward_model": {"ground_truth": "4"}, "extra_info": {"answer": "four"}}, {}),
    ],
)
def test_every_shape_of_messages_gives_the_same_row(tokenizer: Any, row: Any, settings: dict[str, Any]) -> None:
    learned = only(row, tokenizer, **settings)
    assert tokenizer.decode(learned.prompt_ids) == PROMPT_TEXT
    assert tokenizer.decode(learned.token_ids) == "four<|im_end|>"
    n = len(learned.token_ids)
    assert learned.loss_mask == (1,) * n
    assert learned.advantages == (1.0,) * n
    assert learned.logprobs == (0.0,) * n


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "2+2=", "completion": "four"}, {}),
        ({"prompt": "2+2=", "a": "four"}, {"answer_column": "a"}),
        ({"text": "2+2=", "completion": "four"}, {"prompt_column": "text"}),
    ],
)
def test_text_needs_no_template_and_ends_with_the_end_token(bare: Any, row: Any, settings: dict[str, Any]) -> None:
    learned = only(row, bare, **settings)
    assert bare.decode(learned.prompt_ids) == "<|bos|>2+2="
    assert bare.decode(learned.token_ids) == "four<|im_end|>"


def test_system_prompt_and_few_shots_are_given_not_learned(tokenizer: Any) -> None:
    shots = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]
    learned = only({"messages": [USER, FOUR]}, tokenizer, system_prompt="Be brief.", few_shot=shots)
    prompt = tokenizer.decode(learned.prompt_ids)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "one<|im_end|>" in prompt
    assert prompt.endswith(PROMPT_TEXT)
    assert sum(learned.loss_mask) == len(learned.token_ids)


def test_assistant_turns_of_a_prompt_are_not_learned_when_a_completion_follows(
    tokenizer: Any,
) -> None:
    learned = only({"prompt": [USER, FOUR, USER], "completion": [FOUR]}, tokenizer)
    assert tokenizer.decode(learned.token_ids) == "four<|im_end|>"


def test_too_long_rows_are_left_out_and_groups_keep_the_place(tokenizer: Any) -> None:
    long_answer = {"prompt": "a", "completion": "x" * 100}
    long_prompt = {"prompt": "y" * 40, "completion": "b"}
    fine = {"prompt": "a", "completion": "b"}
    loaded = load_supervised([long_answer, long_prompt, fine], config(max_prompt_tokens=30), tokenizer, max_tokens=60)
    assert [row.group for row in loaded.rows] == [2]
    assert (loaded.num_rows, loaded.num_too_long) == (3, 2)
    assert loaded.describe() == "1 conversations of 4 to 4 tokens; 2 are learned; left out 2 of 3 rows as too long"
    assert len(loaded.metrics) == 2
    with pytest.raises(DataError, match=r"every conversation is too long.*sft\.max_tokens = 3"):
        load_supervised([fine, fine], config(), tokenizer, max_tokens=3)


def test_the_end_is_never_cut_at_the_exact_limit(tokenizer: Any) -> None:
    row = {"prompt": "a", "completion": "b"}
    assert load_supervised([row], config(), tokenizer, max_tokens=4).rows[0].token_ids[-1] == tokenizer.eos_token_id


def test_turns_that_the_template_rewrites_are_counted(thinking: Any) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"}
    loaded = load_supervised([{"messages": [USER, thought, USER, thought]}], config(), thinking, max_tokens=500)
    assert loaded.num_untrained_turns == 1
    assert "1 earlier turns carry no loss" in loaded.describe()


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "x"}, {}, r'no column "prompt"'),
        (
            {"prompt": "x", "answer": "y"},
            {},
            r"no answer to learn; the row has prompt, answer.*set data\.answer_column",
        ),
        ({"prompt": [USER]}, {}, "no answer to learn"),
        ({"prompt": [USER], "extra_info": None}, {}, "no answer to learn"),
        ({"prompt": [USER], "extra_info": {"answer": 4}}, {}, '"answer" in the column "extra_info" is a number'),
        ({"q": "x"}, {"question_column": "q"}, "no answer to learn"),
        ({"q": "x", "a": ""}, {"question_column": "q", "answer_column": "a"}, r'"a" \(data\.answer_column\) is empty'),
        ({"messages": []}, {}, "is an empty list"),
        ({"messages": "hello"}, {}, "is text; expected a list of messages"),
        ({"messages": [USER]}, {}, "ends with a message of the user"),
        ({"messages": [FOUR]}, {}, "begins with the assistant"),
        ({"messages": [{"role": "system", "content": "s"}, FOUR]}, {}, "begins with the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, {}, "last message in .* is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, {}, 'has no "content"'),
        ({"completion": "x"}, {}, r'no column "prompt"'),
        ({"prompt": "x", "completion": [FOUR]}, {}, '"completion" is a list; expected text'),
        ({"prompt": "x", "completion": float("nan")}, {}, '"completion" is NaN'),
        ({"prompt": [USER], "completion": [USER]}, {}, "ends with a message of the user"),
        ({"prompt": [USER], "completion": ""}, {}, "is empty"),
        ({"prompt": "x", "completion": "y"}, {"system_prompt": "s"}, r"data\.system_prompt cannot act"),
    ],
)
def test_bad_rows_are_refused_without_a_tokenizer(row: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        check_supervised_rows(read_rows([row]), config(**settings))
    assert str(error.value).startswith("row 1: ")


def test_messages_without_a_template_and_errors_of_the_template_name_the_row(bare: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [USER, FOUR]}))
    with pytest.raises(ConfigError, match="no chat template"):
        load_supervised(path, config(), bare, max_tokens=99)
    bare.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(DataError, match=r"chat\.jsonl:1: the chat template refuses .* never"):
        load_supervised(path, config(), bare, max_tokens=99)


def test_a_whole_text_is_learned_from_its_second_token_on(tokenizer: Any) -> None:
    def tokens_of(text: str) -> list[int]:
        (row,) = load_supervised([{"t": text}], config(), tokenizer, max_tokens=99, text_column="t").rows
        assert len(row.prompt_ids) == 1
        assert set(row.loss_mask) == {1}
        return [*row.prompt_ids, *row.token_ids]

    plain, end = tokenizer.encode("2+2=4"), tokenizer.eos_token_id
    assert tokens_of("2+2=4") == [*plain, end]
    # What a template wrote is not added again: the beginning, and the end before a line end.
    assert tokens_of("<|bos|>2+2=4") == [*plain, end]
    written = f"2+2=4{tokenizer.decode([end])}\n"
    assert tokens_of(written) == tokenizer.encode(written)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "x"}, r'no column "text" \(sft.text_column\); the row has txt'),
        ({"text": ["x"]}, r'"text" \(sft.text_column\) is a list; expected text'),
        ({"text": " "}, "is empty"),
    ],
)
def test_rows_without_their_text_are_refused(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_supervised_rows(read_rows([row]), config(), text_column="text")
