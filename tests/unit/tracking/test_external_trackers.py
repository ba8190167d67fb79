"""Each tracker against its real package, without a network; skipped where the package is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import TrackingConfig
from groupwise.tracking import Trackers, build_trackers
from groupwise.tracking.base import Sample

CONFIG = {"model": {"path": "tiny"}, "optim": {"lr": 1e-6}, "rollout": {"stop": ["a", "b"]}, "none": None}
SAMPLES = (
    Sample("2|2\n<b>?", "日本 🙂", 1.0, {"match": 1.0, "format": None}, 0.5),
    Sample("2|2\n<b>?", "x" * 5000, None, {"match": None}, -0.5),
)


def needing(*names: str) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.extras(package=name)) for name in names]


EXTERNAL = needing("wandb", "swanlab", "trackio", "mlflow")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, no settings of the machine, no network; and time, for a run that ends before a package is imported."""
    monkeypatch.setattr("groupwise.tracking.background.CLOSE_SECONDS", 90.0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home" / "swanlab"))
    names = ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE", "MLFLOW_TRACKING_URI")
    for name in (*names, "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run one"
    folder.mkdir()
    if importlib.util.find_spec("trackio"):
        # trackio reads its variable once, when it is imported.
        for module in ("trackio.utils", "trackio.sqlite_storage", "trackio"):
            found = importlib.import_module(module)
            for constant in ("TRACKIO_DIR", "MEDIA_DIR"):
                if constant in vars(found):
                    monkeypatch.setattr(found, constant, tmp_path / "trackio" / constant)
    return folder


def trackers(name: str, *, resumed: int | None = None, **settings: object) -> Trackers:
    config = TrackingConfig.model_validate({"backends": name, "project": "sums", "samples_every": 1, **settings})
    return build_trackers(config, run_name="one", total_steps=4, resumed_step=resumed)


def track(name: str, run_dir: Path, steps: range, *, resumed: int | None = None, **settings: object) -> Trackers:
    found = trackers(name, resumed=resumed, **settings)
    found.start(CONFIG, run_dir)
    for step in steps:
        found._each(lambda tracker, step=step: tracker.samples(step, SAMPLES))
        found.log(step, {"reward": step / 4, "rewards/match/mean": 1.0, "kl": math.nan, "größe": math.inf})
    found.close()
    return found


def run_id(run_dir: Path, name: str) -> str:
    return json.loads((run_dir / "tracking" / f"{name}_run.json").read_text())["id"]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, pending = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        pending += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


def wandb_history(folder: Path) -> list[dict[str, object]]:
    [file] = folder.glob("run-*.wandb")
    deadline = time.monotonic() + 20  # wandb's own process closes the file some time after `finish` has returned
    while not any(record.HasField("exit") for record in wandb_records(file)):
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.05)
    histories = [record.history for record in wandb_records(file) if record.HasField("history")]
    return [{"/".join(item.nested_key) or item.key: item.value_json for item in row.item} for row in histories]


@pytest.mark.extras(package="wandb")
def test_wandb_offline(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert track("wandb", run_dir, range(1, 4)).names == ("wandb",)
    assert track("wandb", run_dir, range(3, 5), resumed=2).names == ("wandb",)
    folders = sorted((run_dir / "tracking" / "wandb" / "wandb").glob("offline-run-*"))
    identity = run_id(run_dir, "wandb")
    # Two starts within one second have one name, and wandb puts a number behind the second one's.
    assert {folder.name.split("-")[3] for folder in folders} == {identity}, "one run, for `wandb sync`"
    rows = [row for folder in folders for row in wandb_history(folder)]
    seen = [(json.loads(row["step"]), json.loads(row["reward"])) for row in rows if "reward" in row]  # pyright: ignore[reportArgumentType]
    assert sorted(seen) == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 0.75), (4, 1.0)]
    tables = sorted((run_dir / "tracking").rglob("*.table.json"))
    assert tables
    table = json.loads(tables[0].read_text())
    assert table["columns"][:4] == ["step", "prompt", "completion", "reward"]
    assert table["data"][0][1:4] == ["2|2\n<b>?", "日本 🙂", 1.0]
    [start] = [r for r in wandb_records(next(folders[0].glob("*.wandb"))) if r.HasField("run")][:1]
    assert (start.run.project, start.run.display_name, start.run.run_id) == ("sums", "one", identity)
    config = {item.key: json.loads(item.value_json) for item in start.run.config.update}
    assert config["optim"] == {"lr": 1e-6}
    hints = [r.getMessage() for r in caplog.records if "no login found" in r.getMessage()]
    assert len(hints) == 2, "one line for each of the two starts"
    assert "`wandb login`" in hints[0]


def swanlab_run(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "tracking" / "swanlab").glob("run-*"))


