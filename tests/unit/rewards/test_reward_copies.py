"""No call of a reward sees what another one changed."""

from __future__ import annotations

import asyncio
import copy
import datetime
import decimal
import threading
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from groupwise.inputs import ModelInput, SampleKey
from groupwise.rewards import RewardScorer
from groupwise.rewards.copies import independent
from groupwise.types import Completion, Prompt, Rollout

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20) | st.tuples(inner, inner)
    ),
    max_leaves=60,
)


def _mutable(value: Any) -> list[int]:
    """Identities of everything in it that can be changed."""
    if isinstance(value, dict):
        return [id(value), *(i for entry in value.values() for i in _mutable(entry))]
    if isinstance(value, list):
        return [id(value), *(i for entry in value for i in _mutable(entry))]
    return [i for entry in value for i in _mutable(entry)] if isinstance(value, tuple) else []


@given(plain)
def test_copies_are_equal_and_share_nothing_that_can_be_changed(value: Any) -> None:
    copies = independent(value, 3)
    assert copies == [value] * 3
    assert all(type(one) is type(value) for one in copies)
    identities = [i for one in (value, *copies) for i in _mutable(one)]
    assert len(identities) == len(set(identities))


MANY = [{"id": i, "tags": ["a", None, 1.5, True]} for i in range(40)]


@pytest.mark.parametrize(
    "value",
    [
        np.arange(4),
        np.array([{"a": []}], dtype=object),
        torch.arange(4),
        [torch.ones(2), np.ones(2)],
        bytearray(b"abc"),
        {1, 2},
        OrderedDict(a=[1]),
        defaultdict(list, a=[1]),
        {1: [2], None: {"x": [3]}},
        (1, [2]),
        [datetime.datetime(2026, 1, 1), decimal.Decimal("1.5"), [1]],
        MANY,
        [*MANY, b"bytes"],
        [*MANY, np.arange(3)],
        [*MANY, {"list": bytearray(b"x")}],
    ],
    ids=lambda value: str(value)[:30],
)
def test_objects_of_all_kinds(value: Any) -> None:
    before = copy.deepcopy(value)
    one, other = independent(value, 2)
    assert type(one) is type(value)
    assert shown(one) == shown(before)
    assert one is not value
    assert one is not other
    _change(one)
    assert shown(value) == shown(before)
    assert shown(other) == shown(before)


def shown(value: Any) -> str:
    return repr(sorted(value)) if isinstance(value, set) else repr(value)  # a set has no order


def _change(value: Any) -> None:
    if isinstance(value, dict):
        for entry in value.values():
            _change(entry)
        value.clear()
    elif isinstance(value, list):
        for entry in value:
            _change(entry)
        value.clear()
    elif isinstance(value, tuple):
        for entry in value:
            _change(entry)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        _change(value[0])
    elif isinstance(value, np.ndarray | torch.Tensor):
        value[:] = 9
    elif isinstance(value, set | bytearray):
        value.clear()


def test_pictures_texts_and_what_cannot_be_copied() -> None:
    picture = Image.new("RGB", (2, 2))
    (drawn,) = independent(picture, 1)
    drawn.putpixel((0, 0), (255, 0, 0))
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    text = "x" * 100
    assert all(one is text for one in independent(text, 3))
    lock = threading.Lock()
    assert independent(lock, 2) == [lock, lock]
    endless: list[Any] = [1]
    endless.append(endless)
    (one,) = independent(endless, 1)
    for _ in range(20):
        assert one is not endless
        one = one[1]
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert independent(deep, 1)[0] is deep


ROW = {"spec": {"modulus": 3}, "allowed": ["a", "b"], "picture": np.zeros(2)}


def prompt(row: dict[str, Any]) -> Prompt:
    messages = ({"role": "user", "content": "?", "tools": [{"name": "add"}]},)
    return Prompt("row-1", messages, "?", ModelInput.of((1,)), columns=row)


def test_a_reward_that_changes_all_it_gets_scores_identical_answers_the_same_in_every_epoch() -> None:
    row = copy.deepcopy(ROW)
    asked = prompt(row)

    def uses_up(
        completions: Any, prompts: Any, completion_ids: Any, spec: Any, allowed: Any, picture: Any, own: Any = None
    ) -> list[float]:
        found = []
        for i in range(len(completions)):
            left = len(allowed[i]) + spec[i].pop("modulus") + len(prompts[i][0].pop("tools")) + picture[i].sum()
            allowed[i].clear()
            picture[i][:] = 7
            completions[i].clear()
            completion_ids[i].clear()
            found.append(float(left))
        return found

    async def too(completions: Any, **columns: Any) -> list[float]:
        return uses_up(completions, **columns)

    scorer = RewardScorer([], functions=[uses_up, too])
    done = [Rollout.one_turn(Completion(SampleKey("r", 0, i), (1,), (0.0,), (0,), "same", "stop")) for i in range(4)]
    for _ in range(3):
        scores = asyncio.run(scorer.score(asked, done))
        assert [s.rewards for s in scores] == [{"uses_up": 6.0, "too": 6.0}] * 4, scores[0].cause
    assert repr(row) == repr(ROW)
    assert asked.messages[0]["tools"] == [{"name": "add"}]


def test_args_are_new_for_every_call(tmp_path: Any) -> None:
    path = tmp_path / "counts.py"
    path.write_text(
        "def f(completions, seen):\n    seen['n'].append(1)\n    return [float(len(seen['n']))] * len(completions)\n"
    )
    from groupwise.config import RewardConfig

    config = RewardConfig.model_validate({"name": f"{path}:f", "args": {"seen": {"n": []}}})
    scorer = RewardScorer([config])
    done = [Rollout.one_turn(Completion(SampleKey("r", 0, 0), (1,), (0.0,), (0,), "a", "stop"))]
    assert [asyncio.run(scorer.score(prompt({}), done))[0].reward for _ in range(3)] == [1.0, 1.0, 1.0]
    assert config.args == {"seen": {"n": []}}
