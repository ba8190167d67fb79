"""The scorer: a group of completions in, one `Score` each out, whatever the rewards do."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from groupwise.config.reward import RewardConfig
from groupwise.errors import ConfigError, DataError, RewardError
from groupwise.metrics import Last, Metric, Metrics
from groupwise.protocols import Tokenizer
from groupwise.rewards.arguments import finite_number
from groupwise.rewards.calls import Failed, RewardCall, Runner, shortened
from groupwise.rewards.earnable import check_marks, check_tokens
from groupwise.rewards.loading import LoadedReward, load_reward
from groupwise.rewards.placement import make_runner
from groupwise.rewards.signature import function_name, group_arguments, read_signature, require_columns
from groupwise.rewards.tally import Tally
from groupwise.rewards.values import Graded
from groupwise.types import Prompt, Rollout

MAX_ABANDONED_THREADS = 8
_KINDS_LOGGED = 20

_log = logging.getLogger("groupwise.rewards")


@dataclass(frozen=True, slots=True)
class Score:
    """What one completion earned.

    Attributes:
        reward: the weighted sum of all values that are not None; None when there is none, and when `failed`.
        rewards: each reward's raw value by name, None where it does not apply or failed.
        failed: a reward with `on_error = "fail"` failed for this completion.
        cause: which reward failed and how, or "". Where nothing `failed`: why each value is the 0 of
            `on_error = "zero"`, and none is a reward of the completion's own.

    Example:
        Score(reward=1.5, rewards={"gsm8k": 1.0, "format": 1.0}, failed=False, cause="")  # format has weight 0.5
    """

    reward: float | None
    rewards: Mapping[str, float | None]
    failed: bool = False
    cause: str = ""


@dataclass(slots=True)
class _Entry:
    """One reward of the scorer."""

    name: str
    config: RewardConfig
    loaded: LoadedReward
    runner: Runner
    tally: Tally = field(default_factory=Tally)
    logged: set[str] = field(default_factory=set)

    def covers(self, data_source: str) -> bool:
        return not self.config.data_source or data_source in self.config.data_source

    def check(self, prompt: Prompt, stop: Sequence[str]) -> None:
        require_columns(self.loaded.signature, prompt, name=self.name)
        if self.loaded.row_check is not None:
            self.loaded.row_check(prompt.columns)
        if self.loaded.prompt_check is not None:
            self.loaded.prompt_check(prompt, stop)


class RewardScorer:
    """Scores completions with several rewards at once.

    Rewards run side by side and apart from the caller's event loop; each gets all G completions of a group in one call.
    What happens when one raises, hangs or returns no reward is its `on_error`. A `ConfigError` or `DataError` that a
    reward raises is not a failed rollout but the user's to mend, and passes through.

    Args:
        configs: rewards by name, from the config.
        functions: rewards given as Python callables, with the default timeout and `on_error`.
        function_weights: `[functions]`, their weights; empty means 1 for each.
        extras: the caller's own objects for those of `functions` that name them; each call gets the object itself.
        required: False where something else teaches; without a reward, nothing is scored then.

    Raises:
        ConfigError: a reward cannot be found or called, or there is none at all.

    Example:
        scorer = RewardScorer([RewardConfig(name="gsm8k")], functions=[says_please])
        scores = await scorer.score(prompt, rollouts)
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        functions: Sequence[Callable[..., Any]] = (),
        function_weights: Sequence[float] = (),
        extras: Mapping[str, Any] | None = None,
        required: bool = True,
    ) -> None:
        if not configs and not functions and required:
            raise ConfigError("no reward is set; add one, such as --reward gsm8k or --reward my_rewards.py:function")
        if function_weights and len(function_weights) != len(functions):
            raise ConfigError(
                f"{len(function_weights)} reward weights for {len(functions)} reward functions; give one weight each"
            )
        self._entries: list[_Entry] = []
        for config in configs:
            self._add(config, load_reward(config), named=True)
        for function, weight in zip(functions, function_weights or [1.0] * len(functions), strict=True):
            if not callable(function):
                raise ConfigError(f"a reward function is expected, got {function!r} ({type(function).__name__})")
            name = function_name(function)
            signature = read_signature(function, name=name, args={})
            given = {key: value for key, value in (extras or {}).items() if signature.takes(key)}
            needed = tuple(column for column in signature.needed_columns if column not in given)
            setting = {"name": name, "weight": finite_number(weight, reward=name, name="weight")}
            loaded = LoadedReward(name, function, replace(signature, needed_columns=needed), {})
            self._add(RewardConfig.model_validate(setting), loaded, extras=given)

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, as in `Score.rewards` and the metrics."""
        return tuple(entry.name for entry in self._entries)

    @property
    def weights(self) -> dict[str, float]:
        """Each reward's factor in the weighted sum, by name."""
        return {entry.name: entry.config.weight for entry in self._entries}

    def weights_of(self, data_source: str) -> dict[str, float]:
        """Those of the rewards that score rows of this source, the first first."""
        return {entry.name: entry.config.weight for entry in self._covering(data_source)}

    def readers_of(self, argument: str) -> list[str]:
        """The rewards that take it by its name."""
        return [entry.name for entry in self._entries if argument in entry.loaded.signature.accepted]

    def check_sources(self, sources: Iterable[str]) -> None:
        """Check that every data source has a reward.

        Raises:
            ConfigError: naming the sources that have none.
        """
        if not self._entries:
            return
        bare = sorted({source for source in sources if not self._covering(source)})
        if bare:
            routes = "; ".join(f"{e.name}: {', '.join(map(repr, e.config.data_source))}" for e in self._entries)
            raise ConfigError(
                f"no reward scores rows with the data source {', '.join(map(repr, bare))}; the rewards' data_source "
                f"settings are {routes}. Add a reward for them, or one without data_source, which scores all rows"
            )

    def check_prompts(
        self, prompts: Iterable[Prompt], *, stop: Sequence[str] = (), tokenizer: Tokenizer | None = None
    ) -> None:
        """Check, before anything is sampled, that every row can be scored: its data source, columns and reference; and
        that each built-in reward can be earned.

        Args:
            stop: texts that end a completion.
            tokenizer: makes the completions' texts.

        Raises:
            ConfigError: a data source has no reward, a row lacks a column, or no answer could earn a reward.
            DataError: a row's reference answer cannot be used.
        """
        for entry in self._entries:
            check_marks(entry.name, entry.loaded.marks, stop)
            if tokenizer is not None:
                check_tokens(entry.name, entry.loaded.marks, tokenizer)
        for prompt in prompts:
            self.check_sources([prompt.data_source])
            for entry in self._covering(prompt.data_source):
                try:
                    entry.check(prompt, stop)
                except (ConfigError, DataError) as error:
                    raise _with_row(error, prompt) from error

    async def score(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Score]:
        """Score the rollouts `[G]` of one prompt, in their order.

        Raises:
            RewardError: a reward with `on_error = "stop"` failed, or too many calls hang.
            ConfigError: no reward scores this row, or the row lacks a column.
            DataError: the row's reference answer cannot be used.
        """
        if not rollouts:
            return []
        self.check_sources([prompt.data_source])
        entries = self._covering(prompt.data_source)
        graded = await asyncio.gather(*(self._grade(entry, prompt, rollouts) for entry in entries))
        self._check_abandoned()
        return [self._combine(entries, graded, index) for index in range(len(rollouts))]

    def metrics(self) -> Metrics:
        """What happened since the last call, and a new start.

        `rewards/<name>/mean` and `/std` of the values (std with n - 1), `/errors` completions that got none because the
        reward failed, `/seconds` inside its calls; `rewards/abandoned_threads`, the threads that hang now.
        """
        metrics: dict[str, Metric] = {}
        for entry in self._entries:
            metrics.update(entry.tally.metrics(entry.name))
            entry.tally = Tally()
        metrics["rewards/abandoned_threads"] = Last(float(self._abandoned()))
        return metrics

    def close(self) -> None:
        """End the processes of rewards."""
        for entry in self._entries:
            entry.runner.close()

    def _add(
        self,
        config: RewardConfig,
        loaded: LoadedReward,
        *,
        named: bool = False,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        name, number = loaded.name, 1
        while name in self.names:
            number += 1
            name = f"{loaded.name}_{number}"
        call = RewardCall(
            loaded.function,
            name,
            file=loaded.signature.file,
            timeout=config.timeout,
            is_async=loaded.signature.is_async,
            config=config if named else None,
            extras=extras or {},
        )
        runner = make_runner(call, config.isolated)
        self._entries.append(_Entry(name, config, loaded, runner))

    def _covering(self, data_source: str) -> list[_Entry]:
        return [entry for entry in self._entries if entry.covers(data_source)]

    def _abandoned(self) -> int:
        return sum(entry.runner.abandoned() for entry in self._entries)

    def _check_abandoned(self) -> None:
        if self._abandoned() < MAX_ABANDONED_THREADS:
            return
        hanging = ", ".join(f"{e.name} ({e.runner.abandoned()})" for e in self._entries if e.runner.abandoned())
        raise RewardError(
            f"{self._abandoned()} reward calls hang in threads that cannot be ended (the limit is "
            f"{MAX_ABANDONED_THREADS}): {hanging}. Make the function return in time, by a timeout on what it waits "
            "for, or raise the reward's `timeout` if it is only slow"
        )

    async def _grade(self, entry: _Entry, prompt: Prompt, rollouts: Sequence[Rollout]) -> Graded:
        """One reward's answers; `problems` tell what failed, also where `on_error = "zero"` put a 0 in its place."""
        loaded, size = entry.loaded, len(rollouts)
        require_columns(loaded.signature, prompt, name=entry.name)

        def arguments() -> dict[str, Any]:
            return group_arguments(loaded.signature, prompt, rollouts=rollouts, args=loaded.args)

        try:
            outcome = await entry.runner.run(arguments, size)
        except (ConfigError, DataError) as error:
            raise _with_row(error, prompt) from error
        result = outcome.result
        entry.tally.seconds += outcome.seconds
        if isinstance(result, Failed):
            self._report(entry, prompt, result)
            result = Graded((None,) * size, (result.message,) * size)
        elif any(result.problems):
            self._report(entry, prompt, Failed("value", next(filter(None, result.problems))))
        values, problems = list(result.values), list(result.problems)
        for index, problem in enumerate(problems):
            if problem:
                entry.tally.errors += 1
                values[index] = 0.0 if entry.config.on_error == "zero" else None
                problems[index] = f"reward {entry.name!r} failed: {problem}"
            value = values[index]
            if value is not None:
                entry.tally.values.append(value)
        return Graded(tuple(values), tuple(problems))

    def _report(self, entry: _Entry, prompt: Prompt, failed: Failed) -> None:
        if entry.config.on_error == "stop":
            raise RewardError(
                f"reward {entry.name!r} failed on row {prompt.uid!r}: {failed.message}. The run stops because the "
                "reward's on_error is 'stop'"
            )
        # The first of its kind says it all; the metrics count the rest.
        if failed.kind not in entry.logged and len(entry.logged) < _KINDS_LOGGED:
            entry.logged.add(failed.kind)
            trace = f"\n{shortened(failed.trace)}" if failed.trace else ""
            _log.warning("reward %r failed on row %r: %s%s", entry.name, prompt.uid, failed.message, trace)

    @staticmethod
    def _combine(entries: Sequence[_Entry], graded: Sequence[Graded], index: int) -> Score:
        rewards = {entry.name: answer.values[index] for entry, answer in zip(entries, graded, strict=True)}
        passed = [entry.config.on_error == "zero" for entry in entries]
        problems = [answer.problems[index] for answer in graded]
        cause = "; ".join(problem for problem, zero in zip(problems, passed, strict=True) if problem and not zero)
        weighted = [entry.config.weight * value for entry in entries if (value := rewards[entry.name]) is not None]
        total = sum(weighted)
        if not cause and not math.isfinite(total):
            cause = f"the weighted sum of {rewards} is {total}; use smaller rewards or weights"
        if cause:
            return Score(reward=None, rewards=rewards, failed=True, cause=cause)
        own = [value for value, problem in zip(rewards.values(), problems, strict=True) if not problem]
        judged = any(value is not None for value in own)
        return Score(total if weighted else None, rewards, cause="" if judged else "; ".join(filter(None, problems)))


def _with_row(error: ConfigError | DataError, prompt: Prompt) -> ConfigError | DataError:
    message = str(error)
    return error if repr(prompt.uid) in message else type(error)(f"row {prompt.uid!r}: {message}")
