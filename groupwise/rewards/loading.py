"""From a reward's name to its function: built in, `module:function`, or `path/to/file.py:function`.

A boundary module: loading runs the user's file, which may raise anything.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from groupwise.config.reward import RewardConfig
from groupwise.errors import ConfigError, GroupwiseError, nearest
from groupwise.process_state import guarded
from groupwise.rewards.arguments import from_environment
from groupwise.rewards.earnable import PromptCheck
from groupwise.rewards.registry import built_in, check_args
from groupwise.rewards.signature import Signature, read_signature


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A reward function, found and checked.

    Attributes:
        name: short, for metrics.
        args: keyword arguments that each call gets besides the group's; built-in rewards have theirs inside.
        row_check: raises for a row that the reward cannot score, or None.
        prompt_check: raises for a prompt to which no answer can earn it, or None.
        marks: what every answer that earns it has, with more text after it.

    Example:
        load_reward(RewardConfig(name="gsm8k", args={"mode": "strict"})).function(["#### 72"], answer=["72"])  # [1.0]
    """

    name: str
    function: Callable[..., Any]
    signature: Signature
    args: Mapping[str, Any]
    row_check: Callable[[Mapping[str, Any]], None] | None = None
    prompt_check: PromptCheck | None = None
    marks: tuple[str, ...] = ()


def load_reward(config: RewardConfig) -> LoadedReward:
    """Find the function that `config.name` names and bind `config.args`.

    Raises:
        ConfigError: no such reward, file, module or function; or it takes no such arguments.
    """
    name = config.name.strip()
    args: dict[str, Any] = from_environment(config.args, reward=name)
    if ":" not in name:
        return _load_built_in(name, args)
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f"reward {name!r}: expected path/to/file.py:function or module:function")
    looks_like_file = place.endswith(".py") or "/" in place or "\\" in place
    module = _module_of_file(name, Path(place).expanduser()) if looks_like_file else _module_of_name(name, place)
    function = _find(name, module, attribute)
    signature = read_signature(function, name=name, args=args)
    return LoadedReward(attribute.rpartition(".")[2], function, signature, args)


def _load_built_in(name: str, args: Mapping[str, Any]) -> LoadedReward:
    if name.endswith(".py"):
        raise ConfigError(f"reward {name!r} names a file and no function; expected {name}:function")
    found = built_in(name)
    check_args(name, args)
    function = found.make(**args)
    row_check = found.row_check(**args) if found.row_check else None
    signature = read_signature(function, name=name, args={})
    prompt_check = found.prompt_check(**args) if found.prompt_check else None
    return LoadedReward(
        name, function, signature, {}, row_check, prompt_check, found.marks(**args) if found.marks else ()
    )


def _module_of_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"reward {name!r}: {path} {what}; expected a Python file, seen from the current folder {Path.cwd()}"
        )
    if path.suffix != ".py":
        raise ConfigError(f"reward {name!r}: {path} is not a Python file; its name has to end with .py")
    path = path.resolve()
    # The content is part of the module's name: rewards of one file share it, and an edited file is loaded anew.
    digest = hashlib.blake2b(str(path).encode() + b"\0" + path.read_bytes(), digest_size=8).hexdigest()
    module_name = f"groupwise_user_reward_{path.stem}_{digest}"
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
        with guarded(f"loading reward {name!r}"):
            spec.loader.exec_module(module)
    except (KeyboardInterrupt, GroupwiseError):
        del sys.modules[module_name]
        raise
    except BaseException as error:
        del sys.modules[module_name]
        raise _import_failure(name, str(path), error) from error
    return module


def _module_of_name(name: str, place: str) -> ModuleType:
    try:
        with guarded(f"loading reward {name!r}"):
            return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise ConfigError(
                f"reward {name!r}: there is no module {error.name!r}; install it, put its folder on PYTHONPATH, or "
                "give the file as path/to/file.py:function"
            ) from error
        raise _import_failure(name, place, error) from error
    except (KeyboardInterrupt, GroupwiseError):
        raise
    except BaseException as error:
        raise _import_failure(name, place, error) from error


def _import_failure(name: str, place: str, error: BaseException) -> ConfigError:
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == place]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else place
    return ConfigError(
        f"reward {name!r}: loading it raised {type(error).__name__}: {error} (at {where}); correct that file"
    )


def _find(name: str, module: ModuleType, attribute: str) -> Callable[..., Any]:
    found: Any = module
    for part in attribute.split("."):
        names = [key for key in dir(found) if not key.startswith("_")]
        if not hasattr(found, part):
            hint = nearest(part, names, "did you mean {!r}? ")
            functions = [key for key in names if inspect.isroutine(getattr(found, key))]
            place = module.__file__ or module.__name__
            raise ConfigError(
                f"reward {name!r}: {place} has no {part!r}; {hint}functions there: {', '.join(functions) or 'none'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"reward {name!r}: {attribute} is not a function but {type(found).__name__}; expected "
            "def reward(completions, **columns)"
        )
    if isinstance(found, type):
        raise ConfigError(
            f"reward {name!r}: {attribute} is a class, and calling it gives no rewards; name a function, or an "
            "instance that has __call__"
        )
    return found
