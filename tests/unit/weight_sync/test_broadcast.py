"""Groups over real sockets: buckets arrive, faults are found, and nobody waits for one who is gone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.engines.vllm_worker.groupwise_vllm_worker import GroupwiseWorker
from groupwise.engines.vllm_worker.groupwise_vllm_worker.group import Group
from groupwise.engines.weights import Meeting
from groupwise.errors import EngineError, EngineLost
from groupwise.weight_sync.broadcast import Groups, Parcel

URL = "http://127.0.0.1:{port}"


@contextmanager
def somewhere() -> Iterator[str]:
    """An address that something listens at."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield URL.format(port=listening.getsockname()[1])


def tensors() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    named = [(f"w{number}", torch.randn(50, 3, generator=generator)) for number in range(6)]
    return [*named, ("half", torch.randn(33, generator=generator).bfloat16()), ("last", torch.randn(20, 25).T)]


class Runner:
    def __init__(self) -> None:
        self.loads: list[dict[str, Tensor]] = []

    def reload_weights(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        self.loads.append({})
        for name, tensor in weights_iterator:
            self.loads[-1][name] = tensor

    def get_model(self) -> object:
        return object()


class Worker(GroupwiseWorker):
    def __init__(self) -> None:
        self.model_runner = Runner()


def parcel(groups: Groups, bucket_bytes: int) -> Parcel:
    return Parcel.of(tensors(), groups, bucket_bytes)


Takes = Callable[[Meeting, int], Any]


def taken_by(sent: Parcel, *workers: Worker) -> Takes:
    """What vLLM's server does: every worker is called, with what has gone through JSON."""

    async def take(meeting: Meeting, turn: int) -> list[dict[str, Any]]:
        body = json.dumps({"meeting": asdict(meeting), "buckets": sent.buckets, "digest": sent.digest, "turn": turn})
        calls = [asyncio.to_thread(worker.groupwise_receive, **json.loads(body)) for worker in workers]
        return await asyncio.gather(*calls)

    return take


@pytest.mark.parametrize("bucket_bytes", [1, 1300, 10**9])
@pytest.mark.parametrize("count", [1, 2])
def test_every_worker_has_every_tensor(bucket_bytes: int, count: int) -> None:
    groups = Groups(20.0)
    workers = [Worker() for _ in range(count)]

    async def play(url: str) -> list[Parcel]:
        found = []
        for turn in range(2):  # the second time in the same group
            sent = parcel(groups, bucket_bytes)
            assert (sent.group_of(url) is None) == (turn == 0)
            results = await sent.send_compared(url, taken_by(sent, *workers), workers=count, anew=turn == 0)
            assert [result.get("error") for result in results] == [None] * count
            found.append(sent)
        return found

    with somewhere() as url:
        sent = asyncio.run(play(url))
    given = dict(tensors()[:-1])
    for worker in workers:
        assert len(worker.model_runner.loads) == 2
        for load in worker.model_runner.loads:
            assert load.keys() == {*given, "last"}
            assert all(torch.equal(load[name], tensor) for name, tensor in given.items())
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors())
    one_bucket_of_each_type = bucket_bytes == 10**9
    assert len(sent[0].buckets) == (3 if one_bucket_of_each_type else {1: 8, 1300: 5}[bucket_bytes])
    assert sent[1].sent == 2 * count * size  # to be compared, and to be loaded
    groups.close()


def test_what_fits_one_bucket_is_sent_once() -> None:
    groups, worker = Groups(20.0), Worker()
    sent = Parcel.of(tensors()[:6], groups, 10**9)
    with somewhere() as url:
        asyncio.run(sent.send_compared(url, taken_by(sent, worker), workers=1, anew=True))
    assert sent.sent == 6 * 600
    assert len(worker.model_runner.loads[0]) == 6
    groups.close()