def check_swanlab_files(folder: Path, *, viewer: bool) -> None:
    assert "1.0e-06" in (folder / "files" / "config.yaml").read_text()
    tables = [file.read_text() for file in folder.rglob("*.json") if "media" in file.parts]
    assert any(json.loads(text)["rowData"][0]["completion"] == "日本 🙂" for text in tables)
    if not viewer:  # all numbers are in one file, for `swanlab sync`
        content = next(folder.glob("*.swanlab")).read_bytes()
        assert all(name in content for name in (b"reward", b"rewards/match/mean"))
        return
    logs = {}
    for file in folder.glob("logs/*/*.log"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        logs[file.parent.name] = [(row["index"], row["data"]) for row in rows]
    assert [(1, 0.25), (2, 0.5), (3, 0.75)] in logs.values()


@pytest.mark.extras(package="swanlab")
@pytest.mark.parametrize("viewer", [True, False], ids=["with dashboard", "without"])
def test_swanlab_without_a_login_stays_on_this_machine(
    viewer: bool, run_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if viewer:
        pytest.importorskip("swanboard")
    else:
        monkeypatch.setattr("groupwise.tracking.swanlab.VIEWER", "no_such_viewer")
    assert track("swanlab", run_dir, range(1, 4)).names == ("swanlab",)
    [folder] = swanlab_run(run_dir)
    check_swanlab_files(folder, viewer=viewer)
    [hint] = [r.getMessage() for r in caplog.records if "no login found" in r.getMessage()]
    assert "`swanlab login` puts the next online" in hint
    assert ("`swanlab watch" in hint) is viewer
    assert ("`swanlab sync" in hint) is not viewer


@pytest.mark.extras(package="swanlab")
def test_swanlab_resumes_under_the_same_id(run_dir: Path) -> None:
    track("swanlab", run_dir, range(1, 4), mode="local")
    before = run_id(run_dir, "swanlab")
    assert track("swanlab", run_dir, range(3, 5), resumed=2, mode="local").names == ("swanlab",)
    assert run_id(run_dir, "swanlab") == before
    assert all(folder.name.endswith(before) for folder in swanlab_run(run_dir))


@pytest.mark.extras(package="trackio")
def test_trackio(run_dir: Path, tmp_path: Path) -> None:
    assert track("trackio", run_dir, range(1, 4)).names == ("trackio",)
    assert track("trackio", run_dir, range(3, 5), resumed=2).names == ("trackio",)
    [database] = (tmp_path / "trackio").rglob("sums.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        [(config,)] = connection.execute("SELECT config FROM configs").fetchall()
    assert {(row[0], row[1]) for row in rows} == {(run_id(run_dir, "trackio"), "one")}
    logged = [(row[2], json.loads(row[3])) for row in rows]
    assert [(step, m["reward"]) for step, m in logged if "reward" in m] == [
        (1, 0.25), (2, 0.5), (3, 0.75), (3, 0.75), (4, 1.0),
    ]  # fmt: skip
    tables = [m["samples"]["_value"] for _, m in logged if "samples" in m]
    assert tables[0][0]["completion"] == "日本 🙂"
    assert len(tables) == 5
    assert json.loads(config)["optim"] == {"lr": 1e-6}


@pytest.mark.extras(package="trackio")
def test_trackio_does_not_go_on_in_a_stranger_of_the_same_name(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    track("trackio", run_dir, range(1, 3))
    other = tmp_path / "other"
    other.mkdir()
    track("trackio", other, range(1, 3))
    assert track("trackio", run_dir, range(3, 5), resumed=2).names == ()
    assert "newer run called 'one'" in caplog.text
    [database] = (tmp_path / "trackio").rglob("sums.db")
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT COUNT(*) FROM metrics WHERE step > 2").fetchone() == (0,)


@pytest.mark.parametrize(
    ("mode", "variable", "expected"),
    [("online", None, "neither is set"), ("local", "TRACKIO_SPACE_ID", "unset it")],
)
def test_trackio_takes_the_mode_that_was_asked_for(
    mode: str,
    variable: str | None,
    expected: str,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if variable:
        monkeypatch.setenv(variable, "someone/space")
    assert track("trackio", run_dir, range(1, 2), mode=mode).names == ()
    assert expected in caplog.text


@pytest.mark.extras(package="mlflow")
def test_mlflow(run_dir: Path) -> None:
    import mlflow

    assert track("mlflow", run_dir, range(1, 4)).names == ("mlflow",)
    assert track("mlflow", run_dir, range(3, 5), resumed=2).names == ("mlflow",)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run_dir.resolve()}/tracking/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("sums")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == run_id(run_dir, "mlflow")
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert run.data.params["optim.lr"] == "1e-06"
    history = client.get_metric_history(run.info.run_id, "reward")
    assert sorted((m.step, m.value) for m in history) == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 0.75), (4, 1.0)]
    assert math.isnan(run.data.metrics["kl"])
    assert "gr__e" in run.data.metrics, "a name that MLflow refuses does not cost the step"
    files = run_dir / "tracking" / "mlflow" / "files" / run.info.run_id / "artifacts"
    table = json.loads((files / "samples" / "step_000001.json").read_text())
    assert table["columns"][:3] == ["step", "prompt", "completion"]
    assert table["data"][0][2] == "日本 🙂"
    assert len(table["data"]) == 2


@pytest.mark.parametrize("name", needing("wandb", "swanlab", "mlflow"))
def test_files_go_where_the_folder_says(name: str, run_dir: Path, tmp_path: Path) -> None:
    assert track(name, run_dir, range(1, 2), mode="local", folder=str(tmp_path / "shared")).names == (name,)
    assert any(path.is_file() for path in (tmp_path / "shared" / name).rglob("*"))
    assert [path.name for path in (run_dir / "tracking").iterdir()] == [f"{name}_run.json"]


@pytest.mark.parametrize("name", EXTERNAL)
def test_asked_to_be_online_without_a_login_it_warns_and_training_goes_on(
    name: str, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="groupwise"):
        assert track(name, run_dir, range(1, 3), mode="online").names == ()
    mine = [record for record in caplog.records if record.name.startswith("groupwise")]
    assert len(mine) == 1
    assert f"the {name} tracker failed and is off" in mine[0].getMessage()


@pytest.mark.parametrize("name", needing("wandb", "swanlab", "mlflow"))  # trackio has a place of its own
def test_a_place_that_cannot_be_written_is_one_warning(
    name: str, run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert track(name, run_dir, range(1, 3), folder=str(tmp_path / "file")).names == ()
    assert sum(record.name.startswith("groupwise") for record in caplog.records) == 1


def test_one_name_stands_for_a_list() -> None:
    assert TrackingConfig.model_validate({"backends": "wandb"}).backends == ("wandb",)
