"""What a run says at its end."""

from __future__ import annotations

import shlex
from typing import Any

from groupwise.launch.ending import ending

FOUND = [
    {"step": 3, "rule": "answers_cut", "seen": "…", "helps": "…", "count": 12},
    {"step": 50, "rule": "reward_flat", "seen": "…", "helps": "…", "count": 1},
]


def evaluated(step: int, accuracy: float | None, *of: str) -> dict[str, Any]:
    low, high = (None, None) if accuracy is None else (accuracy - 0.0625, accuracy + 0.0625)
    return {"step": step, "accuracy": accuracy, "accuracy_of": list(of), "ci_low": low, "ci_high": high}


def summary(**more: Any) -> dict[str, Any]:
    return {"steps": 50, "seconds": 61.4, "seed": 0, "findings": [], **more}


def test_before_and_after_with_their_intervals() -> None:
    evaluations = [evaluated(0, 0.4, "gsm8k"), evaluated(25, 0.7, "gsm8k"), evaluated(50, 0.9, "gsm8k")]
    assert ending(summary(eval=evaluations), "runs/one") == [
        "done: 50 steps in 61 s",
        "accuracy (gsm8k), 95 % interval:",
        "  before  40.0%  33.8% to 46.2%",
        "  after   90.0%  83.8% to 96.2%",
        "findings: none",
        "model: runs/one/final",
        "next:  groupwise chat runs/one",
        "next:  groupwise report runs/one --open",
    ]


def test_the_step_is_named_where_it_is_neither_the_first_nor_the_last() -> None:
    lines = ending(summary(eval=[evaluated(10, 0.4, "a", "b"), evaluated(50, 0.5, "a", "b")]), "r")
    assert lines[1:4] == [
        "accuracy (a, b), 95 % interval:",
        "  step 10  40.0%  33.8% to 46.2%",
        "  after    50.0%  43.8% to 56.2%",
    ]
    assert ending(summary(eval=[evaluated(50, 0.5)]), "r")[1:3] == [
        "accuracy, 95 % interval:",
        "  after  50.0%  43.8% to 56.2%",
    ]


def test_findings_are_named() -> None:
    assert ending(summary(findings=FOUND), "r")[1:4] == [
        "findings: 2 (docs/doctor.md)",
        "  answers_cut: step 3, 12 times",
        "  reward_flat: step 50",
    ]


def test_where_nothing_was_measured_nothing_is_claimed() -> None:
    for more in ({}, {"eval": [evaluated(0, None), evaluated(50, None)]}, {"loss": None}):
        assert ending(summary(**more), "r")[1] == "findings: none"
    assert ending(summary(steps=1, loss=0.125), "r")[:2] == ["done: 1 step in 61 s", "loss of the last step: 0.1250"]


def test_commands_to_try_can_be_pasted() -> None:
    lines = ending(summary(), "my runs/it's")
    assert [shlex.split(line.removeprefix("next:  "))[2] for line in lines if line.startswith("next:")] == [
        "my runs/it's"
    ] * 2