class Flips:
    """Changes one byte of the n-th bucket that is sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        real = Group.broadcast

        def broadcast(group: Group, tensor: Tensor, *words: Any) -> None:
            if words:  # the sender's
                self.left -= 1
                if self.left == 0:
                    tensor = tensor.clone()
                    tensor[-1] ^= 1
            real(group, tensor, *words)

        monkeypatch.setattr(Group, "broadcast", broadcast)


@pytest.mark.parametrize("bucket", [1, 5])
def test_a_byte_that_changed_is_found_before_the_model_is_touched(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, workers = Groups(20.0), [Worker(), Worker()]
    Flips(monkeypatch, bucket)
    sent = parcel(groups, 1300)
    assert len(sent.buckets) == 5
    with somewhere() as url:
        results = asyncio.run(sent.send_compared(url, taken_by(sent, *workers), workers=2, anew=True))
        assert all("has the checksum" in result["error"] and not result["touched"] for result in results)
        assert [worker.model_runner.loads for worker in workers] == [[], []]
        # The group is as it was, and the right ones are taken.
        sent = parcel(groups, 1300)
        results = asyncio.run(sent.send_compared(url, taken_by(sent, *workers), workers=2, anew=False))
        assert [result.get("error") for result in results] == [None, None]
    groups.close()


def test_one_that_changed_only_the_second_time_leaves_a_torn_model_that_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups, worker = Groups(20.0), Worker()
    Flips(monkeypatch, 5 + 3)
    sent = parcel(groups, 1300)

    async def play(url: str) -> list[dict[str, Any]]:
        take = taken_by(sent, worker)
        with pytest.raises(EngineError, match="did not reach"):
            await sent.send_compared(url, take, workers=1, anew=True)
        assert sent.group_of(url) is None
        return []

    with somewhere() as url:
        asyncio.run(play(url))
    assert len(worker.model_runner.loads) == 1  # it had begun
    assert worker._groupwise_group is None


def test_a_list_that_lost_a_tensor_is_refused_and_the_sender_does_not_wait() -> None:
    groups, worker = Groups(60.0), Worker()
    sent = parcel(groups, 1300)

    async def take(meeting: Meeting, turn: int) -> None:
        result = worker.groupwise_receive(asdict(meeting), [sent.buckets[0][1:], *sent.buckets[1:]], sent.digest, turn)
        raise EngineError(result["error"])

    started = time.monotonic()
    with somewhere() as url, pytest.raises(EngineError, match="is not the one that was sent"):
        asyncio.run(sent.send_compared(url, take, workers=1, anew=True))
    assert time.monotonic() - started < 10
    assert worker.model_runner.loads == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # so the worker ends
@pytest.mark.parametrize("dies_at", ["before it came", "in the middle"])
def test_a_worker_that_is_gone_ends_the_sending(dies_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, worker = Groups(60.0), Worker()
    sent = parcel(groups, 1)
    real, received = Group.broadcast, [0]

    def broadcast(group: Group, tensor: Tensor, *words: Any) -> None:
        if not words:  # the worker's
            received[0] += 1
            if received[0] == 3:
                group.leave()
                raise SystemExit
        real(group, tensor, *words)

    monkeypatch.setattr(Group, "broadcast", broadcast)

    async def take(meeting: Meeting, turn: int) -> None:
        if dies_at == "in the middle":
            body = {"meeting": asdict(meeting), "buckets": sent.buckets, "digest": sent.digest, "turn": turn}
            thread = threading.Thread(target=lambda: worker.groupwise_receive(**body), daemon=True)
            thread.start()
            await asyncio.to_thread(thread.join)
        raise EngineLost("the server is gone")

    started = time.monotonic()
    with somewhere() as url, pytest.raises(EngineLost):
        asyncio.run(sent.send_compared(url, take, workers=1, anew=True))
    assert time.monotonic() - started < 10
    assert groups.joined == {}


def test_a_server_that_says_nothing_is_waited_for_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.weight_sync.broadcast._GRACE", 0.5)
    groups = Groups(1.0)
    sent = parcel(groups, 1)

    async def take(meeting: Meeting, turn: int) -> None:
        await asyncio.sleep(60)

    started = time.monotonic()
    with somewhere() as url, pytest.raises(EngineError, match="did not come within 1 s"):
        asyncio.run(sent.send_compared(url, take, workers=1, anew=True))
    assert 1 < time.monotonic() - started < 10


def test_a_worker_waits_for_a_trainer_so_long_and_no_longer() -> None:
    groups, worker = Groups(1.0), Worker()
    with somewhere() as url:
        meeting, store = groups.opened(url, 1, "gloo")
        sent = parcel(groups, 1)
        started = time.monotonic()
        result = worker.groupwise_receive(asdict(meeting), sent.buckets, sent.digest, 1)
    assert result["error"]
    assert not result["touched"]
    assert time.monotonic() - started < 20
    del store
