"""What one input of the fuzzer is, and the small world that inputs are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REWARD = """
def low(completion_ids, **columns):
    return [sum(token < 130 for token in ids) / max(1, len(ids)) for ids in completion_ids]
"""
SMALL = (
    *("--rollout.group_size", "2", "--rollout.prompts_per_step", "2", "--rollout.max_completion_tokens", "4"),
    *("--train.steps", "1", "--tracking.backends", "jsonl", "--model.device", "cpu"),
)
SMALL_SFT = ("--train.steps", "1", "--tracking.backends", "jsonl", "--model.device", "cpu")


@dataclass(frozen=True)
class Case:
    """One command in a folder of its own.

    Attributes:
        copies: name in the folder -> place in the world, a file or a folder.
        files: name in the folder -> its content, laid over the copies; None removes it.
        codes: exit codes that are right.

    Example:
        Case("rows", ("data", "stats", "rows.jsonl"), files={"rows.jsonl": b"{"})
    """

    kind: str
    argv: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    codes: frozenset[int] = frozenset({0, 2})

    def lay_out(self, world: Path, folder: Path) -> None:
        import shutil

        for name, source in self.copies.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (world / source).is_dir():
                shutil.copytree(world / source, target, symlinks=True)
            else:
                shutil.copyfile(world / source, target)
        for name, content in self.files.items():
            target = folder / name
            if content is None:
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)


def make_world(world: Path) -> None:
    """A model, rows, a recipe, and finished runs: of all weights, of an adapter, supervised."""
    from groupwise.cli import main
    from groupwise.quickstart.tiny_model import build_tiny_model

    words = ["red", "green", "blue", "Käse", "日本", "one", "two", "three"]
    build_tiny_model(world / "model", texts=words, size="0.1m", vocab_size=259)
    chats = [{"prompt": [{"role": "user", "content": f"say {word}"}], "answer": word} for word in words]
    worked = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in words]
    talks = [{"messages": [*row["prompt"], {"role": "assistant", "content": row["answer"]}]} for row in chats]
    for name, rows in (("rows", chats), ("worked", worked), ("talks", talks)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (world / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (world / "reward.py").write_text(REWARD)
    common = ("--model", "model", "--data", "rows.jsonl", "--reward", "reward.py:low", "--train.save_every", "1")
    runs = (
        ("train", *common, "--output", "run", *SMALL, "--train.steps", "2"),
        ("train", *common, "--output", "lora", "--lora.rank", "2", *SMALL),
        ("sft", "--model", "model", "--data", "worked.jsonl", "--output", "sft", *SMALL_SFT, "--train.save_every", "1"),
    )
    for run in runs:
        assert main(run) == 0, f"groupwise {' '.join(run)} failed"


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()
