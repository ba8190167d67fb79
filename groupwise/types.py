"""The nouns of sampling: Prompt, SampleRequest, Completion, Segment, Rollout, RolloutGroup.

Shapes are in brackets: `[P]` prompt tokens, `[T]` completion tokens, `[G]` rollouts of one group.
Nothing here imports torch, so data and rewards stay light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

from groupwise.inputs import ModelInput, SampleKey
from groupwise.sides import NO_SIDES, Sides, Stretch, joined

T = TypeVar("T")

Message: TypeAlias = Mapping[str, Any]
"""One chat message: `{"role": "user", "content": "…"}`."""

FinishReason: TypeAlias = Literal["stop", "length", "turns", "abort", "error"]
"""`length` and `turns`: cut by the budget of tokens or of turns. `abort` and `error`: no sample came of it."""

REFERENCE = "reference"
"""The name of the frozen (or slowly moving) policy that a KL is taken to, among scorers."""

BASE = "base"
"""The name of what a policy's adapter stands on, among scorers."""

TEACHER = "teacher"
"""The name of the frozen model that is distilled from, among scorers."""

RolloutStatus: TypeAlias = Literal["ok", "failed"]

Boundary: TypeAlias = Literal["engine", "environment", "reward", "teacher"]
"""Where a rollout failed: what was asked there, and did not answer as it must."""


@dataclass(frozen=True)
class Prompt:
    """One row of the data, rendered and tokenized.

    Attributes:
        uid: stable name of the row: a function of its content and position, never of the order of reading.
        messages: the conversation that the completion continues; empty when the data gave plain text.
        text: the rendered prompt, as the model sees it.
        input: `[P]`, what the model is given; one object for all of the prompt's samples.
        data_source: routes the row to its rewards.
        columns: every column of the row under its own name (`answer`, `reward_model`, …), given to rewards as they are.

    Example:
        Prompt(uid="train-000017-3fa9", messages=({"role": "user", "content": "2+2?"},), text="<user>2+2?<assistant>",
               input=ModelInput.of((5, 17, 9)), data_source="openai/gsm8k", columns={"answer": "4"})
    """

    uid: str
    messages: tuple[Message, ...]
    text: str
    input: ModelInput
    data_source: str = "default"
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def token_ids(self) -> tuple[int, ...]:
        """`[P]`."""
        return self.input.token_ids


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one completion is drawn. `temperature = 0` is greedy; `top_k = 0`, `top_p = 1` and `min_p = 0` filter
    nothing.

    Attributes:
        max_tokens: most tokens that are drawn, the stop token included.
        min_tokens: no stop token and no stop string ends the completion before this many tokens.
        stop: strings; the completion ends with the first token that completes one (the text keeps it).
        stop_token_ids: tokens that end the completion, beside the model's own end-of-sequence tokens.
        seed: the run's seed; with the prompt's uid and the sample's index it decides every token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


