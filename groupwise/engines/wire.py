"""The token wire: tokens in, tokens and log-probs out, as vLLM's and prime-rl's `/inference/v1/generate` have it.

What is Groupwise's own travels in an object of that name, which other servers and clients do not know.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from groupwise.types import SamplingParams

GENERATE = "/inference/v1/generate"
MODELS = "/v1/models"
HEALTH = "/health"
UPDATE_WEIGHTS = "/update_weights"
ABORT = "/abort_requests"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingBody(_Body):
    """How one completion is drawn; names and meaning are vLLM's. `logprobs` and the two about text are what every
    answer has anyway."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0)
    max_tokens: int = Field(16, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    n: Literal[1] = 1
    logprobs: Literal[0, 1] = 1
    skip_special_tokens: bool = False
    detokenize: bool = False

    @staticmethod
    def of(params: SamplingParams) -> SamplingBody:
        """The same, for the wire."""
        return SamplingBody(**asdict(params))

    @property
    def params(self) -> SamplingParams:
        """What the engine takes; vLLM's -1 for `top_k` keeps all tokens, as 0 does."""
        named: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(SamplingParams)}
        named["top_k"] = max(0, self.top_k)
        named["seed"] = self.seed or 0
        return SamplingParams(**named)


class OwnKey(_Body):
    """What decides a sample's tokens beside weights, prompt and seed, and how its tokens are one stretch.

    Attributes:
        continues: so many of `token_ids`, the last ones, follow the prompt already.
        resumed: the last so many of these began the very answer that goes on here.
        policy_version: which the server must hold.
        keeps: the sample may go on after this turn.
    """

    uid: str
    draw: int
    sample_index: int
    continues: int = Field(default=0, ge=0)
    resumed: int = Field(default=0, ge=0)
    policy_version: int = 0
    keeps: bool = False


class GenerateBody(_Body):
    """One sample asked of a server. `model`, `cache_salt` and `priority` change nothing here, and are taken because
    other clients send them."""

    token_ids: tuple[int, ...] = Field(min_length=1)
    sampling_params: SamplingBody = SamplingBody()  # type: ignore[call-arg]
    request_id: str | None = None
    model: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    groupwise: OwnKey | None = None


class UpdateBody(_Body):
    """A folder of weights that is to be served as `version`."""

    version: int = Field(ge=0)
    path: str


class AbortBody(_Body):
    """Requests to end now; without names, all."""

    request_ids: tuple[str, ...] | None = None


class TokenLogprob(BaseModel):
    """A drawn token. Both keys name it, because clients read one or the other."""

    token: str
    token_id: int
    logprob: float = Field(le=0, allow_inf_nan=False)


class Logprobs(BaseModel):
    content: tuple[TokenLogprob, ...]


class VersionSpan(BaseModel):
    version: str
    start: int
    end: int


class Choice(BaseModel):
    index: int = 0
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: Logprobs
    weight_versions: tuple[VersionSpan, ...] = ()


class GenerateReply(BaseModel):
    request_id: str
    choices: tuple[Choice, ...] = Field(min_length=1, max_length=1)


class ServedModel(BaseModel):
    """What a Groupwise server says of its model, beside the names of the wire.

    Attributes:
        identity: facts by name, compared with the trainer's.
        exact: whether its log-probs are those of the trainer's forward on the same kind of device.
        device: `cpu` or `cuda`.
        version: of the weights that it holds.
    """

    identity: dict[str, str]
    exact: bool
    device: str
    version: int


def reply_body(
    request_id: str, token_ids: tuple[int, ...], logprobs: tuple[float, ...], **choice: Any
) -> GenerateReply:
    """The answer to one request; `choice` has the finish reason and the versions."""
    content = tuple(
        TokenLogprob(token=f"token_id:{token}", token_id=token, logprob=value)
        for token, value in zip(token_ids, logprobs, strict=True)
    )
    return GenerateReply(
        request_id=request_id,
        choices=(Choice(token_ids=token_ids, logprobs=Logprobs(content=content), **choice),),
    )
