"""The checkpoint of the best evaluation, and one part of a checkpoint read alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.checkpoint import list_checkpoints, load_checkpoint, mark_best, read_part, save_checkpoint
from groupwise.errors import CheckpointError


class Part:
    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def loaded(path: Path, *names: str) -> dict[str, Any]:
    parts = {name: Part() for name in names}
    load_checkpoint(path, parts)
    return {name: part.state for name, part in parts.items()}


def save(root: Path, step: int, *, keep: int, best: int | None) -> Path:
    return save_checkpoint(root, step, {"policy": Part({"value": step})}, keep=keep, best=best)


def in_child(action: Callable[[], None]) -> int:
    """Run in a forked process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            torch.set_num_threads(1)  # the parent's other threads are not there, and would be waited for
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps(root: Path) -> list[str]:
    return [path.name.removeprefix("step_") for path in list_checkpoints(root)]


def test_the_best_is_kept_beyond_the_newest_until_another_is_better(tmp_path: Path):
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2)):
        save(tmp_path, step, keep=2, best=best)
    assert steps(tmp_path) == ["000002", "000004", "000005"]
    assert (tmp_path / "best").read_text() == "step_000002\n"
    save(tmp_path, 6, keep=2, best=6)
    assert steps(tmp_path) == ["000005", "000006"]
    assert (tmp_path / "best").read_text() == "step_000006\n"
    mark_best(tmp_path, 7)
    mark_best(tmp_path, None)
    assert (tmp_path / "best").read_text() == "step_000006\n", "never at what is not there"
    mark_best(tmp_path, 5)
    assert (tmp_path / "best").read_text() == "step_000005\n"


@pytest.mark.parametrize("kept", range(1, 40))
def test_a_kill_while_the_best_is_saved_leaves_one(tmp_path: Path, kept: int):
    """The process ends at its kept-th change of the disk; what `best` names is complete at any time."""
    save(tmp_path, 1, best=1, keep=1)
    save(tmp_path, 2, best=1, keep=1)

    def dying() -> None:
        count = 0
        for name in ("replace", "unlink", "rmdir", "fsync"):
            real = getattr(os, name)

            def stopping(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == kept:
                    os._exit(7)
                return real(*args, **kwargs)

            setattr(os, name, stopping)
        save(tmp_path, 3, best=3, keep=1)

    in_child(dying)
    best = (tmp_path / "best").read_text().strip()
    assert best in ("step_000001", "step_000003")
    assert loaded(tmp_path / best, "policy")["policy"]["value"] == int(best[-1])
    save(tmp_path, 3, best=3, keep=1)
    assert (steps(tmp_path), (tmp_path / "best").read_text()) == (["000003"], "step_000003\n")


def test_one_part_is_read_alone_and_verified(tmp_path: Path):
    state = {"a": {"x": torch.arange(3), "n": 5}, "b": torch.ones(4)}
    path = save_checkpoint(tmp_path, 1, {"policy": Part(state), "other": Part({"n": 1})}, keep=1)
    assert read_part(path, "policy", "a", "n") == 5
    assert read_part(path, "policy", "no", "such") is None
    assert torch.equal(read_part(path, "policy", "a")["x"], torch.arange(3))
    assert torch.equal(read_part(path, "policy")["b"], torch.ones(4))
    (path / "other.json").write_text("damaged")
    read_part(path, "policy")
    with pytest.raises(CheckpointError, match="expected also sampler"):
        read_part(path, "sampler")
    content = bytearray((path / "policy.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "policy.safetensors").write_bytes(content)
    assert read_part(path, "policy", "a", "n") == 5
    with pytest.raises(CheckpointError, match=r"policy\.safetensors: the content has changed"):
        read_part(path, "policy", "b")
