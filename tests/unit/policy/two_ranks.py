"""One of two ranks of a data-parallel step: `python two_ranks.py RANK MEETING_FILE OUT.safetensors`.

Each takes every second micro-batch under the whole batch's denominators, and gradients are summed. Rank 0 also computes
the whole batch alone, and writes both.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from conftest import tiny_model  # pyright: ignore[reportAttributeAccessIssue]
from safetensors.torch import save_file

from groupwise.algorithms import build_algorithm
from groupwise.config import AlgorithmConfig, OptimConfig, TrainConfig
from groupwise.inputs import ModelInput, SampleKey
from groupwise.policy import Learner
from groupwise.policy.microbatches import cut_batch
from groupwise.quickstart.tiny_model import build_tokenizer
from groupwise.rollout.batch import BatchShape, build_batch
from groupwise.types import Completion, Prompt, Rollout, RolloutGroup

SETTINGS = [{"kl": {"coef": 0.1}, "entropy": {"coef": 0.02}}, {"name": "gspo"}, {"name": "dr_grpo"}, {"name": "gmpo"}]


def groups() -> list[RolloutGroup]:
    def rollout(group: int, i: int) -> Rollout:
        n = 1 + (3 * i + group) % 6
        tokens = tuple((11 * group + 5 * i + 3 * t) % 60 + 3 for t in range(n))
        old = tuple(-4.0 - 0.2 * t for t in range(n))
        reward = float((i + group) % 3)
        written = Completion(SampleKey(f"p{group}", 0, i), tokens, old, (0,) * n, "", "stop")
        return Rollout.one_turn(written, rewards={"r": reward}, reward=reward)

    return [
        RolloutGroup(
            g, Prompt(f"p{g}", (), "", ModelInput.of((4 + g, 5, 6 + g))), tuple(rollout(g, i) for i in range(4))
        )
        for g in range(4)
    ]


def gradients(settings: dict[str, Any], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    objective = build_algorithm(AlgorithmConfig.model_validate(settings))
    loaded = tiny_model(build_tokenizer(["one"], 259), torch.float64, tied=True, seed=0)
    policy = Learner(loaded, objective, optim=OptimConfig(), train=TrainConfig(), total_updates=1)  # pyright: ignore[reportCallIssue]
    batch = build_batch(groups(), objective, shape=BatchShape(1, 16), reward_weights={"r": 1.0})
    (minibatch,) = batch.minibatches
    parts = cut_batch(minibatch, 20)
    assert len(parts) > 2
    for microbatch in parts[rank::ranks]:
        policy.forward_backward(microbatch, minibatch.denominators)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in loaded.model.named_parameters()}


def main(rank: int, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found: dict[str, torch.Tensor] = {}
    for number, settings in enumerate(SETTINGS):
        for name, grad in gradients(settings, rank, 2).items():
            dist.all_reduce(grad, op=dist.ReduceOp.SUM)
            found[f"two/{number}/{name}"] = grad
        if rank == 0:
            found.update({f"one/{number}/{name}": grad for name, grad in gradients(settings, 0, 1).items()})
    if rank == 0:
        save_file(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
