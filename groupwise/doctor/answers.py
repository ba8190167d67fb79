"""Rules about answers: whether they end, say something, differ, and keep their length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from groupwise.doctor.history import History
from groupwise.doctor.rules import Seen, mean


@dataclass(frozen=True, slots=True)
class AnswersCut:
    """Hardly an answer ends by itself."""

    share: float = 0.9
    steps: int = 3
    name: ClassVar[str] = "answers_cut"
    reads: ClassVar[tuple[str, ...]] = ("completions/clipped_ratio",)
    helps: ClassVar[str] = (
        "raise rollout.max_completion_tokens; if they never end, look for the end token in the chat template, set "
        "rollout.stop, or teach the ending by groupwise sft"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        shares = history.last("completions/clipped_ratio", self.steps)
        if shares is not None and mean(shares) >= self.share:
            yield Seen(f"{mean(shares):.0%} of the answers of the last {self.steps} steps were cut by their limit")


@dataclass(frozen=True, slots=True)
class AnswersEmpty:
    """Hardly an answer has text."""

    share: float = 0.9
    steps: int = 3
    name: ClassVar[str] = "answers_empty"
    reads: ClassVar[tuple[str, ...]] = ("share_empty",)
    helps: ClassVar[str] = (
        "look at the rendered prompt in trajectories/: the chat template may end the answer before it begins; "
        "rollout.min_completion_tokens asks for more than nothing, and a lower optim.lr may keep the model from it"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        shares = history.last("share_empty", self.steps)
        if shares is not None and mean(shares) >= self.share:
            yield Seen(f"{mean(shares):.0%} of the answers of the last {self.steps} steps had no text")


@dataclass(frozen=True, slots=True)
class AnswersIdentical:
    """In most groups all answers are one and the same text."""

    share: float = 0.7
    steps: int = 5
    name: ClassVar[str] = "answers_identical"
    reads: ClassVar[tuple[str, ...]] = ("share_identical",)
    helps: ClassVar[str] = (
        "a higher rollout.temperature, a lower optim.lr, an entropy bonus (algorithm.entropy.coef) or a larger "
        "rollout.group_size; go back to an earlier checkpoint if the answers were not always so"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        shares = history.last("share_identical", self.steps)
        if shares is not None and mean(shares) >= self.share:
            yield Seen(
                f"in {mean(shares):.0%} of the groups of the last {self.steps} steps all answers were the same text"
            )


def _lengths(history: History) -> tuple[float, float, int] | None:
    """Mean length some steps ago and now, in tokens, and how many steps lie between."""
    span, window = 30, 5
    lengths = history.last("completions/mean_length", span)
    return None if lengths is None else (mean(lengths[:window]), mean(lengths[-window:]), span - window)


@dataclass(frozen=True, slots=True)
class LengthExploding:
    """Answers became several times longer within a few steps."""

    factor: float = 2.5
    least: float = 16.0  # tokens; less is no explosion, whatever the factor
    name: ClassVar[str] = "length_exploding"
    reads: ClassVar[tuple[str, ...]] = ("completions/mean_length",)
    helps: ClassVar[str] = (
        "see what the longest answers are paid for; a cost for length (the reward `length`), algorithm.overlong, a "
        "lower optim.lr or a KL to the initial model (algorithm.kl.coef)"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        found = _lengths(history)
        if found is not None and found[1] > self.factor * found[0] and found[1] - found[0] >= self.least:
            yield Seen(f"answers grew from {found[0]:.0f} to {found[1]:.0f} tokens within {found[2]} steps")


@dataclass(frozen=True, slots=True)
class LengthCollapsing:
    """Answers became several times shorter within a few steps."""

    factor: float = 2.5
    least: float = 16.0  # tokens
    name: ClassVar[str] = "length_collapsing"
    reads: ClassVar[tuple[str, ...]] = ("completions/mean_length",)
    helps: ClassVar[str] = (
        "see what the shortest answers are paid for; a reward that short answers cannot have by luck, a lower "
        "optim.lr or a KL to the initial model (algorithm.kl.coef)"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        found = _lengths(history)
        if found is not None and found[0] > self.factor * found[1] and found[0] - found[1] >= self.least:
            yield Seen(f"answers shrank from {found[0]:.0f} to {found[1]:.0f} tokens within {found[2]} steps")
