"""Rows of trajectories: what is written is what is read, also of old and of killed runs; what is damaged is refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.errors import DataError, FileError
from groupwise.files import append_rows, json_line
from groupwise.trajectories import (
    EVAL_FILE,
    FOLDER,
    FORMAT,
    STEP_FILE,
    EvalTrajectoryRow,
    ImageRow,
    SegmentRow,
    TrajectoryRow,
    eval_from_json,
    eval_to_json,
    from_json,
    read_eval_file,
    read_eval_trajectories,
    read_trajectories,
    read_trajectory_file,
    to_json,
)

OLD = {
    "step": 3, "group": 17, "uid": "000017-3fa9", "sample_index": 5, "data_source": "gsm8k", "prompt": "2+2=",
    "completion": "4 🦊", "reward": 1.0, "rewards": {"gsm8k": 1.0, "format": None}, "advantage": 0.7,
    "prompt_tokens": 4, "completion_tokens": 2, "finish_reason": "stop", "policy_version": 2, "status": "ok",
    "cause": "", "token_ids": [7, 2], "logprobs": [-0.1, None],
}  # fmt: skip
"""A row as every run wrote it before rows said their format."""

OLD_EVAL = {
    "uid": "000001-aa", "sample_index": 0, "data_source": "gsm8k", "prompt": "2+2=", "text": "5",
    "rewards": {"gsm8k": 0.0}, "reward": None, "correct": False, "num_tokens": 2, "finish_reason": "length",
    "status": "failed", "cause": "engine: out of memory", "policy_version": 10,
}  # fmt: skip

TURN = SegmentRow("model", "(2+2=", num_tokens=2, finish_reason="stop", reward=0.5)
ANSWER = SegmentRow("environment", "4 🦊", num_tokens=1, messages=({"role": "tool", "content": "4", "id": None},))
LAST = SegmentRow("model", ") 4", num_tokens=2, finish_reason="length")
ROW = TrajectoryRow(
    step=3, group=17, uid="000017-3fa9", draw=1, sample_index=5, data_source="gsm8k", prompt="2+2=", prompt_tokens=3,
    prompt_ids=(4, 5, 6), segments=(TURN, ANSWER, LAST), token_ids=(7, 2, 9, 8, 1),
    logprobs=(-0.1, -0.3, 0.0, -1e-9, -7.25), policy_versions=(2, 2, 2, 3, 3), rewards={"gsm8k": 1.0, "format": None},
    reward=1.0, advantage=0.2, credit=(0.5, 0.5, 0.0, 0.0, 0.0), scores={"teacher": (-1.0, -2.0, -3.0, -4.0, -5.0)},
    finish_reason="length", images=(ImageRow("5f", 640, 480, 300), ImageRow("60", 1, 1, 1, "images/60.webp")),
)  # fmt: skip
FAILED = replace(
    ROW, segments=(), token_ids=(), logprobs=(), policy_versions=(), credit=None, scores={}, rewards={}, reward=None,
    advantage=0.0, finish_reason="error", status="failed", boundary="environment", cause="it hangs", images=(),
    prompt_ids=None,
)  # fmt: skip


def line(row: TrajectoryRow) -> str:
    return json_line(to_json(row))


def again(row: TrajectoryRow) -> TrajectoryRow:
    return from_json(json.loads(line(row)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / FOLDER).mkdir()
    return tmp_path


def write(run: Path, step: int, *rows: TrajectoryRow) -> Path:
    file = run / FOLDER / STEP_FILE.format(step)
    append_rows(file, map(to_json, rows))
    return file


texts = st.text(max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
whole = st.integers(0, 2**40)
reasons = st.sampled_from(["stop", "length", "turns", "abort", "error"])
plain = st.recursive(
    st.none() | st.booleans() | whole | numbers | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def segments(draw: st.DrawFn) -> SegmentRow:
    return SegmentRow(
        by=draw(st.sampled_from(["model", "environment"])),
        text=draw(texts),
        num_tokens=draw(st.integers(0, 4)),
        finish_reason=draw(st.none() | reasons),  # pyright: ignore[reportArgumentType]
        reward=draw(st.none() | numbers),
        messages=tuple(draw(st.lists(st.dictionaries(texts, plain, min_size=1, max_size=2), max_size=2))),
    )


@st.composite
def rows(draw: st.DrawFn) -> TrajectoryRow:
    made = tuple(draw(st.lists(segments(), max_size=4)))
    size = sum(segment.num_tokens for segment in made)

    def per_token(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(values, min_size=size, max_size=size).map(tuple)

    prompt = draw(st.none() | st.lists(whole, max_size=3).map(tuple))
    return TrajectoryRow(
        **{name: draw(whole) for name in ("step", "group", "sample_index")},  # pyright: ignore[reportArgumentType]
        **{name: draw(texts) for name in ("uid", "data_source", "prompt", "cause")},
        draw=draw(st.none() | whole),
        prompt_tokens=draw(whole) if prompt is None else len(prompt),
        prompt_ids=prompt,
        segments=made,
        token_ids=draw(per_token(whole)),
        logprobs=draw(per_token(numbers)),
        policy_versions=draw(per_token(st.integers(0, 3))),
        rewards=draw(st.dictionaries(texts, st.none() | numbers, max_size=2)),
        reward=draw(st.none() | numbers),
        advantage=draw(numbers),
        credit=draw(st.none() | per_token(numbers)),
        scores=draw(st.dictionaries(texts, per_token(numbers), max_size=2)),
        finish_reason=draw(reasons),  # pyright: ignore[reportArgumentType]
        status=draw(st.sampled_from(["ok", "failed"])),
        boundary=draw(st.none() | st.sampled_from(["engine", "environment", "reward", "teacher"])),  # pyright: ignore[reportArgumentType]
        images=tuple(draw(st.lists(st.builds(ImageRow, texts, whole, whole, whole, st.none() | texts), max_size=2))),
    )


@given(rows())
def test_what_is_written_is_what_is_read(row: TrajectoryRow) -> None:
    assert again(row) == row
    assert line(again(row)) == line(row)


@given(st.lists(st.text(alphabet=st.characters(codec=None, categories=["Cs", "Lu", "Zl"]), max_size=4), max_size=4))
def test_half_a_surrogate_moves_no_segment(pieces: list[str]) -> None:
    made = tuple(SegmentRow("model", text, num_tokens=0) for text in pieces)
    read = again(replace(FAILED, segments=made))
    assert [segment.text for segment in read.segments] == [
        text.encode("utf-8", "backslashreplace").decode() for text in pieces
    ]


def test_what_json_has_no_word_for_is_null_and_reads_as_nan() -> None:
    row = replace(
        ROW, logprobs=(-math.inf, math.nan, 0.0, 0.0, 0.0), credit=(math.nan, *ROW.logprobs[:4]), reward=math.inf
    )
    read = again(row)
    assert [math.isnan(value) for value in read.logprobs] == [True, True, False, False, False]
    assert math.isnan(read.advantages[0])
    assert read.reward is None
    assert line(read) == line(row)


def test_a_row_of_several_turns() -> None:
    values = to_json(ROW)
    assert values["completion"] == "(2+2=4 🦊) 4" == ROW.completion
    assert values["completion_tokens"] == 4, "those that the model wrote"
    assert values["policy_version"] == 2
    assert values["policy_versions"] == [[2, 3], [3, 2]]
    assert [segment["chars"] for segment in values["segments"]] == [5, 3, 3]
    assert ROW.starts == (0, 2, 3)
    assert ROW.loss_mask == (1, 1, 0, 1, 1)
    assert replace(ROW, status="failed").loss_mask == (0,) * 5
    assert ROW.advantages == ROW.credit
    assert replace(ROW, credit=None).advantages == (0.2,) * 5
    assert again(ROW) == ROW


def test_a_rollout_that_failed_before_its_first_turn() -> None:
    values = to_json(FAILED)
    assert (values["segments"], values["completion"], values["policy_version"]) == ([], "", None)
    assert not {"credit", "scores", "policy_versions", "prompt_ids"} & set(values)
    assert again(FAILED) == FAILED
    assert FAILED.starts == ()


def test_values_per_token_agree_in_length() -> None:
    for wrong in (
        {"logprobs": (0.0,)},
        {"policy_versions": (1,)},
        {"credit": (1.0,)},
        {"scores": {"teacher": (1.0,)}},
        {"segments": (TURN,)},
    ):
        with pytest.raises(ValueError, match="differ in length"):
            replace(ROW, **wrong)
    with pytest.raises(ValueError, match="3 prompt_ids and prompt_tokens = 9"):
        replace(ROW, prompt_tokens=9)


def test_messages_of_an_environment_are_written_without_addresses() -> None:
    strange = {"role": "tool", "content": "x", "image": object(), 7: ({"deep": {1, 2}},)}
    [read] = again(replace(FAILED, segments=(replace(ANSWER, num_tokens=0, messages=(strange,)),))).segments
    assert read.messages == ({"role": "tool", "content": "x", "image": "<object>", "7": [{"deep": "<set>"}]},)


def test_an_old_run_is_read_into_the_same_type(run: Path) -> None:
    file = run / FOLDER / "step_000003.jsonl"
    file.write_text(json.dumps(OLD, ensure_ascii=False) + "\n", encoding="utf-8")
    [row] = read_trajectories(run)
    turn = SegmentRow("model", "4 🦊", num_tokens=2, finish_reason="stop")
    assert row.segments == (turn,)
    assert (row.draw, row.boundary, row.images, row.credit, row.scores) == (None, None, (), None, {})
    assert row.policy_versions == (2, 2)
    assert row.loss_mask == (1, 1)
    assert row.rewards == {"gsm8k": 1.0, "format": None}
    assert row.logprobs[0] == -0.1
    assert math.isnan(row.logprobs[1])
    written = json.loads(line(replace(row, draw=0)))
    assert {key: written[key] for key in OLD} == OLD, "keys of format 1 keep their names and values"
    failed = {**OLD, "completion": "", "policy_version": None, "status": "failed", "finish_reason": "error"}
    assert from_json({**failed, "token_ids": [], "logprobs": []}).policy_versions == ()


@pytest.mark.parametrize(
    ("given", "advantage", "credit"),
    [([0.5, -0.25], 0.125, (0.5, -0.25)), ([0.1, 0.1], 0.1, None), ([0, 1], 0.5, (0, 1))],
)
def test_an_old_row_s_advantage_may_be_of_each_token(
    given: list[float], advantage: float, credit: tuple[float, ...] | None
) -> None:
    row = from_json({**OLD, "advantage": given})
    assert (row.advantage, row.credit) == (advantage, credit)
    assert row.advantages == tuple(given)
    written = json.loads(line(row))
    assert (written["advantage"], written.get("credit")) == (advantage, credit and list(credit))


def test_an_old_row_s_advantages_are_checked() -> None:
    none = from_json({**OLD, "advantage": [], "token_ids": [], "logprobs": []})
    assert (none.advantage, none.credit) == (0.0, None)
    damaged = from_json({**OLD, "advantage": [0.5, None]})
    assert math.isnan(damaged.advantage)
    assert math.isnan(damaged.advantages[1])
    for wrong, words in (
        ([0.5], "of 1 values; expected one, or one for each of 2 tokens"),
        ([0.5, "a"], 'got "advantage" with text in it'),
        ([1.7e308, 1.6e308], "too large to add"),
    ):
        with pytest.raises(ValueError, match=words):
            from_json({**OLD, "advantage": wrong})
    with pytest.raises(ValueError, match='got "advantage" as a list'):
        from_json({**json.loads(line(ROW)), "advantage": [0.2] * 5})


def test_a_half_line_at_the_end_is_passed_over(run: Path) -> None:
    file = write(run, 1, ROW, FAILED)
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        file.write_bytes(whole[:end])
        assert list(read_trajectories(run)) == [ROW], end
    file.write_bytes(whole[:-1])
    assert list(read_trajectories(run)) == [ROW, FAILED], "nothing but the line break is missing"
    file.write_bytes(whole[:first] + b"\0" * 40)
    assert list(read_trajectories(run)) == [ROW], "as a power cut leaves it"
    file.write_bytes(b"")
    assert list(read_trajectories(run)) == []


def test_a_damaged_line_is_named(run: Path) -> None:
    file = write(run, 1, ROW, FAILED)
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged in (lines[0][:50] + b"\n", b"\xff\n", b"\n", b"[" * 100_000 + b"\n"):
        file.write_bytes(lines[0] + damaged + lines[1])
        found = read_trajectories(run)
        assert next(found) == ROW, "rows before it are read"
        with pytest.raises(DataError, match=r"step_000001\.jsonl:2: got a line that is not JSON .*; remove the line"):
            next(found)
    file.write_bytes(b"[1, 2]\n")
    with pytest.raises(DataError, match=r"jsonl:1: got a line that is no object; expected a row"):
        next(read_trajectories(run))


@pytest.mark.parametrize("number", [FORMAT + 1, 99])
def test_a_newer_format_is_refused_in_words(run: Path, number: int) -> None:
    file = run / FOLDER / "step_000001.jsonl"
    file.write_text(line(ROW) + json.dumps({"format": number, "all": "new"}) + "\n", encoding="utf-8")
    found = read_trajectory_file(file)
    assert next(found) == ROW
    with pytest.raises(DataError, match=rf"jsonl:2: .*got format {number}; .*formats up to {FORMAT}: install"):
        next(found)
    with pytest.raises(ValueError, match=f"got format {number}"):
        eval_from_json({**OLD_EVAL, "format": number})


@pytest.mark.parametrize("number", [0, -1, "2", 2.0, True, None])
def test_a_format_is_a_number(number: Any) -> None:
    with pytest.raises(ValueError, match=r"got the format .*; expected a whole number from 1 to 2"):
        from_json({**to_json(ROW), "format": number})


@pytest.mark.parametrize("kept", [OLD, json.loads(line(FAILED))], ids=["format 1", "format 2"])
def test_every_key_is_needed_and_checked(kept: dict[str, Any]) -> None:
    derived = {"format", "completion_tokens", "boundary"}
    if kept is not OLD:
        derived |= {"policy_version"}  # of no tokens
    for name in set(kept) - derived:
        with pytest.raises(ValueError, match=f'got no "{name}"'):
            from_json({key: value for key, value in kept.items() if key != name})
        with pytest.raises(ValueError, match=f'got "{name}" as true or false; expected'):
            from_json({**kept, name: True})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [7, 2.5, 9, 8, 1]}, 'got "token_ids" with a number in it; expected a whole number'),
        ({"logprobs": [0.0, 0.0, "a", 0.0, 0.0]}, 'got "logprobs" with text in it'),
        ({"logprobs": [0.0]}, "differ in length"),
        ({"finish_reason": "tired"}, "got \"finish_reason\" = 'tired'; expected one of stop, length, turns"),
        ({"boundary": "moon"}, 'got "boundary"'),
        ({"policy_versions": [[2, 3]]}, "no runs .* of 5 tokens"),
        ({"policy_versions": [[2, 3, 1]]}, "no runs"),
        ({"policy_versions": [[0, 10**15]]}, "no runs"),
        ({"completion": "short"}, "its segments have 11 characters, and its completion 5"),
        ({"rewards": {"a": "b"}}, 'got "a" as text'),
        ({"scores": {"teacher": [0.0]}}, "differ in length"),
        ({"segments": [{"by": "model", "tokens": 5, "chars": 11}, 7]}, 'got "segments" with a whole number in it'),
        ({"segments": [{"by": "moon", "tokens": 5, "chars": 11}]}, 'got "by"'),
        ({"segments": [{"by": "model", "tokens": -5, "chars": 11}]}, 'got "tokens" = -5; expected 0 or more'),
        ({"images": [{}]}, 'got no "digest"'),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_json({**json.loads(line(ROW)), **change})


def test_steps_come_in_their_order(run: Path) -> None:
    for step in (10, 9, 1_000_000, 2):
        write(run, step, replace(ROW, step=step), replace(FAILED, step=step))
    for name in ("eval_000003.jsonl", "notes.txt", "step_000004.jsonl.gz", ".step_000005.jsonl.tmp"):
        (run / FOLDER / name).write_text("no row")
    assert [row.step for row in read_trajectories(run)] == [2, 2, 9, 9, 10, 10, 1_000_000, 1_000_000]
    assert [row.step for row in read_trajectories(str(run), steps=range(5, 11))] == [9, 9, 10, 10]
    assert list(read_trajectories(run, steps=[3])) == []


def test_a_folder_without_trajectories_is_refused_at_once(tmp_path: Path) -> None:
    for read in (read_trajectories, read_eval_trajectories):
        with pytest.raises(
            DataError, match=r"got no folder trajectories/ there; expected .*train\.trajectories = true"
        ):
            read(tmp_path)
    with pytest.raises(FileError, match=r"gone\.jsonl cannot be read: it is not there"):
        list(read_trajectory_file(tmp_path / "gone.jsonl"))


def test_a_large_file_is_read_row_by_row(run: Path) -> None:
    size = 500
    turn = replace(LAST, num_tokens=size)
    wide = replace(
        ROW, segments=(turn,), token_ids=(7,) * size, logprobs=(-1.2345678,) * size, policy_versions=(2,) * size,
        credit=None, scores={},
    )  # fmt: skip
    file = write(run, 1, *(replace(wide, sample_index=index) for index in range(1500)))
    assert file.stat().st_size > 10_000_000
    tracemalloc.start()
    try:
        assert sum(row.sample_index for row in read_trajectories(run)) == 1500 * 1499 // 2
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_rows_are_read_while_a_run_writes_more(run: Path) -> None:
    write(run, 1, ROW)
    found: Iterator[TrajectoryRow] = read_trajectories(run)
    assert next(found) == ROW
    write(run, 1, FAILED)
    write(run, 2, FAILED)
    assert list(found) == [FAILED], "a step that began later is for the next reader"


def test_evaluated_samples_are_read_from_old_and_new_runs(run: Path) -> None:
    old = eval_from_json(OLD_EVAL)
    assert old == EvalTrajectoryRow(**OLD_EVAL)
    assert eval_to_json(old) == {"format": FORMAT, **OLD_EVAL}
    for step in (20, 10):
        file = run / FOLDER / EVAL_FILE.format(step)
        append_rows(file, [OLD_EVAL, eval_to_json(replace(old, policy_version=step))])
        with file.open("a") as stream:
            stream.write('{"format": 2, "uid": "00')
    assert [row.policy_version for row in read_eval_trajectories(run)] == [10, 10, 10, 20]
    assert len(list(read_eval_trajectories(run, steps=[20]))) == 2
    assert len(list(read_eval_file(run / FOLDER / "eval_000010.jsonl"))) == 2
    assert list(read_trajectories(run)) == []
    for name in OLD_EVAL:
        with pytest.raises(ValueError, match=f'got no "{name}"'):
            eval_from_json({key: value for key, value in OLD_EVAL.items() if key != name})
    with pytest.raises(DataError, match=r'eval_000010\.jsonl:1: the row cannot be read: got no "token_ids"'):
        next(read_trajectory_file(run / FOLDER / "eval_000010.jsonl"))


def test_reading_loads_nothing_heavy() -> None:
    code = "import sys, groupwise.trajectories; print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b""


PAGE = (Path(__file__).parents[2] / "docs" / "trajectories.md").read_text(encoding="utf-8")


def documented(section: str) -> dict[str, int]:
    """Keys of a section's table, with the format that they came with."""
    [part] = [part for part in PAGE.split("\n## ") if part.startswith(section)]
    lines = re.findall(r"^\| (`[^|]*`) \| (\d) \| .+ \|$", part, re.MULTILINE)
    return {key: int(since) for keys, since in lines for key in re.findall(r"`(\w+)`", keys)}


def test_the_page_has_every_key_and_the_format_that_it_came_with() -> None:
    assert documented("A rollout") == {key: 1 if key in OLD else 2 for key in to_json(ROW)}
    evaluated = eval_to_json(eval_from_json(OLD_EVAL))
    assert documented("A sample of an evaluation") == {key: 1 if key in OLD_EVAL else 2 for key in evaluated}
    assert documented("A segment") == {key: 2 for segment in to_json(ROW)["segments"] for key in segment}


def test_the_page_s_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "gsm8k-tiny"
    (folder / FOLDER).mkdir(parents=True)
    long = from_json({**OLD, "token_ids": [7] * 201, "logprobs": [0.0] * 201})
    write(folder, 40, ROW, replace(long, step=40))
    write(folder, 41, replace(long, step=41))
    [program] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert capsys.readouterr().out == "40 000017-3fa9 4 🦊\n"
