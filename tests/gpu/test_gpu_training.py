"""The trainer on a GPU: gradients beside a CPU's, updates that repeat, adapters, the reference, every optimiser."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from groupwise.algorithms import build_algorithm
from groupwise.batches import Denominators, TrainingRow
from groupwise.config import AlgorithmConfig, LoraConfig, OptimConfig, TrainConfig
from groupwise.inputs import ModelInput
from groupwise.model.loading import LoadedModel, with_adapter, wrap_model
from groupwise.policy import Learner
from groupwise.policy.microbatches import split_rows
from groupwise.quickstart.tiny_model import build_tokenizer

pytestmark = pytest.mark.gpu


def load(device: str, dtype: torch.dtype, *, rank: int = 0, batch_invariant: bool = False) -> LoadedModel:
    config = Qwen3Config(
        vocab_size=1003, hidden_size=256, intermediate_size=520, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, initializer_range=0.06, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = copy.deepcopy(Qwen3ForCausalLM(config)).to(device, dtype)  # pyright: ignore[reportArgumentType]
    loaded = wrap_model(model, build_tokenizer(["one two"], 270), batch_invariant=batch_invariant)  # type: ignore[arg-type]
    return with_adapter(loaded, LoraConfig.model_validate({"rank": rank}))


def make_rows() -> list[TrainingRow]:
    generator = torch.Generator().manual_seed(1)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 1000, (count,), generator=generator).tolist())

    rows: list[TrainingRow] = []
    for group, length in enumerate((5, 64, 130)):
        prompt = ModelInput.of(some(length))
        for place, count in enumerate((1, 40, 65, 200)):
            advantage = 1.0 if place % 2 else -1.0
            rows.append(
                TrainingRow(
                    group, prompt, ModelInput.of(some(count)), (1,) * count, (advantage,) * count, (-6.9,) * count
                )
            )
    return rows


def learn(loaded: LoadedModel, rows: list[TrainingRow], steps: int = 1, **optim: Any) -> tuple[Learner, list[float]]:
    settings = {
        "algorithm": {"kl": {"coef": optim.pop("kl_coef", 0.0)}},
        "checkpointing": optim.pop("checkpointing", False),
    }
    learner = Learner(
        loaded,
        build_algorithm(AlgorithmConfig.model_validate(settings["algorithm"])),
        optim=OptimConfig.model_validate({"lr": 1e-3, **optim}),
        train=TrainConfig(),  # type: ignore[call-arg]
        total_updates=10,
        gradient_checkpointing=bool(settings["checkpointing"]),
    )
    return learner, [update(learner, rows) for _ in range(steps)]


def update(learner: Learner, rows: list[TrainingRow]) -> float:
    learner.learn(split_rows(rows, 700), counts_of(rows))
    return learner.optim_step()["grad_norm"].value  # type: ignore[union-attr]


def counts_of(rows: list[TrainingRow]) -> Denominators:
    return Denominators(float(sum(len(row.token_ids) for row in rows)), float(len(rows)), 200.0)


def gradients(loaded: LoadedModel, rows: list[TrainingRow]) -> dict[str, torch.Tensor]:
    learner, _ = learn(loaded, rows, steps=0)
    learner.learn(split_rows(rows, 700), counts_of(rows))
    return {name: master.grad.double().cpu() for name, master in learner._optimizer._masters.items()}  # type: ignore[union-attr]


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative, of all gradients together."""
    assert found.keys() == wanted.keys()
    whole = torch.cat([value.flatten() for value in wanted.values()])
    error = torch.cat([(found[name] - value).flatten() for name, value in wanted.items()])
    return float(error.norm() / whole.norm())


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_gradients_are_those_of_a_cpu(batch_invariant: bool, rank: int) -> None:
    """In float32 to its digits; in bfloat16 no farther from those than a CPU's are."""
    if batch_invariant:
        pytest.importorskip("triton")
    rows = make_rows()
    wanted = gradients(load("cpu", torch.float32, rank=rank), rows)
    single = gradients(load("cuda", torch.float32, rank=rank, batch_invariant=batch_invariant), rows)
    assert difference(single, wanted) < 1e-4
    rounded = difference(gradients(load("cpu", torch.bfloat16, rank=rank), rows), wanted)
    half = difference(gradients(load("cuda", torch.bfloat16, rank=rank, batch_invariant=batch_invariant), rows), wanted)
    assert half < 1.25 * rounded < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("optim", [{}, {"name": "muon"}, {"kl_coef": 0.1}, {"checkpointing": True}], ids=str)
def test_updates_repeat_to_the_bit(dtype: torch.dtype, optim: dict[str, Any]) -> None:
    """What a killed run needs, to go on as if nothing had been."""
    rows = make_rows()
    first, norms = learn(load("cuda", dtype), rows, 3, **optim)
    second, again = learn(load("cuda", dtype), rows, 3, **optim)
    assert norms == again
    assert len(set(norms)) == 3
    one, two = first.state_dict(), second.state_dict()
    for name, master in one["optimizer"]["masters"].items():
        assert torch.equal(master, two["optimizer"]["masters"][name])


def test_a_step_moves_the_log_probs_where_the_advantages_say() -> None:
    rows = make_rows()
    loaded = load("cuda", torch.bfloat16)
    learner, _ = learn(loaded, rows, steps=0)
    before = learner.log_probs(rows)
    for _ in range(3):
        update(learner, rows)
    moved = (learner.log_probs(rows) - before).cpu()
    signs = torch.tensor([x for row in rows for x in row.advantages])
    assert float((moved * signs).mean()) > 0
