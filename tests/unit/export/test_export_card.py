from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from groupwise.errors import ConfigError
from groupwise.export.card import read_run, render_card, write_card
from groupwise.export.curve import Curve, curve_svg
from groupwise.export.hf import export_hf
from groupwise.export.source import find_source


def test_a_card_tells_rewards_settings_results_and_lineage(run_directory: Path, tmp_path: Path) -> None:
    text = write_card(find_source(run_directory), tmp_path / "card" / "README.md")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "Qwen/Qwen3-0.6B"
    assert head["library_name"] == "transformers"
    assert {"grpo", "groupwise"} <= set(head["tags"])
    assert "| `gsm8k` | 1 |" in text
    assert "| `a\\|b` | 0.5 |" in text
    assert "| `reward` | 0.1833 | 0.85 |" in text, "means of the first and the last ten steps"
    assert "| `eval/accuracy` | 0.1 | 0.6 |" in text
    assert "| `optim.lr` | 1e-06 |" in text
    assert "sft.rows_per_step" not in text, "it did nothing in this run"
    assert "- steps: 30, seed 7" in text
    assert "- versions: groupwise 0.9, torch 2.13, python 3.12" in text
    assert "![reward by step](reward.svg)" in text
    ElementTree.parse(tmp_path / "card" / "reward.svg")


def test_a_supervised_run(run_directory: Path) -> None:
    (run_directory / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    text = render_card(read_run(run_directory), is_adapter=True, has_curve=True)
    assert "supervised training" in text
    assert "algorithm.name" not in text
    assert "`sft.rows_per_step`" in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["library_name"], "lora" in head["tags"]) == ("peft", True)


def test_a_run_of_which_little_is_left(run_directory: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "summary.json", "versions.json"):
        (run_directory / name).unlink()
    text = write_card(find_source(run_directory), tmp_path / "README.md")
    assert "No step was recorded." in text
    assert not (tmp_path / "reward.svg").exists()


def test_a_folder_without_a_run_has_no_card(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "alone" / "model"
    shutil.copytree(model_folder("qwen3"), folder)
    with pytest.raises(ConfigError, match="is in no run directory"):
        write_card(find_source(folder), tmp_path / "README.md")


def test_an_exported_run_has_its_card(run_directory: Path, tmp_path: Path) -> None:
    export_hf(find_source(run_directory), tmp_path / "out")
    assert "# sums" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "reward.svg").is_file()


@pytest.mark.parametrize("values", [(1.0, 1.0), (0.0, 0.5, 0.25), (-3.5, 1e9)])
def test_a_curve_stays_in_its_frame(values: tuple[float, ...]) -> None:
    svg = ElementTree.fromstring(curve_svg(Curve("a<b", tuple(range(5, 5 + len(values))), values)))
    [line] = svg.findall("{*}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == len(values)
    assert all(40 <= x <= 600 and 40 <= y <= 200 for x, y in points)


def test_metrics_that_are_null_are_no_points(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": None}, {"step": 3, "reward": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\nnonsense\n")
    assert read_run(tmp_path).curve("reward") == Curve("reward", (1, 3), (1.0, 3.0))
