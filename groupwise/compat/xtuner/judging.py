"""From XTuner's judgers to rewards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from groupwise.compat.xtuner.base import Translation
from groupwise.compat.xtuner.names import GSM8KJudgerConfig, JudgerConfig
from groupwise.rewards import completion_texts


@dataclass(frozen=True, slots=True)
class Routed:
    """A judger, and which rows it judges; None is all of them."""

    judger: JudgerConfig
    place: str
    data_source: str | None = None


@dataclass(frozen=True, slots=True)
class Rewards:
    """Of one program.

    Attributes:
        settings: those that a config can name. places: where each was found.
        functions: those that it cannot.
    """

    settings: tuple[dict[str, Any], ...]
    places: tuple[str, ...]
    functions: tuple[Callable[..., Any], ...]


def read_judgers(config: JudgerConfig | None, place: str, *, found: Translation) -> Rewards:
    """The rewards that stand for a judger; what has no equal goes to the problems of `found`."""
    settings: list[dict[str, Any]] = []
    places: list[str] = []
    functions: list[Callable[..., Any]] = []
    for routed in _routed(config, place, found):
        judger = routed.judger
        handler = judger.reward_handler
        if callable(handler):
            functions.append(_reward(handler, judger, only=routed.data_source))
        elif handler is not None:
            found.problems.append(
                f"{routed.place}.reward_handler = {handler!r}: rewards over HTTP are not there; give a function"
            )
        elif isinstance(judger, GSM8KJudgerConfig):
            # XTuner's own rule, so that rewards are comparable.
            setting = {"name": "gsm8k", "args": {"mode": "strict", **judger.extra_info}}
            places.append(routed.place)
            settings.append(setting | ({"data_source": (routed.data_source,)} if routed.data_source else {}))
        else:
            found.problems.append(f"{routed.place}: it judges nothing; give reward_handler, or use GSM8KJudgerConfig")
    return Rewards(tuple(settings), tuple(places), tuple(functions))


def _routed(config: JudgerConfig | None, place: str, found: Translation) -> Iterator[Routed]:
    if config is None:
        return
    table = config.reward_judger_configs
    if table is None:
        yield Routed(config, place)
        return
    place = f"{place}.reward_judger_configs"
    entries = list(table.items()) if isinstance(table, Mapping) else [(None, judger) for judger in table]
    for number, (source, judger) in enumerate(entries):
        where = f"{place}[{number if source is None else source!r}]"
        if not isinstance(judger, JudgerConfig):
            found.problems.append(f"{where}: got {judger!r}; expected a judger, such as GSM8KJudgerConfig()")
            continue
        found.take(judger, where)
        yield Routed(judger, where, judger.judger_name if source is None else source)


def _reward(handler: Callable[..., Any], judger: JudgerConfig, *, only: str | None) -> Callable[..., Any]:
    """A reward from `handler(response, label, extra_info)`, which gives `{"score": number}`; None for other rows."""

    def calls(completions: Sequence[Any], reward_model: Sequence[Any]) -> list[Any]:
        return [
            handler(response=text, label=truth.get("ground_truth"), extra_info=deepcopy(judger.extra_info))
            for text, truth in zip(completion_texts(completions), reward_model, strict=True)
        ]

    def applies(data_source: Sequence[Any] | None) -> bool:
        return only is None or (data_source is not None and data_source[0] == only)

    def judged(completions: Sequence[Any], reward_model: Sequence[Any], data_source: Any = None, **_: Any) -> list[Any]:
        if not applies(data_source):
            return [None] * len(completions)
        return [result["score"] for result in calls(completions, reward_model)]

    async def judged_async(
        completions: Sequence[Any], reward_model: Sequence[Any], data_source: Any = None, **_: Any
    ) -> list[Any]:
        if not applies(data_source):
            return [None] * len(completions)
        return [(await result)["score"] for result in calls(completions, reward_model)]

    made = judged_async if inspect.iscoroutinefunction(handler) else judged
    made.__name__ = judger.judger_name
    return made
