"""From a reward's name to its function: built in, `module:function`, or `path/to/file.py:function`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from groupwise.config.reward import RewardConfig
from groupwise.errors import ConfigError
from groupwise.rewards.arguments import from_environment
from groupwise.rewards.earnable import PromptCheck
from groupwise.rewards.registry import built_in, check_args
from groupwise.rewards.signature import Signature, read_signature
from groupwise.user_code import load_named


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
    function = load_named(name, kind="reward", attribute_kind="function")
    attribute = name.rpartition(":")[2]
    _check_function(name, function, attribute)
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


def _check_function(name: str, found: Any, attribute: str) -> None:
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
