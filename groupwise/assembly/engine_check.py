"""`groupwise engine check`: whether an engine keeps what a run relies on, shown on a model of the user's."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from groupwise.batches import ScoreRequest, TrainingRow
from groupwise.config import Config
from groupwise.engines.commands import Start, command_of
from groupwise.engines.http import HttpEngine
from groupwise.engines.member import NotProven
from groupwise.engines.tellings import has_gpu, why_no_routes
from groupwise.errors import ConfigError, EngineError, GroupwiseError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.model.exact.experts import experts_of
from groupwise.model.forward.packing import Packed, pack
from groupwise.model.loading import LoadedModel, load_model, resolve_device, resolve_dtype, with_adapter
from groupwise.model.outline import model_without_weights
from groupwise.model.saved_weights import saved_weights
from groupwise.placement.elsewhere import engine_elsewhere, sync_tolerance
from groupwise.policy.adapter_reference import adapter_off
from groupwise.policy.saving import write_model
from groupwise.protocols import Policy
from groupwise.tensors import floats
from groupwise.types import BASE, Completion, SampleRequest, SamplingParams
from groupwise.weight_sync.canary import Canary
from groupwise.weight_sync.publishing import EngineSync
from groupwise.weight_sync.ways import way_of

_PROMPTS = 4
_PROMPT_TOKENS = 24
_DRAWN = 32
_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class Checked:
    """One line of the table.

    Attributes:
        seen: numbers, or what went wrong.
    """

    name: str
    passed: bool
    seen: str
    seconds: float


class _Weights:
    """What is published: the model in memory, as a policy that does not learn."""

    def __init__(self, loaded: LoadedModel, *, chunk_tokens: int) -> None:
        self._loaded = loaded
        self._trained = [(name, weight) for name, weight in loaded.model.named_parameters() if weight.requires_grad]
        self._chunk_tokens = chunk_tokens

    async def log_probs(
        self, requests: Sequence[ScoreRequest], *, of: str = "policy", temperature: float | None = None
    ) -> list[tuple[float, ...]]:
        rows = [
            TrainingRow(
                prompt=request.prompt,
                follows=request.follows,
                logprobs=(0.0,) * len(request.follows),
                advantages=(0.0,) * len(request.follows),
                loss_mask=(1,) * len(request.follows),
                group=number,
                sides=request.sides,
            )
            for number, request in enumerate(requests)
        ]
        packs = [pack([row]).to(self._loaded.device) for row in rows]
        with adapter_off(self._loaded) if of == BASE else nullcontext():
            at = 1.0 if temperature is None else temperature
            found = [self._logprobs(packed, at, as_sampled=of != BASE) for packed in packs]
        return [tuple(floats(values)) for values in found]

    @torch.no_grad()
    def _logprobs(self, packed: Packed, temperature: float, *, as_sampled: bool) -> Tensor:
        chunk = self._chunk_tokens
        return self._loaded.scoring(packed, temperature=temperature, chunk_tokens=chunk, as_sampled=as_sampled).logprobs

    def published(self, *, exact: bool = True) -> None: ...

    def source(self) -> Iterable[tuple[str, Tensor]]:
        return self._trained

    async def weights(self) -> list[tuple[str, Tensor]]:
        return saved_weights(self._loaded.model)

    async def export(self, folder: Path, *, merged: bool = False) -> None:
        await asyncio.to_thread(write_model, self._loaded, folder, merged=merged)

    @torch.no_grad()
    def move(self, seed: int) -> None:
        """Other weights, as after a large step."""
        generator = torch.Generator().manual_seed(seed)
        for _, weight in self._trained:
            spread = float(weight.float().std()) if weight.numel() > 1 else 0.0
            scale = 0.02 * (spread or 1.0)
            noise = torch.randn(weight.shape, generator=generator) * scale
            weight.add_(noise.to(weight.device, weight.dtype))

    @contextmanager
    def one_changed(self) -> Iterator[str]:
        """Inside, one tensor of the model in memory is another than it was."""
        name, weight = max(self._trained, key=lambda each: each[1].numel())
        held = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
        try:
            yield name
        finally:
            with torch.no_grad():
                weight.copy_(held)


@dataclass(slots=True)
class EngineCheck:
    """Runs every check of the contract against an engine, and goes on after one that fails.

    Args:
        engine: not served any weights yet.
        tolerance: nats, as for a run.
        tell: gets each line as it is there.

    Example:
        table = await EngineCheck(config, loaded, engine, tolerance=1e-4, tell=print).run()
    """

    config: Config
    loaded: LoadedModel
    engine: HttpEngine
    tolerance: float
    tell: Callable[[Checked], None]
    found: list[Checked] = field(default_factory=list[Checked])

    async def run(self) -> list[Checked]:
        """The whole table; the engine is closed at its end."""
        with tempfile.TemporaryDirectory(prefix="groupwise-engine-", dir=self.config.rollout.weights_dir) as folder:
            weights = _Weights(self.loaded, chunk_tokens=self.config.train.logprob_chunk_tokens)
            policy = cast(Policy, weights)
            canary = Canary(
                policy,
                [prompt.token_ids for prompt in self._prompts()[:2]],
                tolerance=self.tolerance,
                vocabulary=self.engine.vocabulary,
            )
            rollout, adapter = self.config.rollout, self.loaded.adapter is not None
            way = way_of(rollout, policy, self.engine, Path(folder), adapter=adapter, leaves_none=False)
            sync = EngineSync(policy, self.engine, way, canary=canary)
            try:
                if await self._check("weights arrive", partial(self._arrive, sync, canary, 1)):
                    await self._samples(weights, sync, canary)
            finally:
                await sync.close()
        return self.found

    async def _samples(self, weights: _Weights, sync: EngineSync, canary: Canary) -> None:
        await self._check("log-probs are the trainer's", partial(self._parity, weights, 1))
        await self._check("seeds decide the tokens", self._seeds)
        await self._check("budget is kept", self._budget)
        await self._check("a stop token ends, and stays", self._stop_token)
        await self._check("an aborted sample ends", self._abort)
        weights.move(1)
        await self._check("an update arrives", partial(self._arrive, sync, canary, 2))
        await self._check("log-probs follow it", partial(self._parity, weights, 2))
        await self._check("other weights are noticed", partial(self._sabotage, weights, sync, canary))
        await self._check("the right ones are taken again", partial(self._arrive, sync, canary, 4))

    async def _check(self, name: str, run: Callable[[], Awaitable[str]]) -> bool:
        started = time.perf_counter()
        try:
            seen, passed = await run(), True
        except (GroupwiseError, AssertionError) as error:
            seen, passed = str(error), False
        self.found.append(Checked(name, passed, seen, time.perf_counter() - started))
        self.tell(self.found[-1])
        return passed

    async def _arrive(self, sync: EngineSync, canary: Canary, version: int) -> str:
        await sync.publish(version)
        await sync.wait()
        return f"version {version} in {sync.seconds:.2f} s, proof {canary.seconds:.2f} s, |Δ| ≤ {canary.difference:.2g}"

    def _prompts(self) -> list[ModelInput]:
        """Tokens of the vocabulary, spread over it: enough to compute with."""
        size = self.loaded.model.config.get_text_config().vocab_size
        stops = set(self.loaded.stop_token_ids)
        usable = [token for token in range(size) if token not in stops]
        return [
            ModelInput.of([usable[(7 + 31 * i * (number + 2)) % len(usable)] for i in range(_PROMPT_TOKENS)])
            for number in range(_PROMPTS)
        ]

    def _requests(self, count: int, *, version: int, **sampling: Any) -> list[SampleRequest]:
        prompts = self._prompts()
        params = SamplingParams(max_tokens=_DRAWN, seed=self.config.train.seed)
        caps, rollout = self.engine.caps, self.config.rollout
        if caps.kept:
            params = replace(params, top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p)
        return [
            SampleRequest(
                SampleKey(f"check-{number % len(prompts)}", 0, number),
                prompts[number % len(prompts)],
                replace(params, **sampling),
                policy_version=version,
                wants_routes=caps.routes,
                wants_kept=caps.kept,
            )
            for number in range(count)
        ]

    async def _drawn(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        found = {completion.key: completion async for completion in self.engine.generate(requests)}
        return [found[request.key] for request in requests]

    async def _parity(self, weights: _Weights, version: int) -> str:
        requests = self._requests(_TOGETHER, version=version)
        drawn = await self._drawn(requests)
        pairs = [(request, one) for request, one in zip(requests, drawn, strict=True) if one.token_ids]
        if failed := next((one.error for one in drawn if one.error), ""):
            raise EngineError(failed)
        asked = [ScoreRequest(request.prompt, ModelInput.of(one.token_ids), sides=one.sides) for request, one in pairs]
        expected = await weights.log_probs(asked)
        if not self.engine.caps.logprobs:
            return f"{len(pairs)} samples; it has none, so the trainer's stand for them"
        gaps = [
            abs(a - b)
            for (_, one), own in zip(pairs, expected, strict=True)
            for a, b in zip(one.logprobs, own, strict=True)
        ]
        assert max(gaps) <= self.tolerance, f"|Δ| ≤ {max(gaps):.3g} of {len(gaps)}; {self.tolerance:g} is allowed"
        return f"|Δ| mean {sum(gaps) / len(gaps):.2g}, max {max(gaps):.2g} over {len(gaps)} tokens"

    async def _seeds(self) -> str:
        requests = self._requests(_TOGETHER, version=1)
        together = await self._drawn(requests)
        alone = [(await self._drawn([request]))[0] for request in requests[:4]]
        for one, other in zip(alone, together, strict=False):
            assert one.token_ids == other.token_ids, f"{one.request_id} is another alone than among {_TOGETHER}"
        groups = {one.key.uid: set[tuple[int, ...]]() for one in together}
        for one in together:
            groups[one.key.uid].add(one.token_ids)
        assert all(len(group) > 1 for group in groups.values()), "samples of one prompt are all the same"
        return f"4 alone as among {_TOGETHER}; samples of a group differ"

    async def _budget(self) -> str:
        drawn = await self._drawn(self._requests(8, version=1, max_tokens=5))
        assert all(len(one.token_ids) <= 5 for one in drawn), "more tokens than were asked for"
        return f"{sum(one.finish_reason == 'length' for one in drawn)} of 8 cut at 5 tokens"

    async def _stop_token(self) -> str:
        [free] = await self._drawn(self._requests(1, version=1))
        assert len(free.token_ids) > 2, "the sample ended by itself; the model says too little to check this"
        stop = free.token_ids[2]
        [ended] = await self._drawn(self._requests(1, version=1, stop_token_ids=(stop,)))
        first = free.token_ids.index(stop) + 1
        assert ended.token_ids == free.token_ids[:first], f"got {ended.token_ids}; expected {free.token_ids[:first]}"
        assert ended.finish_reason == "stop", f"it ended with {ended.finish_reason!r}"
        return f"token {stop} ends the sample, with its log-prob"

    async def _abort(self) -> str:
        limit = self.config.rollout.max_completion_tokens
        requests = self._requests(2, version=1, max_tokens=limit)
        running = asyncio.ensure_future(self._drawn(requests))
        started = time.perf_counter()
        for wait in (0.05, 0.2, 0.5):  # it takes effect once the engine has them
            await asyncio.sleep(wait)
            await self.engine.abort()
        drawn = await asyncio.wait_for(running, 60)
        reasons = sorted({one.finish_reason for one in drawn})
        assert reasons != ["length"], f"{limit} tokens were drawn all the same"
        return f"{', '.join(reasons)} after {time.perf_counter() - started:.2f} s"

    async def _sabotage(self, weights: _Weights, sync: EngineSync, canary: Canary) -> str:
        """The engine gets weights of which one tensor is not the trainer's."""
        self.engine.prover = None
        try:
            await sync.publish(3)
        finally:
            self.engine.prover = canary.prove
        with weights.one_changed() as name:
            try:
                await self.engine.prove(canary.prove)
            except NotProven as error:
                return f"{name} x 1.5: {str(error).split(':', 1)[-1].split(';')[0].strip()}"
        raise EngineError(f"{name} was another than the trainer's, and nothing noticed it")


