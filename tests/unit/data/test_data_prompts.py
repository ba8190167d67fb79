from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from groupwise.config.data import DataConfig
from groupwise.data import check_rows, load_prompts, read_rows
from groupwise.errors import ConfigError, DataError
from groupwise.metrics import resolve

RL_ROW: dict[str, Any] = {
    "data_source": "openai/gsm8k",
    "prompt": [{"content": "2+2?", "role": "user"}],
    "ability": "math",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"answer": "2+2=4\n#### 4", "index": 0, "question": "2+2?", "split": "train"},
}


def config(**settings: Any) -> DataConfig:
    return DataConfig.model_validate(settings)


def test_rl_format_is_rendered_and_keeps_every_column(tokenizer: Any) -> None:
    prompt = load_prompts([RL_ROW], config(), tokenizer).prompts[0]
    assert prompt.text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.messages == ({"content": "2+2?", "role": "user"},)
    assert prompt.data_source == "openai/gsm8k"
    assert prompt.columns == RL_ROW
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert tokenizer.bos_token_id not in prompt.token_ids


def test_text_prompts_get_the_tokenizers_own_first_token_once(bare: Any) -> None:
    prompt = load_prompts([{"prompt": "2+2?", "answer": 4}], config(), bare).prompts[0]
    assert (prompt.text, prompt.messages, prompt.data_source) == ("2+2?", (), "default")
    assert prompt.token_ids[0] == bare.bos_token_id
    assert prompt.token_ids.count(bare.bos_token_id) == 1
    assert prompt.columns == {"prompt": "2+2?", "answer": 4}


def test_question_and_answer_columns(tokenizer: Any) -> None:
    settings = config(question_column="q", answer_column="solution", data_source="mine")
    prompt = load_prompts([{"q": "2+2?", "solution": "4", "hint": None}], settings, tokenizer).prompts[0]
    assert prompt.messages == ({"role": "user", "content": "2+2?"},)
    assert prompt.columns == {"q": "2+2?", "solution": "4", "hint": None, "answer": "4"}
    assert prompt.data_source == "mine"


def test_own_data_source_wins_and_null_ones_do_not(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "data_source": "own"}, {"prompt": "b", "data_source": None}]
    prompts = load_prompts(rows, config(data_source="configured"), tokenizer).prompts
    assert [prompt.data_source for prompt in prompts] == ["own", "configured"]


def test_system_prompt_few_shot_and_template_keywords(tokenizer: Any) -> None:
    shots = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    settings = config(system_prompt="Be brief.", few_shot=shots, chat_template_kwargs={"no_think": True})
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "x"}]
    first, second = load_prompts([RL_ROW, {"prompt": own}], settings, tokenizer).prompts
    assert [message["content"] for message in first.messages] == ["Be brief.", "1+1?", "2", "2+2?"]
    assert [message["content"] for message in second.messages] == ["Own.", "1+1?", "2", "x"]
    assert first.text.endswith("assistant\n(no thoughts)")


def test_columnar_nulls_reach_neither_template_nor_uid(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'name' in m %}{{ m.name }}{% endif %}{{ m.content }};{% endfor %}"
    )
    prompts = [[{"role": "user", "content": "a", "name": "Eve"}], [{"role": "user", "content": "b"}]]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet")[1].values["prompt"][0]["name"] is None, "the test needs a null"
    loaded = load_prompts(tmp_path / "a.parquet", config(), tokenizer)
    assert [prompt.text for prompt in loaded.prompts] == ["Evea;", "b;"]
    assert loaded.prompts[1].messages == ({"role": "user", "content": "b"},)
    plain = load_prompts([{"prompt": prompt} for prompt in prompts], config(), tokenizer)
    assert [p.uid for p in loaded.prompts] == [p.uid for p in plain.prompts], "a row's name is the same in any format"


def test_uid_depends_on_place_and_content_alone(tokenizer: Any) -> None:
    swapped = {**RL_ROW, "prompt": [{"role": "user", "content": "2+2?"}]}
    other = {"prompt": [{"role": "user", "content": "3+3?"}]}
    uids = [p.uid for p in load_prompts([RL_ROW, swapped, other], config(), tokenizer).prompts]
    assert uids[0].startswith("000000-")
    assert uids[1].startswith("000001-")
    assert uids[0][7:] == uids[1][7:] != uids[2][7:]
    assert len(uids[0]) == 15
    again = load_prompts([RL_ROW, swapped, other], config(system_prompt="s"), tokenizer).prompts
    assert [p.uid for p in again] == uids


def test_too_long_prompts_are_left_out_and_counted_and_uids_stay(tokenizer: Any) -> None:
    rows = [{"prompt": "x" * 50}, {"prompt": "ab"}, {"prompt": "cd"}]
    whole = load_prompts(rows, config(), tokenizer)
    cut = load_prompts(rows, config(max_prompt_tokens=10), tokenizer)
    assert [p.uid for p in cut.prompts] == [p.uid for p in whole.prompts[1:]]
    assert (cut.num_rows, cut.num_too_long) == (3, 1)
    assert resolve(cut.metrics) == {"data/prompts": 2, "data/prompts_too_long": 1}
    assert cut.describe() == "2 prompts of 3 to 3 tokens (median 3); left out 1 of 3 rows: over 10 tokens"
    assert "left out" not in whole.describe()


