"""Secrets in a config: written nowhere, and shown to no tracker.

A secret is best given as a reference, `"env:NAME"`: reward arguments are looked up when the reward is loaded. One that
stands in the config itself is known by the name of its key, inside a table of free keys, or by its looks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from groupwise.config import Config

REDACTED = "(redacted)"
REFERENCE = "env:"
_NAMES = frozenset(
    {
        *("key", "keys", "apikey", "token", "tokens", "secret", "secrets", "password", "passwd", "passphrase", "pwd"),
        *("authorization", "auth", "credential", "credentials", "bearer", "cookie", "cookies"),
    }
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_LOOKS = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in an address
    r"|\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[bap]-|AKIA|AIza)[A-Za-z0-9_-]{16,}"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{16,}"
)


def public_values(config: Config, *, references: bool = True) -> dict[str, Any]:
    """The config as plain values, with `(redacted)` in the place of secrets.

    Args:
        references: to environment variables stay; False puts `(redacted)` in their place, too, where a secret is meant.

    Example:
        public_values(config)["reward"][0]["args"] == {"url": "https://judge.example", "api_key": "(redacted)"}
    """
    values = config.model_dump(mode="json")
    for reward in values["reward"]:
        reward["args"] = _free(reward["args"], references=references)
    data = values["data"]
    data["chat_template_kwargs"] = _free(data["chat_template_kwargs"], references=references)
    found: dict[str, Any] = _by_looks(values)
    return found


def without_secrets(config: Config) -> Config:
    """The config with `(redacted)` in the place of secrets, however they were given; two that differ in these alone
    are equal."""
    return Config.model_validate(public_values(config, references=False))


def is_redacted(value: Any) -> bool:
    """Whether a secret was here."""
    if isinstance(value, str):
        return REDACTED in value
    if isinstance(value, Mapping):
        return any(map(is_redacted, value.values()))
    return isinstance(value, list | tuple) and any(map(is_redacted, value))


def _free(value: Any, *, references: bool, secret: bool = False) -> Any:
    """Of a table whose keys are the user's: texts under a secret's name, however deep."""
    if isinstance(value, Mapping):
        return {
            key: _free(item, references=references, secret=secret or _names_secret(str(key)))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_free(item, references=references, secret=secret) for item in value]
    if not secret or not isinstance(value, str) or not value or (references and value.startswith(REFERENCE)):
        return value
    return REDACTED


def _names_secret(key: str) -> bool:
    return any(word.lower() in _NAMES for word in _WORDS.findall(key))


def _by_looks(value: Any) -> Any:
    if isinstance(value, str):
        return _LOOKS.sub(REDACTED, value)
    if isinstance(value, Mapping):
        return {key: _by_looks(item) for key, item in value.items()}
    return [_by_looks(item) for item in value] if isinstance(value, list) else value
