"""The contract servers as processes of their own, as an adapter that starts its engine finds them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import httpx
import pytest

from tests.engines.contract.asking import ASKING
from tests.engines.contract.tiny import Folders


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ASKING))
def test_as_a_process(engine: str, folders: Folders):
    command = [sys.executable, "-m", f"tests.engines.contract.{engine}", "--model", str(folders.old), "--trap", "dies"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        url = process.stdout.readline().strip() if process.stdout else ""
        assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.post(url + ASKING[engine][1].token_path, json={}, timeout=10)
        assert process.wait(10) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait(10)
