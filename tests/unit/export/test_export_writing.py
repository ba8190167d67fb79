"""A full disk, and places that are taken: what was there stays, and nothing half-written is left."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from groupwise.cli import main
from groupwise.errors import ConfigError, ExportError
from groupwise.export.gguf_file import export_gguf, export_gguf_adapter
from groupwise.export.hf import export_hf
from groupwise.export.source import find_source

ModelFolder = Callable[[str], Path]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within it, no file grows over `size` bytes: the error is another than a full disk's, its ways are the same."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", ["gguf", "folder", "gguf adapter", "adapter"])
def test_a_full_disk_leaves_nothing(
    form: str, model_folder: ModelFolder, adapter_folder: Callable[..., Path], tmp_path: Path
) -> None:
    whole, adapter = find_source(model_folder("qwen3")), find_source(adapter_folder("qwen3"))
    write: Callable[[Path], object] = {
        "gguf": lambda out: export_gguf(whole, out, kind="f32"),
        "folder": lambda out: export_hf(whole, out),
        "gguf adapter": lambda out: export_gguf_adapter(adapter, out, kind="f32"),
        "adapter": lambda out: export_hf(adapter, out, form="adapter"),
    }[form]
    write(tmp_path / "free" / "x")
    largest = max(file.stat().st_size for file in (tmp_path / "free").rglob("*") if file.is_file())
    for size in (10, largest // 2, largest - 1):
        with largest_file(size), pytest.raises(ExportError, match=r"cannot be written.*nothing is left"):
            write(tmp_path / "full" / "x")
        assert list((tmp_path / "full").iterdir()) == []


def test_a_record_that_cannot_be_written_leaves_no_file(model_folder: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / "x.gguf.export.json").mkdir()
    with pytest.raises(ExportError, match="cannot be written"):
        export_gguf(find_source(model_folder("qwen3")), tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf.export.json"]


def test_a_folder_is_no_place_for_a_file(model_folder: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match="is a folder; expected a new file"):
        export_gguf(find_source(model_folder("qwen3")), tmp_path / "x")
    export_hf(find_source(model_folder("qwen3")), tmp_path / "x")
    assert (tmp_path / "x" / "config.json").is_file(), "an empty folder is a place for a folder"
    (tmp_path / "y").mkdir()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_file_in_the_way_of_a_folder(model_folder: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="cannot be written"):
        export_gguf(find_source(model_folder("qwen3")), tmp_path / "file" / "x.gguf")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_modelfile_and_a_card_are_not_written_over(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "gguf", str(run_directory), "--out", str(tmp_path / "x.gguf")]) == 0
    for name, command in (
        ("Modelfile", ["modelfile", str(tmp_path / "x.gguf")]),
        ("card.md", ["card", str(run_directory)]),
    ):
        (tmp_path / name).write_text("mine")
        assert main(["export", *command, "--out", str(tmp_path / name)]) == 2
        assert "exists; give a new place with --out" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_an_adapter_without_its_weights(damage: str, adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_folder("qwen3"), folder)
    weights = folder / "adapter_model.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(ConfigError, match="does not load"):
        export_gguf_adapter(find_source(folder), tmp_path / "x.gguf")
