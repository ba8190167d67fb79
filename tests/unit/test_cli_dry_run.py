"""`--dry-run`: every check of the real start that needs no weights."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from groupwise.cli import main

ROWS = '{"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}\n{"prompt": "3+3?", "answer": "6"}\n'


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def copied(tiny: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(tiny, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def test_a_dry_run_looks_at_the_model_without_its_weights(
    training: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def model(name: str, **config: object) -> list[str]:
        return ["train", *training, "--model", str(copied(tiny, tmp_path / name, **config)), "--dry-run"]

    assert main(["train", *training, "--lora.rank", "2", "--lora.target_modules", "q_proj", "--dry-run"]) == 0
    capsys.readouterr()
    lora = refused(capsys, "train", *training, "--lora.rank", "2", "--lora.target_modules", "q_prj", "--dry-run")
    assert "q_proj" in lora
    layers = json.loads((tiny / "config.json").read_text())["num_hidden_layers"]
    hybrid = refused(capsys, *model("hybrid", layer_types=["sliding_attention", *["chunked_attention"] * (layers - 1)]))
    assert "layers of kind ['chunked_attention']" in hybrid
    assert "could not be loaded" in refused(capsys, *model("strange", model_type="no_such_model"))
    whole = model("bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    assert "no weights in it" in refused(capsys, *whole)
    cut = model("cut")
    content = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[:-8])
    assert "model.safetensors" in refused(capsys, *cut)
    silent = model("silent")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "silent" / file).unlink()
    assert "tokenizer" in refused(capsys, *silent)
    index = model("index")
    (tmp_path / "index" / "model.safetensors").rename(tmp_path / "index" / "model-1.safetensors")
    names = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "index" / "model.safetensors.index.json").write_text(json.dumps(names))
    assert "model-2.safetensors, which its index names, is missing" in refused(capsys, *index)


def test_a_dry_run_looks_at_every_row_and_the_output(
    training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["train", *training, "--dry-run"]
    rows = Path(training[3])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert "is not empty" in refused(capsys, *flags, "--output", str(tmp_path / "run"))
    assert "holds notes.txt" in refused(capsys, *flags, "--output", str(tmp_path / "run"), "--overwrite")
    assert "wandbb" in refused(capsys, *flags, "--tracking.backends", "wandbb")
    assert main([*flags, "--tracking.backends", "jsonl,swanlab,console"]) == 0
    absent = "# swanlab: not installed, and will be off" in capsys.readouterr().out
    assert absent == (find_spec("swanlab") is None)
    routed = refused(capsys, *flags, "--reward.0.data_source", "elsewhere,default", "--reward.1.name", "format",
                     "--reward.1.data_source", "elsewhere")  # fmt: skip
    assert "reward.1.data_source = ['elsewhere']: no row has such a data source" in routed
    rows.write_text(ROWS + json.dumps({"prompt": "x" * 3000, "answer": "1"}) + "\n")
    assert main(flags) == 0
    assert "left out 1 of 3 rows: over 1,024 tokens" in capsys.readouterr().out
    rows.write_text(ROWS + '{"prompt": "4+4?"}\n')
    assert "000002" in refused(capsys, *flags), "the reference of the last row"
    assert not (tmp_path / "runs").exists()
