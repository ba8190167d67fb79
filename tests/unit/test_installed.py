"""The packages of these tests are folders with metadata, as pip leaves them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from groupwise import installed
from groupwise.errors import ConfigError

ROOT = Path(__file__).parents[2]


class Packages:
    """A folder that comes first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, number: str, *needs: str, source: str | None = None) -> None:
        info = self.folder / f"{name}-{number}.dist-info"
        info.mkdir(parents=True)
        lines = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}",
            *(f"Requires-Dist: {need}" for need in needs),
        ]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        if source is not None:
            file = self.folder / "transformers" / "integrations" / "peft.py"
            file.parent.mkdir(parents=True)
            file.write_text(source)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    monkeypatch.syspath_prepend(str(tmp_path))
    for function in (installed.version_problems, installed.adapter_problems):
        function.cache_clear()
    yield Packages(tmp_path)
    for function in (installed.version_problems, installed.adapter_problems):
        function.cache_clear()


def test_what_is_installed_here_goes_together() -> None:
    assert installed.version_problems() == ()
    assert installed.adapter_problems() == ()


def test_transformers_and_a_peft_that_it_refuses(packages: Packages) -> None:
    packages.add("transformers", "5.24.0", source='import x\nMIN_PEFT_VERSION = "0.22.0"\n')
    packages.add("peft", "0.21.2")
    packages.add("groupwise", "1.0", "transformers<5.24,>=5.16", "peft<0.22,>=0.18")
    with pytest.raises(ConfigError) as refused:
        installed.require_adapters()
    assert str(refused.value) == (
        "transformers 5.24.0 needs peft>=0.22.0 for LoRA adapters, and peft 0.21.2 is installed; "
        "type: pip install 'transformers<5.24,>=5.16' 'peft<0.22,>=0.18'"
    )
    assert installed.version_problems() == ()  # all weights can be trained


def test_a_peft_that_is_new_enough(packages: Packages) -> None:
    packages.add("transformers", "5.24.0", source="MIN_PEFT_VERSION = '0.22.0'\n")
    packages.add("peft", "0.22.0")
    assert installed.adapter_problems() == ()


def test_a_package_that_is_too_old_is_named_with_the_line_to_type(packages: Packages) -> None:
    packages.add("transformers", "4.57.6")
    packages.add("groupwise", "1.0", "transformers<5.24,>=5.16", 'ray>=2; extra == "ray"')
    with pytest.raises(ConfigError, match=r"groupwise 1.0 needs transformers<5.24,>=5.16, and transformers 4.57.6 is"):
        installed.require_versions()


def test_what_transformers_would_refuse_at_its_import(packages: Packages) -> None:
    packages.add("tokenizers", "0.99.0")
    packages.add("transformers", "5.23.0", "tokenizers<=0.24,>=0.22")
    assert installed.version_problems()[0].startswith(
        "transformers 5.23.0 needs tokenizers<=0.24,>=0.22, and tokenizers 0.99.0 is installed; type: pip install "
    )


def test_newer_than_tested_is_a_warning(packages: Packages, caplog: pytest.LogCaptureFixture) -> None:
    packages.add("transformers", "5.30.0")
    packages.add("groupwise", "1.0", "transformers<5.24,>=5.16")
    with caplog.at_level(logging.WARNING, "groupwise"):
        assert installed.version_problems() == ()
    assert "transformers 5.30.0: newer than this version of groupwise was tested with" in caplog.text


def test_the_clash_is_said_before_anything_is_loaded(packages: Packages) -> None:
    """Through the command, in a process of its own, whose model folder does not even hold weights."""
    packages.add("peft", "0.1.0")
    model = packages.folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (packages.folder / "rows.jsonl").write_text('{"prompt": "1 + 1 ="}\n')
    words = ["train", "--model", str(model), "--data", str(packages.folder / "rows.jsonl"), "--reward", "think_format"]
    program = "import sys; from groupwise.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--lora.rank", "4", "--output", str(packages.folder / "run")],
        env={**os.environ, "PYTHONPATH": f"{packages.folder}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"transformers {version('transformers')} needs peft>=" in done.stderr
    assert "peft 0.1.0 is installed; type: pip install " in done.stderr
    assert not (packages.folder / "run").exists()


def test_the_constraints_are_inside_the_bounds() -> None:
    """The plain `pip install -e .` and the one with constraints may not disagree."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
