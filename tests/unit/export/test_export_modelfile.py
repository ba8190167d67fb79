from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from groupwise.errors import ConfigError
from groupwise.export.modelfile import find_turns, write_modelfile

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ 'SYS: be kind\n' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
)


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that are used here."""
    match = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL)
    assert match, template
    branches = dict(
        re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', match[1], re.DOTALL)
    )
    turns = (branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages)
    return "".join(turns) + match[2]


TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2+2?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
]


@pytest.mark.parametrize("template", [None, LLAMA3], ids=["ChatML", "Llama 3"])
def test_ollamas_template_renders_as_the_models(template: str | None, tokenizer: Any, tmp_path: Path) -> None:
    if template:
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|endoftext|>")
        tokenizer.chat_template = template
    (tmp_path / "x.gguf").touch()
    text = write_modelfile(tmp_path / "Modelfile", gguf_file=tmp_path / "x.gguf", tokenizer=tokenizer, stops=["<e>"])
    assert text == (tmp_path / "Modelfile").read_text()
    match = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert match
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    first = tokenizer.bos_token if template else ""
    assert first + run_go(match[1], TALK) == expected
    assert text.startswith("FROM ./x.gguf\n")
    assert 'PARAMETER stop "<e>"' in text


@pytest.mark.parametrize("template", [WITH_DEFAULT_SYSTEM, NO_SYSTEM, "{{ messages[0]['content'] }}", "{{ 1 // 0 }}"])
def test_a_template_that_is_more_than_a_frame_stays_in_the_file(template: str, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.chat_template = template
    assert find_turns(tokenizer) is None
    (tmp_path / "x.gguf").touch()
    text = write_modelfile(tmp_path / "Modelfile", gguf_file=tmp_path / "x.gguf", tokenizer=tokenizer, stops=[])
    assert "TEMPLATE" not in text.replace("# No TEMPLATE", "")


def test_an_adapter_names_its_base(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("elsewhere/base.gguf", "adapter.gguf"):
        (tmp_path / name).touch()
    text = write_modelfile(
        tmp_path / "m" / "Modelfile",
        gguf_file=tmp_path / "adapter.gguf",
        base_gguf=tmp_path / "elsewhere" / "base.gguf",
        tokenizer=tokenizer,
        stops=[],
    )
    assert text.splitlines()[:2] == [
        f"FROM {tmp_path.resolve()}/elsewhere/base.gguf",
        f"ADAPTER {tmp_path.resolve()}/adapter.gguf",
    ]


def test_a_missing_file(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write it with `groupwise export gguf` first"):
        write_modelfile(tmp_path / "Modelfile", gguf_file=tmp_path / "x.gguf", tokenizer=tokenizer, stops=[])
