"""Looks at a run after every step, says each thing once, and ends the run where it was asked to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from groupwise.doctor.facts import derived, sample_facts
from groupwise.doctor.history import History
from groupwise.doctor.rules import Rule, mean
from groupwise.errors import TrainingError
from groupwise.types import RolloutGroup

logger = logging.getLogger(__name__)

KEPT = 60
"""What the rules look back on, where no bound asks for more."""
_EVAL_WINDOW = 5  # steps whose rewards stand for the time of an evaluation


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule saw, as it stands in summary.json.

    Attributes:
        step: the first at which it was seen.
        seen: what it was then.
        helps: what usually helps.
        count: steps at which it was seen.

    Example:
        Finding(3, "answers_cut", "100% of the answers of the last 3 steps were cut by their limit", "raise …", 12)
    """

    step: int
    rule: str
    seen: str
    helps: str
    count: int = 1


class Doctor:
    """Watches one run. What it knows is in the checkpoint, so a resumed run gives the findings of the whole one.

    Args:
        stop_on: rules that end the run.
        kept: newest values of each number that are remembered; at least `KEPT`.
        record: told of each finding when it is first seen.

    Example:
        doctor = Doctor(build_rules(config), stop_on=("answers_empty",))
        doctor.after(1, {"reward": 0.5}, groups)
        doctor.check(1, run=Path("runs/one"))
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        stop_on: Collection[str] = (),
        kept: int = KEPT,
        record: Callable[[Mapping[str, Any]], None] = lambda finding: None,
    ) -> None:
        self._rules = rules
        self._record = record
        self._stop_on = frozenset(stop_on)
        names = {name for rule in rules for name in rule.reads}
        self._history = History(names, kept=max(kept, KEPT))
        self._findings: dict[str, Finding] = {}
        self._stopping: list[Finding] = []

    @property
    def findings(self) -> list[dict[str, Any]]:
        """As JSON values, in the order in which they were first seen."""
        return [asdict(finding) for finding in self._findings.values()]

    @property
    def stops(self) -> bool:
        """Whether the newest step is to be the run's last."""
        return bool(self._stopping)

    def after(self, step: int, numbers: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        """Look at the numbers and the groups of `step`, and say what is seen for the first time."""
        known = {**numbers, **sample_facts(groups)}
        known |= derived(known)
        self._history.add(step, known)
        if "eval/accuracy" in known:
            self._history.add(step, self._reward_now())
        self._stopping = []
        for rule in self._rules:
            for seen in rule.look(self._history):
                self._keep(rule, seen.text, key=f"{rule.name}/{seen.about}", step=step)

    def check(self, step: int, *, run: Path) -> None:
        """Called when everything of `step` is written, its checkpoint too where `stops`.

        Raises:
            TrainingError: a rule of `train.stop_on` saw something in this step.
        """
        if not self._stopping:
            return
        found = "; ".join(f"{finding.rule}: {finding.seen}" for finding in self._stopping)
        raise TrainingError(
            f"stopped after step {step}, as train.stop_on asks: {found}. What usually helps: "
            f"{self._stopping[0].helps}. The step is saved: the model so far is {run}@{step}, and --resume goes on "
            "from there, with another train.stop_on if you like"
        )

    def _reward_now(self) -> dict[str, float]:
        """The mean reward at the time of an evaluation; before the first step there is none."""
        rewards = self._history.known("reward")[-_EVAL_WINDOW:]
        return {"reward_at_eval": mean(rewards)} if rewards else {}

    def _keep(self, rule: Rule, text: str, *, key: str, step: int) -> None:
        before = self._findings.get(key)
        if before is None:
            self._findings[key] = Finding(step, rule.name, text, rule.helps)
            self._record({"step": step, "rule": rule.name, "seen": text, "helps": rule.helps})
            say = logger.info if rule.told else logger.warning
            # A kind of its own: findings are no variants of one warning, of which the terminal shows a few alone.
            kind = {"kind": f"{__name__}/{key}"}
            say("step %d, %s: %s. What usually helps: %s", step, rule.name, text, rule.helps, extra=kind)
        else:
            self._findings[key] = replace(before, count=before.count + 1)
        if rule.name in self._stop_on:
            self._stopping.append(Finding(step, rule.name, text, rule.helps))

    def state_dict(self) -> dict[str, Any]:
        findings = {key: asdict(finding) for key, finding in self._findings.items()}
        return {"history": self._history.state_dict(), "findings": findings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._history.load_state_dict(state["history"])
        self._findings = {key: Finding(**finding) for key, finding in state["findings"].items()}
