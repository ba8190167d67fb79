"""The tiny model: a folder that transformers loads, decided by its seed; a tokenizer that loses no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from groupwise.errors import ConfigError, DataError, FileError
from groupwise.quickstart.tiny_model import (
    SMALLEST_VOCAB,
    TINY_SIZES,
    build_tiny_model,
    build_tokenizer,
    read_texts,
    strings_in,
    tiny_size,
)

TEXTS = ["Tom has 14 apples. He buys 9 more and gives 5 away.", "14+9=23\n23-5=18\n#### 18"] * 5
TOKENIZER = build_tokenizer(TEXTS, 300)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_survives_encode_and_decode(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["e\u0301 é ﬁ", "\ufeffBOM", "a\r\n\r\n b\t ", "👩‍👩‍👧 漢字 ½", "\x00\x7f", " , .! 's"]
)
def test_hostile_texts_survive(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_digits_are_single_tokens() -> None:
    tokenizer = build_tokenizer(["2024 2024 2024 99"] * 50, 400)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("x2024")] == ["x", "2", "0", "2", "4"]


def test_frequent_words_become_tokens_and_the_size_is_a_bound() -> None:
    assert [TOKENIZER.decode([token]) for token in TOKENIZER.encode(" apples")] == [" apples"]
    assert len(TOKENIZER) <= 300
    assert len(build_tokenizer(["a"], 4096)) == SMALLEST_VOCAB


def test_chatml_and_special_tokens() -> None:
    messages = [{"role": "user", "content": "hi {{ 1 }}"}, {"role": "assistant", "content": "yo"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nhi {{ 1 }}<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = TOKENIZER.encode(str(text), add_special_tokens=True)
    assert TOKENIZER.convert_ids_to_tokens(ids).count("<|im_start|>") == 3
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.convert_ids_to_tokens(ids).count("<|im_end|>") == 2
    assert TOKENIZER.pad_token == "<|endoftext|>"
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id


def test_own_chat_template() -> None:
    tokenizer = build_tokenizer(TEXTS, 300, chat_template="{{ messages[0]['content'] }}!")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_training_is_deterministic_across_processes() -> None:
    code = (
        "import sys, json; from groupwise.quickstart.tiny_model import build_tokenizer;"
        "sys.stdout.write(json.dumps(build_tokenizer(json.loads(sys.argv[1]), 300).get_vocab(), sort_keys=True))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TEXTS)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(other.stdout) == TOKENIZER.get_vocab()


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to train the tokenizer on"):
        build_tokenizer(texts, 300)


def test_small_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"vocab_size = 258 is too small.*use {SMALLEST_VOCAB} or more"):
        build_tokenizer(TEXTS, SMALLEST_VOCAB - 1)
    with pytest.raises(ConfigError, match="vocab_size = 10 is too small"):
        build_tiny_model(tmp_path / "m", texts=TEXTS, size="0.1m", vocab_size=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "a", texts=TEXTS, size="0.1m", vocab_size=300, seed=1)


def test_the_folder_loads_in_transformers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.dtype == torch.float32
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    prompt = torch.tensor([tokenizer.encode("Tom has")])
    written: Any = model.generate(prompt, max_new_tokens=3, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    assert written.shape[1] > prompt.shape[1]


def test_named_sizes_are_what_their_names_say(tmp_path: Path) -> None:
    for name, size in TINY_SIZES.items():
        assert size.parameters(size.vocab_size) / 1e6 == pytest.approx(float(name.removesuffix("m")), abs=0.13), name
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "m", texts=TEXTS, size="5.8m"))
    config, embedding = model.config, model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (256, 6, 4)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (2, 64, 768)
    assert config.vocab_size == embedding.num_embeddings == 4096


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_weights_follow_the_seed_and_leave_the_callers_random_state_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = weights(build_tiny_model(tmp_path / "b", texts=TEXTS, size="0.1m", vocab_size=300, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    other = weights(build_tiny_model(tmp_path / "c", texts=TEXTS, size="0.1m", vocab_size=300, seed=2))
    first = weights(folder)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    spread = first["model.embed_tokens.weight"].std().item()
    assert spread == pytest.approx(TINY_SIZES["0.1m"].initializer_range, rel=0.05)


def test_bfloat16(tmp_path: Path) -> None:
    out = build_tiny_model(tmp_path / "m", texts=TEXTS, size="0.1m", vocab_size=300, dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_unknown_size_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown tiny model size '0.6M'; .*did you mean '0.6m'\?"):
        tiny_size("0.6M")
    with pytest.raises(ConfigError, match=r"expected one of 0\.1m, 0\.6m"):
        build_tiny_model(tmp_path / "m", texts=TEXTS, size="70b")
    assert not list(tmp_path.iterdir())


def test_a_filled_folder_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not an empty folder; give a new folder"):
        build_tiny_model(out, texts=TEXTS, size="0.1m", vocab_size=300)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="not an empty folder"):
        build_tiny_model(out / "mine.txt", texts=TEXTS, size="0.1m", vocab_size=300)


def test_an_empty_folder_is_filled_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    assert (build_tiny_model(tmp_path / "empty", texts=TEXTS, size="0.1m", vocab_size=300) / "config.json").is_file()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(FileError, match="new cannot be written: the disk is full"):
        build_tiny_model(tmp_path / "new", texts=TEXTS, size="0.1m", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_read_texts_takes_every_string_of_every_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": "ça va?"}], "n": 3, "none": None},
        {"extra": {"deep": ["x", {"y": "z"}]}, "blank": "  "},
    ]
    path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert read_texts(path) == ["user", "ça va?", "x", "z"]


def test_read_texts_from_parquet_and_plain_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["a?", "b?"], "n": [1, 2]}), tmp_path / "rows.parquet")
    assert read_texts(tmp_path / "rows.parquet") == ["a?", "b?"]
    (tmp_path / "story.txt").write_bytes("\ufeffcafé\r\nend".encode())
    assert read_texts(str(tmp_path / "story.txt")) == ["café\nend"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt holds no text"),
        ("blank.md", b" \n\t", "blank.md holds no text"),
        ("latin.txt", b"ok\ncaf\xe9", r"latin.txt:2 is not UTF-8"),
        ("numbers.jsonl", b'{"a": 1}\n', "numbers.jsonl holds no text"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("broken.jsonl", b'{"a": "x"}\n{"a": \n', r"broken.jsonl:2"),
        ("rows.xyz", b"x", "rows.xyz"),
    ],
)
def test_read_texts_refuses_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_read_texts_names_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        read_texts(tmp_path / name)


def test_strings_in_leaves_keys_and_numbers_out() -> None:
    assert list(strings_in({"k": ["a", 1, ("b", None)], "m": {"n": "c"}})) == ["a", "b", "c"]


def test_importing_the_module_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, groupwise.quickstart.tiny_model, groupwise.quickstart.task, groupwise.quickstart.recipe;"
        "heavy = {'torch', 'transformers', 'tokenizers', 'datasets'} & sys.modules.keys();"
        "sys.stdout.write(' '.join(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
