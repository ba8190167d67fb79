"""`groupwise xtuner`, and `fit()` up to where a model would be loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from groupwise.cli import main
from groupwise.compat.xtuner.environment import environment, script_variables
from groupwise.compat.xtuner.files import TrajectoryLinks
from groupwise.config.loading import load_config
from groupwise.errors import ConfigError
from groupwise.watching import Wish

EXAMPLE = Path(__file__).parents[3] / "examples" / "xtuner_config.py"
ROW = (
    '{"prompt": [{"role": "user", "content": "2+2?"}], "data_source": "openai/gsm8k", '
    '"reward_model": {"ground_truth": "4"}}\n'
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("WORK_DIR", "MODEL_PATH", "WORLD_SIZE", "XTUNER_USE_FA3"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"hidden_size": 64}))
    (tmp_path / "rows").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "rows" / name).write_text(ROW)
    return tmp_path


def run(config: Path | str, *more: str, backend: str = "lmdeploy") -> int:
    return main(["xtuner", str(config), backend, "model", "rows/train.jsonl", "rows/test.jsonl", *more])


def refusal(
    capsys: pytest.CaptureFixture[str], text: str | None, place: Path, *more: str, backend: str = "sglang"
) -> str:
    if text is not None:
        (place / "program.py").write_text(text)
    assert run("program.py", *more, backend=backend) == 2
    return capsys.readouterr().err


def test_a_dry_run_shows_a_recipe_that_is_the_program(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert run(EXAMPLE, "--dry-run") == 0
    recipe = place / "recipe.toml"
    recipe.write_text(capsys.readouterr().out)
    config = load_config(recipe).config
    assert (config.model.path, config.data.train, config.data.eval) == ("model", "rows/train.jsonl", "rows/test.jsonl")
    assert (config.rollout.group_size, config.rollout.prompts_per_step, config.train.steps) == (5, 64, 45)
    assert Path(config.train.output).parent == place / "work_dirs" / "model_rows_lmdeploy"
    assert config.reward[0].name == "gsm8k"
    assert not (place / "work_dirs").exists()


def test_the_variables_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    made = script_variables(backend="LMDeploy", model="a/model", train="b/gsm8k/train.jsonl", evaluation="")
    assert (made["MODEL_PATH"], made["DATA_PATH"], made["EVAL_DATA_PATH"]) == ("a/model", "b/gsm8k/train.jsonl", "")
    assert (made["XTUNER_USE_LMDEPLOY"], made["XTUNER_USE_FA3"], made["WORLD_SIZE"]) == ("1", "1", "1")
    assert "XTUNER_USE_SGLANG" not in made
    assert made["WORK_DIR"].endswith("work_dirs/model_gsm8k_lmdeploy")
    monkeypatch.setenv("WORK_DIR", "mine")
    monkeypatch.setenv("XTUNER_USE_FA3", "0")
    kept = script_variables(backend="native", model="m", train="t", evaluation="e")
    assert not {"WORK_DIR", "XTUNER_USE_FA3"} & set(kept)
    assert not any(name.startswith("XTUNER_USE") for name in kept)
    with pytest.raises(ConfigError, match="BACKEND 'tgi' is unknown; expected one of lmdeploy, sglang, vllm, native"):
        script_variables(backend="tgi", model="m", train="t", evaluation="e")


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", "before")
    with environment({"MODEL_PATH": "within", "XTUNER_TEST_ONLY": "1"}):
        assert (os.environ["MODEL_PATH"], os.environ["XTUNER_TEST_ONLY"]) == ("within", "1")
    assert os.environ["MODEL_PATH"] == "before"
    assert "XTUNER_TEST_ONLY" not in os.environ


def test_files_that_are_no_programs(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert "no such file" in refusal(capsys, None, place)
    assert "program.py defines no `trainer`" in refusal(capsys, "x = 1\n", place)
    assert "a `trainer` that is int" in refusal(capsys, "trainer = 3\n", place)
    assert "program.py:2: ZeroDivisionError: division by zero" in refusal(capsys, "x = 1\ny = 1 / 0\n", place)
    assert "program.py:1: SyntaxError" in refusal(capsys, "def\n", place)
    assert "program.py:1: KeyError: 'NO_SUCH_NAME'" in refusal(capsys, "import os; os.environ['NO_SUCH_NAME']\n", place)
    old = refusal(capsys, "\nfrom xtuner.v1.config import AdamWConfig\n", place)
    assert "program.py:2: No module named 'xtuner'; take XTuner's names from groupwise.compat.xtuner" in old
    assert "SystemExit" in refusal(capsys, "raise SystemExit(0)\n", place)
    assert "BACKEND 'tgi'" in refusal(capsys, "x = 1\n", place, backend="tgi")


def test_errors_of_the_door_come_through_as_they_are(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    text = "from groupwise.compat.xtuner import AdamWConfig\nAdamWConfig(learning_rate=1)\n"
    assert "AdamWConfig.learning_rate: there is no such argument" in refusal(capsys, text, place)
    text = "from groupwise.compat.xtuner import RLDisaggregatedTrainerConfig\n"
    assert "use RLColocateTrainerConfig" in refusal(capsys, text, place)


def test_what_training_refuses_is_said_in_the_programs_words(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace("GROUP = 5", "GROUP = 1")
    message = refusal(capsys, text, place)
    assert "rollout.group_size = 1: expected at least 2" in message
    assert (
        "in this program:\n  rollout.group_size is agent_loop_manager_cfg.tasks.sampler_config.prompt_repeat_k"
        in message
    )


def test_trajectories_have_both_names(place: Path) -> None:
    folder = place / "run" / "trajectories"
    folder.mkdir(parents=True)
    for name in ("step_000001.jsonl", "step_000012.jsonl", "eval_000010.jsonl", "other.txt"):
        (folder / name).write_text(name)
    links = TrajectoryLinks(place / "run")
    for step in (1, 12, 10, 12, 99):  # a step that a resumed run does again has its link already
        assert links.logged(step, {}) == Wish()
    found = {path.name: path.read_text() for path in (place / "run").iterdir() if path.is_symlink()}
    assert found == {
        "rollout_idx_1_trajectory.jsonl": "step_000001.jsonl",
        "rollout_idx_12_trajectory.jsonl": "step_000012.jsonl",
        "eval_10_trajectory.jsonl": "eval_000010.jsonl",
    }
    assert TrajectoryLinks(place / "nowhere").logged(1, {}) == Wish()
