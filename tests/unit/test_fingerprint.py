from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from groupwise import fingerprint
from groupwise.batches import TrainingRow
from groupwise.fingerprint import code_facts, file_digest, prompt_facts, supervised_facts, value_digest
from groupwise.inputs import ModelInput
from groupwise.types import Prompt


def prompt(uid: str = "a", **values: Any) -> Prompt:
    return Prompt(uid=uid, messages=(), text="2+2?", input=ModelInput.of((1, 2)), **values)


def changed(before: dict[str, str], now: dict[str, str]) -> set[str]:
    return {name for name in {*before, *now} if before.get(name) != now.get(name)}


def test_each_thing_of_a_row_has_its_own_fact():
    def facts(*prompts: Prompt) -> dict[str, str]:
        return prompt_facts(prompts, num_rows=2)

    one, two = prompt(columns={"answer": "4", "x": 1}), prompt("b", columns={"answer": "5", "x": 1})
    base = facts(one, two)
    assert changed(base, facts(prompt(columns={"answer": "7", "x": 1}), two)) == {"data column answer"}
    assert changed(base, facts(prompt(columns={"answer": "4"}), two)) == {"data column x"}
    assert changed(base, facts(prompt(columns=one.columns, data_source="other"), two)) == {"data sources"}
    assert changed(base, facts(two, one)) == {"data order", "data column answer"}
    assert changed(base, prompt_facts([one, two], num_rows=3)) == {"data rows"}


def test_supervised_rows():
    def row(*tokens: int) -> TrainingRow:
        n = len(tokens)
        zeros = (0.0,) * n
        return TrainingRow(
            group=0,
            prompt=ModelInput.of((1,)),
            follows=ModelInput.of(tokens),
            loss_mask=(True,) * n,
            advantages=zeros,
            logprobs=zeros,
        )

    base = supervised_facts([row(2), row(3)], num_rows=2)
    assert changed(base, supervised_facts([row(3), row(2)], num_rows=2)) == {"data tokens"}
    assert changed(base, supervised_facts([row(2)], num_rows=2)) == {"data rows", "data tokens", "data learned tokens"}


class Image:
    def tobytes(self) -> bytes:
        return b"pixels"


@pytest.mark.parametrize(
    "make",
    [lambda: {"a": [1, "ü\udcff", None, b"x"]}, lambda: {1: 2, "a": 3}, lambda: {"s"}, Image, lambda: torch.ones(2)],
)
def test_equal_values_have_one_digest_and_others_another(make: Any):
    assert value_digest(make()) == value_digest(make())
    assert value_digest(make()) != value_digest([make()])


@pytest.mark.parametrize("place", [0, 5_000, 123_456, -1])
def test_a_large_file_is_sampled_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int):
    content = bytearray(200_000)
    file = tmp_path / "w"
    file.write_bytes(content)
    whole = file_digest(file)
    monkeypatch.setattr(fingerprint, "WHOLE_FILE", 1)
    monkeypatch.setattr(fingerprint, "_EDGE", 1_000)
    monkeypatch.setattr(fingerprint, "_BLOCK", 500)
    monkeypatch.setattr(fingerprint, "_STRIDE", 123_400)
    sampled = file_digest(file)
    content[place] = 1
    file.write_bytes(content)
    assert (file_digest(file) == sampled) == (place == 5_000), "between the samples"
    monkeypatch.undo()
    assert file_digest(file) != whole


@pytest.mark.parametrize(
    ("adapter", "compared", "frozen", "decides"),
    [(True, False, False, True), (False, True, False, True), (False, False, True, True), (False, False, False, False)],
)
def test_of_a_model_in_memory_what_a_checkpoint_does_not_replace(
    adapter: bool, compared: bool, frozen: bool, decides: bool
):
    def digest(value: float) -> str:
        module = nn.Linear(2, 2)
        nn.init.constant_(module.weight, value)
        nn.init.constant_(module.bias, 0.0)
        module.weight.requires_grad_(not frozen)
        return fingerprint._weights_in_memory(module, adapter=adapter, compared=compared)

    assert digest(1.0) == digest(1.0)
    assert (digest(1.0) != digest(2.0)) is decides


def test_the_code_of_given_functions():
    def one(completions: list[str]) -> list[float]:
        return [1.0 for _ in completions]

    def two(completions: list[str]) -> list[float]:
        return [2.0 for _ in completions]

    from groupwise.config import Config

    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "t.jsonl"}})
    assert code_facts(config, [one]) == code_facts(config, [one])
    assert changed(code_facts(config, [one]), code_facts(config, [two])) == {"reward function 0"}
