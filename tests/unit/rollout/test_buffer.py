"""The buffer: index order, pinned versions, failure, and its one number of state."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.metrics import resolve
from groupwise.rollout import Buffer


def buffer(per_step: int = 2, lag: int = 0) -> Buffer:
    return Buffer(prompts_per_step=per_step, max_off_policy_steps=lag)


def test_groups_come_in_index_order_whatever_the_order_of_arrival(make_group: Any) -> None:
    async def run() -> list[int]:
        held, order = buffer(3), list(range(9))
        random.Random(1).shuffle(order)
        for index in order:
            held.put(make_group(index, [1.0]))
        return [group.index for _ in range(3) for group in await held.take()]

    assert asyncio.run(run()) == list(range(9))


def test_take_waits_for_the_last_group_of_its_step(make_group: Any) -> None:
    async def run() -> None:
        held = buffer(2)
        held.put(make_group(1, [1.0]))
        held.put(make_group(2, [1.0]))
        waiting = asyncio.create_task(held.take())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert resolve(held.metrics()) == {"buffer/groups_waiting": 2.0}
        held.put(make_group(0, [1.0]))
        assert [group.index for group in await waiting] == [0, 1]
        assert held.next_index == 2
        assert resolve(held.metrics()) == {"buffer/groups_waiting": 1.0}

    asyncio.run(run())


def test_a_failure_wakes_the_waiting_take_and_the_first_one_counts() -> None:
    async def run() -> None:
        held = buffer()
        waiting = asyncio.create_task(held.take())
        await asyncio.sleep(0)
        held.fail(RuntimeError("first"))
        held.fail(RuntimeError("second"))
        with pytest.raises(RuntimeError, match="first"):
            await waiting
        with pytest.raises(RuntimeError, match="first"):
            await held.take()

    asyncio.run(run())


def test_a_step_that_is_complete_is_given_despite_a_later_failure(make_group: Any) -> None:
    async def run() -> None:
        held = buffer(1)
        held.put(make_group(0, [1.0]))
        held.fail(RuntimeError("group 1 will not come"))
        assert (await held.take())[0].index == 0
        with pytest.raises(RuntimeError):
            await held.take()

    asyncio.run(run())


def test_the_same_group_twice_and_one_too_late_are_bugs(make_group: Any) -> None:
    async def run() -> None:
        held = buffer(1)
        held.put(make_group(0, [1.0]))
        with pytest.raises(AssertionError, match="twice"):
            held.put(make_group(0, [1.0]))
        await held.take()
        with pytest.raises(AssertionError, match="after its step"):
            held.put(make_group(0, [1.0]))

    asyncio.run(run())


@given(per_step=st.integers(1, 9), lag=st.integers(0, 4), index=st.integers(0, 200))
def test_a_group_is_pinned_to_the_version_its_step_allows(per_step: int, lag: int, index: int) -> None:
    step, version = index // per_step, buffer(per_step, lag).pin(index)
    assert 0 <= version <= step
    assert version == step - lag or (version == 0 and step < lag)


def test_a_restored_buffer_goes_on_at_its_position(make_group: Any) -> None:
    async def run() -> None:
        held = buffer(2)
        for index in range(3):
            held.put(make_group(index, [1.0]))
        await held.take()
        state = held.state_dict()
        assert state == {"next_index": 2, "step": 1}
        other = buffer(2)
        other.put(make_group(0, [1.0]))
        other.load_state_dict(state)
        assert other.next_index == 2
        assert resolve(other.metrics()) == {"buffer/groups_waiting": 0.0}
        for index in (2, 3):
            other.put(make_group(index, [1.0]))
        assert [group.index for group in await other.take()] == [2, 3]

    asyncio.run(run())


def test_a_step_is_extended_by_groups_of_its_own_version(make_group: Any) -> None:
    async def run() -> None:
        held = buffer(2)
        assert [held.step_of(k) for k in range(5)] == [0, 0, 1, 1, 2]
        for index in range(2):
            held.put(make_group(index, [1.0]))
        await held.take()
        held.extend(3)
        assert [held.step_of(k) for k in range(2, 8)] == [0, 0, 0, 1, 1, 2]
        with pytest.raises(AssertionError, match="once its groups are taken"):
            held.extend(1)
        for index in (4, 2, 3):
            held.put(make_group(index, [1.0]))
        assert [group.index for group in await held.take()] == [2, 3, 4]
        assert held.state_dict() == {"next_index": 5, "step": 1}
        other = buffer(2)
        other.load_state_dict(held.state_dict())
        assert [other.pin(k) for k in range(5, 9)] == [1, 1, 2, 2]

    asyncio.run(run())


def test_with_a_lag_no_step_is_extended(make_group: Any) -> None:
    async def run() -> None:
        held = buffer(1, lag=1)
        held.put(make_group(0, [1.0]))
        await held.take()
        with pytest.raises(AssertionError, match="other weights"):
            held.extend(1)

    asyncio.run(run())
