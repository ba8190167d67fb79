"""The built-in engine: continuous batching in this process, over the policy's own module and weights, nothing copied.

One step admits waiting samples (their prompts are computed once each), feeds one token of every running sample through
the model, and draws the next. The forward is the trainer's (`groupwise.model`), so the log-probs it records are the
trainer's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch

from groupwise.config import RolloutConfig
from groupwise.engines.native.ahead import Flight
from groupwise.engines.native.cache import CacheShape
from groupwise.engines.native.chosen import sides_of
from groupwise.engines.native.decode_attention_kernel import kernel_attends
from groupwise.engines.native.next_tokens import Draws
from groupwise.engines.native.scheduler import Outbox, Sample, Scheduler
from groupwise.engines.native.steps import DecodeSteps
from groupwise.engines.native.stopping import find_finish
from groupwise.engines.native.threads import SMALL_BYTES, StepThreads
from groupwise.errors import EngineError
from groupwise.model.exact.experts import experts_of
from groupwise.model.fast_cpu.linear import ordered_weights
from groupwise.model.fast_gpu.layers import fused
from groupwise.model.forward.hidden_states import depends_on_length
from groupwise.model.heads import Heads
from groupwise.model.loading import LoadedModel
from groupwise.protocols import EngineCaps
from groupwise.types import Completion, FinishReason, Likeliest, SampleRequest

CPU_CACHES = 4 * 2**30
"""Bytes of keys and values on a CPU, unless `rollout.kv_cache_gib` says."""

GPU_SHARE = 0.6
"""The same on a GPU, of what training leaves free."""

_LOOK_SECONDS = 0.02
"""How often a stream looks at what was drawn."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """Tokens `[n]` of a sample under way, and their log-probs; and the likeliest, where the request wants them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[Likeliest, ...] = ()


