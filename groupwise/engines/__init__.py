"""Engines: prompts in, completions out, behind one Protocol (`groupwise/protocols.py`); loaded by name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from groupwise.errors import ConfigError, nearest

if TYPE_CHECKING:
    from groupwise.config import RolloutConfig

ENGINES = ("native", "http")
_SERVER_PACKAGES = ("starlette", "uvicorn", "httpx")
_HTTP_SETTINGS = ("url", "engine_timeout", "weights_dir")


def check_engine(rollout: RolloutConfig) -> None:
    """Refuse, before anything is loaded, an unknown name, or settings that do not act with the engine.

    Raises:
        ConfigError: says which, and what to do.
    """
    name = rollout.engine
    if name not in ENGINES:
        hint = nearest(name, ENGINES, "did you mean {!r}? Known:") or "expected one of"
        raise ConfigError(f"rollout.engine = {name!r} is unknown; {hint} {', '.join(ENGINES)}")
    if name == "http":
        require_server("rollout.engine = 'http'")
        _check_url(rollout.url)
        return
    given = [setting for setting in _HTTP_SETTINGS if setting in rollout.model_fields_set and _acts(rollout, setting)]
    if given:
        raise ConfigError(
            f"rollout.{given[0]} = {getattr(rollout, given[0])!r} has no effect with rollout.engine = {name!r}; set "
            "rollout.engine to 'http', or leave it out"
        )


def _acts(rollout: RolloutConfig, setting: str) -> bool:
    return getattr(rollout, setting) != type(rollout).model_fields[setting].default


def _check_url(url: str | None) -> None:
    if url is None:
        raise ConfigError("rollout.engine = 'http' needs rollout.url, where a server of `groupwise serve` is")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"rollout.url = {url!r} is no address of a server; expected one such as http://127.0.0.1:8000"
        )


def require_in_process(rollout: RolloutConfig, who: str) -> None:
    """Refuse an engine elsewhere where a command has its own model.

    Raises:
        ConfigError: says which.
    """
    check_engine(rollout)
    if rollout.engine != "native":
        raise ConfigError(f"{who} samples in this process; leave rollout.engine = {rollout.engine!r} out")


def require_server(who: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
        ConfigError: says how to install it.
    """
    missing = [package for package in _SERVER_PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigError(f"{who} needs {', '.join(missing)}: pip install 'groupwise[serve]'")
