"""Passes side by side: in order, with all errors, on shares of the threads, and with the numbers of passes in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupwise.algorithms import build_algorithm
from groupwise.batches import Denominators, TrainingRow
from groupwise.config import AlgorithmConfig, LoraConfig, OptimConfig, TrainConfig
from groupwise.inputs import ModelInput
from groupwise.metrics import resolve
from groupwise.model.loading import LoadedModel, with_adapter
from groupwise.policy import Learner, streams
from groupwise.policy.microbatches import MicroBatch
from groupwise.policy.streams import Streams

Threads = Callable[[int], None]


def row(group: int, length: int, advantage: float = 1.0) -> TrainingRow:
    tokens = tuple((7 * group + 3 * i + length) % 60 + 3 for i in range(length))
    return TrainingRow(
        group,
        ModelInput.of((10, 11, 12 + group)),
        ModelInput.of(tokens),
        (1,) * length,
        (advantage,) * length,
        (-4.0,) * length,
    )


def test_results_come_in_order_whatever_ends_first(threads: Threads) -> None:
    threads(2)

    def slow(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    waits = [0.2, 0.0, 0.1, 0.0, 0.0, 0.05, 0.0]
    assert list(Streams(nn.Linear(2, 2)).map(slow, waits)) == waits


def test_streams_share_the_threads_and_leave_their_number_as_it_was(threads: Threads) -> None:
    threads(5)
    together = threading.Barrier(2, timeout=20)

    def count(_: int) -> int:
        together.wait()  # both streams are at work at one time
        return torch.get_num_threads()

    assert list(Streams(nn.Linear(2, 2)).map(count, range(4))) == [2] * 4
    assert torch.get_num_threads() == 5
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [5]


def test_an_error_ends_the_passes_that_have_not_begun(threads: Threads) -> None:
    threads(2)
    begun: list[int] = []

    def fail(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("pass 1")
        time.sleep(0.05)
        return number

    with pytest.raises(ValueError, match="pass 1"):
        list(Streams(nn.Linear(2, 2)).map(fail, range(100)))
    assert max(begun) < 10
    assert torch.get_num_threads() == 2


def test_some_models_take_one_pass_at_a_time(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    threads(2)
    angles = nn.Linear(2, 2)
    for kind, count in (("default", 2), ("dynamic", 1), ("longrope", 1), ({"full_attention": "dynamic"}, 1)):
        angles.rope_type = kind  # type: ignore[assignment]
        assert Streams(nn.Sequential(angles)).count == count
    assert Streams(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))).count == 1
    assert Streams(nn.Linear(2, 2, device="meta")).count == 1
    monkeypatch.setattr(streams, "_SMALL_BYTES", 20)
    assert Streams(nn.Linear(2, 2)).count == 1
    assert Streams(nn.Linear(2, 1)).count == 2
    threads(1)
    assert Streams(nn.Linear(2, 1)).count == 1


BATCHES = (
    MicroBatch((row(0, 7), row(1, 5, -1.0))),
    MicroBatch((row(2, 9), row(2, 3, -1.0))),
    MicroBatch((row(3, 1), row(4, 12, -0.5))),
    MicroBatch((row(5, 4, 0.0),), backward=False),
    MicroBatch((row(6, 6, 0.0),), backward=False),
)
COUNTS = Denominators(47.0, 8.0, 16.0)


def learned(loaded: LoadedModel, **settings: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics and gradients of `BATCHES`."""
    algorithm = build_algorithm(AlgorithmConfig.model_validate({"kl": {"coef": 0.1}, "entropy": {"coef": 0.01}}))
    train = TrainConfig.model_validate({"logprob_chunk_tokens": 16, "seed": 7})
    policy = Learner(loaded, algorithm, optim=OptimConfig(), train=train, total_updates=10, **settings)  # type: ignore[call-arg]
    policy.published()
    assert policy.streams.count == (1 if policy._dropout else torch.get_num_threads())
    with torch.no_grad():  # away from the reference
        for weight in loaded.model.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    metrics = [resolve(each) for each in policy.learn(BATCHES, COUNTS)]
    masters = policy._optimizer._masters
    return metrics, {name: m.grad.clone() for name, m in masters.items() if m.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_on_streams_gives_what_it_gives_in_turn(
    make_model: Callable[..., LoadedModel], threads: Threads, dtype: torch.dtype, adapter: int, checkpointing: bool
) -> None:
    found = []
    for number in (2, 1, 2):
        threads(number)
        loaded = with_adapter(make_model(dtype), LoraConfig.model_validate({"rank": adapter}), seed=1)
        found.append(learned(loaded, gradient_checkpointing=checkpointing))
    (metrics, gradients), (in_turn, expected), again = found
    assert metrics == in_turn  # the forward has the same bits
    assert all(torch.equal(again[1][name], gradient) for name, gradient in gradients.items())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        difference = float((gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-9))
        assert difference < (1e-5 if dtype == torch.float32 else 1e-2), name


def test_dropout_is_drawn_in_turn_whatever_the_threads(
    make_model: Callable[..., LoadedModel], threads: Threads
) -> None:
    found = []
    for number in (1, 2):
        threads(number)
        loaded = with_adapter(make_model(), LoraConfig.model_validate({"rank": 4, "dropout": 0.3}), seed=1)
        found.append(learned(loaded))
    assert found[0][0] == found[1][0]
