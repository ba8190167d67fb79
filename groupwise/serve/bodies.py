"""What OpenAI's clients send: every key acts, or cannot change the answer, or is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from groupwise.serve.front import Refusal
from groupwise.types import SamplingParams

_MOST_CHOICES = 128


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampled(BaseModel):
    """What both routes take. The second half changes nothing of an answer, and is taken because clients send it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=_MOST_CHOICES)
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # vLLM's, and ours
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0)
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: tuple[int, ...] | None = None
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
        stops = (stop,) if isinstance(stop, str) else stop or ()
        if "" in stops:
            raise ValueError("an empty text would end every answer at once")
        return stops

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
    messages: tuple[dict[str, Any], ...] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Literal[0] | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: Literal[False] = False
    modalities: tuple[Literal["text"], ...] | None = None

    @model_validator(mode="after")
    def _plain_text(self) -> ChatBody:
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise ValueError("response_format: this server cannot hold an answer to a format; leave it out")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Of the answer, where the client says."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def template_tools(self) -> list[dict[str, Any]]:
        """As the chat template takes them; none where they must not be used."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]


class CompletionBody(_Sampled):
    prompt: str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]
    max_tokens: int = Field(16, ge=1)
    logprobs: Literal[0, 1] | None = None
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
    def prompts(self) -> Sequence[str | tuple[int, ...]]:
        """One or several, as texts or as tokens."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if not self.prompt:
            raise Refusal(400, "prompt: it is empty; give a text, or tokens")
        if isinstance(self.prompt[0], int):
            return (tuple(token for token in self.prompt if isinstance(token, int)),)
        return tuple(each for each in self.prompt if not isinstance(each, int))
