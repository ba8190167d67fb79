"""Chat templates: broken, endless, huge, recursive, and those that try to leave the sandbox."""

from __future__ import annotations

from pathlib import Path

from cases import SMALL, SMALL_SFT, Case
from hypothesis import strategies as st
from values import damaged_bytes, plain_texts

GOOD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ENDLESS = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% if i == 1 and j == 2 %}x{% endif %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 'a' * 10**12 }}",
    "{{ ('a' * 10**6) * 10**4 }}",
    "{{ [0] * 10**9 }}",
    "{% set x = 'a' %}{% for i in range(60) %}{% set x = x ~ x %}{% endfor %}{{ x }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == n.x }}",
    "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 2 ** 10**9 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ (['a' * 1000000] * 100000) | join }}",
    "{{ 'x'.join(['a' * 1000000] * 100000) }}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ lipsum(n=10**7) }}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(200) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}{{ x }}",
    "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "{{ range(99999) | map('string') | map('center', 100000) | list | length }}",
    "{% set c = cycler('a') %}{% for i in range(99999) %}{% for j in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
)
WRONG = (
    *(
        "",
        " ",
        "{",
        "{{",
        "{{ }}",
        "{% %}",
        "{% if %}",
        "{% for m in %}",
        "{% endfor %}",
        "{{ messages[0] }}",
        "{{ 1/0 }}",
    ),
    *(
        "{{ nope() }}",
        "{{ nope.nope.nope }}",
        "{{ x | nope }}",
        "{{ x is nope }}",
        "{{ messages | first | nope }}",
        "{{ none }}",
    ),
    *(
        "{{ raise_exception('no') }}",
        "{{ raise_exception() }}",
        "{{ raise_exception(messages) }}",
        "{{ raise_exception(1) }}",
    ),
    *(
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
    ),
    *("{{ messages.append(1) }}", "{{ messages | attr('append') }}", "{{ messages.clear() }}", "{{ cycler.__init__ }}"),
    *(
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{% from 'x' import y %}",
        "{% block a %}x{% endblock %}",
    ),
    *(
        "{{ messages['role'] }}",
        "{{ messages[99].content }}",
        "{{ messages + 1 }}",
        "{{ 'a' - 1 }}",
        "{{ -'a' }}",
        "{{ 'a' < 1 }}",
    ),
    *(
        "{{ strftime_now('%Y') }}",
        "{{ strftime_now(1) }}",
        "{{ strftime_now('%') }}",
        "{{ strftime_now('\ud800') }}",
        "{{ dict(1) }}",
    ),
    *(
        "{{ namespace(1) }}",
        "{% set namespace.x = 1 %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages | tojson(1, 2, 3, 4, 5) }}",
    ),
    *(
        "{{ range('a') }}",
        "{{ range(1, 2, 0) }}",
        "{{ int('x') }}",
        "{{ 'x' | int('y') }}",
        "{{ 'é\x00\x1b[2J' }}",
        "\x00",
        "﻿{{ 1 }}",
    ),
    *(
        "{{ caller() }}",
        "{% call x() %}{% endcall %}",
        "{% break %}",
        "{% continue %}",
        "{% do 1 %}",
        "{% raw %}",
        "{% generation %}x",
    ),
    *(
        "{% generation %}{{ messages }}{% endgeneration %}",
        "{% set x, y = 1 %}",
        "{% for a, b in messages %}{% endfor %}",
        "{{ '\\ud800' }}",
    ),
    *(
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
        "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    ),
    *(
        "{{ " + " + ".join(["1"] * 5000) + " }}",
        "{% for a in [1] %}" * 40 + "{% endfor %}" * 40,
        "{{ messages | sum }}",
        "{{ messages | max }}",
    ),
    *(
        "{{ messages | sort }}",
        "{{ messages | groupby('x') }}",
        "{{ messages | map('nope') | list }}",
        "{{ messages | map(attribute='a.b') | list }}",
    ),
    *(
        "{{ messages | selectattr('role', 'nope') | list }}",
        "{{ messages | random }}",
        "{{ 'a' | urlize(nofollow=[]) }}",
        "{{ 'a' | format(1) }}",
    ),
    *(
        "{{ '%s %s' % 'a' }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x}'.format() }}",
        "{{ x if }}",
        "{{ 1 if 0 }}",
        "{{ debug }}",
        "{% debug %}",
    ),
    *(
        "{{ messages[0].content.encode('utf-16') }}",
        "{{ [].pop() }}",
        "{{ {}.popitem() }}",
        "{{ {[]: 1} }}",
        "{{ {messages: 1} }}",
        "{{ messages in {} }}",
    ),
)


def templates(world: Path) -> st.SearchStrategy[Case]:
    @st.composite
    def one(draw: st.DrawFn) -> Case:
        way = draw(st.integers(0, 7))
        if way < 2:
            text = draw(st.sampled_from(ENDLESS))
        elif way < 4:
            text = draw(st.sampled_from(WRONG))
        elif way == 4:
            text = GOOD + draw(st.sampled_from(WRONG + ENDLESS))
        elif way == 5:
            text = draw(
                st.sampled_from(["{{ %s }}", "{%% set x = %s %%}{{ x }}", "{%% if %s %%}a{%% endif %%}"])
            ) % draw(plain_texts)
        else:
            text = draw(damaged_bytes(GOOD.encode())).decode("latin-1")
        content = text.encode("utf-8", "surrogatepass")
        if draw(st.integers(0, 4)) == 0:
            content = GOOD.encode() + content
        file = "--model.chat_template"
        command = draw(
            st.sampled_from(
                [
                    ("data", "stats", "rows.jsonl", "--model", "model", file, "t.jinja"),
                    ("generate", "model", "--prompt", "hi", "--max-tokens", "3", file, "t.jinja"),
                    (
                        "train",
                        "--model",
                        "model",
                        "--data",
                        "rows.jsonl",
                        "--reward",
                        "reward.py:low",
                        "--output",
                        "out",
                        file,
                        "t.jinja",
                        *SMALL,
                    ),
                    (
                        "sft",
                        "--model",
                        "model",
                        "--data",
                        "talks.jsonl",
                        "--output",
                        "out",
                        file,
                        "t.jinja",
                        *SMALL_SFT,
                    ),
                    (
                        "eval",
                        "model",
                        "--data",
                        "rows.jsonl",
                        "--reward",
                        "reward.py:low",
                        "--max-completion-tokens",
                        "3",
                        file,
                        "t.jinja",
                    ),
                    ("data", "stats", "rows.jsonl", "--model", "model"),
                    ("generate", "model", "--prompt", "hi", "--max-tokens", "3"),
                ]
            )
        )
        names = ("rows.jsonl", "talks.jsonl", "reward.py")
        place = "t.jinja" if file in command else "model/chat_template.jinja"
        return Case("templates", command, {"model": "model", **{name: name for name in names}}, {place: content})

    return one()
