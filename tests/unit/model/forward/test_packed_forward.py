"""The packed forward against transformers' own: one row at a time, unpacked, eager attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.exact import buckets
from groupwise.model.forward.head import LanguageHead, TokenScores, token_scores
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import pack
from groupwise.model.loading import wrap_model

MakeModel = Callable[..., PreTrainedModel]
MakeRows = Callable[..., list[TrainingRow]]
Eager = Callable[[PreTrainedModel], PreTrainedModel]


@pytest.fixture(autouse=True, params=[1, 512], ids=["runs", "pools"])
def run_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every segment is read where it lies, or short ones are gathered."""
    monkeypatch.setattr(buckets, "_RUN_TOKENS", request.param)
    return request.param


# Prompts and completions of one token, on both sides of a block's edge, and longer than two blocks.
SHAPE = [(1, [1, 63]), (63, [1]), (64, [64, 2, 1]), (65, [65, 66]), (5, [129]), (129, [3, 65, 64])]
TEMPERATURE = 0.7


def packed_scores(model: PreTrainedModel, rows: Sequence[TrainingRow], **options: object) -> TokenScores:
    packed = pack(rows)
    hidden = packed_hidden_states(model, packed)[packed.predictors]
    settings = {"temperature": TEMPERATURE, "with_entropy": True} | options
    return token_scores(LanguageHead(model), hidden, packed.targets, **settings)  # type: ignore[arg-type]


def eager_scores(model: PreTrainedModel, rows: Sequence[TrainingRow]) -> TokenScores:
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for row in rows:
        tokens = torch.tensor(row.prompt_ids + row.token_ids)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
        law = torch.distributions.Categorical(
            logits=logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE
        )
        logprobs.append(law.log_prob(torch.tensor(row.token_ids)))
        entropies.append(law.entropy())
    return TokenScores(torch.cat(logprobs), torch.cat(entropies))


def loss_of(scores: TokenScores) -> Tensor:
    """Every token with a weight of its own, entropy included: no gradient can hide behind another."""
    assert scores.entropy is not None
    weight = torch.linspace(-1, 1, scores.logprobs.shape[0], dtype=scores.logprobs.dtype)
    return (scores.logprobs * weight).sum() + 0.3 * (scores.entropy * weight.flip(0)).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters())), "a parameter got no gradient"
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=["f64", "f32"])
def test_scores_and_gradients_equal_the_unpacked_eager_forward(
    architecture: str,
    dtype: torch.dtype,
    tolerance: float,
    make_model: MakeModel,
    make_rows: MakeRows,
    eager: Eager,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_model(architecture, dtype=dtype)
    twin = eager(model)
    model = wrap_model(model, tiny_tokenizer).model  # pyright: ignore[reportArgumentType]
    rows = make_rows(SHAPE)
    mine, theirs = packed_scores(model, rows), eager_scores(twin, rows)
    assert mine.entropy is not None
    assert theirs.entropy is not None
    assert theirs.entropy.max() - theirs.entropy.min() > 0.5, "flat distributions would prove nothing"
    torch.testing.assert_close(mine.logprobs, theirs.logprobs, rtol=tolerance / 10, atol=tolerance / 10)
    torch.testing.assert_close(mine.entropy, theirs.entropy, rtol=tolerance / 10, atol=tolerance / 10)
    loss_of(mine).backward()
    loss_of(theirs).backward()
    wanted = gradients(twin)
    for name, grad in gradients(model).items():
        scale = float(wanted[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            grad, wanted[name], rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_no_split_or_order_of_the_batch_changes_the_gradient(
    architecture: str, make_model: MakeModel, make_rows: MakeRows, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = wrap_model(make_model(architecture, dtype=torch.float64), tiny_tokenizer).model  # pyright: ignore[reportArgumentType]
    rows = make_rows([(3, [5, 1, 30]), (70, [2, 66]), (1, [1]), (20, [9, 9])])

    def gradient_of(batches: list[list[TrainingRow]]) -> dict[str, Tensor]:
        model.zero_grad()
        for batch in batches:
            scores = packed_scores(model, batch)
            assert scores.entropy is not None
            weight = torch.cat([torch.linspace(1, -1, len(r.token_ids), dtype=torch.float64) for r in batch])
            ((scores.logprobs + 0.1 * scores.entropy) * weight).sum().backward()
        return {name: grad.clone() for name, grad in gradients(model).items()}

    whole = gradient_of([rows])
    shuffled = [rows[i] for i in (6, 7, 5, 2, 0, 1, 4, 3)]
    for other in ([shuffled], [[r] for r in rows], [rows[:2], rows[2:4], rows[4:]]):
        for name, grad in gradient_of(other).items():
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(grad, whole[name], rtol=0, atol=1e-9 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_a_rows_log_probs_have_the_same_bits_in_any_company(
    architecture: str, make_model: MakeModel, make_rows: MakeRows, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = wrap_model(make_model(architecture), tiny_tokenizer).model  # pyright: ignore[reportArgumentType]
    rows = make_rows([(3, [5, 1, 30]), (70, [2, 66]), (1, [1]), (129, [9, 65])])
    with torch.no_grad():
        alone = [packed_scores(model, [r]).logprobs for r in rows]
        for order in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [2, 3, 6]):
            together = packed_scores(model, [rows[i] for i in order]).logprobs
            assert torch.equal(together, torch.cat([alone[i] for i in order])), order


def test_gradient_checkpointing_gives_the_same_gradients(
    architecture: str, make_model: MakeModel, make_rows: MakeRows, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = make_rows([(3, [5, 1]), (66, [2, 20])])
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = wrap_model(make_model(architecture), tiny_tokenizer).model  # pyright: ignore[reportArgumentType]
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(checkpointing)
        loss_of(packed_scores(model, rows)).backward()
        found.append(gradients(model))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_padding_rows_get_no_gradient_and_give_none(
    make_model: MakeModel, make_rows: MakeRows, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Padding repeats token 0; if it took part, the embedding of token 0 would have a gradient."""
    model = wrap_model(make_model("qwen3", tie_word_embeddings=False), tiny_tokenizer).model  # pyright: ignore[reportArgumentType]
    rows = [TrainingRow(0, ModelInput.of((5, 6, 7)), ModelInput.of((8, 9)), (1, 1), (1.0, 1.0), (0.0, 0.0))]
    loss_of(packed_scores(model, rows)).backward()
    grad = model.get_input_embeddings().weight.grad
    assert isinstance(grad, Tensor)
    touched = grad.abs().sum(-1).nonzero().flatten().tolist()
    assert touched == [5, 6, 7, 8]


def test_without_gradients_the_scores_are_the_same_bits(
    make_model: MakeModel, make_rows: MakeRows, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = wrap_model(make_model("qwen3"), tiny_tokenizer).model  # pyright: ignore[reportArgumentType]
    rows = make_rows([(3, [5, 40]), (66, [2])])
    training = packed_scores(model, rows).logprobs.detach()
    with torch.no_grad():
        assert torch.equal(packed_scores(model, rows).logprobs, training)
    with torch.inference_mode():
        assert torch.equal(packed_scores(model, rows).logprobs, training)