def check_of(config: Config, *, tell: Callable[[Checked], None]) -> EngineCheck:
    """The check of the engine that `config` names, with its model, which is loaded here.

    Raises:
        ConfigError: the model or the engine cannot be had.
    """
    loaded = with_adapter(load_model(config.model), config.lora, seed=config.train.seed)
    length = _PROMPT_TOKENS + max(_DRAWN, config.rollout.max_completion_tokens)
    logs = Path(tempfile.mkdtemp(prefix="groupwise-engine-check-"))  # stays: an engine that failed is read there
    engine = engine_elsewhere(config, loaded, length=length, logs=logs)
    tolerance = sync_tolerance(config.rollout, loaded, exact=engine.caps.exact_logprobs)
    return EngineCheck(config, loaded, engine, tolerance=tolerance, tell=tell)


def shell_command(config: Config) -> str:
    """How the engine is started by hand, so that a run finds it at `rollout.urls`."""
    model = config.model.path
    start = Start(
        python=config.rollout.launch.python or "python",
        model=model,
        port=config.rollout.launch.port or 8000,
        length=config.rollout.launch.max_model_len or config.rollout.max_completion_tokens + 1024,
        dtype=str(resolve_dtype(config.model.dtype, resolve_device(config.model.device))).removeprefix("torch."),
        seed=config.train.seed,
        rollout=config.rollout,
        lora_rank=config.lora.rank,
        on_gpu=has_gpu(),
        routes=_tells_routes(config),
    )
    return command_of(config.rollout.engine, start).shell()


def _tells_routes(config: Config) -> bool:
    """Whether the model is a mixture whose routes are replayed."""
    rollout = config.rollout
    if rollout.replay_routes is not True and (rollout.replay_routes is False or why_no_routes(rollout)):
        return False
    try:
        return bool(experts_of(model_without_weights(config.model, config.lora)))
    except ConfigError:  # its files are not here, where the command is only printed
        return rollout.replay_routes is True
