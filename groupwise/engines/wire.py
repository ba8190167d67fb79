"""The token wire: tokens in, tokens and log-probs out, as vLLM's and prime-rl's `/inference/v1/generate` have it.

What is Groupwise's own travels in an object of that name, which other servers and clients do not know.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from groupwise.config.temperature import temperature_problem
from groupwise.types import SamplingParams

GENERATE = "/inference/v1/generate"
MODELS = "/v1/models"
HEALTH = "/health"
UPDATE_WEIGHTS = "/update_weights"
ABORT = "/abort_requests"


def _that_acts(value: float) -> float:
    if problem := temperature_problem(value):
        raise ValueError(problem)
    return value


Temperature: TypeAlias = Annotated[float, AfterValidator(_that_acts)]
TopK: TypeAlias = Annotated[int, Field(ge=-1, lt=2**31)]
"""vLLM's -1 keeps all tokens, as 0 does."""

Penalty: TypeAlias = Annotated[float, Field(ge=1e-3, le=1e3)]
Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Index: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
TokenIds: TypeAlias = Annotated[tuple[int, ...], Field(fail_fast=True)]
StopTokens: TypeAlias = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(max_length=1024, fail_fast=True)
]
StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024)]
"""A stop string is looked for in the text of so many of the newest tokens, at each token."""

StopTexts: TypeAlias = Annotated[tuple[StopText, ...], Field(max_length=64, fail_fast=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingBody(_Body):
    """How one completion is drawn; names and meaning are vLLM's. `logprobs` and the two about text are what every
    answer has anyway."""

    temperature: Temperature = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: TopK = 0
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: Penalty = 1.0
    max_tokens: int = Field(16, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: StopTexts = ()
    stop_token_ids: StopTokens = ()
    seed: Seed | None = None
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
        routes_from: the experts that were chosen are to be told, of tokens at this position and later; None: they are
            not.
    """

    uid: str
    draw: Index
    sample_index: Index
    continues: Index = 0
    resumed: Index = 0
    policy_version: Index = 0
    keeps: bool = False
    routes_from: Index | None = None


class GenerateBody(_Body):
    """One sample asked of a server. `model`, `cache_salt` and `priority` change nothing here, and are taken because
    other clients send them."""

    token_ids: TokenIds = Field(min_length=1)
    sampling_params: SamplingBody = SamplingBody()  # type: ignore[call-arg]
    request_id: str | None = None
    model: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    groupwise: OwnKey | None = None

    @model_validator(mode="after")
    def _has_a_prompt(self) -> GenerateBody:
        if self.groupwise is not None and self.groupwise.continues >= len(self.token_ids):
            raise ValueError(
                f"groupwise.continues = {self.groupwise.continues} leaves no prompt of {len(self.token_ids)} token_ids"
            )
        return self


class UpdateBody(_Body):
    """A folder of weights that is to be served as `version`."""

    version: Index
    path: str


class AbortBody(_Body):
    """Requests to end now; without names, all."""

    request_ids: Annotated[tuple[str, ...], Field(fail_fast=True)] | None = None


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
    routed_experts: str | None = None


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
        routes: it tells which experts it chose, where it is asked.
    """

    identity: dict[str, str]
    exact: bool
    device: str
    version: int
    routes: bool = False


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
