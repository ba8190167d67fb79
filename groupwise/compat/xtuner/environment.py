"""What XTuner's launch script puts into the environment, and what of it has no effect here: the boundary to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from groupwise.engines import ENGINES
from groupwise.errors import ConfigError

BACKENDS = ("lmdeploy", "sglang", "vllm")
_SWITCHES = {f"XTUNER_USE_{name.upper()}": name for name in BACKENDS}
_FLASH_ATTENTION = "XTUNER_USE_FA3"


def engine_notes() -> list[str]:
    """A line for each library that the environment asks for and that is not used here."""
    asked = [f"{key}={os.environ[key]}" for key in _SWITCHES if os.environ.get(key, "0") not in ("", "0")]
    notes = [f"{', '.join(asked)}: groupwise's own engine samples, from the weights that are trained"] if asked else []
    if os.environ.get(_FLASH_ATTENTION, "0") not in ("", "0"):
        notes.append(
            f"{_FLASH_ATTENTION}={os.environ[_FLASH_ATTENTION]}: attention is torch's variable-length flash attention "
            "on a GPU, and exact blocks on a CPU"
        )
    return notes


def script_variables(*, backend: str, model: str, train: str, evaluation: str) -> dict[str, str]:
    """What XTuner's script would set; `WORK_DIR` and the other names that a user may set before stay as they are.

    Raises:
        ConfigError: the backend is none of XTuner's and no engine of groupwise.
    """
    name = backend.lower()
    known = dict.fromkeys((*BACKENDS, *ENGINES))
    if name not in known:
        raise ConfigError(f"BACKEND {backend!r} is unknown; expected one of {', '.join(known)}")
    place = Path("work_dirs").absolute() / f"{Path(model).name}_{Path(train).parent.name}_{name}"
    theirs = {
        "ACCELERATOR": "GPU",
        "MASTER_PORT": "6000",
        "RAY_MASTER_ADDR": "127.0.0.1",
        "RAY_RANK": "0",
        "RAY_HEAD_PORT": "6379",
        "RAY_DASHBOARD_PORT": "8265",
        "WORLD_SIZE": "1",
        "RANK": "0",
        _FLASH_ATTENTION: "1",
        "XTUNER_LOG_LEVEL": "INFO",
        "WORK_DIR": str(place),
    }
    kept = {key: value for key, value in theirs.items() if not os.environ.get(key)}
    switch = {f"XTUNER_USE_{name.upper()}": "1"} if name in BACKENDS else {}
    return kept | switch | {"MODEL_PATH": model, "DATA_PATH": train, "EVAL_DATA_PATH": evaluation}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within it, these variables are set."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
