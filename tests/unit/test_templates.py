"""Chat templates render as transformers renders them, within limits, and every error of theirs is a sentence."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from groupwise.data.chat import render, set_chat_template
from groupwise.errors import ConfigError, DataError
from groupwise.quickstart.tiny_model import build_tokenizer
from groupwise.templates import TemplateFault, apply_template
from groupwise.templates.bounded import SECONDS
from groupwise.templates.counting import CountingEnvironment

TALK: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 12 * 3?\n"},
    {"role": "assistant", "content": "<think>\n12 * 3 = 36\n</think>\n\n36"},
    {"role": "user", "content": "And <b>日本</b> & {{ 7 }}?"},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{% set bos_token = '<s>' %}{{- bos_token }}{%- set loop_messages = messages %}{% for message in loop_messages %}{% set content =
'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if
loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{{ loop_messages | length }}"""
QWEN = """{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi_step_tool and message.role == "user" and message.content is string %}{%- set ns.multi_step_tool = false %}
{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- set content = message.content %}{%- set reasoning_content = '' %}
{%- if '</think>' in content %}{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}{%- if loop.last or loop.index0 > ns.last_query_index %}
{{- 'thought: ' + reasoning_content }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"""
MACROS = """{% macro show(value, depth=0) %}{% if value is mapping %}{% for k, v in value | dictsort %}{{ '  ' * depth }}{{ k
}}: {{ show(v, depth + 1) }}{% endfor %}{% elif value is iterable and value is not string %}[{% for v in value %}{{ show(v)
}}{{ ', ' if not loop.last }}{% endfor %}]{% else %}{{ '%s!' % value }}{% endif %}{% endmacro %}{{ show(messages) }}
{% for row in messages | batch(2) %}{% for m in row recursive %}{{ loop.index }}/{{ loop.length }} {{ m.role.upper().ljust(12)
}}|{{ '{:>8}'.format(m.role) }}{% endfor %}{% endfor %}{% generation %}x{{ messages | map(attribute='role') | join('+')
}}{% endgeneration %}{{ range(3) | list + [1, 2] }}{{ 2 ** 10 }} {{ 7 % 4 }} {{ [1] * 3 }} {{ ('a', 'b') }} {{ {'a': [1]} }}
{% set x %}block {{ messages | length }}{% endset %}{{ x | replace('block', 'b') | indent(2) }}{{ messages | selectattr('role',
'equalto', 'user') | list | count }}{% for a in [] %}{% else %}none{% endfor %}{{ undefined_name }}{{ none }}{{ 1.5 }}{{ true }}"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["one two three"], 300)


def as_transformers(template: str, tokenizer: Any, **kwargs: Any) -> str:
    """With the sandbox that transformers has by itself."""
    cache, ours = chat_template_utils._compile_jinja_template, chat_template_utils.ImmutableSandboxedEnvironment
    chat_template_utils.ImmutableSandboxedEnvironment = ImmutableSandboxedEnvironment
    cache.cache_clear()
    try:
        return tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False, **kwargs)
    finally:
        chat_template_utils.ImmutableSandboxedEnvironment = ours
        cache.cache_clear()


@pytest.mark.parametrize("template", [CHATML, LLAMA, QWEN, MACROS])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False, "bos_token": "<s>"}])
def test_what_a_template_writes_stays_the_same(tokenizer: Any, template: str, kwargs: dict[str, Any]) -> None:
    expected = as_transformers(template, tokenizer, add_generation_prompt=True, **kwargs)
    tokenizer.chat_template = template
    found = apply_template(tokenizer, TALK, add_generation_prompt=True, template_kwargs=kwargs)
    assert found == expected
    assert chat_template_utils.ImmutableSandboxedEnvironment is CountingEnvironment
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, **kwargs) == expected


def test_it_costs_little(tokenizer: Any) -> None:
    tokenizer.chat_template = QWEN
    apply_template(tokenizer, TALK)
    started = time.perf_counter()
    for _ in range(200):
        apply_template(tokenizer, TALK)
    assert (time.perf_counter() - started) / 200 < 0.01


LARGE = (
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x == 1 }}",
    "{% set n = namespace(x=()) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{{ 2 ** (10**8) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%(a)1000000000s' % {'a': 1} }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "{{ ('{}' * 100000).format(*(['a' * 100000] * 100000)) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "{{ (['a' * 1000000] * 10000) | join }}",
    "{{ 'x'.join(['a' * 1000000] * 10000) }}",
    "{{ ('a' * 100000).join(range(99999) | map('string')) }}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ lipsum(n=10**7) }}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}{{ x }}",
    "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
)


# The limit of time ends some, which takes as long as the limit.
_BY_TIME = {5, 6, 7}


@pytest.mark.parametrize(
    "template",
    [pytest.param(one, marks=[pytest.mark.slow] * (place in _BY_TIME)) for place, one in enumerate(LARGE)],
)
def test_a_template_that_grows_is_stopped(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    tracemalloc.start()
    try:
        with pytest.raises(TemplateFault, match="does more than it may") as raised:
            apply_template(tokenizer, TALK)
        assert raised.value.hopeless
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.templates.bounded.SECONDS", 0.3)
    tokenizer.chat_template = template
    started = time.perf_counter()
    with pytest.raises(TemplateFault, match=r"does more than it may: it ran for more than 0\.3 s"):
        apply_template(tokenizer, TALK)
    assert time.perf_counter() - started < SECONDS


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "is not valid Jinja: line 1"),
        ("{{ x | nope }}", "is not valid Jinja"),
        ("{% break %}", "is not valid Jinja"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "is not valid Jinja"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("{{ " + " + ".join(["1"] * 9000) + " }}", "nested too deeply"),
        ("x" * 300_000, "does more than it may: it has 300,000 characters"),
    ],
)
def test_a_hopeless_template_is_refused_at_once(tokenizer: Any, template: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    with pytest.raises(ConfigError, match=r"model\.chat_template ") as raised:
        set_chat_template(tokenizer, file)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ nope.nope }}",
        "{{ nope() }}",
        "{{ messages + 1 }}",
        "{{ -messages }}",
        "{{ messages['role'].x }}",
        "{{ raise_exception('no \x1b[2J\ntwo') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ strftime_now(1) }}",
        "{{ dict(1) }}",
        "{{ {[]: 1} }}",
        "{% for a, b, c in messages %}{% endfor %}",
        "{{ '%s %s' % 'a' }}",
        "{{ '{x}'.format() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages | sort }}",
        "{{ '\\ud800' }}",
    ],
)
def test_every_error_is_a_sentence(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises((ConfigError, DataError), match="the chat template ") as raised:
        render(TALK, tokenizer, template_kwargs={})
    assert "\x1b" not in str(raised.value)
    assert "\n" not in str(raised.value)
