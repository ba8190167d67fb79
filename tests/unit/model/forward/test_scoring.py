"""The root of a model: one forward that can be sharded and compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groupwise.model.forward.packing import pack
from groupwise.model.loading import wrap_model
from groupwise.quickstart.tiny_model import build_tokenizer

SCRIPT = Path(__file__).with_name("sharded.py")


def sharded() -> Any:
    """The script as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("sharded_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_shards_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    """`fully_shard` of layers and root, tied embedding included, over gloo."""
    out, meeting = tmp_path / "out.safetensors", tmp_path / "meeting"
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(meeting), str(out)], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=90)
        assert rank.returncode == 0, errors.decode()[-3000:]
    script = sharded()
    whole = wrap_model(script.model(), build_tokenizer(["one"], 259))  # type: ignore[arg-type]
    script.loss_of(whole, [*script.rows(0), *script.rows(1)]).backward()
    found = load_file(out)
    for name, weight in whole.model.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_root_compiles() -> None:
    """Traced by torch.compile, with breaks where it must: scores and gradients are the same."""
    script = sharded()
    plain, traced = (wrap_model(script.model(), build_tokenizer(["one"], 259)) for _ in range(2))  # type: ignore[arg-type]
    packed = pack(script.rows(0))
    compiled = torch.compile(traced.scoring, backend="eager")
    for scoring in (plain.scoring, compiled):
        scores = scoring(packed, temperature=0.7, with_entropy=True)
        (scores.logprobs.sum() + 0.1 * scores.entropy.sum()).backward()
    torch.testing.assert_close(compiled(packed).logprobs, plain.scoring(packed).logprobs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(traced.model.parameters(), plain.model.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
