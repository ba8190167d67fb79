"""A plan as text on one screen, as the lines of `--dry-run`, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from groupwise.plan.devices import GIB, MEASURED
from groupwise.plan.planning import Plan

_WIDE = 20


def lines(plan: Plan) -> list[str]:
    """The whole plan."""
    return [
        *_headline(plan),
        "",
        *_memory(plan),
        "",
        *_sizes(plan),
        "",
        *_amount(plan),
        "",
        *_seconds(plan),
        *([""] if plan.notes else []),
        *(f"note: {note}" for note in plan.notes),
    ]


def summary(plan: Plan) -> list[str]:
    """What `--dry-run` says of it, as comments."""
    peak, memory = _size(plan.memory.peak), _size(plan.device.memory)
    found = [f"# plan for {plan.device.name}: peak {peak} of {memory}, at the {plan.memory.peak_moment}: {_fits(plan)}"]
    found.append("# " + "; ".join(line.strip() for line in _sizes(plan)))
    amount = plan.amount
    found.append(
        f"# {amount.samples:,} samples of up to {plan.load.longest_answer:,} tokens of {amount.prompts:,} prompts "
        f"({amount.epochs:.2f} epochs)"
    )
    found.append("# `groupwise plan` with the same arguments tells more, and how long it takes")
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds and counts under the names that the text has."""
    memory = plan.memory
    return {
        "device": {**asdict(plan.device), "at_hand": plan.at_hand},
        "planned_for": "one process on one device",
        "model": {**asdict(plan.facts), "trained": plan.facts.trained},
        "setup": asdict(plan.setup),
        "step": asdict(plan.load),
        "memory": {
            "held": memory.held,
            "moments": memory.moments,
            "peak_moment": memory.peak_moment,
            "peak": memory.peak,
            "available": plan.device.memory,
            "fits": plan.fits,
        },
        "sampling": {**asdict(plan.sampling), "cache_bytes_per_token": plan.setup.each * plan.facts.cached},
        "largest": {
            "train.micro_batch_tokens": plan.largest_micro_batch,
            "holds_whole_step": plan.whole_step,
            "samples_together": plan.most_samples,
        },
        "run": asdict(plan.amount),
        "seconds": None if plan.seconds is None else _seconds_json(plan),
        "notes": list(plan.notes),
    }


def _seconds_json(plan: Plan) -> dict[str, Any]:
    assert plan.seconds is not None and plan.rates is not None, "asked for seconds that are not there"
    step = plan.seconds.step
    return {
        **asdict(plan.seconds),
        "step": step,
        "run": step * plan.amount.steps,
        "basis": _basis(plan),
        "note": plan.rates.note,
    }


def _headline(plan: Plan) -> list[str]:
    facts, config = plan.facts, plan.config
    trained = f"LoRA of {facts.adapter:,}" if facts.adapter else "all weights trained"
    kind = "nf4" if plan.setup.packed else ("bfloat16" if plan.setup.each == 2 else "float32")
    return [
        f"{config.model.path}: {facts.parameters:,} parameters in {kind}, {trained}",
        f"planned for one process on one device: {plan.device.name} ({plan.device.source})",
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    parts = {**memory.held, **{f"{name} *": size for name, size in memory.moments[memory.peak_moment].items()}}
    found = ["memory"]
    found += [f"  {name:<{_WIDE}} {_size(size):>10}" for name, size in parts.items() if size]
    others = [
        f"{moment} {_size(sum(memory.held.values()) + sum(some.values()))}"
        for moment, some in memory.moments.items()
        if moment != memory.peak_moment
    ]
    found.append(f"  {'peak':<{_WIDE}} {_size(memory.peak):>10}   of {_size(plan.device.memory)}: {_fits(plan)}")
    found.append(f"  * at the {memory.peak_moment}; at the others: {', '.join(others)}")
    return found


def _fits(plan: Plan) -> str:
    if not plan.fits:
        return "does not fit"
    return "fits" if plan.memory.peak <= 0.9 * plan.device.memory else "fits, with less than a tenth to spare"


def _sizes(plan: Plan) -> list[str]:
    given = f"train.micro_batch_tokens = {plan.config.train.micro_batch_tokens:,}"
    if not plan.largest_micro_batch:
        most = "no size fits"
    elif plan.whole_step:
        most = "any size fits: a whole update can be computed at one time"
    else:
        most = f"up to {plan.largest_micro_batch:,} fit"
    found = [f"{given}: {most}"]
    if plan.sampling.lanes or plan.most_samples:
        whole = ", all of a step's" if plan.most_samples == plan.load.samples else ""
        together = f"{plan.most_samples:,} would fit{whole}" if plan.most_samples else "not one fits"
        found.append(f"samples decoded together: {plan.sampling.lanes:,} (of {plan.load.samples:,} a step); {together}")
    return found


def _amount(plan: Plan) -> list[str]:
    amount, load = plan.amount, plan.load
    found = [
        f"{amount.steps:,} steps of {load.prompts} prompts x {load.group} samples: {amount.prompts:,} prompts "
        f"({amount.epochs:.2f} epochs of {amount.rows:,} rows), {amount.samples:,} samples",
        f"{amount.tokens:,} tokens drawn, at {load.answer:,} a sample; prompts of {load.prompt:,} tokens on average, "
        f"{load.longest_prompt:,} at most",
    ]
    if amount.evaluations:
        found.append(f"{amount.evaluations} evaluations of {amount.eval_samples:,} samples")
    return found


def _seconds(plan: Plan) -> list[str]:
    if plan.seconds is None or plan.rates is None:
        return ["seconds: not known of this device; leave --device out where the run will be, and it is measured"]
    seconds = plan.seconds
    phases = {"rollout": seconds.rollout, "train": seconds.train, "update": seconds.update}
    if seconds.evaluation:
        phases["evaluation, amortised"] = seconds.evaluation
    parts = ", ".join(f"{name} {_duration(value)}" for name, value in phases.items())
    return [
        f"a step: {_duration(seconds.step)} ({parts})",
        f"the run: {_duration(seconds.step * plan.amount.steps)}; rewards, checkpoints and loading come to it",
        f"  {_basis(plan)}: {plan.rates.note}",
    ]


def _basis(plan: Plan) -> str:
    if plan.at_hand:
        return "measured" if not plan.device.on_gpu else "computed from what was measured"
    return "computed with shares measured on this device" if plan.device.name in MEASURED else "computed"


def _size(count: float) -> str:
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
