"""Pushing, to a server on this machine that speaks the Hub's API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from groupwise.errors import ConfigError, ExportError
from groupwise.export.push import plan_push, push


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "deep").mkdir(parents=True)
    (place / "config.json").write_text('{"model_type": "qwen3"}')
    (place / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (place / "deep" / "odd [name]*.txt").write_text("ä")
    (place / "export.json").write_text('{"source": "/home/me/secret/place"}')
    (place / "x.gguf.export.json").write_text("{}")
    (place / ".cache").mkdir()
    (place / ".cache" / "token").write_text("secret")
    (place / ".env").write_text("HF_TOKEN=secret")
    return place


SENT = ["config.json", "deep/odd [name]*.txt", "model.safetensors"]


def test_what_is_sent_arrives(hub: Any, folder: Path) -> None:
    url = push(plan_push(folder, "someone/sums", private=True, endpoint=hub.address))
    assert url == f"{hub.address}/someone/sums/commit/abc"
    assert sorted(hub.files) == SENT
    assert all(hub.files[name] == (folder / name).read_bytes() for name in SENT)
    [created] = hub.created
    assert (created["organization"], created["name"]) == ("someone", "sums")
    assert created.get("private") is True or created.get("visibility") == "private"


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    plan = plan_push(folder, "someone/sums", endpoint=hub.address)
    assert [file.name for file in plan.files] == SENT
    assert "3 files, 25,625 bytes" in plan.describe()
    assert "(public)" in plan.describe()
    assert hub.seen == []


def test_without_a_token(hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="set HF_TOKEN, or run `hf auth login`"):
        push(plan_push(folder, "someone/sums", endpoint=hub.address))
    assert hub.seen == []


def test_a_token_that_is_refused(hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ExportError, match="could not push to someone/sums") as error:
        push(plan_push(folder, "someone/sums", endpoint=hub.address))
    assert "hf_wrong" not in str(error.value)
    assert hub.files == {}


def test_a_hub_that_is_not_there(hub: Any, folder: Path) -> None:
    with pytest.raises(ExportError, match="could not push"):
        push(plan_push(folder, "someone/sums", endpoint="http://127.0.0.1:9"))


@pytest.mark.parametrize("repo", ["sums", "a/b/c", "me/my model", "", "../x/y", "https://huggingface.co/a/b"])
def test_names_of_no_repository(repo: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected `owner/name`"):
        plan_push(folder, repo)


def test_folders_without_a_model(tmp_path: Path, run_directory: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        plan_push(tmp_path / "none", "a/b")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="without a model"):
        plan_push(tmp_path / "notes", "a/b")
    with pytest.raises(ConfigError, match="is a run directory"):
        plan_push(run_directory, "a/b")
