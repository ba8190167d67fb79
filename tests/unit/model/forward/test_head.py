from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from groupwise.model.forward.head import (
    LanguageHead,
    TokenScores,
    entropy_of,
    scale_by_temperature,
    target_logprobs,
    token_scores,
    weigh,
)

MakeModel = Callable[..., PreTrainedModel]


def states(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def targets_of(count: int) -> Tensor:
    return torch.randint(0, 283, (count,), generator=torch.Generator().manual_seed(7))


def scores(model: PreTrainedModel, hidden: Tensor, **options: float) -> TokenScores:
    return token_scores(
        LanguageHead(model),
        hidden,
        targets_of(hidden.shape[0]),
        with_entropy=True,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("chunk", [1, 8, 9, 24, 37, 1000])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_no_chunk_size_changes_a_bit(chunk: int, grad: bool, make_model: MakeModel) -> None:
    model = make_model("qwen3")
    with torch.set_grad_enabled(grad):
        whole = scores(model, states(37), chunk_tokens=4096)
        parts = scores(model, states(37), chunk_tokens=chunk)
    assert whole.entropy is not None
    assert parts.entropy is not None
    assert torch.equal(parts.logprobs, whole.logprobs)
    assert torch.equal(parts.entropy, whole.entropy)


def test_chunks_give_the_same_gradient(make_model: MakeModel) -> None:
    model = make_model("qwen3", dtype=torch.float64)
    found: list[Tensor] = []
    for chunk in (8, 4096):
        hidden = states(37).double().requires_grad_()
        model.zero_grad()
        result = scores(model, hidden, chunk_tokens=chunk)
        assert result.entropy is not None
        (result.logprobs.sum() + result.entropy.square().sum()).backward()
        assert hidden.grad is not None
        weight = model.get_output_embeddings().weight.grad  # type: ignore[union-attr]
        assert isinstance(weight, Tensor)
        found.append(torch.cat([hidden.grad, weight]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_log_probs_and_entropy_are_the_distributions(temperature: float, make_model: MakeModel) -> None:
    model = make_model("llama")
    hidden = states(20)
    with torch.no_grad():
        result = scores(model, hidden, temperature=temperature)
        law = torch.distributions.Categorical(logits=model.get_output_embeddings()(hidden) / temperature)  # pyright: ignore[reportOptionalCall]
    torch.testing.assert_close(result.logprobs, law.log_prob(targets_of(20)), rtol=1e-4, atol=1e-5)
    assert result.entropy is not None
    torch.testing.assert_close(result.entropy, law.entropy(), rtol=1e-4, atol=1e-4)


def test_entropy_at_its_ends() -> None:
    flat = torch.full((1, 283), 5.0)
    sure = torch.full((1, 283), -200.0)
    sure[0, 3] = 200.0
    torch.testing.assert_close(entropy_of(flat), torch.tensor([283.0]).log(), rtol=1e-5, atol=1e-5)
    assert entropy_of(sure).item() == 0.0


def test_large_logits_neither_overflow_nor_lose_the_gradient() -> None:
    logits = torch.tensor([[1e4, 9.999e3, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    logprobs = target_logprobs(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(logprobs, logits.double().log_softmax(-1)[[0, 1], [1, 2]].float())
    logprobs.sum().backward()
    probabilities = logits.detach().softmax(-1)
    wanted = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) - probabilities
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, wanted)


def test_entropy_has_the_gradient_of_its_definition() -> None:
    logits = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (mine,) = torch.autograd.grad(entropy_of(logits).sum(), logits)
    law = torch.distributions.Categorical(logits=logits)
    (wanted,) = torch.autograd.grad(law.entropy().sum(), logits)
    torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("vocabulary", [283, 151_936])
def test_a_row_weighs_the_same_alone_and_in_company(
    number: int, vocabulary: int, threads: Callable[[int], None]
) -> None:
    threads(number)
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(0)) * 4
    whole = weigh(logits)
    for rows in (*(slice(i, i + 1) for i in range(6)), slice(1, 3), slice(2, 6)):
        part = weigh(logits[rows].clone())
        assert torch.equal(part.mass, whole.mass[rows])
        assert torch.equal(part.weights, whole.weights[rows])
        assert torch.equal(part.log_normaliser, whole.log_normaliser[rows])


@pytest.mark.parametrize("count", [1, 3, 4, 8, 13])
def test_a_rows_logits_do_not_depend_on_the_others(count: int, make_model: MakeModel) -> None:
    head = LanguageHead(make_model("qwen2"))
    with torch.no_grad():
        whole = head.logits(states(40))
        assert torch.equal(head.logits(states(40)[5 : 5 + count]), whole[5 : 5 + count])


def test_softcap_and_scale_are_the_architectures_own(make_model: MakeModel) -> None:
    model = make_model("gemma3", final_logit_softcapping=3.0)
    hidden = states(9)
    with torch.no_grad():
        plain = model.get_output_embeddings()(hidden)  # pyright: ignore[reportOptionalCall]
        torch.testing.assert_close(LanguageHead(model).logits(hidden), torch.tanh(plain / 3.0) * 3.0)
        for setting, number, factor in (("logit_scale", 0.5, 0.5), ("logits_scaling", 4.0, 0.25)):
            scaled = make_model("llama")
            bare = scaled.get_output_embeddings()(hidden)  # pyright: ignore[reportOptionalCall]
            scaled.config.update({setting: number})
            torch.testing.assert_close(LanguageHead(scaled).logits(hidden), bare * factor)


def test_bfloat16_logits_are_summed_in_float32(make_model: MakeModel) -> None:
    model = copy.deepcopy(make_model("qwen3")).to(torch.bfloat16)  # type: ignore[arg-type]
    with torch.no_grad():
        result = scores(model, states(8).bfloat16())
    assert result.logprobs.dtype == torch.float32
    assert result.entropy is not None
    assert result.entropy.dtype == torch.float32


def test_temperature_zero_counts_as_one_in_both_forms() -> None:
    logits = torch.randn(3, 5)
    assert torch.equal(scale_by_temperature(logits, 0.0), logits)
    mixed = scale_by_temperature(logits, torch.tensor([0.0, 1.0, 0.7]))
    assert torch.equal(mixed[:2], logits[:2])
    # What the sampler divides by is what the trainer divides by, to the bit.
    assert torch.equal(mixed[2], scale_by_temperature(logits, 0.7)[2])
