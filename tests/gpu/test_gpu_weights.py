"""Weights that another process reads out of a GPU's memory, or gets by NCCL; and their checksums, on a GPU."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.engines.vllm_worker.groupwise_vllm_worker.fold import folds
from groupwise.engines.vllm_worker.groupwise_vllm_worker.group import nccl_version
from groupwise.engines.weights import Meeting
from groupwise.weight_sync.broadcast import Groups, Parcel
from groupwise.weight_sync.memory import told_of_gpus

pytestmark = pytest.mark.gpu

WORKER = """
import json, sys, torch
from groupwise.engines.vllm_worker.groupwise_vllm_worker import GroupwiseWorker
from groupwise.engines.vllm_worker.groupwise_vllm_worker.fold import folds

class Runner:
    def reload_weights(self, weights_iterator):
        self.held = {name: tensor.clone() for name, tensor in weights_iterator}
    def get_model(self):
        return object()

worker = GroupwiseWorker()
worker.model_runner = Runner()
torch.cuda.set_device(int(sys.argv[1]))
for line in sys.stdin:
    method, named = json.loads(line)
    result = getattr(worker, method)(**named)
    held = getattr(worker.model_runner, "held", {})
    result["held"] = dict(zip(held, folds(held.values())))
    print(json.dumps(result), flush=True)
"""


class Worker:
    """vLLM's worker extension in a process of its own, without vLLM."""

    def __init__(self, device: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path.cwd(),
        )

    def call(self, method: str, **named: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, named]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def tensors() -> list[tuple[str, Tensor]]:
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    whole = drawn(96, 64).bfloat16()
    return [
        *((name, part) for name, part in zip("qkv", whole.split(32), strict=True)),
        ("turned", drawn(33, 17).T),
        ("large", drawn(3000, 2048).bfloat16()),
        ("small", drawn(5)),
    ]


def test_checksums_are_those_of_a_cpu() -> None:
    given = tensors()
    here = folds(tensor for _, tensor in given)
    assert here == folds(tensor.cpu() for _, tensor in given)
    assert len(set(here)) == len(given)


def test_another_process_reads_the_tensors_where_they_lie_and_keeps_what_it_read() -> None:
    given = tensors()
    worker = Worker(torch.cuda.current_device())
    try:
        for _ in range(2):
            memory = asdict(told_of_gpus(given))
            assert len(memory["storages"]) == 4  # three of the tensors lie in one
            expected = dict(zip((name for name, _ in given), folds(tensor for _, tensor in given), strict=True))
            result = worker.call("groupwise_map", **memory)
            assert result.get("error") is None
            assert result["held"] == expected
            for _, tensor in given:
                tensor.mul_(1.25)  # as the optimiser does; what was loaded is the worker's own
            torch.cuda.synchronize()
            assert worker.call("groupwise_hello", group="")["held"] == expected
        memory = asdict(told_of_gpus(given))
        memory["entries"][0][-1] = "0" * 16
        assert "not the one that was sent" in worker.call("groupwise_map", **memory)["error"]
    finally:
        worker.end()


def test_what_changed_after_it_was_told_is_refused() -> None:
    given = tensors()
    worker = Worker(torch.cuda.current_device())
    try:
        memory = asdict(told_of_gpus(given))
        given[4][1][17, 3] += 1
        torch.cuda.synchronize()
        result = worker.call("groupwise_map", **memory)
        assert "large has the checksum" in result["error"]
        assert not result["touched"]
        assert result["held"] == {}
    finally:
        worker.end()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a second GPU")
@pytest.mark.parametrize("bucket_bytes", [1000, 2**30])
def test_nccl_brings_them_to_another_gpu(bucket_bytes: int) -> None:
    import socket

    groups, worker = Groups(60.0), Worker(1)

    async def play(url: str) -> None:
        for number in range(3):
            given = tensors()
            for _, tensor in given:
                tensor.add_(number)
            sent = Parcel.of(given, groups, bucket_bytes)
            assert sent.backend == "nccl"
            assert worker.call("groupwise_hello", group="")["nccl"] == nccl_version()

            async def take(meeting: Meeting, turn: int, sent: Parcel = sent) -> dict[str, Any]:
                body = {"meeting": asdict(meeting), "buckets": sent.buckets, "digest": sent.digest, "turn": turn}
                return await asyncio.to_thread(worker.call, "groupwise_receive", **body)

            result = await sent.send_compared(url, take, workers=1, anew=number == 0)
            assert result.get("error") is None
            assert result["held"] == dict(
                zip((name for name, _ in given), folds(tensor for _, tensor in given), strict=True)
            )

    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            asyncio.run(play(f"http://127.0.0.1:{listening.getsockname()[1]}"))
    finally:
        groups.close()
        worker.end()
