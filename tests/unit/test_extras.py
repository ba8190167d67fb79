"""`make test-extras`: a package that is missing there is an error, not a skipped test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

@pytest.mark.extras(package="no_such_package")
def test_absent():
    assert False, "it ran"

@pytest.mark.extras(package="json")
def test_present():
    import json
"""


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 0, "1 passed, 1 skipped"),
        (("--extras", "-m", "extras"), 4, "--extras: not installed here: no_such_package"),
        (("--extras", "-m", 'extras and not extras(package="no_such_package")'), 0, "1 passed, 1 deselected"),
    ],
)
def test_a_missing_package(options: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *options, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr


def versions(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_both_environments_have_the_same_versions_but_for_what_trackers_hold_back() -> None:
    dev, extras = versions("constraints.txt"), versions("constraints-extras.txt")
    different = {name for name in dev.keys() & extras.keys() if dev[name] != extras[name]}
    assert different == {"pillow", "protobuf", "pyarrow"}
    assert {"torch", "transformers", "wandb", "swanlab", "trackio", "mlflow", "gguf"} <= extras.keys()
