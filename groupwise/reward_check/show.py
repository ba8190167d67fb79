"""What was seen, as lines for a terminal, as JSON, and as one page of HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from groupwise.reward_check.checking import RewardCheck, RewardSummary, Scored
from groupwise.reward_check.findings import Finding
from groupwise.texts import printable

_BARS = " ▁▂▃▄▅▆▇█"
_SHOWN = 200  # characters of an answer on the terminal


def bars(counts: Sequence[int]) -> str:
    """A histogram in one line."""
    most = max(counts, default=0)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most) if most else 0] for count in counts)


def lines(check: RewardCheck, findings: Sequence[Finding]) -> Iterator[str]:
    """For a terminal."""
    groups = sum(bool(given) for _, given in check.answers.groups)
    yield f"{len(check.scored)} answers to {groups} prompts, from {check.answers.what}"
    width = max((len(one.name) for one in check.rewards), default=0)
    yield f"{'':{width}}   mean    std    low   high  failed  equal  length   s/answer"
    for one in check.rewards:
        equal = "-" if one.equal_groups is None else f"{one.equal_groups:.0%}"
        length = "-" if one.with_length is None else f"{one.with_length:+.2f}"
        yield (
            f"{one.name:{width}} {one.mean:6.3f} {one.std:6.3f} {one.low:6.3g} {one.high:6.3g} {one.failed:7d} "
            f"{equal:>6} {length:>7} {one.seconds:10.4f}  |{bars(one.counts)}|"
        )
    for (first, second), value in check.correlations.items():
        yield f"{first} and {second} go together: {value:+.2f}"
    for name, some in (("best", check.best[:1]), ("worst", check.worst[:1])):
        for scored in some:
            yield f"{name}: {_values(scored)}: {_short(scored.answer.text)}"
    for each in check.disagreements[:1]:
        yield f"{each.first} and {each.second} disagree: {_values(each.scored)}: {_short(each.scored.answer.text)}"
    for finding in findings:
        yield f"{finding.rule}: {finding.reward} {finding.text}"
    if not findings:
        yield "nothing suspicious was found"


def _values(scored: Scored) -> str:
    values = ", ".join(f"{name} {'-' if v is None else f'{v:g}'}" for name, v in scored.score.rewards.items())
    return f"{scored.prompt.uid} ({values})"


def _short(text: str) -> str:
    shown = " ".join(printable(text).split())
    return repr(shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN // 2]} … {shown[-_SHOWN // 2 :]}")


def record(check: RewardCheck, findings: Sequence[Finding]) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "answers": len(check.scored),
        "from": check.answers.what,
        "rewards": [_summary(one) for one in check.rewards],
        "correlations": [
            {"first": first, "second": second, "value": value} for (first, second), value in check.correlations.items()
        ],
        "best": [_example(one) for one in check.best],
        "worst": [_example(one) for one in check.worst],
        "disagreements": [
            {"first": one.first, "second": one.second, "distance": one.distance, **_example(one.scored)}
            for one in check.disagreements
        ],
        "findings": [{"rule": one.rule, "reward": one.reward, "text": one.text} for one in findings],
    }


def _summary(one: RewardSummary) -> dict[str, Any]:
    names = ("name", "weight", "count", "none", "failed", "mean", "std", "low", "high", "at_high", "equal_groups")
    return {
        **{name: getattr(one, name) for name in names},
        "correlation_with_length": one.with_length,
        "histogram": list(one.counts),
        "causes": [{"cause": cause, "count": count} for cause, count in one.causes],
        "seconds_per_answer": one.seconds,
        "probes": one.paid,
    }


def _example(one: Scored) -> dict[str, Any]:
    return {
        "uid": one.prompt.uid,
        "prompt": printable(one.prompt.text),
        "answer": printable(one.answer.text),
        "reward": one.score.reward,
        "rewards": dict(one.score.rewards),
    }


def page(check: RewardCheck, findings: Sequence[Finding]) -> str:
    """One page that opens from disk and asks nobody for anything; all text is text."""
    groups = sum(bool(given) for _, given in check.answers.groups)
    rows = "".join(_row(one) for one in check.rewards)
    found = "".join(f"<li><b>{escape(one.rule)}</b> {escape(one.reward)} {escape(one.text)}</li>" for one in findings)
    examples = "".join(
        f"<h2>{title}</h2>" + "".join(map(_article, some))
        for title, some in (
            ("Best answers", check.best),
            ("Worst answers", check.worst),
            ("Where rewards disagree", [one.scored for one in check.disagreements]),
        )
        if some
    )
    what = f"{len(check.scored)} answers to {groups} prompts, from {escape(printable(check.answers.what))}"
    head = "".join(f"<th>{name}</th>" for name in _HEAD)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Rewards</title>{_POLICY}<style>{_STYLE}</style>"
        f"<main><h1>Rewards</h1><p>{what}</p><ul>{found or '<li>nothing suspicious was found</li>'}</ul>"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{examples}"
        "</main></html>"
    )


_HEAD = ("reward", "weight", "mean", "std", "low", "high", "failed", "equal groups", "with length", "distribution")
_POLICY = (
    "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    "<meta name=viewport content='width=device-width, initial-scale=1'>"
)
_STYLE = """:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:0}main{max-width:70rem;
margin:auto;padding:1.5rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.3rem .7rem;
text-align:right;border-bottom:1px solid #8884}td:first-child,th:first-child{text-align:left}.wide{overflow-x:auto}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8881;padding:.7rem;border-radius:.4rem}
article{margin:1rem 0}svg{height:1.6rem;width:8rem;fill:currentColor;opacity:.7}"""


def _row(one: RewardSummary) -> str:
    equal = "–" if one.equal_groups is None else f"{one.equal_groups:.0%}"
    length = "–" if one.with_length is None else f"{one.with_length:+.2f}"
    numbers = (one.weight, one.mean, one.std, one.low, one.high)
    cells = [escape(one.name), *(f"{number:.4g}" for number in numbers), str(one.failed), equal, length, _drawn(one)]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _drawn(one: RewardSummary) -> str:
    most, count = max(one.counts, default=0) or 1, len(one.counts)
    boxes = "".join(
        f"<rect x={index * 10} y={40 - 40 * value / most:.1f} width=9 height={40 * value / most:.1f} />"
        for index, value in enumerate(one.counts)
    )
    title = f"{one.low:g} to {one.high:g}: {', '.join(map(str, one.counts))}"
    return f"<svg viewBox='0 0 {count * 10} 40' preserveAspectRatio=none role=img><title>{title}</title>{boxes}</svg>"


def _article(one: Scored) -> str:
    return (
        f"<article><p>{escape(_values(one))}</p><pre dir=auto>{escape(printable(one.prompt.text))}</pre>"
        f"<pre dir=auto>{escape(printable(one.answer.text))}</pre></article>"
    )
