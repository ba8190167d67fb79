"""The rows of `trajectories/`, as programs hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, TypeAlias

from groupwise.batches import Credit, mean_credit
from groupwise.types import Boundary, FinishReason, Message, RolloutStatus

Writer: TypeAlias = Literal["model", "environment"]


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """A stretch of what follows the prompt, written by the model (one turn) or by its environment (one answer).

    Attributes:
        num_tokens: S of the row's T tokens, after those of the segments before it.
        finish_reason: of a turn.
        reward: what the environment gave for a turn; None: nothing.
        messages: what an environment said, where it did not just go on with the text.

    Example:
        SegmentRow("environment", "4", num_tokens=1)
    """

    by: Writer
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    reward: float | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image of the prompt or of an environment's answer; pixels are elsewhere.

    Attributes:
        width, height: in pixels.
        tokens: that it takes.
        thumbnail: a small picture's place in the run directory; None where there is none.

    Example:
        ImageRow("5f0c…", width=640, height=480, tokens=300, thumbnail="images/5f0c….webp")
    """

    digest: str
    width: int
    height: int
    tokens: int
    thumbnail: str | None = None


@dataclass(frozen=True, slots=True)
class TrajectoryRow:
    """One rollout of a training step: what was asked, what came of it, and what it was worth. T tokens follow the
    prompt.

    Attributes:
        group: k, its group's position in the sampler's stream.
        draw: how often the prompt came before in the run's stream; None in format 1, which does not say.
        prompt: the rendered prompt.
        prompt_tokens: P.
        prompt_ids: `[P]`, where an environment began with messages of its own, so that the model saw more than
            `prompt`; None: it saw just that.
        segments: turns and answers, in order; none where the rollout failed before its first turn.
        token_ids: `[T]`.
        logprobs: `[T]`, the sampler's; zeros where an environment wrote.
        policy_versions: `[T]`, of the weights that drew each token.
        rewards: each reward function's raw value by name; None where the function does not apply.
        reward: the weighted sum; None where no function gave a value.
        advantage: what the rollout was credited with, the mean over its tokens.
        credit: `[T]`, what each token was credited with; None: `advantage`, every one.
        scores: log-probs `[T]` by the name of the scorer (`reference`, `teacher`), and the trainer's own (`policy`).
        finish_reason: of the episode.
        boundary, cause: where and why it failed.

    Raises:
        ValueError: per-token values differ in length.

    Example:
        turn = SegmentRow("model", "4", num_tokens=2, finish_reason="stop")
        TrajectoryRow(step=3, group=17, uid="000017-3fa9", draw=0, sample_index=5, data_source="gsm8k", prompt="2+2=",
                      prompt_tokens=4, segments=(turn,), token_ids=(7, 2), logprobs=(-0.1, -0.3),
                      policy_versions=(2, 2), rewards={"gsm8k": 1.0}, reward=1.0, advantage=0.7, finish_reason="stop")
    """

    step: int
    group: int
    uid: str
    draw: int | None
    sample_index: int
    data_source: str
    prompt: str
    prompt_tokens: int
    segments: tuple[SegmentRow, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float
    finish_reason: FinishReason
    credit: tuple[float, ...] | None = None
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    status: RolloutStatus = "ok"
    boundary: Boundary | None = None
    cause: str = ""
    prompt_ids: tuple[int, ...] | None = None
    images: tuple[ImageRow, ...] = ()

    def __post_init__(self) -> None:
        lengths = {
            "token_ids": len(self.token_ids),
            "segments": sum(segment.num_tokens for segment in self.segments),
            "logprobs": len(self.logprobs),
            "policy_versions": len(self.policy_versions),
            **({} if self.credit is None else {"credit": len(self.credit)}),
            **{f"scores.{name}": len(values) for name, values in self.scores.items()},
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"its per-token values differ in length: {lengths}")
        if self.prompt_ids is not None and len(self.prompt_ids) != self.prompt_tokens:
            raise ValueError(f"it has {len(self.prompt_ids)} prompt_ids and prompt_tokens = {self.prompt_tokens}")

    @property
    def completion(self) -> str:
        """All that follows the prompt, answers of the environment included."""
        return "".join(segment.text for segment in self.segments)

    @property
    def completion_tokens(self) -> int:
        """Those that the model wrote."""
        return sum(segment.num_tokens for segment in self.segments if segment.by == "model")

    @property
    def policy_version(self) -> int | None:
        """Of the weights that drew the first token; None without one."""
        return self.policy_versions[0] if self.policy_versions else None

    @property
    def starts(self) -> tuple[int, ...]:
        """`[segments]`, where each begins among the T tokens."""
        return tuple(accumulate((segment.num_tokens for segment in self.segments), initial=0))[:-1]

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """`[T]`, 1 where the model wrote the token; 0 everywhere in a failed rollout. What a setting leaves out beyond
        that, such as samples that were cut off, is not in it."""
        ok = self.status == "ok"
        return tuple(int(segment.by == "model" and ok) for segment in self.segments for _ in range(segment.num_tokens))

    @property
    def advantages(self) -> tuple[float, ...]:
        """`[T]`, what each token was credited with."""
        return (self.advantage,) * len(self.token_ids) if self.credit is None else self.credit


def split_credit(given: Credit) -> tuple[float, tuple[float, ...] | None]:
    """A row's `advantage` and `credit`: the mean, and each token's where they differ; of equal ones the mean is the
    one, to the bit."""
    if not isinstance(given, tuple):
        return given, None
    if len(set(given)) == 1:
        return given[0], None
    return mean_credit(given), given or None


@dataclass(frozen=True, slots=True)
class EvalTrajectoryRow:
    """One sample of an evaluation and its judgement.

    Attributes:
        num_tokens: those that the model wrote.
        policy_version: of the weights that were evaluated; inside a run, the step after which they were.
        status: `failed` where the engine, an environment or a reward did not give what it must; then it is not correct.
    """

    uid: str
    sample_index: int
    data_source: str
    prompt: str
    text: str
    rewards: Mapping[str, float | None]
    reward: float | None
    correct: bool
    num_tokens: int
    finish_reason: FinishReason
    status: RolloutStatus
    cause: str
    policy_version: int
