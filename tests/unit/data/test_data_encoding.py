"""Special tokens at both ends of a prompt, for tokenizers as Llama, Gemma, Mistral and Qwen have them; and the keywords
that a chat template reads."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from groupwise.config import DataConfig
from groupwise.data import load_prompts, load_supervised
from groupwise.data.chat import check_template, encode_text
from groupwise.errors import ConfigError

CHAT = [{"role": "user", "content": "what is two?"}]
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDED = {
    "nothing": ("$A", []),
    "a beginning": ("<|bos|> $A", [("<|bos|>", 0)]),
    "both ends": ("<|bos|> $A <|im_end|>", [("<|bos|>", 0), ("<|im_end|>", 2)]),
    "two at each end": (
        "<|bos|> <|im_start|> $A <|im_end|> <|im_start|>",
        [("<|bos|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)],
    ),
}


@pytest.fixture(params=list(ADDED))
def adding(request: pytest.FixtureRequest, bare: PreTrainedTokenizerFast) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer, and what it puts before a text."""
    template, special = ADDED[request.param]
    made = copy.deepcopy(bare)
    backend: Any = made.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    made.chat_template = WITH_BOS
    starts = {"nothing": [], "two at each end": [0, 1]}
    return made, starts.get(request.param, [0])


def test_a_text_has_one_beginning_and_no_end(adding: tuple[PreTrainedTokenizerFast, list[int]]) -> None:
    tokenizer, start = adding
    plain = tokenizer.encode("what is two?", add_special_tokens=False)
    assert list(encode_text("what is two?", tokenizer)) == [*start, *plain]  # pyright: ignore[reportArgumentType]
    begun = tokenizer.decode(start) + "what is two?"  # pyright: ignore[reportOperatorIssue]
    assert list(encode_text(begun, tokenizer)) == [*start, *plain]  # pyright: ignore[reportArgumentType]


def test_special_tokens_that_the_text_itself_has_stay(adding: tuple[PreTrainedTokenizerFast, list[int]]) -> None:
    tokenizer, start = adding
    ended = "two<|im_end|><|im_end|>"
    assert list(encode_text(ended, tokenizer)) == [*start, *tokenizer.encode(ended, add_special_tokens=False)]  # pyright: ignore[reportArgumentType]
    twice = tokenizer.decode(start * 2) + "two"  # pyright: ignore[reportOperatorIssue]
    assert list(encode_text(twice, tokenizer)) == tokenizer.encode(twice, add_special_tokens=False)  # pyright: ignore[reportArgumentType]


def test_a_chat_that_the_program_rendered_is_the_same_prompt(
    adding: tuple[PreTrainedTokenizerFast, list[int]],
) -> None:
    tokenizer, _ = adding
    if tokenizer.encode("a")[:2] == [0, 1]:
        pytest.skip("its beginning is longer than the template's")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    config = DataConfig.model_validate({})
    asked, rendered = (load_prompts([{"prompt": prompt}], config, tokenizer).prompts[0] for prompt in (CHAT, text))  # pyright: ignore[reportArgumentType]
    assert asked.token_ids == rendered.token_ids
    assert asked.token_ids.count(0) == 1


def test_supervised_rows_have_one_beginning_too(adding: tuple[PreTrainedTokenizerFast, list[int]]) -> None:
    tokenizer, _ = adding
    if tokenizer.encode("a")[:2] == [0, 1]:
        pytest.skip("its beginning is longer than the template's")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    turns = {"prompt": CHAT, "completion": [{"role": "assistant", "content": "five"}]}
    config = DataConfig.model_validate({})
    rows = [{"prompt": text, "completion": "five<|im_end|>"}, turns]
    written, said = (load_supervised([row], config, tokenizer, max_tokens=99).rows[0] for row in rows)  # pyright: ignore[reportArgumentType]
    assert written.prompt_ids == said.prompt_ids
    assert written.token_ids == said.token_ids
    whole = load_supervised([{"text": text}], config, tokenizer, max_tokens=99, text_column="text").rows[0]  # pyright: ignore[reportArgumentType]
    assert [*whole.prompt_ids, *whole.token_ids].count(0) == 1


def test_a_template_without_the_beginning_is_said(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig.model_validate({})
    with caplog.at_level(logging.WARNING):
        prompt = load_prompts([{"prompt": CHAT}] * 3, config, tokenizer).prompts[0]  # pyright: ignore[reportArgumentType]
        assert 0 not in prompt.token_ids, "the template decides"
    assert caplog.text.count("the chat template begins without <|bos|>") == 1
    caplog.clear()
    tokenizer.chat_template = WITH_BOS
    load_prompts([{"prompt": CHAT}, {"prompt": "a text"}], config, tokenizer)  # pyright: ignore[reportArgumentType]
    assert not caplog.records


@pytest.mark.parametrize(
    "template",
    [
        "{# think #}{{ messages[0].content }}",
        "{{ 'think' }}{{ messages[0].content }}",
        "think {{ messages[0].content }}",
        "{{ messages[0].think }}",
        "{% set think = true %}{{ think }}",
        "{% for think in messages %}{{ think.content }}{% endfor %}",
        "{% macro f(think) %}{{ think }}{% endmacro %}{{ f(1) }}",
        {"default": "{{ messages[0].content }}", "tool_use": "{{ think }}"},
    ],
)
def test_a_keyword_that_the_template_only_mentions_is_refused(template: Any, bare: PreTrainedTokenizerFast) -> None:
    bare.chat_template = template
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs\.think has no effect"):
        check_template(bare, {"think": True})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "template",
    [
        "{% if think is defined and think is false %}.{% endif %}",
        "{% set think = think | default(true) %}{{ think }}",
        "{% for m in messages %}{% if think %}{% break %}{% endif %}{% endfor %}",
        "{% generation %}{{ think }}{% endgeneration %}",
        "{% macro f() %}{{ think }}{% endmacro %}{{ f() }}",
        {"default": "{{ think }}", "tool_use": ""},
    ],
)
def test_a_keyword_that_the_template_reads_is_taken(template: Any, bare: PreTrainedTokenizerFast) -> None:
    bare.chat_template = template
    check_template(bare, {"think": True})  # pyright: ignore[reportArgumentType]


def test_a_template_of_the_folder_that_is_not_jinja_is_a_sentence(bare: PreTrainedTokenizerFast) -> None:
    bare.chat_template = "{% if %}"
    with pytest.raises(ConfigError, match="not valid Jinja: line 1"):
        check_template(bare, {"think": True})  # pyright: ignore[reportArgumentType]
