"""What needs no kernel: tables of tiles, alignment, and the backward pass of attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from groupwise.config import ModelConfig
from groupwise.errors import ConfigError
from groupwise.model.exact.attention_backward import Rows
from groupwise.model.forward import segment_gradient as gradient_module
from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.packing import Segment
from groupwise.model.forward.segment_gradient import segment_gradient
from groupwise.model.invariant.launching import aligned, power_of_two
from groupwise.model.invariant.packed import tiles_of
from groupwise.model.invariant.use import is_batch_invariant, require_gpu
from groupwise.model.loading import given_or_loaded, load_model, wrap_model


def test_tiles_of_a_sequence_worked_by_hand() -> None:
    """A prompt of 5 tokens with completions of 3 and 4; 2 key heads, 4 tokens to a tile."""
    table = tiles_of((Segment(0, 5), Segment(5, 3, 0), Segment(8, 4, 0)), tokens=4, heads=2)
    assert table.tolist() == [
        [0, 4, 0, 0, 0, 0],
        [4, 1, 0, 0, 0, 4],
        [5, 3, 0, 5, 10, 0],
        [8, 4, 0, 5, 16, 0],
    ]


def test_aligned_copies_only_what_is_not() -> None:
    x = torch.arange(64.0)
    assert aligned(x) is x
    assert aligned(x[4:]).data_ptr() == x[4:].data_ptr()
    assert aligned(x[1:]).data_ptr() % 16 == 0
    assert torch.equal(aligned(x.view(8, 8).t()), x.view(8, 8).t())
    assert [power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


@pytest.mark.parametrize("most_scores", [1 << 26, 100])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_gradient_of_one_segment(causal: bool, window: int | None, most_scores: int, monkeypatch) -> None:
    """Against autograd through softmax, in float64; the second bound takes a few rows at a time."""
    monkeypatch.setattr(gradient_module, "_MAX_SCORES", most_scores)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    count, keys = (6, 6) if causal else (4, 6)
    query, key, value = (
        x.requires_grad_() for x in (random(2, count, 6, 5), random(2, keys, 2, 5), random(2, keys, 2, 5))
    )
    distance = torch.arange(count) if causal else torch.arange(count) + keys - 2  # as far as a window lets rows see
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key.repeat_interleave(3, 2)) * 0.4
    ahead = distance[:, None] - torch.arange(keys)
    hidden = (ahead < 0) & causal
    if window is not None:
        hidden = hidden | (ahead >= window)
    scores = scores.masked_fill(hidden, -torch.inf)
    out = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), value.repeat_interleave(3, 2))
    grad = random(*out.shape)
    wanted = torch.autograd.grad((out * grad).sum(), [query, key, value])
    with torch.no_grad():
        rows = Rows(query, grad, out, scores.logsumexp(-1).transpose(1, 2), distance)
        found = segment_gradient(rows, key, value, AttentionCall(0, 0.4, window), causal=causal)
    for mine, theirs in zip((found.query, found.key, found.value), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_cpu_is_refused_and_models_are_plain_unless_asked(
    make_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="on the cpu, where sampler and trainer agree to the bit without it"):
        require_gpu(torch.device("cpu"))
    loaded = wrap_model(make_model("qwen3"), tiny_tokenizer)  # type: ignore[arg-type]
    assert not loaded.batch_invariant
    assert not is_batch_invariant(loaded.model)
    asked = ModelConfig.model_validate({"batch_invariant": True, "path": "here", "device": "cpu"})
    assert given_or_loaded(loaded, asked.model_copy(update={"batch_invariant": False})) is loaded
    with pytest.raises(ConfigError, match="given as an object that was made ready without it"):
        given_or_loaded(loaded, asked)
    with pytest.raises(ConfigError, match="leave it out"):
        load_model(asked.model_copy(update={"path": str(tmp_path)}))
