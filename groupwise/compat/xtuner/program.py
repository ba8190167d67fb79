"""`groupwise xtuner CONFIG.py BACKEND MODEL TRAIN EVAL`: the user's file, run as XTuner's script would run it.

A boundary module: the file may raise anything.
"""

from __future__ import annotations

import runpy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groupwise.compat.xtuner.environment import environment, script_variables
from groupwise.compat.xtuner.trainer import RLColocateTrainerConfig, RLTrainer
from groupwise.errors import ConfigError, GroupwiseError


@contextmanager
def open_program(
    file: str, *, backend: str, model: str, train: str, evaluation: str = ""
) -> Iterator[RLTrainer | RLColocateTrainerConfig]:
    """The `trainer` that the file defines; within the context, the variables of XTuner's script are set.

    Raises:
        ConfigError: the backend is unknown, or the file is missing, raises, or defines no trainer.
    """
    with environment(script_variables(backend=backend, model=model, train=train, evaluation=evaluation)):
        yield _trainer_of(Path(file))


def _trainer_of(file: Path) -> RLTrainer | RLColocateTrainerConfig:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; expected a Python file that defines `trainer`")
    found = _globals_of(file).get("trainer")
    if not isinstance(found, RLTrainer | RLColocateTrainerConfig):
        got = "no `trainer`" if found is None else f"a `trainer` that is {type(found).__name__}"
        raise ConfigError(f"{file} defines {got}; expected trainer = RLTrainer(…) or RLColocateTrainerConfig(…)")
    return found


def _globals_of(file: Path) -> dict[str, Any]:
    try:
        return runpy.run_path(str(file), run_name="__xtuner_config__")
    except (KeyboardInterrupt, GroupwiseError):
        raise
    except ModuleNotFoundError as error:
        hint = (
            "; take XTuner's names from groupwise.compat.xtuner instead, all of them are in that one module"
            if (error.name or "").partition(".")[0] == "xtuner"
            else ""
        )
        raise ConfigError(f"{_place(file, error)}: {error}{hint}") from error
    except BaseException as error:
        raise ConfigError(f"{_place(file, error)}: {type(error).__name__}: {error}; correct that file") from error


def _place(file: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)
