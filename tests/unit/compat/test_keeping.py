"""What an earlier program left is moved aside, whole, and nothing is deleted unless the program asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from groupwise.compat.keeping import Place


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_earlier_things_lie_together_under_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one", "two", "mine"):
        (tmp_path / name).write_text(f"old {name}")
    place = Place(tmp_path)
    place.free(["one", "missing"])
    (tmp_path / "one").write_text("new")
    place.wrote(["one"])
    place.free(["two"])
    assert files(tmp_path) == {
        "one": "new",
        "mine": "old mine",
        "earlier-1/one": "old one",
        "earlier-1/two": "old two",
    }
    place.free(["one"])  # this program's own
    assert not (tmp_path / "one").exists()
    assert "what an earlier run left is now in" in caplog.text


def test_a_name_that_is_taken_gets_the_next_number(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        (tmp_path / "file").write_text(text)
        Place(tmp_path).free(["file"])
    place = Place(tmp_path)
    (tmp_path / "file").write_text("fourth")
    place.free(["file"])
    (tmp_path / "file").write_text("fifth")
    place.free(["file"])
    assert files(tmp_path) == {
        f"earlier-{n}/file": text for n, text in enumerate(("first", "second", "third", "fourth", "fifth"), start=1)
    }


def test_what_is_asked_for_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("old")
    (tmp_path / "other").write_text("kept")
    Place(tmp_path, replace=True).free(["run"])
    assert files(tmp_path) == {"other": "kept"}
    assert "deleted, as the program asks: run" in caplog.text


def test_a_link_is_moved_and_what_it_points_to_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("far")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "run").symlink_to(target)
    Place(folder).free(["run"])
    assert (folder / "earlier-1" / "run").is_symlink()
    (folder / "run").symlink_to(target)
    Place(folder, replace=True).free(["run"])
    assert (target / "file").read_text() == "far"
