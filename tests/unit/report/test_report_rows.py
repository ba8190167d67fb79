"""What a page knows of a run that is written meanwhile, damaged, or taken back."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from groupwise.files import json_line
from groupwise.report.choice import choose_groups, spread_order
from groupwise.report.detail import group_detail
from groupwise.report.pieces import Pieces
from groupwise.report.reader import MetricsSoFar, RunReader, names_of
from groupwise.report.rows import RolloutIndex, columns, labels, light
from groupwise.trajectories import read_trajectories, to_json
from tests.made_run import TEXT, add_step, lines, make_run, rollout


def read(run: Path) -> RolloutIndex:
    index = RolloutIndex(run)
    index.refresh()
    return index


def test_all_groups_with_their_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3, groups=5, samples=4)
    found = columns(index := read(run), index.groups)
    rows = list(read_trajectories(run))
    assert found["rewards"] == [row.reward for row in rows]
    assert found["lengths"] == [row.completion_tokens for row in rows]
    assert list(zip(found["step"], found["group"], strict=True)) == sorted({(row.step, row.group) for row in rows})
    assert found["samples"] == [4] * 15
    assert [found["end_names"][end] for end in found["ends"]] == ["stop"] * 60


def test_a_group_whole_is_what_its_rows_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    index = read(run)
    entry = index.groups[-1]
    detail = group_detail(index, entry, Pieces(run))
    rows = [row for row in read_trajectories(run) if (row.step, row.group) == (entry.step, entry.group)]
    for sample, row in zip(detail["samples"], rows, strict=True):
        assert sample["text"] == row.completion
        assert sample["ids"] == list(row.token_ids)
        assert sample["logprobs"] == pytest.approx(list(row.logprobs), rel=1e-4)
        assert sample["rewards"] == {"made": row.reward, "format": None}
        assert sample["pieces"] is None, "this run keeps no tokenizer"
        assert sum(segment["chars"] for segment in sample["segments"]) == len(row.completion.encode("utf-16-le")) // 2
    assert detail["prompt"] == rows[0].prompt


@pytest.mark.parametrize("trap", ['x", "token_ids": [1, 2], "logprobs": [', 'x","token_ids":[1,2],"logprobs":['])
def test_what_a_text_says_is_not_taken_for_a_field(tmp_path: Path, trap: str) -> None:
    run = make_run(tmp_path / "run", steps=1)
    row = rollout(2, 99, 0, prompt=trap, cause=trap)
    lines(run / "trajectories/step_000002.jsonl", [to_json(row)])
    index = read(run)
    assert index.prompts[index.groups[-1].prompt] == trap
    assert index.damaged == 0
    assert group_detail(index, index.groups[-1], Pieces(run))["samples"][0]["cause"] == trap


def test_fields_behind_the_tokens_and_rows_without(tmp_path: Path) -> None:
    row = to_json(rollout(1, 0, 0, credit=tuple(float(i) for i in range(12))))
    assert light(json.dumps(row).encode()) is not None
    late = {"token_ids": row.pop("token_ids"), "logprobs": row.pop("logprobs"), **row}  # an order of somebody else
    assert light(json.dumps(late).encode()) == late
    assert light(b"[1]") is None
    assert light(b'{"group": "0"}') is None
    assert light(b'{"a": ' * 100_000) is None


def test_it_reads_on_and_leaves_half_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    index = read(run)
    assert len(index.groups) == 8
    file = run / "trajectories/step_000003.jsonl"
    whole = json.dumps(to_json(rollout(3, 8, 0))) + "\n"
    file.write_text(whole + whole[:100])
    index.refresh()
    assert [len(entry.rewards) for entry in index.groups[8:]] == [1]
    file.write_text(whole + json.dumps(to_json(rollout(3, 8, 1))) + "\n" + "not json\n")
    index.refresh()
    index.refresh()
    assert [len(entry.rewards) for entry in index.groups[8:]] == [2]
    assert index.damaged == 1
    assert index.generation == 0


def test_what_a_killed_run_took_back_is_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    reader = RunReader(run, "run")
    reader.refresh()
    known = {"generation": reader.generation, "steps": 3, "groups": 12, "samples": 48, "evals": reader.evals.version}
    assert "anew" not in reader.changes(**known)
    (run / "trajectories/step_000003.jsonl").unlink()
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (run / "metrics.jsonl").write_text("".join(kept))
    reader.refresh()
    found = reader.changes(**known)
    assert found["anew"]
    assert found["metrics"]["steps"] == [1, 2]
    assert set(found["groups"]["step"]) == {1, 2}
    add_step(run, 3)
    reader.refresh()
    fresh = reader.changes(generation=found["generation"], steps=2, groups=8, samples=32, evals=0)
    assert fresh["metrics"]["steps"] == [3]
    assert fresh["groups"]["group"] == [8, 9, 10, 11]


def test_a_group_that_grew_meanwhile_is_sent_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, groups=1, samples=2)
    reader = RunReader(run, "run")
    reader.refresh()
    lines(run / "trajectories/step_000001.jsonl", [to_json(rollout(1, 0, 2))])
    reader.refresh()
    assert reader.changes(generation=0, steps=1, groups=1, samples=2, evals=0)["anew"]


def test_metrics_that_a_step_lacks_are_none(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines(file, [{"step": 1, "a": 1.5}, {"step": 2, "b": float("nan")}, {"no": "step"}, {"step": 3, "a": True}])
    metrics = MetricsSoFar(file)
    metrics.refresh()
    assert metrics.columns() == {"steps": [1, 2, 3], "columns": {"a": [1.5, None, None], "b": [None, None, None]}}
    assert metrics.columns(2)["steps"] == [3]


def test_the_first_places_are_spread_evenly() -> None:
    order = spread_order(101)
    assert sorted(order) == list(range(101))
    assert order[:5] == [0, 100, 50, 25, 75]
    for count in (4, 9, 17, 40):
        gaps = sorted(order[:count])
        widest = max(b - a for a, b in pairwise(gaps))
        assert widest <= 2 * 101 / (count - 1) + 1
    assert [spread_order(n) for n in (0, 1, 2)] == [[], [0], [0, 1]]


def test_a_page_keeps_what_says_most_within_its_room(tmp_path: Path) -> None:
    index = read(make_run(tmp_path / "run", steps=40, groups=5, samples=4))
    total = sum(entry.size for entry in index.groups)
    choice = choose_groups(index.groups, total // 10)
    assert sum(entry.size for entry in choice.kept) <= total // 10
    assert len(choice.kept) >= 15
    assert f"{len(choice.kept)} of 200 groups" in choice.rule
    steps = {entry.step for entry in choice.kept}
    assert {1, 40} < steps
    for step in (1, 40):
        of_step = [entry for entry in index.groups if entry.step == step]
        kept = [entry for entry in choice.kept if entry.step == step]
        assert max(entry.spread for entry in kept) == max(entry.spread for entry in of_step)
        assert min(entry.mean for entry in kept) == min(entry.mean for entry in of_step)
    assert choose_groups(index.groups, None).kept == tuple(index.groups)
    assert choose_groups(index.groups, total).kept == tuple(index.groups)
    assert choose_groups([], 5).kept == ()


def test_prompts_that_come_again_are_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    for step in range(2, 30):
        lines(
            run / f"trajectories/step_{step:06d}.jsonl",
            [to_json(rollout(step, step, i, uid=f"{step % 15}")) for i in (0, 1)],
        )
    index = read(run)
    choice = choose_groups(index.groups, 9 * sum(entry.size for entry in index.groups) // 10)
    kept = {(entry.step, entry.uid) for entry in choice.kept}
    again = [uid for uid in {entry.uid for entry in index.groups} if sum(e.uid == uid for e in index.groups) > 1]
    whole = [uid for uid in again if all((e.step, e.uid) in kept for e in index.groups if e.uid == uid)]
    assert len(whole) >= 8


def test_labels_are_what_tells_prompts_apart() -> None:
    prompts = ["<|user|>\nHow many apples are left?<|end|>", "<|user|>\nHow many pears are left?<|end|>"]
    assert labels(prompts) == ["apples", "pears"]
    assert labels(["only one"]) == ["only one"]
    assert labels(["same", "same again"]) == ["same", "same again"]
    assert labels([]) == []
    assert len(labels(["x" * 10_000, "y" * 10_000])[0]) <= 240
    assert labels([*prompts, "<|user|>\nHow few plums are left?<|end|>"]) == ["many apples", "many pears", "few plums"]


def test_characters_of_several_tokens(tmp_path: Path) -> None:
    from groupwise.quickstart.tiny_model import build_tiny_model

    build_tiny_model(tmp_path / "final", texts=["one two"], size="0.1m", vocab_size=259)
    pieces = Pieces(tmp_path)
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tmp_path / "final" / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    found = pieces.of(ids)
    assert found is not None
    assert len(found) == len(ids)
    assert "".join(found) == TEXT
    assert "" in found, "bytes of a character before its last one"
    wrong = pieces.of([ids[0], 10**9, ids[0]])
    assert wrong is not None
    assert wrong[1] == "\N{REPLACEMENT CHARACTER}"
    (tmp_path / "final" / "tokenizer.json").write_text("{torn")
    assert Pieces(tmp_path).of(ids) is None


def test_names_tell_runs_apart() -> None:
    assert names_of([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert names_of([Path("/a/one/grpo"), Path("/a/two/grpo")]) == ["one/grpo", "two/grpo"]
    assert names_of([Path("/a/one")]) == ["one"]


@pytest.mark.parametrize("compact", [True, False], ids=["as written", "with spaces"])
def test_a_row_is_read_without_its_tokens(compact: bool) -> None:
    written = json_line(to_json(rollout(1, 0, 0)))
    line = (written if compact else json.dumps(json.loads(written))).encode()
    torn = line[: line.index(b"token_ids") + 15] + b"what follows is not read"
    assert (found := light(torn)) is not None
    assert "token_ids" not in found
    assert found == {name: value for name, value in json.loads(line).items() if name in found}
