"""Answers to be scored: a run's own, those of a file, or what the data's rows hold themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from groupwise.config import DataConfig
from groupwise.data.files import read_rows
from groupwise.data.prompts import check_rows, make_prompt
from groupwise.errors import DataError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.trajectories import TrajectoryRow, read_trajectories
from groupwise.types import Completion, FinishReason, Prompt, Rollout, Segment

_ANSWERS = ("completion", "completions", "text")
_OWN = ("completion", "answer", "solution", "extra_info.answer", "reward_model.ground_truth")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as a reward gets it.

    Attributes:
        length: tokens, where they are known, else characters.
        cut: its length ended it.
        kind: "given", or the name of a probe.
    """

    rollout: Rollout
    length: int
    cut: bool
    kind: str = "given"

    @property
    def text(self) -> str:
        return self.rollout.text


@dataclass(frozen=True, slots=True)
class Answers:
    """Groups of answers by prompt.

    Attributes:
        has_tokens: the answers' token ids are a model's; else they are the characters' numbers.
        what: where they come from, for a person.
        are_right: each is a row's own answer, which its rewards should like.
    """

    groups: Sequence[tuple[Prompt, Sequence[Answer]]]
    has_tokens: bool
    what: str
    are_right: bool = False


def answers_of_run(run: Path, data: Path, config: DataConfig, *, limit: int | None = None) -> Answers:
    """What a run kept in `trajectories/`, with the columns of the data that it was trained on.

    Args:
        limit: groups that are taken, spread evenly over the run.

    Raises:
        DataError: nothing is kept there, or the data is another.
    """
    prompts = {prompt.uid: prompt for prompt in _prompts(data, config)}
    groups: dict[tuple[int, int], tuple[Prompt, list[Answer]]] = {}
    for row in read_trajectories(run):
        prompt = prompts.get(row.uid)
        if prompt is None:
            raise DataError(f"{run}: row {row.uid} is not in {data}; give the data that the run was trained on")
        if row.segments:  # else it failed before its first turn, and there is nothing to judge
            groups.setdefault((row.step, row.group), (prompt, []))[1].append(_answer_of(row))
    if not groups:
        raise DataError(f"{run} has no answers in its trajectories; give a run that has made a step")
    found = list(groups.values())
    return Answers(_spread(found, limit), has_tokens=True, what=f"{run}")


def answers_of_file(path: Path, data: Path, config: DataConfig, *, limit: int | None = None) -> Answers:
    """Of a JSON Lines file whose rows name a row of the data (`uid`, or `row`, counted from 0) and hold `completion`,
    `completions`, or `text`; `groupwise eval --save` writes such rows. `finish_reason` and `token_ids` are used where
    they are there.

    Raises:
        DataError: a row is none of this, or names a row that is not there.
    """
    prompts = _prompts(data, config)
    by_uid = {prompt.uid: prompt for prompt in prompts}
    groups: dict[str, tuple[Prompt, list[Answer]]] = {}
    has_tokens = True
    for row in read_rows(str(path)):
        values = row.values
        uid, number = values.get("uid"), values.get("row")
        if isinstance(number, int) and not 0 <= number < len(prompts):
            raise DataError(f"{row.where}: row {number}, but {data} has rows 0 to {len(prompts) - 1}")
        prompt = prompts[number] if isinstance(number, int) else by_uid.get(str(uid))
        if prompt is None:
            raise DataError(f'{row.where}: uid {uid!r} is no row of {data}; give "uid" or "row", a number from 0')
        kept = groups.setdefault(prompt.uid, (prompt, []))[1]
        for text in _texts(values, where=row.where):
            ids = values.get("token_ids")
            tokens = tuple(cast("list[int]", ids)) if isinstance(ids, list) else None
            has_tokens &= tokens is not None
            cut = values.get("finish_reason") == "length"
            kept.append(_answer(prompt.uid, len(kept), text, tokens, cut=cut))
    if not groups:
        raise DataError(f"{path} has no rows")
    return Answers(_spread(list(groups.values()), limit), has_tokens=has_tokens, what=str(path))


