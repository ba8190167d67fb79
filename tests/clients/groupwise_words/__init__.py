"""A taskset of verifiers v1 for tests: say a word. Its reward counts what was written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import verifiers.v1 as vf


class WordData(vf.TaskData):
    answer: str = ""


class WordTask(vf.Task[WordData]):
    @vf.reward(weight=1.0)
    async def written(self, trace: Any) -> float:
        return float(sum(sum(branch.sampled_mask) for branch in trace.branches))


class WordTaskset(vf.Taskset[WordTask]):
    def load(self) -> Iterable[WordTask]:
        for word in ("red", "blue"):
            yield WordTask(WordData(prompt=f"say {word}:", answer=word), self.config.task)


__all__ = ["WordTaskset"]
