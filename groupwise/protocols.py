"""The Protocols: what an engine, a policy, an environment and a checkpoint's part have to offer.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from groupwise.batches import Knobs, MiniBatch, ScoreRequest
from groupwise.inputs import SampleKey
from groupwise.types import Completion, Done, Message, Prompt, Reply, SampleRequest, Segment

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from groupwise.metrics import Metrics


@dataclass(frozen=True, slots=True)
class EngineCaps:
    """What an engine can promise. The trainer refuses a configuration that these cannot make exact.

    Attributes:
        exact_logprobs: its log-probs are those of the trainer's own forward, so no second forward is needed.
        seeded: a sample depends on weights, prompt, seed and index alone.
        logprobs: it has log-probs of the distribution that it draws from; without, the trainer's own stand for them.
        routes: it tells which experts were chosen, for samples that are learned.
        kept: it tells which tokens filters left, for samples that are learned.
        scores: it scores given tokens.
        images: it takes inputs with images.
    """

    name: str
    exact_logprobs: bool
    seeded: bool
    logprobs: bool = True
    routes: bool = False
    kept: bool = False
    scores: bool = False
    images: bool = False


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

    async def close(self) -> None:
        """Release what is held: caches, connections. A later call of `generate` takes it again."""
        ...


class Policy(Protocol):
    """The model being trained. It cuts its own batches, and is awaited: the event loop answers engines meanwhile."""

    async def learn(self, batch: MiniBatch, knobs: Knobs) -> list[Metrics]:
        """Add the gradient of the batch, in as many passes as it takes; the metrics of each."""
        ...

    async def optim_step(self) -> Metrics:
        """Clip, update, forget the gradients.

        Raises:
            TrainingError: the third gradient in a row that is not finite.
        """
        ...

    async def log_probs(
        self, requests: Sequence[ScoreRequest], *, of: str = "policy", temperature: float | None = None
    ) -> list[tuple[float, ...]]:
        """`[T]` each, at the sampling temperature or another, by the policy or by the scorer of that name.

        Raises:
            ConfigError: there is no such scorer.
        """
        ...

    async def move_reference(self, name: str, alpha: float) -> None:
        """The scorer becomes `alpha` x policy + (1 - `alpha`) x scorer."""
        ...

    def published(self, *, exact: bool = True) -> None:
        """The engines sample from these weights from now on.

        Args:
            exact: they compute what the policy does, to the last bit.
        """
        ...

    def source(self) -> Iterable[tuple[str, Tensor]]:
        """What an engine's module needs to become this policy, by name: all that training changes."""
        ...

    async def weights(self) -> list[tuple[str, Tensor]]:
        """The whole model as `export` writes it, by the names there. Most are the policy's own memory, which the next
        `optim_step` changes."""
        ...

    async def export(self, folder: Path, *, merged: bool = False) -> None:
        """Write a Hugging Face folder, whole or not at all.

        Args:
            merged: an adapter as a whole model, with its base.
        """
        ...

    async def close(self) -> None:
        """Leave the model as a model, which may be trained by another policy."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class WeightSync(Protocol):
    """A policy version into an engine: pause, transfer, verify, resume are its own."""

    async def publish(self, version: int) -> None:
        """The policy as it is now is `version`, and what the engine serves from now on.

        Raises:
            EngineError: samples of the old version are still running, or the engine did not take it.
        """
        ...

    async def rest(self) -> None:
        """Nothing is sampled until the next `publish`."""
        ...

    async def wait(self) -> None:
        """Until the last `publish` has read all that it reads: then weights may change."""
        ...

    def metrics(self) -> Metrics:
        """Of the version that is served."""
        ...

    async def close(self) -> None: ...


class Environment(Protocol):
    """What answers the turns of one sample; there is one object for each. Methods may also be plain functions, which
    then run in a thread.

    Its answers should be a function of prompt, key and turns: then a resumed run is the run that was never stopped.

    Attributes:
        stop: strings that end a turn, beside `rollout.stop`; may be left out.
    """

    async def begin(self, prompt: Prompt, key: SampleKey) -> Sequence[Message] | None:
        """Called first. Messages are put after the prompt's own; None leaves it as it is."""
        ...

    async def answer(self, turn: Segment) -> Reply | Done:
        """Answer what the model just wrote."""
        ...

    async def close(self) -> None:
        """Called last, also after a failure."""
        ...


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

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: Sequence[Message], **kwargs: Any) -> Any: ...

    def save_pretrained(self, save_directory: Any) -> Any: ...
