"""Each rule on a run that shows what it is about, and on runs that do not.

The runs are written down here; every step's samples go through the metrics that a run's batches go through.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Config
from groupwise.doctor import Doctor, build_rules, rule_names
from groupwise.errors import TrainingError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.metrics import Last, Mean, Metric, Sum, merge, resolve
from groupwise.notices import once_each
from groupwise.rollout.batch import batch_metrics
from groupwise.types import Completion, FinishReason, Prompt, Rollout, RolloutGroup

GROUPS, SAMPLES = 8, 4


@dataclass(frozen=True)
class Drawn:
    """One sample as a script writes it."""

    rewards: Mapping[str, float | None]
    length: int
    text: str
    finish: FinishReason = "stop"
    logprob: float = -0.6


@dataclass(frozen=True)
class Script:
    """A run of `steps`; what is not given is that of a run in good health.

    Attributes:
        sample: step, group, index and a generator to the sample.
        learned: step to what the policy and the clock measured, over what a healthy run has.
    """

    steps: int = 60
    sample: Callable[[int, int, int, random.Random], Drawn] | None = None
    learned: Callable[[int], Mapping[str, Metric]] | None = None


def healthy_sample(step: int, group: int, index: int, draw: random.Random) -> Drawn:
    right = float(draw.random() < 0.2 + step / 100)
    return Drawn({"right": right, "form": draw.choice([0.0, 0.5])}, draw.randint(25, 55), f"{step} {draw.random()}")


def healthy_numbers(step: int) -> dict[str, Metric]:
    draw = random.Random(step)
    numbers: dict[str, Metric] = {
        "kl": Mean(0.02 + step / 1000),
        "grad_norm": Mean(draw.uniform(0.5, 1.5)),
        "updates_skipped": Sum(0.0),
        "sampling/sampling_logp_difference/mean": Mean(draw.uniform(0, 0.01)),
        "empty_steps": Last(0.0),
        "rewards/right/errors": Sum(0.0),
        "time/rollout": Sum(draw.uniform(0.9, 1.2)),
        "time/train": Sum(draw.uniform(0.9, 1.2)),
    }
    if step % 10 == 0:
        numbers["eval/accuracy"] = Last(0.3 + step / 400)
    return numbers


def groups_of(script: Script, step: int) -> list[RolloutGroup]:
    draw, sample = random.Random(step), script.sample or healthy_sample
    return [
        _group(step, group, [sample(step, group, index, draw) for index in range(SAMPLES)]) for group in range(GROUPS)
    ]


def numbers_of(script: Script, step: int, groups: list[RolloutGroup]) -> dict[str, float]:
    own = {} if script.learned is None else script.learned(step)
    return resolve(merge(batch_metrics(groups), {**healthy_numbers(step), **own}))


def doctor_of(stop_on: tuple[str, ...] = (), **bounds: Any) -> Doctor:
    config = Config.model_validate({"train": {"doctor": bounds}})
    return Doctor(build_rules(config, eval_rows=200), stop_on=stop_on, kept=config.train.doctor.flat_steps)


def watch(doctor: Doctor, script: Script, *, first: int = 1, last: int | None = None) -> Doctor:
    for step in range(first, (last or script.steps) + 1):
        groups = groups_of(script, step)
        doctor.after(step, numbers_of(script, step, groups), groups)
    return doctor


def _group(step: int, index: int, drawn: list[Drawn]) -> RolloutGroup:
    prompt = Prompt(f"p{step}-{index}", (), "2+2?", ModelInput.of((1, 7, 8)))
    return RolloutGroup(index, prompt, tuple(_rollout(i, one) for i, one in enumerate(drawn)))


def _rollout(index: int, one: Drawn) -> Rollout:
    values = [value for value in one.rewards.values() if value is not None]
    written = Completion(
        SampleKey("p", 0, index),
        token_ids=tuple(range(10, 10 + one.length)),
        logprobs=(one.logprob,) * one.length,
        policy_versions=(0,) * one.length,
        text=one.text,
        finish_reason=one.finish,
    )
    return Rollout.one_turn(written, rewards=one.rewards, reward=sum(values) if values else None)


def sampled(**changes: Callable[[int, float], Any]) -> Callable[..., Drawn]:
    """Healthy samples of which some things are others: each a function of the step and of chance, from 0 to 1."""

    def sample(step: int, group: int, index: int, draw: random.Random) -> Drawn:
        own = {name: change(step, draw.random()) for name, change in changes.items()}
        return replace(healthy_sample(step, group, index, draw), **own)

    return sample


def learned(**changes: Callable[[int], Metric]) -> Callable[[int], dict[str, Metric]]:
    """Names have `__` for `/`."""
    return lambda step: {name.replace("__", "/"): change(step) for name, change in changes.items()}


def same_for_a_group(step: int, group: int, index: int, draw: random.Random) -> Drawn:
    return Drawn({"right": float(group < 2)}, draw.randint(25, 55), f"{draw.random()}")


def half_the_groups_equal(step: int, group: int, index: int, draw: random.Random) -> Drawn:
    right = float(group < 2) if group % 2 else float(index % 2)
    return Drawn({"right": right + step / 100}, draw.randint(25, 55), f"{draw.random()}")


def one_text_a_group(step: int, group: int, index: int, draw: random.Random) -> Drawn:
    return replace(healthy_sample(step, group, index, draw), text=f"{group}")


def paid_by_length(step: int, group: int, index: int, draw: random.Random) -> Drawn:
    length = draw.randint(25, 55)
    return Drawn({"right": -length / 10 + step / 10}, length, f"{draw.random()}")


def partly_paid_by_length(step: int, group: int, index: int, draw: random.Random) -> Drawn:
    length = draw.randint(25, 55)
    return Drawn({"right": float(draw.random() < 0.5) + step / 10, "brief": -length / 30}, length, f"{draw.random()}")


def failing(every: int) -> Script:
    """Each `every`-th sample's reward fails."""

    def sample(step: int, group: int, index: int, draw: random.Random) -> Drawn:
        one = healthy_sample(step, group, index, draw)
        fails = (group * SAMPLES + index) % every == 0
        return replace(one, rewards={**one.rewards, "right": None}) if fails else one

    return Script(12, sample, learned(rewards__right__errors=lambda step: Sum(float(GROUPS * SAMPLES // every))))


def numbers(**changes: Callable[[int], Metric]) -> Script:
    return Script(learned=learned(**changes))


def samples(**changes: Callable[[int, float], Any]) -> Script:
    return Script(sample=sampled(**changes))


def accuracy(step: int) -> float:
    """Up to step 30, and down from there."""
    return 0.8 - abs(step - 30) / 60


@dataclass(frozen=True)
class Case:
    """A rule, a run that shows what it is about, words of what it says, and a run that comes near."""

    rule: str
    shows: Script
    says: str
    near: Script


CASES = (
    Case(
        "no_usable_sample",
        numbers(empty_steps=lambda step: Last(float(step == 9))),
        "not one usable sample",
        numbers(empty_steps=lambda step: Last(0.0)),
    ),
    Case(
        "reward_flat",
        samples(rewards=lambda step, chance: {"right": float(chance < 0.4)}),
        "does not rise: mean 0.",
        samples(rewards=lambda step, chance: {"right": float(chance < 0.3 + step / 200)}),
    ),
    Case(
        "groups_equal",
        Script(sample=same_for_a_group),
        "in 100% of the groups of the last 5 steps all rewards were equal; the mean reward is 0.25",
        Script(sample=half_the_groups_equal),
    ),
    Case(
        "reward_constant",
        samples(rewards=lambda step, chance: {"right": float(chance < 0.2 + step / 100), "form": 0.0}),
        "reward 'form' gave 0 to every sample of the last 10 steps",
        samples(rewards=lambda step, chance: {"right": float(chance < 0.2 + step / 100), "form": float(step % 9 == 0)}),
    ),
    Case("reward_failed", failing(1), "reward 'right' failed on 32 of a step's 32 samples", failing(16)),
    Case(
        "reward_is_length",
        Script(sample=paid_by_length),
        "the shorter answer earns more, and little else counts: correlation of reward and length -1.00",
        Script(sample=partly_paid_by_length),
    ),
    Case(
        "accuracy_falls",
        numbers(eval__accuracy=lambda step: Last(accuracy(step))),
        "held-out accuracy fell from 80.0% to ",
        numbers(eval__accuracy=lambda step: Last(0.5 - 0.02 * (step % 3))),
    ),
    Case(
        "answers_cut",
        samples(finish=lambda step, chance: "length"),
        "100% of the answers of the last 3 steps were cut",
        samples(finish=lambda step, chance: "length" if chance < 0.6 else "stop"),
    ),
    Case(
        "answers_empty",
        samples(text=lambda step, chance: " \n"),
        "100% of the answers of the last 3 steps had no text",
        samples(text=lambda step, chance: " " if chance < 0.6 else f"{chance}"),
    ),
    Case(
        "answers_identical",
        Script(sample=one_text_a_group),
        "in 100% of the groups of the last 5 steps all answers were the same text",
        samples(text=lambda step, chance: f"{chance:.0f}"),
    ),
    Case(
        "length_exploding",
        samples(length=lambda step, chance: 30 if step < 20 else 30 * (step - 18)),
        "answers grew from 30 to ",
        samples(length=lambda step, chance: 30 + 2 * step),
    ),
    Case(
        "length_collapsing",
        samples(length=lambda step, chance: 90 if step < 40 else 20),
        "answers shrank from 90 to 34 tokens within 25 steps",
        samples(length=lambda step, chance: 90 - step),
    ),
    Case(
        "kl_high",
        numbers(kl=lambda step: Mean(step / 50)),
        "the KL to the reference is 0.52 over the last 3 steps, above train.doctor.max_kl = 0.5",
        numbers(kl=lambda step: Mean(0.9 if step % 3 == 0 else 0.1)),
    ),
    Case(
        "entropy_collapse",
        samples(logprob=lambda step, chance: -0.6 / (1 + step**2)),
        "nats per token over the last 5 steps, below train.doctor.min_entropy = 0.01",
        samples(logprob=lambda step, chance: -0.6 / (1 + step / 4)),
    ),
    Case(
        "entropy_explosion",
        samples(logprob=lambda step, chance: -0.5 - step / 30),
        "the entropy rose from 0.65 to ",
        samples(logprob=lambda step, chance: -0.5 - step / 200),
    ),
    Case(
        "gradient_norm",
        numbers(grad_norm=lambda step: Mean(40.0 if step > 30 else 1.0)),
        "the gradient's norm is above 40 in the last 3 steps, and was 1 in the 20 before",
        numbers(grad_norm=lambda step: Mean(40.0 if step % 9 == 0 else 1.0)),
    ),
    Case(
        "gradient_norm",
        numbers(updates_skipped=lambda step: Sum(float(step == 4))),
        "a gradient was not finite, and 1 of a step's updates was left out",
        numbers(grad_norm=lambda step: Mean(1.0 + step / 4)),
    ),
    Case(
        "mismatch_high",
        numbers(sampling__sampling_logp_difference__mean=lambda step: Mean(0.2)),
        "log-probs of sampler and trainer differ by 0.2 nats per token over the last 3 steps",
        numbers(sampling__sampling_logp_difference__mean=lambda step: Mean(0.1 if step % 3 == 0 else 0.01)),
    ),
    Case(
        "experts_strange",
        numbers(moe__replaced=lambda step: Mean(0.81 if step == 7 else 0.02)),
        "81% of the experts that the engine named are others than the policy's own",
        numbers(moe__replaced=lambda step: Mean(0.2)),
    ),
    Case(
        "throughput_halved",
        numbers(time__rollout=lambda step: Sum(1.0 if step < 40 else 9.0)),
        "tokens per second in the last 10 steps, ",
        numbers(time__rollout=lambda step: Sum(9.0 if step % 4 == 0 else 1.0)),
    ),
)
SHOWS = {case.rule: case.shows for case in CASES}


def found_by(doctor: Doctor) -> dict[str, str]:
    return {finding["rule"]: finding["seen"] for finding in doctor.findings}


def test_a_healthy_run_has_no_findings() -> None:
    assert watch(doctor_of(), Script(75)).findings == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_a_rule_sees_what_it_is_about_and_nothing_in_a_run_that_comes_near(case: Case) -> None:
    found = found_by(watch(doctor_of(), case.shows))
    assert case.says in found[case.rule]
    assert "\n" not in found[case.rule]
    assert case.rule not in found_by(watch(doctor_of(), case.near))


def test_every_rule_has_its_case_and_they_have_names_of_their_own() -> None:
    assert {case.rule for case in CASES} == set(rule_names())
    assert len(set(rule_names())) == len(rule_names())


def test_a_finding_is_said_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    doctor = watch(doctor_of(), SHOWS["answers_cut"], last=9)
    [finding] = [finding for finding in doctor.findings if finding["rule"] == "answers_cut"]
    assert (finding["step"], finding["count"]) == (3, 7)
    assert finding["helps"].startswith("raise rollout.max_completion_tokens")
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage().partition(". What")[0] for record in said] == [
        "step 3, answers_cut: 100% of the answers of the last 3 steps were cut by their limit"
    ]


def test_many_findings_are_all_said(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"r{number}" for number in range(14)]
    script = samples(rewards=lambda step, chance: {**dict.fromkeys(names, 1.0), "right": float(chance < step / 60)})
    with once_each():
        watch(doctor_of(), script, last=11)
    told = capsys.readouterr().err
    assert all(told.count(f"reward_constant: reward {name!r} gave 1") == 1 for name in names)


def test_rewards_have_findings_of_their_own() -> None:
    script = samples(rewards=lambda step, chance: {"a": 0.0, "b": 1.0, "right": float(chance < step / 60)})
    found = [finding["seen"] for finding in watch(doctor_of(), script, last=12).findings]
    assert [text.split()[1] for text in found if "gave" in text] == ["'a'", "'b'"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
@pytest.mark.parametrize("cut", [1, 8, 33])
def test_a_resumed_run_finds_what_the_whole_one_finds(case: Case, cut: int) -> None:
    whole, first, second = (doctor_of() for _ in range(3))
    watch(whole, case.shows)
    watch(first, case.shows, last=min(cut, case.shows.steps))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    watch(second, case.shows, first=cut + 1)
    assert second.findings == whole.findings
    assert second.state_dict() == whole.state_dict()


def test_bounds_act() -> None:
    kl, cut = SHOWS["kl_high"], SHOWS["answers_cut"]
    assert "kl_high" not in found_by(watch(doctor_of(max_kl=2.0), kl))
    assert "kl_high" in found_by(watch(doctor_of(max_kl=0.1), kl, last=8))
    assert "answers_cut" not in found_by(watch(doctor_of(ignore=["answers_cut"]), cut))
    assert "groups_equal" in found_by(watch(doctor_of(equal_share=0.4), Script(sample=half_the_groups_equal)))
    assert "reward_flat" in found_by(watch(doctor_of(flat_steps=10), SHOWS["reward_flat"], last=10))
    assert "reward_flat" in found_by(watch(doctor_of(flat_steps=100), replace(SHOWS["reward_flat"], steps=120)))
    assert "mismatch_high" in found_by(watch(doctor_of(max_mismatch=0.001), Script()))
    assert "entropy_collapse" in found_by(watch(doctor_of(min_entropy=0.7), Script()))


def test_it_stops_the_run_where_it_was_asked_to() -> None:
    doctor = doctor_of(("answers_cut", "answers_empty"))
    script = SHOWS["answers_cut"]
    watch(doctor, script, last=2)
    assert not doctor.stops
    doctor.check(2, run=Path("runs/one"))
    watch(doctor, script, first=3, last=3)
    assert doctor.stops
    with pytest.raises(TrainingError) as error:
        doctor.check(3, run=Path("runs/one"))
    assert str(error.value).startswith(
        "stopped after step 3, as train.stop_on asks: answers_cut: 100% of the answers of the last 3 steps were cut"
    )
    assert "What usually helps: raise rollout.max_completion_tokens" in str(error.value)
    assert "the model so far is runs/one@3, and --resume goes on from there" in str(error.value)
    watch(doctor, Script(), first=4, last=4)
    assert not doctor.stops, "it was so before, and is not now"


def test_a_step_without_samples_is_no_trouble() -> None:
    doctor = doctor_of()
    doctor.after(0, {"eval/accuracy": 0.5}, ())
    doctor.after(1, {"empty_steps": 1.0, "grad_norm": float("nan")}, ())
    assert [finding["rule"] for finding in doctor.findings] == ["no_usable_sample"]
