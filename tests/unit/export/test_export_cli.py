from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from groupwise.cli import main


def test_a_run_to_gguf_modelfile_and_card(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "sums.gguf"
    assert main(["export", "gguf", str(run_directory), "--out", str(out), "--type", "q8_0"]) == 0
    assert f"wrote {out} (q8_0)" in capsys.readouterr().out
    assert main(["export", "modelfile", str(out)]) == 0
    assert "FROM ./sums.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "out" / "Modelfile").read_text()
    assert main(["export", "card", str(run_directory), "--out", str(tmp_path / "README.md")]) == 0
    assert "# sums" in (tmp_path / "README.md").read_text()


def test_an_adapter_merged_and_verified(
    adapter_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["export", "hf", str(adapter_folder("qwen3")), "--out", str(out)]) == 0
    assert "merging the adapter changed the logits by" in capsys.readouterr().out
    assert main(["export", "verify", str(out), "--max-tokens", "8"]) == 0
    assert "20 of 20 greedy answers are the same" in capsys.readouterr().out
    assert (
        main(["export", "verify", str(out), "--source", str(json.loads((out / "export.json").read_text())["base"])])
        == 1
    )
    assert "is not the model that it came from" in capsys.readouterr().err
    assert main(["export", "push", str(out), "--repo", "me/sums", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed
    assert "export.json" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "needs one of these commands"),
        (["export", "ggfu"], "did you mean `gguf`"),
        (["export", "hf", "none", "--out", "x"], "no such folder"),
        (["export", "hf", "none"], "--out"),
        (["export", "gguf", "x", "--out", "y", "--type", "q9"], "invalid choice"),
        (["export", "gguf", "x", "--adapter", "--out", "y"], "no such folder"),
        (["export", "verify", "none"], "no such file or folder"),
        (["export", "verify", ".", "--base", "x"], "no effect without --source"),
        (["export", "push", ".", "--repo", "nobody"], "expected `owner/name`"),
        (["export", "modelfile", "none.gguf"], "none.gguf: no such file; expected a GGUF file"),
    ],
)
def test_refusals(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
