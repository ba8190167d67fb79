"""Code of the user's, found by name: `path/to/file.py:attribute` or `module:attribute`.

A boundary module: loading runs the user's file, which may raise anything.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from groupwise.errors import ConfigError, GroupwiseError, nearest
from groupwise.process_state import guarded


def load_named(name: str, *, kind: str, attribute_kind: str) -> Any:
    """What `name` names.

    Args:
        kind: what the user calls it, such as `reward`, for messages.
        attribute_kind: what the part after the colon is, such as `function`.

    Raises:
        ConfigError: no such file, module or attribute, or loading it raised.

    Example:
        load_named("my_rewards.py:short", kind="reward", attribute_kind="function")
    """
    place, _, attribute = name.rpartition(":")
    shown = f"{kind} {name!r}"
    if not place or not attribute:
        raise ConfigError(f"{shown}: expected path/to/file.py:{attribute_kind} or module:{attribute_kind}")
    looks_like_file = place.endswith(".py") or "/" in place or "\\" in place
    module = (
        _module_of_file(shown, Path(place).expanduser())
        if looks_like_file
        else _module_of_name(shown, place, attribute_kind)
    )
    return _find(shown, module, attribute, attribute_kind)


def _module_of_file(shown: str, path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{shown}: {path} {what}; expected a Python file, seen from the current folder {Path.cwd()}")
    if path.suffix != ".py":
        raise ConfigError(f"{shown}: {path} is not a Python file; its name has to end with .py")
    path = path.resolve()
    # The content is part of the module's name: names of one file share it, and an edited file is loaded anew.
    digest = hashlib.blake2b(str(path).encode() + b"\0" + path.read_bytes(), digest_size=8).hexdigest()
    module_name = f"groupwise_user_code_{path.stem}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, f"no import spec for {path}"
    assert spec.loader is not None, f"no loader for {path}"
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent)
    if folder not in sys.path:  # last, so that the user's helpers are found and hide nothing
        sys.path.append(folder)
    sys.modules[module_name] = module
    try:
        with guarded(f"loading {shown}"):
            spec.loader.exec_module(module)
    except (KeyboardInterrupt, GroupwiseError):
        del sys.modules[module_name]
        raise
    except BaseException as error:
        del sys.modules[module_name]
        raise _import_failure(shown, str(path), error) from error
    return module


def _module_of_name(shown: str, place: str, attribute_kind: str) -> ModuleType:
    try:
        with guarded(f"loading {shown}"):
            return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise ConfigError(
                f"{shown}: there is no module {error.name!r}; install it, put its folder on PYTHONPATH, or "
                f"give the file as path/to/file.py:{attribute_kind}"
            ) from error
        raise _import_failure(shown, place, error) from error
    except (KeyboardInterrupt, GroupwiseError):
        raise
    except BaseException as error:
        raise _import_failure(shown, place, error) from error


def _import_failure(shown: str, place: str, error: BaseException) -> ConfigError:
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == place]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else place
    return ConfigError(f"{shown}: loading it raised {type(error).__name__}: {error} (at {where}); correct that file")


def _find(shown: str, module: ModuleType, attribute: str, attribute_kind: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        names = [key for key in dir(found) if not key.startswith("_")]
        if not hasattr(found, part):
            hint = nearest(part, names, "did you mean {!r}? ")
            functions = [key for key in names if inspect.isroutine(getattr(found, key))]
            place = module.__file__ or module.__name__
            raise ConfigError(
                f"{shown}: {place} has no {part!r}; {hint}{attribute_kind}s there: {', '.join(functions) or 'none'}"
            )
        found = getattr(found, part)
    return found
