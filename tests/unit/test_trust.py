"""Reward code that a run names runs only where this user said yes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.config.loading import config_json, load_config
from groupwise.errors import ConfigError
from groupwise.trust import prove, require_yes

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def short(completions): return [0.0] * len(completions)\n")

    def run(name: str, *rewards: dict[str, Any], **settings: Any) -> Path:
        Path(name).mkdir()
        (Path(name) / "config.json").write_text(
            config_json(load_config(None, {"reward": [*rewards], **settings}).config)
        )
        return Path(name)

    return run


def check(run: Path, *words: str, trusted: bool = False) -> None:
    require_yes(load_config(run / "config.json", words), run, rewards_trusted=trusted)


def refusal(run: Path, *words: str, trusted: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        check(run, *words, trusted=trusted)
    return str(caught.value)


def test_a_run_that_was_made_here_needs_no_word(make: Make) -> None:
    run = make("run", {"name": "mine.py:short"}, {"name": "gsm8k"})
    said = refusal(run)
    assert "reward mine.py:short" in said
    assert "--trust-rewards" in said
    assert "gsm8k" not in said
    assert not Path("state").exists(), "asking makes no key"
    prove(run)
    check(run)
    assert os.stat("state/groupwise/key").st_mode & 0o777 == 0o600
    shutil.copytree(run, "copy")
    check(Path("copy"))


def test_a_run_from_elsewhere_asks_and_takes_a_yes(make: Make) -> None:
    run = make("run", {"name": "os:system"})
    (run / "trust.json").write_text(json.dumps({"proofs": ["0" * 64, 3]}))
    assert "reward os:system" in refusal(run)
    check(run, trusted=True)
    check(run, '--reward=[{"name": "os:system"}]')
    check(run, '--reward=[{"name": "gsm8k"}]')
    assert "os:system" in refusal(run, "--reward.0.weight=2")
    for content in ("", "[]", '{"proofs": 3}'):
        (run / "trust.json").write_text(content)
        assert "reward os:system" in refusal(run)


def test_a_proof_is_of_one_code(make: Make) -> None:
    ours = make("ours", {"name": "mine.py:short", "args": {"scale": 2}})
    prove(ours)
    theirs = make("theirs", {"name": "mine.py:short", "args": {"scale": 3}})
    shutil.copy(ours / "trust.json", theirs)
    assert "mine.py:short" in refusal(theirs), "other arguments"
    Path("mine.py").write_text("def short(completions): raise SystemExit\n")
    assert "mine.py:short" in refusal(ours), "another file"


def test_another_users_proof_is_none(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = make("run", {"name": "mine.py:short"})
    prove(run)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert "mine.py:short" in refusal(run)


def test_built_in_rewards_need_no_key(make: Make) -> None:
    run = make("run", {"name": "gsm8k"}, {"name": "format"})
    prove(run)
    check(run)
    assert not (run / "trust.json").exists()
    assert not Path("state").exists()


def test_remote_code_has_a_flag_of_its_own(make: Make) -> None:
    run = make("run", {"name": "gsm8k"}, **{"model.path": "owner/name", "model.trust_remote_code": "true"})
    said = refusal(run, trusted=True)
    assert "code that comes with the model owner/name" in said
    assert "--model.trust_remote_code true" in said
    assert "--trust-rewards" not in said
    check(run, "--model.trust_remote_code=true")
    check(run, "--model.trust_remote_code=false")
    prove(run)
    check(run)


def test_without_a_place_for_the_key_there_is_no_proof(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make("run", {"name": "mine.py:short"})
    Path("file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("file").resolve()))
    with caplog.at_level(logging.WARNING):
        prove(run)
    assert "reward mine.py:short" in caplog.text
    assert "will ask for --trust-rewards" in caplog.text
    assert "mine.py:short" in refusal(run)


def test_a_key_that_others_can_read_is_none(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    run = make("run", {"name": "mine.py:short"})
    prove(run)
    os.chmod("state/groupwise/key", 0o644)
    assert "mine.py:short" in refusal(run)
    prove(run)
    assert "can be read by others" in caplog.text


def test_keys_made_at_once_are_one(make: Make) -> None:
    runs = [make(f"run{number}", {"name": "os:system"}) for number in range(4)]
    code = "import sys; from pathlib import Path; from groupwise.trust import prove; prove(Path(sys.argv[1]))"
    started = [subprocess.Popen([sys.executable, "-c", code, str(run)]) for run in runs]
    assert [process.wait(60) for process in started] == [0] * 4
    for run in runs:
        check(run)
    assert [file.name for file in Path("state/groupwise").iterdir()] == ["key"]
