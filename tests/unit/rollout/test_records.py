"""Trajectory and ledger rows: one per rollout, one per group, and a digest that notices every change."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from groupwise.algorithms import build_algorithm
from groupwise.config import AlgorithmConfig
from groupwise.files import json_line
from groupwise.inputs import ModelInput
from groupwise.rollout.batch import BatchShape, build_batch
from groupwise.rollout.records import ledger_rows, trajectory_rows
from groupwise.types import RolloutGroup


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
