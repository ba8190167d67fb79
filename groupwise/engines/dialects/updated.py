"""What vLLM and SGLang have in common: they take weights, or adapters of a base, while they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from groupwise.engines.connection import Connection, NoKey, Refused
from groupwise.engines.dialects.base import CONTROL_SECONDS, TELLS_NOTHING, Facts, Tells, new_name
from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.errors import EngineError
from groupwise.protocols import EngineCaps
from groupwise.types import SampleRequest, SamplingParams


class Updated(ABC):
    """Over HTTP; nothing of the engine is imported.

    Args:
        kind: what it is given: a whole model, or an adapter of a base that it serves.
        stop_token_ids: the model's own.
        load_seconds: longest wait for weights to be loaded.
        tells: what is learned from beside tokens.

    Attributes:
        engine: its name in a config.
        unload: the route that lets an adapter go.
        sleeper: the flag without which it does not sleep.
    """

    engine = ""
    unload = ""
    sleeper = ""
    restarts = False
    stops = True

    def __init__(
        self,
        *,
        kind: Literal["model", "adapter"],
        stop_token_ids: Sequence[int],
        load_seconds: float = 600.0,
        tells: Tells = TELLS_NOTHING,
    ) -> None:
        self.caps = EngineCaps(
            name=self.engine,
            exact_logprobs=False,
            seeded=True,
            routes=tells.routes,
            kept=tells.kept,
            scores=True,
        )
        self._tells = tells
        self.takes: Sequence[WeightKind] = (kind,)
        self._adapts = kind == "adapter"
        self._stops = tuple(stop_token_ids)
        self._load_seconds = load_seconds

    def name(self, request: SampleRequest) -> str:
        """See `Dialect.name`."""
        return new_name()

    def _ends(self, sampling: SamplingParams) -> dict[str, Any]:
        """What ends an answer before its last token."""
        return {"stop": list(sampling.stop), "stop_token_ids": sorted({*self._stops, *sampling.stop_token_ids})}

    async def load(self, server: Connection, ref: WeightRef, facts: Facts) -> None:
        """See `Dialect.load`."""
        if ref.kind != "adapter":
            await self._load_model(server, ref)
            return
        await self._load_adapter(server, ref, {"lora_name": adapter_name(ref.version), "lora_path": str(ref.folder)})
        if old := old_adapter(ref.version):
            with suppress(Refused):  # it was unloaded before, or never there
                await self._control(server, self.unload, {"lora_name": old})

    @abstractmethod
    async def _load_model(self, server: Connection, ref: WeightRef) -> None:
        """Stop what is drawn, take the whole model, forget what was computed with others, go on."""

    @abstractmethod
    async def _load_adapter(self, server: Connection, ref: WeightRef, named: Mapping[str, str]) -> None:
        """Take it beside the others, under the name that `named` has."""

    async def sleep(self, server: Connection) -> None:
        """It has to be started with `sleeper`."""
        try:
            await self._fall_asleep(server)
        except NoKey:
            raise
        except Refused as refused:
            raise EngineError(
                f"{server.url} does not sleep: {refused.said}; start it with {self.sleeper}, or leave "
                "rollout.engine_sleeps out"
            ) from refused

    @abstractmethod
    async def _fall_asleep(self, server: Connection) -> None: ...

    async def _control(
        self,
        server: Connection,
        route: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
    ) -> Any:
        return await server.post(route, body, seconds=CONTROL_SECONDS, query=query)


def adapter_name(version: int) -> str:
    """New for each version, so that none is ever taken for another."""
    return f"policy-{version:06d}"


def old_adapter(version: int) -> str | None:
    """The one that need not be there any more, once `version` is: the one before that stays until it is proven."""
    return adapter_name(version - 2) if version >= 2 else None
