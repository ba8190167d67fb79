"""One of two processes: the gradient of a sharded `ScoringModel`, gathered. Run by test_scoring.py."""

from __future__ import annotations

import os
import sys
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.forward.packing import pack
from groupwise.model.forward.scoring import ScoringModel
from groupwise.model.loading import LoadedModel, wrap_model
from groupwise.quickstart.tiny_model import build_tokenizer


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 270, "tie_word_embeddings": True}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **sizes, eos_token_id=2, bos_token_id=None, pad_token_id=0))


def rows(rank: int) -> list[TrainingRow]:
    def row(group: int, length: int) -> TrainingRow:
        tokens = ModelInput.of([(7 * group + 3 * i + length) % 60 + 3 for i in range(length)])
        return TrainingRow(group, ModelInput.of((10, 11, 12 + group)), tokens, (1,) * length, *[(0.0,) * length] * 2)

    every = [row(0, 9), row(0, 4), row(1, 20), row(2, 7)]
    return every[:2] if rank == 0 else every[2:]


def loss_of(loaded: LoadedModel, some: list[TrainingRow]) -> torch.Tensor:
    scores = loaded.scoring(pack(some), with_entropy=True)
    assert scores.entropy is not None
    return -(scores.logprobs.sum() + 0.1 * scores.entropy.sum())


def shard(root: ScoringModel) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for layer in cast(Any, root.model.get_decoder()).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)


def main(rank: int, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    loaded = wrap_model(model(), cast(Any, build_tokenizer(["one"], 259)), shard=shard)
    loss_of(loaded, rows(rank)).backward()
    found: dict[str, torch.Tensor] = {}
    for name, weight in loaded.model.named_parameters():
        grad = weight.grad
        assert isinstance(grad, DTensor)
        found[name] = 2 * grad.full_tensor()  # it averages over ranks
    if rank == 0:
        save_file(found, out)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the interpreter, and abort it then


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
