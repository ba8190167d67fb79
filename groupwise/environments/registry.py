"""Environments by name: built in, or the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from groupwise.config.environment import EnvironmentConfig
from groupwise.environments.calculator import Calculator
from groupwise.environments.visit import SINGLE_TURN, Environments
from groupwise.errors import ConfigError, GroupwiseError, nearest
from groupwise.process_state import guarded
from groupwise.protocols import Environment, Tokenizer
from groupwise.user_code import load_named

_BUILT_IN: Mapping[str, Callable[..., Environment]] = {"calculator": Calculator}
_METHODS = ("begin", "answer", "close")


def environment_names() -> tuple[str, ...]:
    return tuple(_BUILT_IN)


def load_environments(
    config: EnvironmentConfig, tokenizer: Tokenizer, *, template_kwargs: Mapping[str, Any]
) -> Environments:
    """What `environment.name` names, with the bounds of an episode; single-turn without a name.

    One object is made, looked at and closed by nobody, so that a factory that cannot be called is found before a run.

    Raises:
        ConfigError: no such environment, or one without the methods, or a factory that raises.
    """
    if config.name is None:
        return SINGLE_TURN
    factory = _factory(config.name)
    make = partial(factory, **config.args)
    example = _first(config.name, make)
    return Environments(
        make,
        tokenizer,
        template_kwargs,
        name=config.name,
        max_turns=config.max_turns,
        timeout=config.timeout,
        weight=config.weight,
        stop=_stop_of(config.name, example),
    )


def _factory(name: str) -> Callable[..., Environment]:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if ":" not in name:
        hint = nearest(name, _BUILT_IN, "did you mean {!r}? ")
        raise ConfigError(
            f"environment.name = {name!r}: there is no such environment; {hint}expected {', '.join(_BUILT_IN)}, or "
            "your own as path/to/file.py:factory"
        )
    found: Any = load_named(name, kind="environment", attribute_kind="factory")
    if not callable(found):
        raise ConfigError(
            f"environment {name!r} is no class and no function but {type(found).__name__}; expected what makes an "
            "environment for each sample"
        )
    return cast("Callable[..., Environment]", found)


def _first(name: str, make: Callable[[], Environment]) -> Environment:
    try:
        with guarded(f"making environment {name!r}"):
            example = make()
    except (KeyboardInterrupt, GroupwiseError):
        raise
    except BaseException as error:
        raise ConfigError(
            f"environment {name!r}: making one raised {type(error).__name__}: {error}; mend it, or environment.args"
        ) from error
    missing = [method for method in _METHODS if not callable(getattr(example, method, None))]
    if inspect.isawaitable(example) or missing:
        raise ConfigError(
            f"environment {name!r} makes a {type(example).__name__} without {' and '.join(missing) or 'methods'}; an "
            f"environment has {', '.join(_METHODS)}"
        )
    return example


def _stop_of(name: str, example: Environment) -> tuple[str, ...]:
    stop: Any = getattr(example, "stop", ())
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"environment {name!r}: stop = {stop!r}; expected texts that end a turn, none of them empty")
    return texts
