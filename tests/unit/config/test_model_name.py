"""What a name means where a model is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Config
from groupwise.config.checks import check_model_path, check_trainable
from groupwise.config.loading import config_json, load_config
from groupwise.config.model_name import base_of, named_checkpoint, run_of, settled_model, short_name
from groupwise.errors import ConfigError


def make_run(folder: Path, *steps: int, final: bool = False, **settings: Any) -> Path:
    for step in steps:
        place = folder / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
    if steps:
        (folder / "checkpoints" / "latest").write_text(f"step_{steps[-1]:06d}\n")
    if final:
        make_model(folder / "final")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config_json(load_config(None, settings).config))
    return folder


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def step_of(name: str) -> int | None:
    found = named_checkpoint(name)
    return None if found is None else found.step


def test_a_step_the_newest_and_the_best() -> None:
    run = make_run(Path("runs/x"), 20, 40, 60, final=True)
    (run / "checkpoints" / "best").write_text("step_000020\n")
    assert [step_of(f"runs/x@{which}") for which in ("20", "40", "000040", "best", "latest")] == [20, 40, 40, 20, 60]
    (run / "checkpoints" / "latest").write_text("step_000040\n")
    assert step_of("runs/x@latest") == 40, "it names the checkpoint to resume from"
    (run / "checkpoints" / "latest").write_text("step_000080\n")
    assert step_of("runs/x@latest") == 60, "what it names is gone"
    found = named_checkpoint("runs/x/checkpoints/step_000040")
    assert found is not None
    assert (found.name, found.run, found.folder.name) == ("runs/x@40", Path("runs/x"), "step_000040")
    assert [run_of(name) for name in ("runs/x", "runs/x@40", "runs/x/checkpoints/step_000040")] == [Path("runs/x")] * 3
    assert run_of("runs/x/final") is None


def test_other_names_with_an_at_mean_what_they_did() -> None:
    for name in ("owner/name@main", "owner/name@40", "owner/name", "", "./no-run@40"):
        assert named_checkpoint(name) is None
        assert settled_model(name) == name
    make_model(Path("models/x@40"))
    assert settled_model("models/x@40") == "models/x@40"
    check_model_path("models/x@40")
    make_run(Path("models/x"), 40)
    assert named_checkpoint("models/x@40") is None, "a folder of that very name comes first"
    with pytest.raises(ConfigError, match=r"for RUN@STEP, './no-run' would have to be a run directory"):
        check_model_path("./no-run@40")


def test_a_run_alone_is_its_final_model_or_else_its_newest_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    make_run(Path("done"), 20, final=True)
    assert settled_model("done") == "done/final"
    assert not caplog.records
    make_run(Path("stopped"), 20, 40)
    with caplog.at_level(logging.WARNING):
        assert settled_model("stopped") == "stopped@40"
    assert "stopped has no final model; its newest checkpoint is taken: stopped@40" in caplog.text
    assert settled_model("stopped@latest") == "stopped@40", "a name that means the same tomorrow"
    caplog.clear()
    (Path("done") / "summary.json").write_text(json.dumps({"steps": 10}))
    assert settled_model("done") == "done/final"
    assert "done/final is of step 10, and the run has a newer checkpoint: done@20" in caplog.text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/x@50", "no checkpoint of step 50; its checkpoints are of the steps 20, 40"),
        ("runs/x@best", "no checkpoint named best; its checkpoints are of the steps 20, 40; train.keep_best names one"),
        ("runs/x@last", "got 'last' after the @; expected a step, best or latest; its checkpoints are of the steps 20"),
        ("runs/x@", "got '' after the @"),
        ("runs/none@1", "no checkpoint of step 1; it has no checkpoint"),
        ("runs/none", "without a final model and without a checkpoint"),
        ("copied/step_000040", "a checkpoint outside its run"),
    ],
)
def test_what_is_not_there_says_what_is(name: str, said: str) -> None:
    make_run(Path("runs/x"), 20, 40)
    make_run(Path("runs/none"))
    Path("copied/step_000040").mkdir(parents=True)
    Path("copied/step_000040/manifest.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        check_model_path(name)
    assert said in str(caught.value)


def test_half_a_checkpoint_is_none() -> None:
    run = make_run(Path("runs/x"), 20)
    (run / "checkpoints" / "step_000040").mkdir()
    (run / "checkpoints" / ".tmp-step_000060-1").mkdir()
    with pytest.raises(ConfigError, match=r"of the steps 20$"):
        named_checkpoint("runs/x@40")
    (run / "checkpoints" / "step_000020").rename(run / "checkpoints" / ".old-step_000020")
    assert step_of("runs/x@20") == 20, "a killed save left it aside"


def test_a_relative_base_is_looked_for_where_the_run_was_started(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(Path("models/tiny"))
    make_run(Path("runs/x"), 20, **{"model.path": "models/tiny", "train.output": "runs/x"})  # pyright: ignore[reportArgumentType]
    make_run(Path("runs/y"), 5, **{"model.path": "runs/x@20", "train.output": "runs/y"})  # pyright: ignore[reportArgumentType]
    for name in ("runs/x@20", "runs/y@5"):
        check_model_path(name)
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found, second = named_checkpoint("../runs/x@20"), named_checkpoint("../runs/y@5")
    assert found is not None
    assert second is not None
    assert base_of(found) == str(here / "models/tiny")
    assert base_of(second) == str(here / "runs/x@20")
    check_model_path("../runs/y@5")
    (here / "models/tiny/config.json").unlink()
    with pytest.raises(ConfigError, match="a checkpoint of a run that began with") as caught:
        check_model_path("../runs/y@5")
    assert str(here / "models/tiny") in str(caught.value), "the whole chain is named"


def test_a_base_that_is_nowhere_or_was_given_in_memory() -> None:
    make_run(Path("runs/x"), 20, **{"model.path": "./models/gone", "train.output": "runs/x"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"'runs/x@20' is a checkpoint of a run that began with './models/gone'"):
        check_model_path("runs/x@20")
    make_run(Path("runs/memory"), 20)
    with pytest.raises(ConfigError, match="was given in memory, so its config"):
        check_model_path("runs/memory@20")


def test_bases_that_lead_to_one_another_end() -> None:
    make_run(Path("a"), 1, **{"model.path": "b@1"})  # pyright: ignore[reportArgumentType]
    make_run(Path("b"), 1, **{"model.path": "a@1"})  # pyright: ignore[reportArgumentType]
    make_run(Path("own"), 1, **{"model.path": "own@1"})  # pyright: ignore[reportArgumentType]
    Path("adapter").mkdir()
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (Path("adapter") / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": "adapter"}))
    for name in ("a@1", "own@1", "adapter"):
        with pytest.raises(ConfigError, match="its bases lead back to itself"):
            check_model_path(name)


def test_an_adapters_checkpoint_goes_on_as_that_adapter() -> None:
    make_model(Path("models/tiny"))
    make_run(
        Path("runs/x"), 20, **{"model.path": "models/tiny", "lora.rank": 4, "lora.target_modules": "q_proj,v_proj"}
    )
    Path("t.jsonl").touch()

    def check(**lora: Any) -> None:
        values = {f"lora.{name}": value for name, value in lora.items()}
        given = {"model.path": "runs/x@20", "data.train": "t.jsonl", "reward.0.name": "gsm8k", **values}
        check_trainable(load_config(None, given).config)

    check(rank=4, target_modules="v_proj,q_proj")
    for lora, said in (({}, "lora.rank = 0, but the adapter has 4"), ({"rank": 8}, "lora.rank = 8")):
        with pytest.raises(ConfigError, match="is a checkpoint of a LoRA adapter") as caught:
            check(**lora)
        assert said in str(caught.value)


def test_a_run_gives_its_name_to_the_runs_that_begin_with_it() -> None:
    make_run(Path("runs/x"), 20, final=True)
    assert {short_name(name) for name in ("runs/x", "runs/x@20", "runs/x@latest", "runs/x/final")} == {"x"}
    assert [short_name(name) for name in ("models/tiny", "Qwen/Qwen3-0.6B", "")] == ["tiny", "Qwen3-0.6B", "model"]


def test_a_config_is_no_run_because_it_is_json(tmp_path: Path) -> None:
    for content in ("[]", "{", '{"model": {}}', "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        assert settled_model(str(tmp_path)) == str(tmp_path)
    assert Config().model.path == ""  # pyright: ignore[reportCallIssue]
