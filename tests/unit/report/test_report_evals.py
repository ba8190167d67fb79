"""Evaluations row by row, two runs compared, and what else is known of a run."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from math import comb
from pathlib import Path

import pytest

from groupwise.accuracy import Paired, accuracy, confidence_interval, paired
from groupwise.config.loading import config_json, load_config, settings
from groupwise.errors import ConfigError
from groupwise.report import write_report
from groupwise.report.evals import Evaluations, compared
from groupwise.report.facts import RunFacts, command
from groupwise.report.page import page
from groupwise.runs import read_run
from groupwise.trajectories import eval_to_json, read_eval_trajectories, to_json
from tests.made_run import add_step, evaluated, lines, make_run, rollout


def evaluations(run: Path) -> Evaluations:
    found = Evaluations(run)
    found.refresh()
    return found


def test_accuracies_are_those_of_the_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=60, groups=1, samples=1, rows=50)
    found = evaluations(run).record()
    assert [point["step"] for point in found["points"]] == [0, 60]
    for point, right in zip(found["points"], found["right"], strict=True):
        rows = [[row.correct] for row in read_eval_trajectories(run, [point["step"]])]
        assert point["accuracy"] == accuracy(rows)
        assert (point["low"], point["high"]) == (confidence_interval(rows).low, confidence_interval(rows).high)
        assert right == [float(row[0]) for row in rows]
    assert found["labels"][:3] == ["0?<|assistant|>", "1?<|assistant|>", "2?<|assistant|>"]


def test_texts_of_rows_that_changed_come_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=60, groups=1, samples=1, rows=200)
    found = evaluations(run)
    whole = found.texts(None)
    assert len(whole) == 200
    assert whole["e00007"]["answers"]["60"][0]["text"] == "step 60 says 7"
    few = found.texts(20_000)
    first, last = (found.outcomes[step] for step in (0, 60))
    changed = {uid for uid in first if first[uid] != last[uid]}
    assert 0 < len(few) < 200
    assert set(few) <= changed or changed <= set(few)


def test_a_file_that_is_damaged_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=3)
    (run / "trajectories/eval_000003.jsonl").write_text('{"format": 2}\n')
    record = evaluations(run).record()
    assert [point["step"] for point in record["points"]] == [0, 6]
    assert "eval_000003.jsonl:1" in record["problems"][0]


def test_new_evaluations_are_read_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=3)
    found = evaluations(run)
    before = found.version
    found.refresh()
    assert found.version == before
    lines(run / "trajectories/eval_000009.jsonl", [eval_to_json(evaluated(9, row)) for row in range(3)])
    found.refresh()
    assert found.version > before
    assert found.steps == [0, 6, 9]
    (run / "trajectories/eval_000009.jsonl").unlink()
    found.refresh()
    assert found.steps == [0, 6]


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 1), (12, 2), (3, 3)])
def test_the_sign_test_is_exact(better: int, worse: int) -> None:
    first = [[False]] * better + [[True]] * worse + [[True]] * 4
    second = [[True]] * better + [[False]] * worse + [[True]] * 4
    n, few = better + worse, min(better, worse)
    expected = min(1.0, 2 * sum(comb(n, k) for k in range(few + 1)) / 2**n) if n else 1.0
    assert paired(first, second) == Paired(n + 4, better, worse, expected)
    assert paired(second, first) == Paired(n + 4, worse, better, expected)


def test_the_sign_test_counts_rows_of_several_samples_once() -> None:
    assert paired([[True, False]], [[True, True]]) == Paired(1, 1, 0, 1.0)
    with pytest.raises(ValueError, match="no rows"):
        paired([], [])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired([[True]], [[True], [False]])


def test_runs_are_compared_over_the_rows_that_both_have(tmp_path: Path) -> None:
    one, two = (
        make_run(tmp_path / name, steps=steps, rows=rows) for name, steps, rows in (("one", 6, 40), ("two", 50, 30))
    )
    found = compared(evaluations(one), evaluations(two))
    assert found is not None
    rows = [(evaluated(6, row).correct, evaluated(50, row).correct) for row in range(30)]
    assert (found["rows"], found["better"], found["worse"]) == (
        30,
        sum(b > a for a, b in rows),
        sum(b < a for a, b in rows),
    )
    assert len(found["differ"]) == found["better"] + found["worse"]
    assert compared(evaluations(one), Evaluations(two)) is None


def test_what_is_known_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "log.txt").write_text("2026 INFO groupwise: fine\n2026 WARNING groupwise: look out <b>\n")
    (run / "origins.json").write_text(json.dumps({"optim.lr": "recipes/one.toml"}))
    known = RunFacts(run, "run")
    known.refresh()
    found = known.record([])
    rows = {row[0]: row[1:] for row in found["settings"]}
    assert rows["optim.lr"] == ["3e-05", "1e-06", "recipes/one.toml"]
    assert rows["train.steps"][2] == "given"
    assert rows["train.seed"][2] == "default"
    assert found["findings"][0]["rule"] == "reward_flat"
    assert found["warnings"] == ["2026 WARNING groupwise: look out <b>"]
    assert found["ledger"] == {"groups": 24, "samples": 96, "learned": 24, "prompts": 24}


def test_the_ledger_and_the_log_are_read_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    (run / "log.txt").write_text("a WARNING: one\nan INFO: two\nhalf of a WARN")
    known = RunFacts(run, "run")
    known.refresh()
    known.refresh()
    assert known.record([])["ledger"] == {"groups": 8, "samples": 32, "learned": 8, "prompts": 8}
    add_step(run, 3)
    with (run / "log.txt").open("a") as file:
        file.write("ING: three\n")
    known.refresh()
    assert known.record([])["ledger"] == {"groups": 12, "samples": 48, "learned": 12, "prompts": 12}
    assert known.record([])["warnings"] == ["a WARNING: one", "half of a WARNING: three"]
    lines_of = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines_of[:8]))  # as a killed run that goes on does
    known.refresh()
    assert known.record([])["ledger"]["groups"] == 8


def test_numbers_that_are_none_do_not_end_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    row = json.dumps(to_json(rollout(1, 50, 0))).replace('"reward": ', '"reward": NaN, "was": ', 1)
    with (run / "trajectories/step_000001.jsonl").open("a") as file:
        file.write(row.replace('"rewards": {"made": ', '"rewards": {"made": -Infinity, "was": ') + "\n")
    assert write_report([run], tmp_path / "out.html").kept == 5


def test_the_command_makes_the_same_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\npath = "models/a b"\n[data]\ntrain = "x.jsonl"\nsystem_prompt = "It\'s \\"so\\"\\n"\n'
        '[[reward]]\nname = "gsm8k"\nweight = 0.5\n[[reward]]\nname = "file.py:f"\n'
        '[optim]\nbetas = [0.9, 0.95]\n[rollout]\nstop = ["--", "b,c"]\n'
        '[algorithm]\nname = "dapo"\n'
    )
    config = load_config(str(recipe), []).config
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config_json(config))
    words = shlex.split(command(read_run(run)))
    assert words[:2] == ["groupwise", "train"]
    assert settings(load_config(None, words[2:]).config) == settings(config)


def test_a_page_lets_only_its_own_program_run() -> None:
    text = "".join(page("</title><script>alert(1)</script>", [("head", "AAAA")]))
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "default-src 'none'" in text
    assert "connect-src 'none'" in text
    assert "unsafe" not in text.split("</head>")[0].split("<style>")[0]
    assert "connect-src 'self'" in "".join(page("x", live=True))
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_run_is_refused(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("")
    with pytest.raises(ConfigError, match="expected a run directory"):
        write_report([place], tmp_path / "out.html")
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="named twice"):
        write_report([run, tmp_path / "." / "run"], tmp_path / "out.html")


def test_a_run_with_nothing_but_a_config(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "ledger.jsonl", "summary.json", "versions.json"):
        (run / name).unlink()
    for file in (run / "trajectories").iterdir():
        file.unlink()
    (run / "config.json").write_text("{torn")
    (run / "metrics.jsonl").write_text("")
    written = write_report([run], tmp_path / "deep" / "out.html")
    assert written.groups == 0
    assert written.path.stat().st_size == written.size


def test_an_evaluation_of_failures_alone_measured_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=3)
    failed = [replace(evaluated(6, row), status="failed", cause="boom", correct=False) for row in range(3)]
    (run / "trajectories/eval_000006.jsonl").write_text("".join(json.dumps(eval_to_json(row)) + "\n" for row in failed))
    record = evaluations(run).record()
    assert [point["step"] for point in record["points"]] == [0]
    assert record["problems"] == ["evaluation of step 6: every sample failed, so nothing was measured"]


@pytest.mark.parametrize("number", ["1" + 400 * "0", "1e999"])
def test_numbers_beyond_all_floats_do_not_end_a_page(number: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").write_text(f'{{"step": 1, "reward": {number}}}\n{{"step": {number}, "reward": 1.0}}\n')
    for place, name in enumerate(("reward", "advantage", "completion_tokens", "group")):
        row = json.dumps(to_json(rollout(1, 50 + place, 0))).replace(f'"{name}": ', f'"{name}": {number}, "was": ', 1)
        with (run / "trajectories/step_000001.jsonl").open("a") as file:
            file.write(row + "\n")
    for name in ("logprobs", "rewards"):
        row = to_json(rollout(1, 60 + len(name), 0))
        row[name] = [10**400] * 12 if name == "logprobs" else {"made": 10**400}
        with (run / "trajectories/step_000001.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    assert write_report([run], tmp_path / "out.html").groups >= 4
