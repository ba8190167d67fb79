"""The one helper for "did you mean"."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from groupwise.errors import nearest

PACKAGE = Path(__file__).parents[2] / "groupwise"


@pytest.mark.parametrize(
    ("name", "candidates", "meant"),
    [
        ("trian", ["train", "eval"], "train"),
        ("qqqq", ["train", "eval"], ""),
        ("GSM8K", ["gsm8k", "math"], "gsm8k"),
        ("question", ["Question", "answer"], "Question"),
        ("", ["train"], ""),
        ("train", [], ""),
        ("mod", {"mode": 1, "model": 2}, "mode"),
    ],
)
def test_the_nearest_is_named_as_it_is_written_and_nothing_when_none_is_near(name, candidates, meant):
    assert nearest(name, candidates) == meant
    assert nearest(name, candidates, "; did you mean {!r}?") == (f"; did you mean {meant!r}?" if meant else "")


def test_a_cut_off_decides_how_near_is_near():
    assert nearest("train_data", ["train_dataset"], cutoff=0.8) == "train_dataset"
    assert nearest("my_state", ["state"]) == "state"
    assert nearest("my_state", ["state"], cutoff=0.8) == ""


def test_no_other_module_looks_for_near_names_by_itself():
    using = subprocess.run(["grep", "-rl", "difflib", "--include=*.py", PACKAGE], capture_output=True, text=True)
    assert using.stdout.split() == [str(PACKAGE / "errors.py")]
