"""What a run says at its end: what came of it, where the model is, which command to try next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

NEXT = ("groupwise chat {run}", "groupwise report {run} --open")
"""Commands that a finished run names, in order; `{run}` is its directory."""

_LONGEST_COUNTED = 3  # names of rewards in one line


def ending(summary: Mapping[str, Any], run: str) -> list[str]:
    """Lines of at most 40 columns where run and rewards have short names.

    Args:
        summary: what `summary.json` holds.
        run: the run's directory, as the user named it.

    Example:
        done: 50 steps in 61 s
        accuracy (gsm8k), 95 % interval:
          before  40.2%  34.4% to 46.3%
          after   94.9%  91.5% to 97.0%
        findings: 1
          answers_cut: step 3, 12 times
        model: runs/quickstart/grpo/final
        next:  groupwise chat runs/quickstart/grpo
        next:  groupwise report runs/quickstart/grpo --open
    """
    steps = summary["steps"]
    return [
        f"done: {steps} step{'s' * (steps != 1)} in {summary['seconds']:.0f} s",
        *_outcome(summary),
        *findings_lines(summary["findings"]),
        f"model: {run}/final",
        *next_lines(run),
    ]


def next_lines(run: str) -> list[str]:
    """The commands to try next, as a shell takes them."""
    return [f"next:  {command.format(run=shlex.quote(run))}" for command in NEXT]


def findings_lines(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each finding by its rule; what was seen stands above, where it was said."""
    if not findings:
        return ["findings: none"]
    lines = [f"findings: {len(findings)} (docs/doctor.md)"]
    for finding in findings:
        times = f", {finding['count']} times" if finding["count"] > 1 else ""
        lines.append(f"  {finding['rule']}: step {finding['step']}{times}")
    return lines


def _outcome(summary: Mapping[str, Any]) -> list[str]:
    """Accuracy before and after; of worked answers the last loss; nothing where nothing was measured."""
    evaluations = [one for one in summary.get("eval", ()) if one["accuracy"] is not None]
    if not evaluations:
        return [f"loss of the last step: {summary['loss']:.4f}"] if summary.get("loss") is not None else []
    counted = ", ".join(evaluations[-1]["accuracy_of"][:_LONGEST_COUNTED])
    shown = {_moment(evaluations[0], summary): evaluations[0]}
    shown[_moment(evaluations[-1], summary)] = evaluations[-1]
    width = max(map(len, shown))
    lines = [f"accuracy ({counted}), 95 % interval:" if counted else "accuracy, 95 % interval:"]
    for moment, one in shown.items():
        lines.append(f"  {moment:<{width}}  {one['accuracy']:.1%}  {one['ci_low']:.1%} to {one['ci_high']:.1%}")
    return lines


def _moment(evaluation: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    step = evaluation["step"]
    return "before" if step == 0 else "after" if step == summary["steps"] else f"step {step}"
