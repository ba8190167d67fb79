"""Trajectory and ledger rows: one per rollout, one per group, and a digest that notices every change."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from groupwise.algorithms import build_algorithm
from groupwise.batches import Credit, TrainingBatch
from groupwise.config import AlgorithmConfig
from groupwise.files import json_line
from groupwise.inputs import ImagePiece, ImageSource, ModelInput, SampleKey, TokenPiece
from groupwise.rollout.batch import BatchShape, build_batch
from groupwise.rollout.records import ledger_rows, trajectory_rows
from groupwise.sides import NO_SIDES, Kept, Routes, Sides
from groupwise.trajectories import ImageRow, SegmentRow, TrajectoryRow, from_json, to_json
from groupwise.types import Completion, Prompt, Rollout, RolloutGroup, Segment


def digest(group: RolloutGroup) -> str:
    return next(ledger_rows((group,), step=1))["digest"]


def test_one_trajectory_row_per_rollout(make_group: Any) -> None:
    groups = (make_group(4, [1.0, 0.0]), make_group(5, ["failed", 0.5]))
    shape = BatchShape(1, 9)
    batch = build_batch(
        groups, build_algorithm(AlgorithmConfig.model_validate({})), shape=shape, reward_weights={"r": 1.0}
    )
    rows = [json.loads(json_line(row)) for row in trajectory_rows(batch, step=3)]
    assert [(row["group"], row["sample_index"]) for row in rows] == [(4, 0), (4, 1), (5, 0), (5, 1)]
    assert {row["step"] for row in rows} == {3}
    assert rows[0]["advantage"] > 0 > rows[1]["advantage"]
    assert rows[0]["uid"] == "p4"
    assert rows[0]["prompt"] == "prompt 4"
    assert rows[0]["completion"] == "answer 0"
    assert rows[0]["rewards"] == {"r": 1.0}
    assert rows[0]["prompt_tokens"] == 3
    assert rows[1]["completion_tokens"] == 3
    assert rows[0]["policy_version"] == 3
    assert rows[2]["status"] == "failed"
    assert rows[2]["cause"] == "engine: out of memory"
    assert rows[2]["reward"] is None
    assert rows[2]["advantage"] == 0
    assert rows[2]["boundary"] == "engine"
    assert rows[0]["segments"] == [{"by": "model", "tokens": 2, "chars": 8, "finish_reason": "stop"}]
    assert (rows[0]["format"], rows[0]["draw"], rows[0]["images"]) == (2, 0, [])


PROMPT = Prompt("000017-3fa9", (), "2+2=", ModelInput.of((4, 5)), data_source="sums")
ROUTES = Routes(b"experts" * 9, "uint8", layers=3, k=3)  # 7 rows
FIRST, SECOND = replace(ROUTES, data=ROUTES.data[:27]), replace(ROUTES, data=ROUTES.data[27:63], first=3)


def episode(**changes: Any) -> Rollout:
    """Two turns with an answer between them: 2 + 1 + 3 tokens."""
    key = SampleKey(PROMPT.uid, 4, 1)
    turn = Segment.turn(
        Completion(key, (7, 2), (-0.1, -0.3), (2, 2), "(2+2=", "stop", sides=Sides(FIRST, Kept.of([(7,), ()])))
    )
    said = ({"role": "tool", "content": "4"},)
    answer = Segment.answer(ModelInput.of((9,)), "4", said, version=2)
    last = Segment.turn(
        Completion(
            key,
            (8, 8, 1),
            (-1.0, -2.0, -3.0),
            (2, 3, 3),
            ") 4",
            "length",
            sides=Sides(SECOND, Kept.of([(8, 9), (8,), (1,)])),
        )
    )
    return Rollout(key, (replace(turn, reward=0.5), answer, last), "length", **changes)


def row_of(rollout: Rollout, credit: Credit = 0.25) -> TrajectoryRow:
    batch = TrainingBatch((RolloutGroup(17, PROMPT, (rollout,)),), ((credit,),), (), {})
    [written] = map(json_line, trajectory_rows(batch, step=9))
    row = from_json(json.loads(written))
    assert json_line(to_json(row)) == written
    return row


def test_a_row_has_turns_and_answers() -> None:
    row = row_of(episode(reward=1.5, rewards={"r": 1.0}))
    assert row.segments == (
        SegmentRow("model", "(2+2=", 2, finish_reason="stop", reward=0.5),
        SegmentRow("environment", "4", 1, messages=({"role": "tool", "content": "4"},)),
        SegmentRow("model", ") 4", 3, finish_reason="length"),
    )
    assert (row.step, row.group, row.uid, row.draw, row.sample_index) == (9, 17, "000017-3fa9", 4, 1)
    for name in ("token_ids", "logprobs", "policy_versions", "loss_mask"):
        assert getattr(row, name) == getattr(episode(), name), name
    assert (row.completion, row.completion_tokens) == ("(2+2=4) 4", 5)
    assert to_json(row)["policy_versions"] == [[2, 4], [3, 2]]
    assert row.loss_mask == (1, 1, 0, 1, 1, 1)


def test_what_turns_told_is_that_of_the_whole_rollout() -> None:
    """2 prompt tokens and 6 that follow: the last one was not run, and the second was with the second turn."""
    sides = episode().sides
    assert sides.routes is not None
    assert sides.kept is not None
    assert (sides.routes.rows, sides.routes.first) == (7, 0)
    assert sides.routes.data == ROUTES.data[:63]
    assert list(sides.kept) == [(7,), (), (), (8, 9), (8,), (1,)]
    assert episode() == replace(episode(), segments=tuple(replace(s, sides=NO_SIDES) for s in episode().segments))


def test_a_turn_that_told_nothing_leaves_nothing_known() -> None:
    whole = episode()
    silent = replace(whole, segments=(*whole.segments[:2], replace(whole.segments[2], sides=NO_SIDES)))
    assert not silent.sides


def test_routes_are_in_no_row() -> None:
    text = json_line(to_json(row_of(episode())))
    assert "routes" not in text
    assert "experts" not in text
    assert "kept" not in text
    assert "sides" not in text


def test_credit_is_its_mean_and_where_it_varies_the_list() -> None:
    assert (row_of(episode(), 0.1).advantage, row_of(episode(), 0.1).credit) == (0.1, None)
    equal = row_of(episode(), (0.1,) * 6)
    assert (equal.advantage, equal.credit) == (0.1, None), "to the bit, as a sum's share would not be"
    varied = row_of(episode(), (3.0, 0.0, 0.0, 0.0, -0.5, -1.0))
    assert (varied.advantage, varied.credit) == (0.25, (3.0, 0.0, 0.0, 0.0, -0.5, -1.0))
    assert to_json(varied)["credit"] == [3.0, 0.0, 0.0, 0.0, -0.5, -1.0]
    assert "credit" not in to_json(equal)


def test_credit_of_another_length_is_never_written() -> None:
    """A reader would refuse the whole file for it."""
    with pytest.raises(ValueError, match="credit for 5 tokens; expected one value for each of 6"):
        row_of(episode(), (3.0, 0.0, 0.0, 0.0, -0.5))


def test_scores_are_by_name_where_there_are_any() -> None:
    scores = {"reference": (-1.0,) * 6, "teacher": (-2.0,) * 6}
    assert row_of(episode(scores=scores)).scores == scores
    assert "scores" not in to_json(row_of(episode()))
    trainer = (-0.5,) * 6
    assert row_of(episode(scores=scores, old_logprobs=trainer)).scores == {**scores, "policy": trainer}


def test_a_prompt_that_an_environment_began_is_in_its_tokens() -> None:
    assert (row_of(episode()).prompt_tokens, row_of(episode()).prompt_ids) == (2, None)
    row = row_of(episode(prompt=ModelInput.of((4, 5, 6))))
    assert (row.prompt, row.prompt_tokens, row.prompt_ids) == ("2+2=", 3, (4, 5, 6))


def test_a_rollout_that_failed_before_its_first_turn() -> None:
    key = SampleKey(PROMPT.uid, 0, 0)
    row = row_of(Rollout(key, (), "error", status="failed", boundary="environment", cause="it hangs"), ())
    assert (row.segments, row.token_ids, row.completion, row.policy_version) == ((), (), "", None)
    assert (row.advantage, row.credit, row.status, row.boundary) == (0.0, None, "failed", "environment")


def test_images_of_prompt_and_answers_are_named() -> None:
    def image(digest: str) -> ImagePiece:
        return ImagePiece((8, 9, 9), ((1, 2),), (1, 1, 2), digest, ImageSource("file", "a.png", 640, 480))

    shown = ModelInput((image("b0"), TokenPiece((3,))))
    rollout = episode(prompt=ModelInput((TokenPiece((4,)), image("a0"))))
    answer = replace(rollout.segments[1], input=shown, logprobs=(0.0,) * 4, policy_versions=(2,) * 4)
    row = row_of(replace(rollout, segments=(rollout.segments[0], answer)))
    assert row.images == (ImageRow("a0", 640, 480, 3), ImageRow("b0", 640, 480, 3))


def test_one_ledger_row_per_group(make_group: Any) -> None:
    rows = list(ledger_rows((make_group(4, [1.0, 0.0]), make_group(5, [1.0])), step=3))
    assert [(row["step"], row["group"], row["uid"], row["samples"]) for row in rows] == [
        (3, 4, "p4", 2),
        (3, 5, "p5", 1),
    ]
    assert {row["policy_version"] for row in rows} == {3}


def test_the_version_of_a_group_without_tokens_is_unknown(make_group: Any) -> None:
    (row,) = ledger_rows((make_group(0, ["failed"], [0]),), step=1)
    assert row["policy_version"] is None


def test_the_digest_is_steady_and_notices_every_change(make_group: Any) -> None:
    group = make_group(0, [1.0, 0.0])
    assert digest(group) == digest(make_group(0, [1.0, 0.0]))
    first = group.rollouts[0]
    turn = first.segments[0]
    for changed in (
        replace(first, segments=(replace(turn, input=ModelInput.of((10, 99))),)),
        replace(first, segments=(replace(turn, logprobs=(-0.5, -0.5100000001)),)),
        replace(first, reward=None),
        replace(first, reward=0.9999999999),
    ):
        assert digest(replace(group, rollouts=(changed, group.rollouts[1]))) != digest(group)
    assert digest(replace(group, rollouts=group.rollouts[::-1])) != digest(group)
