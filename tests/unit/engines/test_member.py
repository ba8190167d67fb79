"""A server that is torn, lost and mended while samples are under way: what is given out was drawn by proven weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.engines.dialects.base import Call, Drawn, Facts
from groupwise.engines.member import Member, NotProven
from groupwise.engines.weights import WeightRef
from groupwise.errors import EngineError, EngineLost
from groupwise.inputs import ModelInput
from groupwise.types import Prompt, SampleRequest, SamplingParams

REF = WeightRef(1, Path("weights"), "model", 10)


class Server:
    """A dialect and its connection in one: it draws the number of loads that it has had.

    Attributes:
        answers: by request, what it waits for before it answers. lost: raises while it is set.
    """

    url = "http://server"
    takes = ("model",)
    restarts = False

    def __init__(self) -> None:
        self.loads = self.asked = 0
        self.lost = False
        self.loading: Callable[[int], Any] | None = None
        self.answers: dict[str, asyncio.Event] = {}

    async def post(self, route: str, body: Any) -> Any:
        self.asked += 1
        loads = self.loads
        if (event := self.answers.get(body["id"])) is not None:
            await event.wait()
        if self.lost:
            raise EngineLost("gone")
        return loads

    async def close(self) -> None: ...

    async def reach(self, server: Any) -> Facts:
        return Facts("model")

    async def probe(self, server: Any) -> None:
        if self.lost:
            raise EngineLost("gone")

    def name(self, request: SampleRequest) -> str:
        return request.id

    def sample(self, request: SampleRequest, *, name: str, facts: Facts) -> Call:
        return Call("sample", {"id": name})

    def drawn(self, answer: int) -> Drawn:
        return Drawn((answer,), (0.0,), "stop", ("1",))

    async def load(self, server: Any, ref: WeightRef, facts: Facts) -> None:
        if self.loading is not None:
            await self.loading(self.loads + 1)
        self.loads += 1


def request(name: str) -> SampleRequest:
    prompt = Prompt(uid=name, messages=(), text="", input=ModelInput.of((1,)))
    return SampleRequest.of(prompt, 0, SamplingParams(max_tokens=1), 1)


def member(server: Server, patience: float = 5.0) -> Member:
    return Member(server, server, patience=patience)  # type: ignore[arg-type]


def test_a_sample_of_torn_weights_that_arrives_while_they_are_loaded_again_is_drawn_again() -> None:
    async def run() -> tuple[Drawn, Drawn, int]:
        server = Server()
        again, loaded = asyncio.Event(), asyncio.Event()

        async def loading(number: int) -> None:
            if number == 2:
                again.set()
                await loaded.wait()

        async def prove(asked: Any, ref: WeightRef) -> None:
            if server.loads < 2:
                raise NotProven("torn")

        server.loading = loading
        one = member(server)
        await one.serve(REF, prove)
        late = request("late")
        server.answers[late.id] = asyncio.Event()
        second = asyncio.create_task(one.sample(late))
        first = asyncio.create_task(one.sample(request("first")))
        await again.wait()  # the first has found the broken proof, and mends
        server.answers.pop(late.id).set()  # drawn by the torn weights, and arrives now
        await asyncio.sleep(0.01)
        assert not second.done()
        loaded.set()
        found = await asyncio.gather(first, second)
        return *found, server.asked

    first, second, asked = asyncio.run(run())
    assert (first.token_ids, second.token_ids) == ((2,), (2,))
    assert asked == 4


def test_a_proof_that_fails_twice_ends_every_sample() -> None:
    async def run() -> list[BaseException | Drawn]:
        server = Server()

        async def prove(asked: Any, ref: WeightRef) -> None:
            raise NotProven("torn")

        one = member(server)
        await one.serve(REF, prove)
        return await asyncio.gather(*(one.sample(request(str(i))) for i in range(3)), return_exceptions=True)

    assert [type(found) for found in asyncio.run(run())] == [EngineError] * 3


def test_patience_begins_when_a_server_is_lost_and_not_with_the_request() -> None:
    async def run() -> Drawn:
        server = Server()
        one = member(server, patience=0.5)

        async def prove(asked: Any, ref: WeightRef) -> None: ...

        await one.serve(REF, prove)
        long = request("long")
        server.answers[long.id] = asyncio.Event()
        sample = asyncio.create_task(one.sample(long))
        await asyncio.sleep(0.8)  # a long answer, and then its server is gone
        server.lost = True
        server.answers.pop(long.id).set()
        await asyncio.sleep(0.1)
        server.lost = False
        return await sample

    assert asyncio.run(run()).token_ids == (2,)


def test_a_server_that_does_not_come_back_is_waited_for_so_long_and_no_longer() -> None:
    async def run() -> float:
        server = Server()
        one = member(server, patience=0.3)

        async def prove(asked: Any, ref: WeightRef) -> None: ...

        await one.serve(REF, prove)
        server.lost = True
        begun = time.monotonic()
        with pytest.raises(EngineLost):
            await one.sample(request("a"))
        return time.monotonic() - begun

    assert 0.3 <= asyncio.run(run()) < 3.0


def test_a_server_that_is_lost_while_it_is_mended_is_brought_back_again() -> None:
    async def run() -> Drawn:
        server = Server()
        tries: list[int] = []

        async def loading(number: int) -> None:
            tries.append(number)
            if len(tries) in (2, 3):
                raise EngineLost("gone while it loads")

        async def prove(asked: Any, ref: WeightRef) -> None: ...

        server.loading = loading
        one = member(server)
        await one.serve(REF, prove)
        server.lost = True
        sample = asyncio.create_task(one.sample(request("a")))
        await asyncio.sleep(0.05)
        server.lost = False
        found = await sample
        assert len(tries) == 4
        return found

    assert asyncio.run(run()).token_ids == (2,)
