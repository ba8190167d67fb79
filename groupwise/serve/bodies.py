"""What OpenAI's clients send: every key acts, or cannot change the answer, or is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from groupwise.engines.wire import Penalty, Seed, StopText, StopTexts, StopTokens, Temperature, TokenIds, TopK
from groupwise.serve.front import Refusal
from groupwise.texts import one_line
from groupwise.types import SamplingParams

_MOST_CHOICES = 128
_MOST_PROMPTS = 4096
_MOST_LIKELIEST = 20

Objects: TypeAlias = Annotated[tuple[dict[str, Any], ...], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    """`continuous_usage_stats` is vLLM's: each part says how much it was so far."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampled(BaseModel):
    """What both routes take. The second half changes nothing of an answer, and is taken because clients send it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    temperature: Temperature | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=_MOST_CHOICES)
    seed: Seed | None = None
    stop: StopText | StopTexts | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # vLLM's, and ours
    top_k: TopK = 0
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: Penalty = 1.0
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: StopTokens | None = None
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    # OpenAI's that would change the answer, and that the engine does not have: only their neutral values
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    # Those that change nothing
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    request_id: str | None = None
    skip_special_tokens: Literal[True, False] | None = None
    spaces_between_special_tokens: bool | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return (stop,) if isinstance(stop, str) else stop or ()

    @model_validator(mode="after")
    def _streams(self) -> _Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: there is no stream; set stream, or leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return tuple(self.stop or ())

    @property
    def names_tokens(self) -> bool:
        """Log-probs name tokens by number: `token_id:17`."""
        return self.return_token_ids or self.return_tokens_as_token_ids

    def sampling(self, *, max_tokens: int, seed: int) -> SamplingParams:
        """For the engine; OpenAI's defaults."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            stop=self.stops,
            stop_token_ids=self.stop_token_ids or (),
            seed=seed,
        )


class Function(BaseModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    type: Literal["function"] = "function"
    function: Function


class ChatBody(_Sampled):
    messages: Objects = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_LIKELIEST)
    tools: Annotated[tuple[Tool, ...], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: Literal[False] = False
    modalities: Annotated[tuple[Literal["text"], ...], Field(fail_fast=True)] | None = None

    @field_validator("tool_choice")
    @classmethod
    def _left_to_the_model(cls, choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if choice in (None, "auto", "none"):
            return choice
        wanted = "a call of a named tool" if isinstance(choice, dict) else f"'{one_line(choice)}'"
        raise ValueError(
            f"this server cannot hold an answer to {wanted}; give 'auto', which leaves it to the model, or 'none'"
        )

    @field_validator("parallel_tool_calls")
    @classmethod
    def _any_number(cls, parallel: bool | None) -> bool | None:
        if parallel is False:
            raise ValueError("this server cannot hold an answer to one call; leave it out")
        return parallel

    @model_validator(mode="after")
    def _plain_text(self) -> ChatBody:
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise ValueError("response_format: this server cannot hold an answer to a format; leave it out")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: there are no log-probs to tell them with; set logprobs, or leave it out")
        return self

    @property
    def likeliest(self) -> int:
        """Most probable tokens that are told of each position."""
        return self.top_logprobs or 0

    @property
    def most_tokens(self) -> int | None:
        """Of the answer, where the client says."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @cached_property
    def template_tools(self) -> list[dict[str, Any]]:
        """As the chat template takes them; none where they must not be used."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]


class CompletionBody(_Sampled):
    prompt: (
        str
        | TokenIds
        | Annotated[tuple[str, ...], Field(max_length=_MOST_PROMPTS, fail_fast=True)]
        | Annotated[tuple[TokenIds, ...], Field(max_length=_MOST_PROMPTS, fail_fast=True)]
    )
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=_MOST_LIKELIEST)
    echo: Literal[False] = False
    suffix: Literal[""] | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _draws_what_it_gives(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: this server gives all that it draws; leave it out, or raise n")
        return self

    @property
    def likeliest(self) -> int:
        """As of a chat."""
        return self.logprobs or 0

    @cached_property
    def prompts(self) -> Sequence[str | tuple[int, ...]]:
        """One or several, as texts or as tokens."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if not self.prompt:
            raise Refusal(400, "prompt: it is empty; give a text, or tokens")
        if isinstance(self.prompt[0], int):
            return (tuple(token for token in self.prompt if isinstance(token, int)),)
        return tuple(each for each in self.prompt if not isinstance(each, int))
