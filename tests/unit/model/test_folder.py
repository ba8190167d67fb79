"""Damaged and hostile model folders: a sentence that names the folder, no code run, no memory filled."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from groupwise.config import ModelConfig
from groupwise.errors import ConfigError
from groupwise.model.folder import check_sizes, stored_shapes
from groupwise.model.loading import load_model, load_tokenizer
from groupwise.quickstart.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("m") / "model", texts=["one two"], size="0.1m", vocab_size=259)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(folder: Path, name: str = "config.json", **values: Any) -> None:
    content = json.loads((folder / name).read_bytes())
    (folder / name).write_text(json.dumps(content | values))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lie_about_the_head(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])


def hide_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, Callable[[Path], object]] = {
    "vocabulary of a million millions": lambda f: change(f, vocab_size=10**12),
    "layers without end": lambda f: change(f, num_hidden_layers=10**9),
    "a negative size": lambda f: change(f, hidden_size=-64),
    "no heads": lambda f: change(f, num_attention_heads=0),
    "a size that is text": lambda f: change(f, hidden_size="64"),
    "a size that is a list": lambda f: change(f, vocab_size=[]),
    "a size too large for a number": lambda f: change(f, intermediate_size=2**70),
    "an unknown activation": lambda f: change(f, hidden_act="nope"),
    "an unknown kind": lambda f: change(f, model_type="nope", architectures=["Nope"]),
    "another kind": lambda f: change(f, model_type="t5"),
    "rope that is no table": lambda f: change(f, rope_parameters="yarn"),
    "rope of an unknown kind": lambda f: change(f, rope_parameters={"rope_type": "nope", "rope_theta": 1.0}),
    "an odd dtype": lambda f: change(f, dtype="float33"),
    "no JSON": lambda f: (f / "config.json").write_text("{"),
    "a list": lambda f: (f / "config.json").write_text("[]"),
    "weights cut short": cut,
    "a head without end": lie_about_the_head,
    "weights that are none": lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 10),
    "an absent shard": hide_a_shard,
    "end tokens in a list of lists": lambda f: change(f, "generation_config.json", eos_token_id=[[1], [2]]),
    "end tokens as text": lambda f: change(f, "generation_config.json", eos_token_id="end"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_folder_is_a_sentence(copy: Path, case: str) -> None:
    BROKEN[case](copy)
    with pytest.raises(ConfigError) as raised:
        load_model(ModelConfig(path=str(copy), dtype="float32", device="cpu"))  # type: ignore[call-arg]
    assert str(copy) in str(raised.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model": 7}', '{"version": "1.0", "model": {"type": "BPE", "vocab": "1e400"}}']
)
def test_a_broken_tokenizer_is_a_sentence(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="no tokenizer") as raised:
        load_tokenizer(ModelConfig(path=str(copy)))  # type: ignore[call-arg]
    assert str(copy) in str(raised.value)


def test_memory_is_not_taken_for_what_the_files_do_not_have(copy: Path) -> None:
    change(copy, vocab_size=300_000_000)
    config = AutoConfig.from_pretrained(copy)
    with pytest.raises(ConfigError, match=r"asks for 19,200,[0-9,]+ weights, and the files have 115,328"):
        check_sizes(str(copy), config, trust_remote_code=False)
    change(copy, vocab_size=259)
    check_sizes(str(copy), AutoConfig.from_pretrained(copy), trust_remote_code=False)


def test_shapes_are_those_of_the_file(whole: Path) -> None:
    from safetensors.torch import load_file

    expected = [list(tensor.shape) for _, tensor in sorted(load_file(whole / "model.safetensors").items())]
    assert sorted(stored_shapes(whole / "model.safetensors")) == sorted(expected)


def test_code_in_a_folder_does_not_run_unasked(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()\n")
    change(copy, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ConfigError, match=r"code of its own.*set model\.trust_remote_code"):
        load_model(ModelConfig(path=str(copy)))  # type: ignore[call-arg]
    assert not (tmp_path / "trace").exists()


def test_weights_have_the_umasks_mode(whole: Path) -> None:
    assert (whole / "model.safetensors").stat().st_mode == (whole / "config.json").stat().st_mode