Likeliest: TypeAlias = tuple[tuple[int, float], ...]
"""The most probable tokens of one position, the first one first, each with its log-prob."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample asked of an engine, or what is to come of one that began. Requests with equal prompts share the
    prompt's computation.

    Attributes:
        prompt: `[P]`.
        continues: `[C]`, what follows the prompt already: the model's own tokens and an environment's. It is the same
            stretch for the sampler as for the trainer: the number that decides the next token is that of position C.
        resumed: the last so many tokens of `continues` began the very answer that goes on here, as after an abort:
            they count for `max_tokens`, `min_tokens` and stop strings.
        keeps: the sample may go on after this turn: what it computed is kept while there is room.
        wants_routes: the completion is to bring the experts that were chosen (`EngineCaps.routes`), those of tokens at
            `routes_from` and later, counted from the prompt's first: earlier turns have the others.
        wants_kept: it is to bring the tokens that filters left (`EngineCaps.kept`).
        likeliest: so many of the most probable tokens of each position are to be told; the native engine does.

    Example:
        SampleRequest(SampleKey("train-000017-3fa9", 0, 5), prompt.input, SamplingParams(max_tokens=64))
    """

    key: SampleKey
    prompt: ModelInput
    sampling: SamplingParams
    continues: ModelInput = field(default_factory=ModelInput)
    resumed: int = 0
    policy_version: int = 0
    keeps: bool = False
    wants_routes: bool = False
    routes_from: int = 0
    wants_kept: bool = False
    likeliest: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.resumed <= len(self.continues), f"{self.resumed} of {len(self.continues)} tokens are resumed"

    @staticmethod
    def of(
        prompt: Prompt, sample_index: int, sampling: SamplingParams, policy_version: int = 0, *, draw: int = 0
    ) -> SampleRequest:
        """A sample of `prompt`, from its beginning."""
        key = SampleKey(prompt.uid, draw, sample_index)
        return SampleRequest(key, prompt.input, sampling, policy_version=policy_version)

    @property
    def id(self) -> str:
        return str(self.key)


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one request.

    Attributes:
        token_ids: `[T]`, those drawn for this request, the stop token included when one ended it.
        logprobs: `[T]`, natural log of the policy's probability of each token at the sampling temperature, before
            top-k/top-p/min-p filters and the repetition penalty (at temperature 0: at temperature 1).
        policy_versions: `[T]`, the version of the weights that drew each token.
        sides: what the request wanted beside the tokens; `Sides.kept` is `[T]`.
        likeliest: `[T][K]`, where the request wanted them; log-probs as above, of what was drawn from.
    """

    key: SampleKey
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    error: str = ""
    sides: Sides = NO_SIDES
    likeliest: tuple[Likeliest, ...] = ()

    @property
    def request_id(self) -> str:
        return str(self.key)

    @property
    def sample_index(self) -> int:
        return self.key.sample_index


@dataclass(frozen=True)
class Segment:
    """A stretch of a rollout, written by the model (one turn) or by its environment (one answer). S tokens.

    Attributes:
        input: `[S]`.
        logprobs: `[S]`, the sampler's; zeros where an environment wrote.
        policy_versions: `[S]`, of the weights that drew each token; an environment's tokens have the version that they
            answered.
        messages: what an environment said, where it did not just go on with the text; empty for a turn.
        finish_reason: of a turn.
        reward: what the environment gave for a turn; None: nothing.
        sides: of a turn: what the engine told beside its tokens; no part of equality.

    Example:
        Segment("model", ModelInput.of((7, 2)), "4", logprobs=(-0.1, -0.3), policy_versions=(4, 4),
                finish_reason="stop")
    """

    by: Literal["model", "environment"]
    input: ModelInput
    text: str
    logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    finish_reason: FinishReason | None = None
    reward: float | None = None
    sides: Sides = NO_SIDES

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.token_ids, self.logprobs, self.policy_versions)}
        assert len(lengths) == 1, f"per-token arrays of one segment differ in length: {sorted(lengths)}"

    @staticmethod
    def turn(completion: Completion) -> Segment:
        """What the model wrote."""
        return Segment(
            "model",
            ModelInput.of(completion.token_ids),
            completion.text,
            completion.logprobs,
            completion.policy_versions,
            finish_reason=completion.finish_reason,
            sides=completion.sides,
        )

    @staticmethod
    def answer(given: ModelInput, text: str, messages: Sequence[Message], *, version: int) -> Segment:
        """What an environment said to a turn."""
        size = len(given)
        return Segment("environment", given, text, (0.0,) * size, (version,) * size, messages=tuple(messages))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """`[S]`."""
        return self.input.token_ids


@dataclass(frozen=True)
class Rollout:
    """One episode with its reward. A bad one is data: `status="failed"` and a `cause`, never an exception.

    Attributes:
        segments: turns and answers, in order; what they hold together is `[T]`.
        finish_reason: of the episode: its last turn's, or `turns` where the budget of turns ended it.
        rewards: each reward function's raw value by name; None where the function does not apply.
        reward: the weighted sum, or None when no function gave a value.
        boundary: where it failed.
        cause: why it failed; with the status `ok`, why each of its rewards is the 0 of `on_error = "zero"`.
        old_logprobs: `[T]`, by the policy before the step's first update; None where the algorithm does not ask.
        scores: log-probs `[T]` by the name of the scorer (`reference`, `teacher`) that the algorithm asks.
        prompt: its own, where an environment's beginning changed the group's.

    Example:
        Two turns with an answer between them: segments P0 | A0 E0 A1 have token_ids A0 + E0 + A1, and loss_mask 1 on A0
        and A1, 0 on E0.
    """

    key: SampleKey
    segments: tuple[Segment, ...]
    finish_reason: FinishReason
    rewards: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    reward: float | None = None
    status: RolloutStatus = "ok"
    boundary: Boundary | None = None
    cause: str = ""
    old_logprobs: tuple[float, ...] | None = None
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    prompt: ModelInput | None = None

    def __post_init__(self) -> None:
        computed = [*self.scores.values(), *([] if self.old_logprobs is None else [self.old_logprobs])]
        lengths = {len(self.token_ids), *map(len, computed)}
        assert len(lengths) == 1, f"per-token arrays of one rollout differ in length: {sorted(lengths)}"

    @staticmethod
    def one_turn(
        completion: Completion, *, rewards: Mapping[str, float | None] | None = None, reward: float | None = None
    ) -> Rollout:
        """An episode of one turn, as rewards take it: `scorer.score(prompt, [Rollout.one_turn(completion)])`."""
        turn = Segment.turn(completion)
        return Rollout(completion.key, (turn,), completion.finish_reason, rewards=rewards or {}, reward=reward)

    @property
    def sample_index(self) -> int:
        return self.key.sample_index

    @cached_property
    def input(self) -> ModelInput:
        """`[T]`, all that follows the prompt."""
        if len(self.segments) == 1:
            return self.segments[0].input
        return ModelInput(tuple(piece for segment in self.segments for piece in segment.input.pieces))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """`[T]`."""
        return self.input.token_ids

    @cached_property
    def loss_mask(self) -> tuple[int, ...]:
        """`[T]`, 1 where the model wrote the token; 0 everywhere in a failed rollout."""
        ok = self.status != "failed"
        return _joined([(int(ok and s.by == "model"),) * len(s.token_ids) for s in self.segments])

    @cached_property
    def logprobs(self) -> tuple[float, ...]:
        """`[T]`, the sampler's."""
        return _joined([segment.logprobs for segment in self.segments])

    @cached_property
    def policy_versions(self) -> tuple[int, ...]:
        """`[T]`."""
        return _joined([segment.policy_versions for segment in self.segments])

    @cached_property
    def sides(self) -> Sides:
        """Of all that follows the prompt."""
        return joined([Stretch(len(s.token_ids), s.by == "model", s.sides) for s in self.segments])

    @property
    def num_written(self) -> int:
        """Tokens that the model wrote."""
        return sum([len(segment.token_ids) for segment in self.segments if segment.by == "model"])

    @property
    def num_turns(self) -> int:
        return sum(segment.by == "model" for segment in self.segments)

    @property
    def is_cut(self) -> bool:
        """Whether a budget ended it."""
        return self.finish_reason in ("length", "turns")

    @property
    def text(self) -> str:
        """All that follows the prompt, answers of the environment included."""
        return "".join([segment.text for segment in self.segments])


def _joined(parts: Sequence[tuple[T, ...]]) -> tuple[T, ...]:
    """One after the other; a single one as it is, as of most rollouts."""
    return parts[0] if len(parts) == 1 else tuple(value for part in parts for value in part)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """A prompt and its G rollouts: the unit that is scored, normalised, buffered and shown.

    Attributes:
        index: k, the group's position in the sampler's stream; it serves training step `k // prompts_per_step`.
        rollouts: `[G]`, ordered by `sample_index`.
    """

    index: int
    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """An environment's answer to a turn, after which the model goes on.

    Attributes:
        messages: rendered once by the chat template, as what follows the turn; the model answers them.
        text: in place of messages: the turn goes on after it, as after the result of a calculator.
        reward: for the turn.

    Example:
        Reply(messages=({"role": "tool", "content": "18 °C"},))
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    reward: float | None = None

    def __post_init__(self) -> None:
        if bool(self.messages) == bool(self.text):
            raise ValueError("a Reply has messages or a text: one of them, and not both")


@dataclass(frozen=True, slots=True)
class Done:
    """The episode is over. `reward` is for its last turn."""

    reward: float | None = None
