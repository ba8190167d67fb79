"""The experts of a group's prompt: the first sample's, for all samples with that prompt."""

from __future__ import annotations

from dataclasses import replace

from groupwise.inputs import ModelInput, SampleKey
from groupwise.metrics import Mean
from groupwise.rollout.prompt_routes import with_one_choice
from groupwise.sides import Kept, Routes, Sides
from groupwise.types import Completion, Prompt, Rollout, RolloutGroup, Segment

PROMPT = Prompt("p", (), "2+2=", ModelInput.of((4, 5, 6)))


def rollout(index: int, rows: str, *, kept: bool = False) -> Rollout:
    """Two turns of two and one token, with one letter a row: three of the prompt, one, then two of the second turn."""
    data = rows.encode()
    key = SampleKey("p", 0, index)
    sides = Sides(Routes(data[:4], "uint8", 1, 1), Kept.of([(7,), (2,)]) if kept else None)
    first = Segment.turn(Completion(key, (7, 2), (-0.1, -0.2), (0, 0), "ab", "stop", sides=sides))
    answer = Segment.answer(ModelInput.of((9,)), "4", (), version=0)
    last = Sides(Routes(data[4:], "uint8", 1, 1, first=4))
    second = Segment.turn(Completion(key, (8,), (-0.3,), (0,), "c", "stop", sides=last))
    return Rollout(key, (first, answer, second), "stop")


def rows_of(group: RolloutGroup) -> list[str]:
    return ["" if r.sides.routes is None else r.sides.routes.data.decode() for r in group.rollouts]


def test_the_first_ones_stand_for_all_and_the_others_are_counted() -> None:
    group = RolloutGroup(0, PROMPT, (rollout(0, "abcdef"), rollout(1, "abxgh i"[:6], kept=True), rollout(2, "abcjkl")))
    [found], metrics = with_one_choice([group])
    assert rows_of(found) == ["abcdef", "abcgh ", "abcjkl"]
    assert metrics == {"moe/prompt_differs": Mean(1.0, 6.0)}
    assert found.rollouts[1].segments[0].sides.kept is not None


def test_another_prompt_and_a_failed_rollout_have_their_own() -> None:
    other = replace(rollout(1, "xyzdef"), prompt=ModelInput.of((1, 2, 3)))
    failed = replace(rollout(2, "qqqdef"), status="failed")
    group = RolloutGroup(0, PROMPT, (failed, rollout(0, "abcdef"), other))
    [found], metrics = with_one_choice([group])
    assert rows_of(found) == ["qqqdef", "abcdef", "xyzdef"]
    assert metrics == {}


def test_without_routes_nothing_changes() -> None:
    bare = Rollout.one_turn(Completion(SampleKey("p", 0, 0), (7,), (-0.1,), (0,), "a", "stop"))
    group = RolloutGroup(0, PROMPT, (bare, bare))
    assert with_one_choice([group]) == ((group,), {})