def test_the_limit_of_length_is_inclusive(tokenizer: Any) -> None:
    n = len(load_prompts([{"prompt": "abcdef"}], config(), tokenizer).prompts[0].token_ids)
    assert load_prompts([{"prompt": "abcdef"}], config(max_prompt_tokens=n), tokenizer).num_too_long == 0
    with pytest.raises(DataError, match=rf"{n} to {n} tokens, median {n}; raise it to {n}"):
        load_prompts([{"prompt": "abcdef"}], config(max_prompt_tokens=n - 1), tokenizer)


def test_limit_is_the_first_rows(tokenizer: Any) -> None:
    assert load_prompts([{"prompt": str(i)} for i in range(9)], config(), tokenizer, limit=4).num_rows == 4


BAD_ROWS: list[tuple[Any, str]] = [
    (
        {"promt": "x", "answer": "1"},
        r'no column "prompt" \(data\.prompt_column\); the row has promt, answer; did you mean "promt"',
    ),
    ({}, "the row has no columns"),
    ({"prompt": None}, "is null; expected text"),
    ({"prompt": 3}, "is a number; expected text"),
    ({"prompt": float("nan")}, "is NaN"),
    ({"prompt": {"role": "user", "content": "x"}}, "is an object; expected text"),
    ({"prompt": ""}, "is empty"),
    ({"prompt": " \n\t"}, "is empty"),
    ({"prompt": "\ud800"}, "half of a surrogate pair at character 1"),
    ({"prompt": []}, "is an empty list"),
    ({"prompt": ["hello"]}, r'"prompt"\[0\] is a str; expected a message'),
    ({"prompt": [{"content": "x"}]}, r'"prompt"\[0\] has no "role", only content'),
    ({"prompt": [{"from": "human", "value": "x"}]}, 'has no "role", only from, value'),
    ({"prompt": [{"role": "user"}]}, 'has no "content", only role'),
    ({"prompt": [{"role": "user", "content": None}]}, '"content" that is null'),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, '"content" that is a list'),
    ({"prompt": [{"role": " ", "content": "x"}]}, "empty role"),
    ({"prompt": [{"role": "user", "content": "x\udfff"}]}, "surrogate"),
    ({"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": " "}]}, "none of its messages says"),
    (
        {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "ends with .* the assistant",
    ),
    ({"prompt": "x", "data_source": 3}, '"data_source" is a number'),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_are_refused_without_a_tokenizer(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        check_rows(read_rows([{"prompt": "fine"}, row]), config())
    assert str(error.value).startswith("row 2: ")


def test_the_first_problem_names_file_and_line_and_counts_the_others(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in ("ok", "", "ok", " ")))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: .*\(1 more rows have problems\)"):
        load_prompts(path, config(), tokenizer)


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        (
            {"question_column": "question"},
            {"Question": "x"},
            r'"question" \(data\.question_column\).* did you mean "Question"',
        ),
        ({"question_column": "q"}, {"q": ["x"]}, '"q" is a list; expected text'),
        ({"question_column": "q"}, {"q": float("nan")}, "is NaN"),
        ({"answer_column": "a"}, {"prompt": "x"}, r"data\.answer_column"),
        ({"answer_column": "a"}, {"prompt": "x", "a": None}, "is null; expected the answer"),
        ({"system_prompt": "s"}, {"prompt": "x"}, r"plain text, so data\.system_prompt cannot act"),
        ({"chat_template_kwargs": {"k": 1}}, {"prompt": "x"}, r"data\.chat_template_kwargs cannot act"),
        ({"few_shot": [{"role": "user", "content": "u"}]}, {"prompt": "x"}, r"data\.few_shot cannot act"),
    ],
)
def test_mapped_columns_and_settings_are_checked(settings: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_rows(read_rows([row]), config(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"few_shot": [{"role": "user"}]}, r'data\.few_shot\[0\] has no "content"'),
        ({"few_shot": [{"role": "system", "content": "x"}]}, r"put its text into data\.system_prompt"),
        ({"system_prompt": "  "}, r"data\.system_prompt is blank"),
    ],
)
def test_bad_settings_are_config_errors(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rows(read_rows([RL_ROW]), config(**settings))


def test_messages_without_a_chat_template(bare: Any) -> None:
    with pytest.raises(ConfigError, match=r"no chat template; set model\.chat_template"):
        load_prompts([RL_ROW], config(), bare)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [("no_thnk", 'has no effect.*did you mean "no_think"'), ("tokenize", "decided by Groupwise")],
)
def test_template_keywords_must_act(tokenizer: Any, keyword: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_prompts([RL_ROW], config(chat_template_kwargs={keyword: True}), tokenizer)


def test_a_template_that_refuses_a_row_names_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no ' ~ m.role) if m.role == 'critic' }}x{% endfor %}"
    )
    rows = [RL_ROW, {"prompt": [{"role": "critic", "content": "x"}]}]
    with pytest.raises(DataError, match=r"row 2: the chat template refuses a conversation of critic: no critic"):
        load_prompts(rows, config(), tokenizer)


def test_importing_the_data_layer_loads_no_heavy_library() -> None:
    heavy = ["torch", "transformers", "datasets", "pyarrow", "jinja2"]
    code = f"import sys, groupwise.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_gsm8k_when_present(tokenizer: Any) -> None:
    path = Path(__file__).parents[3] / "../shared/data/gsm8k/test.jsonl"
    if not path.exists():
        pytest.skip("GSM8K is not here")
    settings = config(question_column="question", answer_column="answer", max_prompt_tokens=4096)
    loaded = load_prompts(path, settings, tokenizer, limit=50)
    assert len({prompt.uid for prompt in loaded.prompts}) == 50
    assert all(tokenizer.decode(prompt.token_ids) == prompt.text for prompt in loaded.prompts)
