"""Twenty kills at random moments: every run comes to the weights and the ledger of one that nobody killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills(tmp_path: Path) -> None:
    output = tmp_path / "chaos.json"
    flags = ["--kills", "20", "--seed", "5", "--modes", "grpo,sft", "--changes", "--output", str(output)]
    ended = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, check=False)
    found = json.loads(output.read_text())
    assert ended.returncode == 0, found["faults"]
    assert found["faults"] == []
    assert found["kills"] >= 20