def answers_of_data(data: Path, config: DataConfig, *, limit: int | None = None) -> Answers:
    """The rows' own answers: the column `completion`, `answer`, `solution`, `extra_info.answer` or
    `reward_model.ground_truth`, whichever is there first.

    Raises:
        DataError: no row has one.
    """
    groups: list[tuple[Prompt, Sequence[Answer]]] = []
    for prompt in _prompts(data, config):
        text = next((value for path in _OWN if (value := _at(prompt.columns, path)) is not None), None)
        groups.append((prompt, [] if text is None else [_answer(prompt.uid, 0, text, None, cut=False)]))
    if not any(answers for _, answers in groups):
        raise DataError(
            f"{data} has none of the columns {', '.join(_OWN)} to take answers from; give --completions or --run"
        )
    what = f"{data}, the rows' own answers"
    return Answers(_spread(groups, limit), has_tokens=False, what=what, are_right=True)


def probes(prompt: Prompt, answers: Sequence[Answer]) -> list[Answer]:
    """Answers that should earn nothing: none at all, the question once more, and a given one that is cut in half."""
    asked = str(prompt.messages[-1].get("content", "")) if prompt.messages else prompt.text
    texts = {"empty": "", "echo": asked}
    if answers:
        longest = max(answers, key=lambda answer: len(answer.text)).text
        texts["half"] = longest[: len(longest) // 2]
    return [
        _answer(prompt.uid, 1_000_000 + place, text, None, cut=kind == "half", kind=kind)
        for place, (kind, text) in enumerate(texts.items())
    ]


def _at(columns: Mapping[str, Any], path: str) -> str | None:
    """The text in a column, or in a column's entry; None where there is none."""
    value: Any = columns
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None


def _answer_of(row: TrajectoryRow) -> Answer:
    """With its turns and its environment's answers, as the run's rewards got it."""
    segments = tuple(
        Segment(
            segment.by,
            ModelInput.of(row.token_ids[start : start + segment.num_tokens]),
            segment.text,
            row.logprobs[start : start + segment.num_tokens],
            row.policy_versions[start : start + segment.num_tokens],
            messages=segment.messages,
            finish_reason=segment.finish_reason,
            reward=segment.reward,
        )
        for segment, start in zip(row.segments, row.starts, strict=True)
    )
    rollout = Rollout(SampleKey(row.uid, row.draw or 0, row.sample_index), segments, row.finish_reason)
    return Answer(rollout, row.completion_tokens, cut=row.finish_reason == "length")


def _prompts(data: Path, config: DataConfig) -> list[Prompt]:
    rows = read_rows(str(data))
    check_rows(rows, config)
    return [make_prompt(row, index, config=config, tokenizer=None) for index, row in enumerate(rows)]


def _texts(values: Mapping[str, Any], *, where: str) -> Iterable[str]:
    for name in _ANSWERS:
        value = values.get(name)
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return value
    segments = values.get("segments")
    if isinstance(segments, list):
        return ["".join(str(cast("dict[str, Any]", one).get("text", "")) for one in segments)]
    raise DataError(f'{where}: got {", ".join(values) or "nothing"}; expected "completion" or "completions"')


def _answer(
    uid: str, index: int, text: str, tokens: tuple[int, ...] | None, *, cut: bool, kind: str = "given"
) -> Answer:
    ids = tuple(map(ord, text)) if tokens is None else tokens
    reason: FinishReason = "length" if cut else "stop"
    completion = Completion(SampleKey(uid, 0, index), ids, (0.0,) * len(ids), (0,) * len(ids), text, reason)
    return Answer(Rollout.one_turn(completion), len(ids), cut, kind)


def _spread(
    groups: Sequence[tuple[Prompt, Sequence[Answer]]], limit: int | None
) -> Sequence[tuple[Prompt, Sequence[Answer]]]:
    if limit is None or len(groups) <= limit:
        return groups
    return [groups[index * len(groups) // limit] for index in range(limit)]