class NativeEngine:
    """Samples from `loaded.model` as it is at each moment; see `groupwise.protocols.Engine` for the methods' contract.

    Example:
        engine = NativeEngine(load_model(config.model), config.rollout)
        async for completion in engine.generate([SampleRequest.of(prompt, 0, SamplingParams(max_tokens=64))]):
            print(completion.text)
    """

    def __init__(self, loaded: LoadedModel, config: RolloutConfig, *, reserved_bytes: int = 0) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._version = 0
        self._worker: asyncio.Task[None] | None = None
        shape = _cache_shape(loaded)
        self._scheduler = Scheduler(
            shape,
            max_samples=config.max_concurrent_samples,
            max_bytes=_cache_bytes(config, shape.device, reserved_bytes),
        )
        self._steps = DecodeSteps(loaded, self._scheduler)
        self._draws: tuple[int, Draws] | None = None  # for the samples that run since this change
        self._flight: Flight | None = None  # a step whose tokens have not been read
        self._is_mixture = bool(experts_of(loaded.model))
        self._threads = StepThreads(torch.get_num_threads())
        small = sum(weight.nbytes for weight in loaded.model.parameters()) <= SMALL_BYTES
        self._tries_threads = small and shape.device.type == "cpu"

    @property
    def caps(self) -> EngineCaps:
        return EngineCaps(name="native", exact_logprobs=True, seeded=True)

    @property
    def tells_routes(self) -> bool:
        """Whether requests may ask which experts were chosen: of a mixture, on a CPU."""
        return self._is_mixture and self._loaded.device.type == "cpu"

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Completion]:
        outbox: Outbox = asyncio.Queue()
        for request in requests:
            self._check(request)
        samples = [Sample(request, outbox) for request in requests]
        self._begin(samples)
        arrived = 0
        try:
            while arrived < len(samples):
                completion = await outbox.get()
                if isinstance(completion, BaseException):
                    raise completion
                arrived += 1
                yield completion
        finally:
            if arrived < len(samples):
                self._scheduler.remove(samples)

    async def stream(self, request: SampleRequest) -> AsyncGenerator[Drawing | Completion]:
        """What was drawn since the last look, as it is drawn, and the whole completion at the end."""
        self._check(request)
        sample = Sample(request, asyncio.Queue())
        self._begin([sample])
        seen = 0
        try:
            while True:
                completion = None
                with suppress(TimeoutError):
                    completion = await asyncio.wait_for(sample.outbox.get(), _LOOK_SECONDS)
                if isinstance(completion, BaseException):
                    raise completion
                if completion is not None:
                    if len(completion.token_ids) > seen:
                        yield Drawing(
                            completion.token_ids[seen:], completion.logprobs[seen:], completion.likeliest[seen:]
                        )
                    yield completion
                    return
                drawn, logprobs = tuple(sample.drawn[seen:]), tuple(sample.logprobs[seen:])
                if drawn and len(drawn) == len(logprobs):
                    likeliest = tuple(sample.likeliest[seen:])
                    seen += len(drawn)
                    yield Drawing(drawn, logprobs, likeliest)
        finally:
            self._scheduler.remove([sample])

    def _begin(self, samples: list[Sample]) -> None:
        self._scheduler.waiting.extend(samples)
        if samples and (self._worker is None or self._worker.done()):
            self._worker = asyncio.get_running_loop().create_task(self._work())
            self._worker.add_done_callback(_failure_of)  # callers have it; asyncio need not warn of it

    def _check(self, request: SampleRequest) -> None:
        vocabulary = self._loaded.text_config.vocab_size
        if not len(request.prompt):
            raise EngineError(f"prompt {request.key.uid} has no tokens")
        tokens = request.prompt.token_ids + request.continues.token_ids
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise EngineError(
                f"prompt {request.key.uid} has tokens from {min(tokens)} to {max(tokens)}, but the model has "
                f"embeddings for 0 to {vocabulary - 1}; use the tokenizer that belongs to the model"
            )
        if request.sampling.max_tokens < 1:
            raise EngineError(f"max_tokens = {request.sampling.max_tokens} for {request.id}; ask for at least 1")
        if request.resumed >= request.sampling.max_tokens:
            raise EngineError(
                f"{request.id} goes on after {request.resumed} tokens of an answer of at most "
                f"{request.sampling.max_tokens}; nothing is left to draw"
            )
        if request.policy_version != self._version:
            raise EngineError(
                f"asked for policy version {request.policy_version}, but this engine holds {self._version}"
            )
        if request.wants_routes and not self.tells_routes:
            raise EngineError(f"{request.id} asks for chosen experts: this model has none, or its steps are graphs")
        self._scheduler.check(request)

    async def _work(self) -> None:
        """Step until nothing is left; other tasks (rewards) run between steps."""
        if self._threads.most != torch.get_num_threads():
            self._threads = StepThreads(torch.get_num_threads())
        while self._scheduler.busy:
            version = self._version
            with ordered_weights(self._model):  # those of one version: they must not change meanwhile
                while self._scheduler.busy and self._version == version:
                    self._step_or_fail()
                    if self._scheduler.busy:
                        await asyncio.sleep(0)

    def _step_or_fail(self) -> None:
        """One step; whatever it raises goes to every caller, and the engine is empty afterwards."""
        try:
            with torch.inference_mode():
                self._step()
        except BaseException as error:
            for sample in self._scheduler.find(None):
                sample.outbox.put_nowait(error)
            self._scheduler.clear()
            self._steps.forget()
            self._flight = None
            raise

    def _step(self) -> None:
        if not self._scheduler.running:  # caches may be made anew, and the old ones must be free then
            self._steps.forget()
            self._flight = None
        admitted = self._scheduler.admit()
        if admitted:
            self._prefill(admitted)
        if self._scheduler.running and not self._flew():
            with self._threads.step() if self._tries_threads else nullcontext():
                self._decode(self._scheduler.running)

    def _flew(self) -> bool:
        """Ask for the next step, where a GPU draws by itself, and read the one before meanwhile."""
        before, self._flight = self._flight, None
        if before is None or not before.is_last:
            self._flight = self._steps.launch(self._scheduler.running, self._scheduler.prompts, before)
        if before is not None:
            self._land(before)
        return before is not None or self._flight is not None

    def _land(self, flight: Flight) -> None:
        ended: list[tuple[Sample, FinishReason]] = []
        for sample, token, logprob in flight.read():
            if sample.over:
                continue
            sample.tokens.append(token)
            sample.logprobs.append(logprob)
            reason = find_finish(sample, self._loaded)
            if reason is not None:
                ended.append((sample, reason))
        self._release(ended)

    def _prefill(self, admitted: list[Sample]) -> None:
        """Compute what the admitted samples begin with, and draw the first token of each."""
        beginnings = self._steps.prefill(admitted, self._scheduler.running, self._scheduler.prompts)
        if beginnings.hidden is None:
            return
        logits = self._loaded.head.logits(beginnings.hidden, as_computed=fused(beginnings.hidden))
        self._release(Draws(beginnings.samples, self._loaded).next(logits[beginnings.of_sample]))

    def _decode(self, running: list[Sample]) -> None:
        """Feed every running sample's last token, and draw its next."""
        hidden = self._steps.hidden(running, self._scheduler.prompts)
        changes = self._scheduler.changes
        if self._draws is None or self._draws[0] != changes:
            self._draws = changes, Draws(running, self._loaded)
        logits = self._loaded.head.logits(hidden, as_computed=fused(hidden))
        self._release(self._draws[1].next(logits[: len(running)]))

    def _release(self, ended: list[tuple[Sample, FinishReason]]) -> None:
        for sample, reason in ended:
            completion = self._completion(sample, reason)
            self._scheduler.release(sample)
            sample.outbox.put_nowait(completion)

    def _completion(self, sample: Sample, reason: FinishReason) -> Completion:
        return Completion(
            key=sample.request.key,
            token_ids=tuple(sample.drawn),
            logprobs=tuple(sample.logprobs),
            policy_versions=(sample.request.policy_version,) * len(sample.logprobs),
            text=self._loaded.decode(sample.drawn),
            finish_reason=reason,
            likeliest=tuple(sample.likeliest),
            sides=sides_of(sample),
        )

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        aborted = self._scheduler.find(request_ids)
        self._scheduler.remove(aborted)
        for sample in aborted:
            sample.outbox.put_nowait(self._completion(sample, "abort"))

    async def update_weights(self, version: int) -> None:
        """Serve the module's weights as this version from now on; caches of older versions are dropped.

        Raises:
            EngineError: samples of the old version are still running.
        """
        if self._scheduler.busy:
            raise EngineError("weights changed while samples were running; abort them or wait first")
        self._scheduler.kept.clear()
        self._version = version

    async def close(self) -> None:
        """Release the caches, which come back with the next request."""
        if self._scheduler.busy:
            raise EngineError("an engine cannot be closed while samples are running; abort them or wait first")
        self._scheduler.drop_caches()
        self._steps.forget()
        self._steps.forget_graphs()
        self._draws = self._flight = None


def _failure_of(worker: asyncio.Task[None]) -> BaseException | None:
    return None if worker.cancelled() else worker.exception()


def _cache_shape(loaded: LoadedModel) -> CacheShape:
    heads = Heads.of(loaded.text_config)
    on_gpu = loaded.device.type == "cuda"
    by_kernel = kernel_attends(loaded)
    return CacheShape(
        loaded.text_config.num_hidden_layers,
        heads.keys,
        heads.size,
        loaded.model.dtype,
        loaded.device,
        fixed=by_kernel or on_gpu,
        graphs=on_gpu and not any(map(depends_on_length, loaded.model.modules())),  # a graph cannot ask for it
        by_kernel=by_kernel,
    )


def _cache_bytes(config: RolloutConfig, device: torch.device, reserved_bytes: int) -> int:
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * 2**30)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, and kept by torch
        return int(max(0, free - reserved_bytes) * GPU_SHARE)
    return CPU_CACHES
