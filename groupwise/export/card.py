"""A model card: what was trained, on what, with which rewards and settings, how it went, and from which model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise import __version__
from groupwise.config.renamed import of_today
from groupwise.errors import ConfigError
from groupwise.export.curve import Curve, curve_svg
from groupwise.export.source import ADAPTER_CONFIG, Source, read_object
from groupwise.files import write_text_atomic
from groupwise.texts import one_line

CARD_FILE = "README.md"
CURVE_FILE = "reward.svg"
_SETTINGS = (
    *("algorithm.name", "algorithm.kl.coef", "optim.lr", "optim.schedule", "optim.steps_per_batch"),
    *("rollout.group_size", "rollout.prompts_per_step", "rollout.temperature", "rollout.max_completion_tokens"),
    *("sft.rows_per_step", "train.steps", "train.epochs", "train.seed", "model.dtype"),
)
_MARKS = re.compile(r"[\\`*_{}\[\]()<>#!|~&@$]|:(?=//)|(?<=www)\.")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_RESULTS = ("reward", "reward_std", "eval/accuracy", "loss", "kl", "completions/mean_length")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run directory says of its run.

    Attributes:
        config: `config.json`, and so on: the files' contents.
        rows: of `metrics.jsonl`, in order.
    """

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    versions: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]

    def curve(self, metric: str) -> Curve:
        points = [(row["step"], row[metric]) for row in self.rows if isinstance(row.get(metric), int | float)]
        return Curve(metric, tuple(step for step, _ in points), tuple(float(value) for _, value in points))

    @property
    def trained_by_reward(self) -> bool:
        return bool(self.curve("reward").steps)


def read_run(folder: Path, *, until: int | None = None) -> RunRecord:
    """Read a run directory, up to the checkpoint of step `until` if that is what the card is of; metrics that a killed
    run left half-written are passed over."""
    rows: list[Mapping[str, Any]] = []
    file = folder / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and (until is None or row["step"] <= until):
            rows.append(row)
    return RunRecord(
        folder.resolve().name,
        of_today(read_object(folder / "config.json")).values,
        read_object(folder / "summary.json") if until is None else {"steps": until},
        read_object(folder / "versions.json"),
        tuple(rows),
    )


def write_card(source: Source, out: str | Path) -> str:
    """Write the card, and the curve beside it; returns the card's text.

    Raises:
        ConfigError: the source is in no run directory, so nothing is known of its training.
    """
    if source.run is None:
        raise ConfigError(
            f"{source.folder} is in no run directory, so there is nothing to tell of its training; give the run's"
        )
    place = Path(out)
    run = read_run(source.run, until=source.step)
    place.parent.mkdir(parents=True, exist_ok=True)
    curve = run.curve("reward" if run.trained_by_reward else "loss")
    if len(curve.steps) > 1:
        write_text_atomic(place.with_name(CURVE_FILE), curve_svg(curve))
    text = render_card(run, is_adapter=(source.folder / ADAPTER_CONFIG).is_file(), has_curve=len(curve.steps) > 1)
    write_text_atomic(place, text)
    return text


def render_card(run: RunRecord, *, is_adapter: bool, has_curve: bool) -> str:
    """The card as Markdown, with the Hub's metadata at its head."""
    base = _setting(run.config, "model.path")
    kind = "group-relative reinforcement learning" if run.trained_by_reward else "supervised training"
    parts = [
        _head(base, is_adapter=is_adapter, by_reward=run.trained_by_reward),
        f"# {_plain(run.name)}\n\n{_code(base)}, trained by {kind} with Groupwise "
        f"{_plain(run.versions.get('groupwise', __version__))}.",
    ]
    rewards = run.config.get("reward")
    if rows := [
        (_code(reward.get("name")), _shown(reward.get("weight", 1.0)))
        for reward in (rewards if isinstance(rewards, list) else ())
        if isinstance(reward, Mapping)
    ]:
        parts.append("## Rewards\n\n" + _table(("reward", "weight"), rows))
    parts.append("## Results\n\n" + _results(run, has_curve=has_curve))
    settings = [(f"`{name}`", _shown(_setting(run.config, name))) for name in _SETTINGS if _acts(run, name)]
    parts.append("## Settings\n\n" + _table(("setting", "value"), settings))
    parts.append("## Lineage\n\n" + _lineage(run, base))
    return "\n\n".join(parts) + "\n"


def _head(base: Any, *, is_adapter: bool, by_reward: bool) -> str:
    """YAML in JSON's notation, which is YAML too and needs no escaping rules of its own."""
    tags = ["groupwise", *(["reinforcement-learning", "grpo"] if by_reward else ["sft"]), *(["lora"] * is_adapter)]
    lines = [f"library_name: {'peft' if is_adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if isinstance(base, str) and _HUB_NAME.fullmatch(base):
        lines.append(f"base_model: {json.dumps(base)}")
    lines.append(f"tags: {json.dumps(tags)}")
    return "---\n" + "\n".join(lines) + "\n---"


def _results(run: RunRecord, *, has_curve: bool) -> str:
    rows: list[Sequence[str]] = []
    for metric in _RESULTS:
        curve = run.curve(metric)
        if curve.steps:
            first, last = curve.ends()
            rows.append((f"`{metric}`", _shown(first), _shown(last)))
    table = _table(("metric", "first steps", "last steps"), rows) if rows else "No step was recorded."
    picture = f"\n\n![{'reward' if run.trained_by_reward else 'loss'} by step]({CURVE_FILE})" if has_curve else ""
    return f"{table}{picture}"


def _lineage(run: RunRecord, base: Any) -> str:
    steps = run.summary.get("steps") or (run.rows[-1]["step"] if run.rows else 0)
    facts = [
        f"- base model: {_code(base)}",
        f"- training data: {_code(_setting(run.config, 'data.train'))}",
        f"- steps: {_shown(steps)}, seed {_shown(_setting(run.config, 'train.seed'))}",
    ]
    if "seconds" in run.summary:
        facts.append(f"- time: {_shown(run.summary['seconds'])} seconds")
    names = ("groupwise", "torch", "transformers", "python")
    known = [f"{name} {_plain(run.versions[name])}" for name in names if name in run.versions]
    facts.append(f"- versions: {', '.join(known)}")
    return "\n".join(facts)


def _acts(run: RunRecord, name: str) -> bool:
    """Supervised runs have rollout settings in their config too, which did nothing."""
    if _setting(run.config, name) is None:
        return False
    section = name.partition(".")[0]
    return section not in (("sft",) if run.trained_by_reward else ("algorithm", "rollout"))


def _setting(config: Mapping[str, Any], name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return _plain(value)


def _plain(value: Any) -> str:
    """The value as text that is no markup: neither Markdown's, nor HTML, nor a link, on one line."""
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", one_line(str(value)))


def _code(value: Any) -> str:
    """The value as code on one line. Nothing in it is markup, but a backtick, which would end it."""
    text = one_line(str(value)).replace("`", "'")
    return f"`{text or ' '}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
