"""The nouns: Prompt, Completion, Rollout, RolloutGroup, TrainingBatch; and the Protocols Engine, Policy, Stateful.

Shapes are in brackets: `[P]` prompt tokens, `[T]` completion tokens, `[G]` rollouts of one group.
Nothing here imports torch, so data and rewards stay light.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from groupwise.inputs import ModelInput, SampleKey

if TYPE_CHECKING:
    from groupwise.metrics import Metrics

Message: TypeAlias = Mapping[str, Any]
"""One chat message: `{"role": "user", "content": "…"}`."""

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
RolloutStatus: TypeAlias = Literal["ok", "failed"]


@dataclass(frozen=True)
class Prompt:
    """One row of the data, rendered and tokenized.

    Attributes:
        uid: stable name of the row: a function of its content and position, never of the order of reading.
        messages: the conversation that the completion continues; empty when the data gave plain text.
        text: the rendered prompt, as the model sees it.
        token_ids: `[P]`, the rendered prompt's tokens.
        data_source: routes the row to its rewards.
        columns: every column of the row under its own name (`answer`, `reward_model`, …), given to rewards as they are.

    Example:
        Prompt(uid="train-000017-3fa9", messages=({"role": "user", "content": "2+2?"},), text="<user>2+2?<assistant>",
               token_ids=(5, 17, 9), data_source="openai/gsm8k", columns={"answer": "4"})
    """

    uid: str
    messages: tuple[Message, ...]
    text: str
    token_ids: tuple[int, ...]
    data_source: str = "default"
    columns: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def input(self) -> ModelInput:
        """What the model is given; one object for all of the prompt's samples, so that its digest is made once."""
        return ModelInput.of(self.token_ids)


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

    Example:
        SampleRequest(SampleKey("train-000017-3fa9", 0, 5), prompt.input, SamplingParams(max_tokens=64))
    """

    key: SampleKey
    prompt: ModelInput
    sampling: SamplingParams
    continues: ModelInput = field(default_factory=ModelInput)
    resumed: int = 0
    policy_version: int = 0

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
    """

    key: SampleKey
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    error: str = ""

    @property
    def request_id(self) -> str:
        return str(self.key)

    @property
    def sample_index(self) -> int:
        return self.key.sample_index


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer with its reward. A bad one is data: `status="failed"` and a `cause`, never an exception.

    Attributes:
        token_ids, loss_mask, logprobs, policy_versions: each `[T]`; `loss_mask` is 1 where the model wrote the token.
        rewards: each reward function's raw value by name; None where the function does not apply.
        reward: the weighted sum, or None when no function gave a value.
        cause: why it failed; with the status `ok`, why each of its rewards is the 0 of `on_error = "zero"`.
        old_logprobs, ref_logprobs: `[T]`, by the policy before the step's first update, and by the reference; None
            where the algorithm does not ask for them.

    Example:
        Rollout(sample_index=0, token_ids=(7, 2), loss_mask=(1, 1), logprobs=(-0.1, -0.3), policy_versions=(4, 4),
                text="4", finish_reason="stop", rewards={"gsm8k": 1.0}, reward=1.0)
    """

    sample_index: int
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    status: RolloutStatus = "ok"
    cause: str = ""
    old_logprobs: tuple[float, ...] | None = None
    ref_logprobs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        computed = [values for values in (self.old_logprobs, self.ref_logprobs) if values is not None]
        arrays = (self.token_ids, self.loss_mask, self.logprobs, self.policy_versions, *computed)
        lengths = {len(values) for values in arrays}
        assert len(lengths) == 1, f"per-token arrays of one rollout differ in length: {sorted(lengths)}"


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
class TrainingRow:
    """One sequence as the trainer sees it; all per-token arrays are `[T]`, checked here.

    Attributes:
        prompt_ids: `[P]`; rows of one micro-batch with the same `group` have the same prompt, computed once.
        token_ids: `[T]`, what follows the prompt.
        loss_mask: `[T]`, 1 where the loss counts.
        advantages: `[T]`.
        logprobs: `[T]`, the sampler's log-probs; zeros in supervised training.
        old_logprobs: `[T]`, by the policy before the step's first update; None: the sampler's are these.
        ref_logprobs: `[T]`, by the reference; None: the policy asks it when it needs them.
    """

    group: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    advantages: tuple[float, ...]
    logprobs: tuple[float, ...]
    old_logprobs: tuple[float, ...] | None = None
    ref_logprobs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        computed = [values for values in (self.old_logprobs, self.ref_logprobs) if values is not None]
        arrays = (self.token_ids, self.loss_mask, self.advantages, self.logprobs, *computed)
        lengths = {len(values) for values in arrays}
        assert len(lengths) == 1, f"per-token arrays of one row differ in length: {sorted(lengths)}"
        assert self.prompt_ids and self.token_ids, "a training row needs at least one prompt and one completion token"

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Denominators:
    """What sums are divided by, counted over the whole optimiser batch, so that no split of it changes the gradient.

    Attributes:
        tokens: tokens with `loss_mask = 1`.
        sequences: rows with at least one such token.
        max_tokens: the completion cap, the constant of Dr. GRPO's normaliser.
        expert_counts: `[layers][experts]`, how often the loss tokens chose each expert of a mixture; for a balance loss
            alone, whose policy counts them where they are None.
    """

    tokens: float
    sequences: float
    max_tokens: float
    expert_counts: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model in one pass.

    Attributes:
        backward: False for rows whose gradient is known to be zero: they are only measured.
    """

    rows: tuple[TrainingRow, ...]
    backward: bool = True


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """Rows of one optimiser step: its micro-batches and the denominators counted over all of them."""

    microbatches: tuple[MicroBatch, ...]
    denominators: Denominators


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Groups packed for the trainer: `steps_per_batch` mini-batches, each one optimiser step, and again in each further
    pass.

    Attributes:
        groups: the groups it was built from, in index order.
        advantages: `[groups][G]`, one number per rollout, for trajectories.
        dropped: groups that were sampled for it and teach nothing: measured and recorded, not learned.
    """

    groups: tuple[RolloutGroup, ...]
    advantages: tuple[tuple[float, ...], ...]
    minibatches: tuple[MiniBatch, ...]
    metrics: Metrics
    dropped: tuple[RolloutGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineCaps:
    """What an engine can promise. The trainer refuses a configuration that these cannot make exact.

    Attributes:
        exact_logprobs: its log-probs are those of the trainer's own forward, so no second forward is needed.
        seeded: a sample depends on weights, prompt, seed and index alone.
    """

    name: str
    exact_logprobs: bool
    seeded: bool


class Engine(Protocol):
    """Turns prompts into completions; knows nothing of rewards or training."""

    @property
    def caps(self) -> EngineCaps: ...

    def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Completion]:
        """Yield one completion per request, as each finishes. Concurrent calls share the engine."""
        ...

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (or all) now; each yields what it has with finish reason `abort`."""
        ...

    async def update_weights(self, version: int) -> None:
        """Serve this version of the policy from now on; caches of older versions are dropped."""
        ...

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[float]:
        """Log-probs `[T]` of the completion's tokens after the prompt, at temperature 1."""
        ...

    async def sleep(self) -> None:
        """Release the memory of the caches."""
        ...

    async def wake(self) -> None: ...

    async def health(self) -> bool: ...


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state belongs in a checkpoint: JSON values and tensors, nested in dicts and lists."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that Groupwise calls."""

    eos_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(self, conversation: Sequence[Message], **kwargs: Any) -> Any: ...

    def save_pretrained(self, save_directory: Any) -> Any: ...
