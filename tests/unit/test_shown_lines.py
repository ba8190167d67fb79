"""The lines that README.md and the tutorial show are those that come: their numbers give the same lines again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Config
from groupwise.doctor import build_rules
from groupwise.launch.ending import ending
from groupwise.tracking.line import COLUMNS, step_line

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]
LABELS = {column.label: column.metric for column in COLUMNS if column.label}
COUNTED = "gsm8k"


def shown(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    [block] = [
        block for block in re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "step " in block
    ]
    return block.splitlines()


def metrics_of(cells: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for cell in cells:
        label, _, number = cell.removeprefix(f"{COUNTED} accuracy").rpartition(" ")
        name = "eval/accuracy" if cell.startswith(f"{COUNTED} accuracy") else LABELS.get(label, f"rewards/{label}/mean")
        value = float(number.rstrip("%"))
        found[name] = value / 100 if number.endswith("%") else value
    return found


def summary_of(lines: list[str]) -> dict[str, Any]:
    """What `summary.json` would have to hold for a run to end so."""
    done = re.fullmatch(r"done: (\d+) steps in (\d+) s", lines[0])
    assert done
    steps, seconds = done.groups()
    evaluations = []
    for line, step in zip(lines[2:4], (0, int(steps)), strict=True):
        accuracy, low, high = (float(number) / 100 for number in re.findall(r"([\d.]+)%", line))
        evaluations.append(
            {"step": step, "accuracy": accuracy, "ci_low": low, "ci_high": high, "accuracy_of": [COUNTED]}
        )
    findings = [
        {"rule": rule, "step": int(step), "count": int(count or 1)}
        for rule, step, count in re.findall(r"^  (\w+): step (\d+)(?:, (\d+) times)?$", "\n".join(lines), re.MULTILINE)
    ]
    return {"steps": int(steps), "seconds": float(seconds), "eval": evaluations, "findings": findings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_steps_are_shown_as_they_come(page: Path) -> None:
    lines = [line for line in shown(page) if line.startswith("step ")]
    assert len(lines) > 1
    for line in lines:
        head, *cells = line.split("  ")
        assert step_line(head, metrics_of(cells), accuracy_of=COUNTED) == line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_end_is_shown_as_it_comes(page: Path) -> None:
    lines = shown(page)
    end = lines[next(index for index, line in enumerate(lines) if line.startswith("done")) :]
    run = end[-1].split()[-2]  # before --open
    assert ending(summary_of(end), run) == end


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_findings_are_shown_as_they_come(page: Path) -> None:
    [told] = [line for line in shown(page) if line.startswith("warning: ")]
    rules = {rule.name: rule for rule in build_rules(Config())}  # type: ignore[call-arg]
    found = re.fullmatch(r"warning: step (\d+), (\w+): (.*)\. What usually helps: (.*)", told)
    assert found
    step, name, seen, helps = found.groups()
    assert helps == rules[name].helps
    assert f"  {name}: step {step}" in "\n".join(shown(page))
    assert re.fullmatch(
        r"in \d+% of the groups of the last 5 steps all rewards were equal; the mean reward is [\d.]+", seen
    )


def test_the_page_of_the_doctor_has_every_rule_in_order() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `(\w+)` \|", text.partition("## Rules")[2], re.MULTILINE)
    assert names == [rule.name for rule in build_rules(Config())]  # type: ignore[call-arg]
