"""The model behind all routes: samples of one version, whole or as they are drawn, and changes of the version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import torch
from torch import Tensor

from groupwise.engines.native import NativeEngine
from groupwise.engines.native.engine import Drawing
from groupwise.errors import EngineError, EngineLost
from groupwise.model.loading import LoadedModel
from groupwise.types import Completion, SampleRequest

_MOST_SAMPLES = 4096


class Busy(EngineLost):
    """More samples are under way than the server takes."""


class OtherVersion(EngineError):
    """The request is for weights that the server does not hold."""


class Served:
    """One model and its native engine.

    Args:
        name: what clients call it.
        positions: most tokens of prompt and completion together; None where the model sets no bound.
        max_samples: most samples under way, those that wait included.

    Attributes:
        version: of the weights; samples under way end with the ones that they began with.
        tokens: drawn so far.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        engine: NativeEngine,
        *,
        name: str,
        positions: int | None,
        max_samples: int = _MOST_SAMPLES,
    ) -> None:
        self.loaded = loaded
        self.name = name
        self.positions = positions
        self.version = 0
        self.running = 0
        self.tokens = 0
        self._engine = engine
        self.max_samples = max_samples
        self._idle = asyncio.Event()
        self._idle.set()
        self._updating = asyncio.Lock()

    @asynccontextmanager
    async def _counted(self, request: SampleRequest) -> AsyncIterator[None]:
        if self.running >= self.max_samples:
            raise Busy(f"{self.running} samples are under way, the most that this server takes; ask again later")
        async with self._updating:  # new samples wait while weights change
            if request.policy_version != self.version:
                raise OtherVersion(f"other version: this server holds {self.version}, not {request.policy_version}")
            self.running += 1
            self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    @property
    def tells_routes(self) -> bool:
        """Whether requests may ask which experts were chosen."""
        return self._engine.tells_routes

    async def draw(self, request: SampleRequest) -> Completion:
        """One sample. A caller that is cancelled ends it.

        Raises:
            Busy, OtherVersion: it was not begun.
            EngineError: it cannot be drawn.
        """
        async with self._counted(request):
            async for completion in self._engine.generate([request]):
                self.tokens += len(completion.token_ids)
                return completion
        raise EngineError(f"nothing was drawn for {request.id}")

    async def stream(self, request: SampleRequest) -> AsyncGenerator[Drawing | Completion]:
        """What was drawn since the last look, and the whole sample at the end. Errors as of `draw`."""
        async with self._counted(request):
            async for part in self._engine.stream(request):
                if isinstance(part, Completion):
                    self.tokens += len(part.token_ids)
                yield part

    async def abort(self, request_ids: tuple[str, ...] | None = None) -> None:
        """End these samples, or all."""
        await self._engine.abort(request_ids)

    async def update(self, version: int, read: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Serve other weights, once the samples under way have ended.

        Args:
            read: gives the new tensors for those that training changes; it runs in a thread, and may refuse.

        Raises:
            DataError: `read` refused, and the old version goes on.
        """
        async with self._updating:
            wanted = self.trained()
            found = await asyncio.to_thread(read, wanted)
            await self._idle.wait()  # samples of the old version end with it
            with torch.no_grad():
                for name, tensor in found.items():
                    wanted[name].copy_(tensor)
            await self._engine.update_weights(version)
            self.version = version

    def trained(self) -> dict[str, Tensor]:
        """What training changes, by the names that a policy's source has."""
        model: Any = self.loaded.model
        trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.loaded.adapter is None:
            saved = model.state_dict().keys()
            trained |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
        return trained
