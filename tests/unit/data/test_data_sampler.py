from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.data import PromptSampler
from groupwise.errors import CheckpointError, DataError
from groupwise.inputs import ModelInput
from groupwise.protocols import Stateful
from groupwise.types import Prompt


def prompts(n: int, *, tag: str = "") -> tuple[Prompt, ...]:
    return tuple(Prompt(uid=f"{i:06d}-{tag}", messages=(), text=str(i), input=ModelInput.of((i,))) for i in range(n))


def sampler(n: int, *, seed: int = 0, shuffle: bool = True) -> PromptSampler:
    return PromptSampler(prompts(n), seed=seed, shuffle=shuffle)


def order(source: PromptSampler, start: int, stop: int) -> list[int]:
    return [source.prompt_at(k).token_ids[0] for k in range(start, stop)]


@given(n=st.integers(1, 40), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6), shuffle=st.booleans())
def test_every_epoch_has_every_prompt_once(n: int, seed: int, epoch: int, shuffle: bool) -> None:
    seen = order(sampler(n, seed=seed, shuffle=shuffle), epoch * n, (epoch + 1) * n)
    assert sorted(seen) == list(range(n))
    if not shuffle:
        assert seen == list(range(n))


@given(
    n=st.integers(1, 12), seed=st.integers(0, 99), steps=st.lists(st.integers(0, 9), max_size=6), cut=st.integers(0, 6)
)
def test_a_resumed_stream_is_the_unbroken_one(n: int, seed: int, steps: list[int], cut: int) -> None:
    unbroken, broken = sampler(n, seed=seed), sampler(n, seed=seed)
    whole = [item for size in steps for item in unbroken.take(size)]
    parts = [item for size in steps[:cut] for item in broken.take(size)]
    resumed = sampler(n, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    parts += [item for size in steps[cut:] for item in resumed.take(size)]
    assert parts == whole
    assert [item.index for item in parts] == list(range(sum(steps)))


@given(ks=st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_prompt_at_does_not_depend_on_what_was_asked_before(ks: list[int]) -> None:
    source = sampler(7, seed=3)
    assert [source.prompt_at(k) for k in ks] == [sampler(7, seed=3).prompt_at(k) for k in ks]


def test_epochs_and_seeds_differ() -> None:
    source = sampler(50)
    assert order(source, 0, 50) != order(source, 50, 100)
    assert order(source, 0, 50) != order(sampler(50, seed=1), 0, 50)
    assert order(source, 0, 50) != list(range(50))


def test_the_order_is_the_one_of_old_runs() -> None:
    # Written down once: a change here would break the resuming of every saved run.
    assert order(sampler(8, seed=7), 0, 16) == [0, 4, 3, 1, 2, 6, 7, 5, 2, 7, 6, 4, 0, 3, 1, 5]


def test_places_are_even() -> None:
    n, epochs = 5, 4000
    source = sampler(n, seed=11)
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        for place, prompt in enumerate(order(source, epoch * n, (epoch + 1) * n)):
            counts[place, prompt] += 1
    expected = epochs / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 45, "16 degrees of freedom: above 45 with probability 1e-4"


def test_position_and_epoch() -> None:
    source = sampler(4)
    assert (source.position, source.epoch, source.num_prompts) == (0, 0.0, 4)
    assert [item.index for item in source.take(6)] == [0, 1, 2, 3, 4, 5]
    assert (source.position, source.epoch) == (6, 1.5)
    assert source.take(0) == []
    assert isinstance(source, Stateful)


def test_other_data_seed_or_order_is_refused() -> None:
    state = sampler(4).state_dict()
    with pytest.raises(CheckpointError, match=r"other data \(4 prompts, now 5\)"):
        sampler(5).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other data"):
        PromptSampler(prompts(4, tag="x"), seed=0, shuffle=True).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other data"):
        PromptSampler(prompts(4)[::-1], seed=0, shuffle=True).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed = 0, but it is 1 now"):
        sampler(4, seed=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match="shuffle = True, but it is False now"):
        sampler(4, shuffle=False).load_state_dict(state)


@pytest.mark.parametrize("position", [-1, None, "3", 1.5, True])
def test_a_bad_position_is_refused_and_changes_nothing(position: Any) -> None:
    source = sampler(4)
    source.take(3)
    with pytest.raises(CheckpointError, match="expected a whole number"):
        source.load_state_dict({**source.state_dict(), "position": position})
    assert source.position == 3


def test_no_prompts() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptSampler((), seed=0, shuffle=True)
