"""A sample's visit to its environment: begin, answers, close; and how answers become tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import TracebackType
from typing import Any

from groupwise.data.chat import encode_answer, encode_going_on, encode_rendered, render
from groupwise.data.rows import message_problem
from groupwise.environments.calls import Calls, EnvironmentFailed
from groupwise.errors import DataError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.protocols import Environment, Tokenizer
from groupwise.types import Done, Message, Prompt, Reply, Segment

ENVIRONMENT = "environment"
"""The name of what environments give, among a rollout's rewards."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environments:
    """Where a run's environments come from, and the bounds of an episode.

    Attributes:
        make: gives a new environment for each sample; None is the single-turn one, which says Done at once.
        tokenizer, template_kwargs: render answers.
        max_turns: most turns of the model in an episode.
        timeout: seconds that one call may take.
        weight: factor of what environments give, in the reward.
        stop: strings that end a turn, beside the run's own.
    """

    make: Callable[[], Environment] | None = None
    tokenizer: Tokenizer | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str = "single-turn"
    max_turns: int = 1
    timeout: float = 60.0
    weight: float = 1.0
    stop: tuple[str, ...] = ()

    @cached_property
    def _calls(self) -> Calls:
        """One for all visits, so that it knows how many calls hang."""
        return Calls(self.name, self.timeout)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of what environments give, by its name among the rewards; nothing where there is none."""
        return {} if self.make is None else {ENVIRONMENT: self.weight}

    def visit(self, key: SampleKey) -> Visit:
        """An environment of its own for this sample."""
        return Visit(self, self._calls, key)

    def render(self, said: Reply, prompt: Prompt, segments: Sequence[Segment]) -> tuple[ModelInput, str]:
        """An answer's tokens, and its text, as they follow the last of `segments`.

        Raises:
            DataError: messages cannot follow a plain text, or the chat template refuses them.
        """
        assert self.tokenizer is not None, "environments that answer have a tokenizer"
        if said.text:
            token_ids, text = encode_going_on(said.text, self.tokenizer), said.text
        elif not prompt.messages:
            raise DataError(
                f"row {prompt.uid!r}: environment {self.name!r} answered with messages, but the prompt is plain text; "
                "give prompts as messages, or answer with Reply(text=…)"
            )
        else:
            token_ids, text = encode_answer(
                said.messages,
                self.tokenizer,
                template_kwargs=self.template_kwargs,
                last_token=segments[-1].token_ids[-1],
            )
        if not token_ids:
            raise EnvironmentFailed(
                f"environment {self.name!r} answered {text!r}, which the tokenizer makes nothing of"
            )
        return ModelInput.of(token_ids), text


SINGLE_TURN = Environments()


class Visit:
    """One sample's environment, between `async with` and its end."""

    def __init__(self, environments: Environments, calls: Calls, key: SampleKey) -> None:
        self._environments = environments
        self._calls = calls
        self._key = key
        self._environment: Environment | None = None

    async def __aenter__(self) -> Visit:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._environment is None:
            return
        try:
            await self._calls.call(self._environment.close)
        except EnvironmentFailed as failure:
            logger.warning("%s", failure)

    async def begin(self, prompt: Prompt) -> Prompt:
        """The prompt that the sample answers."""
        if self._environments.make is None:
            return prompt
        self._environment = await self._calls.call(self._environments.make)
        assert self._environment is not None, "the registry checked what makes environments"
        messages = await self._calls.call(self._environment.begin, prompt, self._key)
        return self._with_messages(prompt, messages) if messages else prompt

    async def answer(self, turn: Segment) -> Reply | Done:
        """What the environment says to the turn, checked."""
        if self._environment is None:
            return Done()
        said = await self._calls.call(self._environment.answer, turn)
        name = self._calls.name
        if not isinstance(said, Reply | Done):
            raise EnvironmentFailed(f"environment {name!r} answered with {type(said).__name__}; expected Reply or Done")
        if said.reward is not None and not _is_number(said.reward):
            raise EnvironmentFailed(f"environment {name!r} gave the reward {said.reward!r}; expected a finite number")
        if isinstance(said, Reply):
            self._check(said.messages)
        return said

    def _check(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if problem := message_problem(message, "its message"):
                raise EnvironmentFailed(f"environment {self._calls.name!r} answered, and {problem}")

    def _with_messages(self, prompt: Prompt, messages: Sequence[Message]) -> Prompt:
        name, tokenizer = self._calls.name, self._environments.tokenizer
        assert tokenizer is not None, "environments that begin have a tokenizer"
        self._check(messages)
        if not prompt.messages:
            raise DataError(
                f"row {prompt.uid!r}: environment {name!r} began with messages, but the prompt is plain text; give "
                "prompts as messages"
            )
        whole = (*prompt.messages, *(dict(message) for message in messages))
        text = render(whole, tokenizer, template_kwargs=self._environments.template_kwargs)
        return replace(prompt, messages=whole, text=text, input=ModelInput.of(encode_rendered(text, tokenizer)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
