"""The kinds of hostile input, each a strategy over a world; the same seed gives the same inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hostile_folders
import hostile_rows
import hostile_templates
from cases import SMALL, SMALL_SFT, Case
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from values import damaged_bytes, plain_texts, scalars, texts, values

RECIPE = """[model]
path = "model"
device = "cpu"
[data]
train = "rows.jsonl"
[[reward]]
name = "reward.py:low"
weight = 1.0
[rollout]
group_size = 2
prompts_per_step = 2
max_completion_tokens = 4
[optim]
lr = 1e-4
[train]
steps = 1
output = "out"
[tracking]
backends = ["jsonl"]
"""


def recipes(world: Path) -> st.SearchStrategy[Case]:
    from groupwise.config.keys import describe_keys

    names = [key.name for key in describe_keys()]

    @st.composite
    def one(draw: st.DrawFn) -> Case:
        lines = RECIPE.splitlines()
        for _ in range(draw(st.integers(0, 3))):
            name = draw(st.sampled_from(names))
            section, _, key = name.rpartition(".")
            value = draw(st.one_of(values, scalars))
            written = f"{key or name} = {_toml(value)}"
            head = "[[reward]]" if section.startswith("reward") else f"[{section}]"
            place = lines.index(head) + 1 if head in lines else len(lines)  # pyright: ignore[reportArgumentType]
            if head not in lines and section:
                lines.append(head)  # pyright: ignore[reportArgumentType]
                place = len(lines)
            lines = [line for line in lines if not line.startswith(f"{key} =")] if draw(st.booleans()) else lines
            place = min(place, len(lines))
            lines.insert(place, written)  # pyright: ignore[reportArgumentType]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        if draw(st.integers(0, 3)) == 0:
            content = draw(damaged_bytes(content))
        command = draw(st.sampled_from(["train", "train", "sft"]))
        small = SMALL_SFT if command == "sft" else SMALL
        ending = draw(st.sampled_from([("--dry-run",), ("--dry-run",), (*small, "--output", "out")]))
        data = "worked.jsonl" if command == "sft" else "rows.jsonl"
        argv = (command, "recipe.toml", "--model", "model", "--data", data, *ending)
        copies = {"model": "model", "reward.py": "reward.py", data: data}
        return Case("recipes", argv, copies, {"recipe.toml": content}, frozenset({0, 1, 2}))

    return one()


def commands(world: Path) -> st.SearchStrategy[Case]:
    """Every command with its own flags, some odd, and strangers."""
    from groupwise.cli.app import COMMANDS
    from groupwise.config.keys import describe_keys

    copies = {
        "model": "model",
        "run": "run",
        "rows.jsonl": "rows.jsonl",
        "reward.py": "reward.py",
        "talks.jsonl": "talks.jsonl",
    }
    places = [
        "model",
        "run",
        "run/final",
        "rows.jsonl",
        "reward.py",
        "nowhere",
        "model/config.json",
        "run@1",
        "run@best",
    ]
    words = st.one_of(
        st.sampled_from(places), plain_texts.filter(lambda text: "\x00" not in text), st.integers(-2, 9).map(str)
    )
    names = [key.name for key in describe_keys()]
    commands = [command for command in COMMANDS if command.name not in ("quickstart",)]

    @st.composite
    def one(draw: st.DrawFn) -> Case:
        command = draw(st.sampled_from(commands))
        argv = list(command.name.split())
        if draw(st.integers(0, 3)):  # mostly what would work, and then one word of it is another
            argv += VALID.get(command.name, ())
            if len(argv) > 2 and draw(st.booleans()):
                argv[draw(st.integers(len(command.name.split()), len(argv) - 1))] = draw(words)
            if draw(st.booleans()):
                return Case("commands", tuple(argv), copies, {}, frozenset({0, 1, 2}))
        flags = [flag for flag in command.parser().flags if flag not in ("-h", "--help", "--debug")]
        for _ in range(draw(st.integers(0, 2))):
            argv.append(draw(words))
        for _ in range(draw(st.integers(0, 4))):
            flag = draw(
                st.one_of(
                    st.sampled_from(flags or ["--x"]), st.sampled_from(names).map(lambda name: f"--{name}"), words
                )
            )
            argv += [flag, draw(words)] if draw(st.booleans()) else [f"{flag}={draw(words)}"]
        if command.name in ("train", "sft"):
            argv += ["--dry-run"] if draw(st.booleans()) else list(SMALL if command.name == "train" else SMALL_SFT)
        if command.name in ("generate", "chat"):
            argv += ["--max-tokens", "4"]
        if command.name == "eval":
            argv += ["--max-completion-tokens", "4", "--samples", "1"]
        return Case(
            "commands", tuple(argv), copies, {}, frozenset({0, 1, 2}) if "export" in argv else frozenset({0, 2})
        )

    return one()


VALID: Mapping[str, tuple[str, ...]] = {
    "train": ("--model", "model", "--data", "rows.jsonl", "--reward", "reward.py:low", "--output", "out", *SMALL),
    "sft": ("--model", "model", "--data", "talks.jsonl", "--output", "out", *SMALL_SFT),
    "xtuner": ("reward.py", "native", "model", "rows.jsonl"),
    "eval": ("model", "--data", "rows.jsonl", "--reward", "reward.py:low", "--max-completion-tokens", "4"),
    "generate": ("model", "--prompt", "hi", "--max-tokens", "4"),
    "chat": ("model", "--max-tokens", "4"),
    "data gsm8k": ("--input-dir", ".", "--out-dir", "out"),
    "data stats": ("rows.jsonl", "--model", "model"),
    "model tiny": ("--out", "out", "--tokenizer-from", "rows.jsonl", "--size", "0.1m"),
    "export hf": ("run", "--out", "out"),
    "export gguf": ("run", "--out", "out.gguf", "--pre", "gpt-2"),
    "export modelfile": ("model/config.json", "--source", "run", "--out", "Modelfile"),
    "export card": ("run", "--out", "card.md"),
    "export push": ("run/final", "--repo", "a/b", "--dry-run"),
    "export verify": ("model", "--source", "run"),
    "config": ("optim",),
}


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if value is None:
        return '"none"'
    if isinstance(value, float):
        return str(value)
    return json.dumps(value)


KINDS: Mapping[str, Callable[[Path], st.SearchStrategy[Case]]] = {
    "recipes": recipes,
    "rows": hostile_rows.rows,
    "templates": hostile_templates.templates,
    "folders": hostile_folders.folders,
    "runs": hostile_folders.runs,
    "commands": commands,
}


def cases_of(kind: str, world: Path, count: int, number: int) -> list[Case]:
    """`count` inputs of a kind: hypothesis makes them, and shrinks and keeps none."""
    found: list[Case] = []

    @seed(f"{number}/{kind}")
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(KINDS[kind](world))
    def collect(case: Case) -> None:
        if len(found) < count:
            found.append(case)

    collect()
    return found


def preload() -> None:
    """Import what commands import, so that a fork has it."""
    import importlib

    for name in (
        *("groupwise.cli.app", "groupwise.launch.run", "groupwise.sft", "groupwise.model.loading"),
        *("groupwise.export.hf", "groupwise.export.verify", "groupwise.export.card", "groupwise.export.push"),
        *("groupwise.evaluation.evaluator", "transformers.models.qwen3.modeling_qwen3", "groupwise.data.stats"),
        *("peft", "pyarrow.parquet", "groupwise.compat.xtuner.program", "jinja2", "groupwise.quickstart.tiny_model"),
    ):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    import torch

    torch.set_num_threads(1)


__all__ = ["KINDS", "cases_of", "preload", "texts"]
