"""`fit()` of a program with XTuner's names: a function as judger, its run directories, and going on with a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.compat import xtuner
from groupwise.errors import ConfigError
from groupwise.trajectories import read_trajectory_file

ReadRows = Callable[[Path], list[dict[str, Any]]]


def long_enough(response: str, label: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    assert label == "x"
    return {"score": extra_info["weight"] * len(response)}


def program(task: Any, folder: Path, **given: Any) -> xtuner.RLTrainer:
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"say {k}:", "reward_model": {"ground_truth": "x"}}) + "\n" for k in range(4))
    )
    judger = xtuner.JudgerConfig(judger_name="long", reward_handler=long_enough, extra_info={"weight": 0.5})
    loss = xtuner.GRPOLossConfig(policy_loss_cfg={"cliprange_low": 0.2, "cliprange_high": 0.2})  # pyright: ignore[reportArgumentType]
    parts: dict[str, Any] = {
        "resources": xtuner.AcceleratorResourcesConfig(accelerator="CPU", num_workers=1),
        "rollout_config": xtuner.RolloutConfig(model_path=task.model, dtype="float32"),
        "dataflow_config": xtuner.DataFlowConfig(
            prompt_repeat_k=2, global_batch_size=2, sample_params=xtuner.SampleParams(max_tokens=6)
        ),
        "judger_config": judger,
        "replay_buffer_config": xtuner.ReplayBufferConfig(
            dataset_cfg=[{"dataset": xtuner.DatasetConfig(anno_path=rows)}],  # pyright: ignore[reportArgumentType]
            tokenizer=task.model,  # pyright: ignore[reportArgumentType]
        ),
        "train_worker_cfg": xtuner.WorkerConfig(loss_cfg=loss, load_from=task.model, pack_max_length=256),
        "tokenizer_path": task.model,
        "work_dir": folder / "work",
        "total_epochs": 1,
        "enable_evaluate": False,
    }
    return xtuner.RLTrainer(**{**parts, **given})


def test_each_fit_has_a_folder_of_its_own(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    for _ in range(2):
        assert program(task, tmp_path).fit()["steps"] == 2
    runs = sorted((tmp_path / "work").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert all("rewards/long/mean" in row for row in read_jsonl(run / "metrics.jsonl"))
        rows = list(read_trajectory_file(run / "rollout_idx_2_trajectory.jsonl"))
        assert {row.reward for row in rows} == {0.5 * len(row.completion) for row in rows}


def test_trajectories_have_xtuners_names_while_the_run_goes_on(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    seen: list[set[str]] = []

    def watching(response: str, label: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        seen.append({link.name for link in tmp_path.glob("work/*/*_trajectory.jsonl") if read_jsonl(link)})
        return {"score": float(len(response))}

    rows = [{"dataset": xtuner.DatasetConfig(anno_path=tmp_path / "rows.jsonl")}]
    evaluator = xtuner.EvaluatorConfig(
        dataset_cfg=rows,  # pyright: ignore[reportArgumentType]
        evaluate_step=1,
        sample_params=xtuner.SampleParams(max_tokens=6),  # pyright: ignore[reportArgumentType]
    )
    given = {"evaluator_config": evaluator, "enable_evaluate": True, "enable_initial_evaluate": True}
    program(task, tmp_path, judger_config=xtuner.JudgerConfig(reward_handler=watching), **given).fit()
    in_second_step = {"eval_0_trajectory.jsonl", "eval_1_trajectory.jsonl", "rollout_idx_1_trajectory.jsonl"}
    assert seen[0] == set()
    assert seen[-1] == in_second_step, "the last evaluation comes before the second step is logged"


def test_where_links_cannot_be_made_a_line_says_so_and_the_run_goes_on(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(link: Path, file: Path) -> None:
        raise OSError("links are not supported")

    monkeypatch.setattr(Path, "symlink_to", refused)
    assert program(task, tmp_path).fit()["steps"] == 2
    assert sum("links are not supported" in record.getMessage() for record in caplog.records) == 1


def test_auto_resume_goes_on_with_the_newest_run(task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = program(task, tmp_path, auto_resume=True)
    first.fit()
    with caplog.at_level(logging.INFO, "groupwise"):
        program(task, tmp_path, auto_resume=True).fit()
    assert len(list((tmp_path / "work").iterdir())) == 1
    assert "resumed from" in caplog.text


def test_a_row_without_a_label_is_refused(task: Any, tmp_path: Path) -> None:
    trainer = program(task, tmp_path)
    trainer.replay_buffer_config.dataset_cfg[0].dataset.anno_path = task.rows
    with pytest.raises(ConfigError, match="reward_model"):
        trainer.fit()
