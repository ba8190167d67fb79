"""K-quants, by llama.cpp's own `llama-quantize`: the `gguf` package has none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from groupwise.errors import ConfigError, ExportError

K_QUANTS = ("q4_k_m", "q5_k_m")
PROGRAM = "llama-quantize"
_SOURCE = "it comes with llama.cpp: https://github.com/ggml-org/llama.cpp/releases, or `brew install llama.cpp`"


def find_llama_quantize(kind: str, given: str | None = None) -> Path:
    """The program on this machine.

    Raises:
        ConfigError: it is not there; says where to get it.
    """
    found = shutil.which(given or PROGRAM)
    if found is not None:
        return Path(found)
    if given is not None:
        raise ConfigError(f"--llama-quantize {given}: got no program that can be run; {_SOURCE}")
    raise ConfigError(
        f"--type {kind} needs {PROGRAM}, and it is not on the PATH; {_SOURCE}; then name it with "
        "--llama-quantize FILE, or use --type q8_0, q5_0 or q4_0, which need no program"
    )


def run_llama_quantize(program: Path, plain: Path, out: Path, *, kind: str) -> None:
    """Quantise a GGUF file into another.

    Raises:
        ExportError: the program failed; shows the end of what it said.
    """
    command = [str(program), str(plain), str(out), kind.upper()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not out.is_file():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise ExportError(f"{program} failed with exit code {done.returncode}:\n{said}")
