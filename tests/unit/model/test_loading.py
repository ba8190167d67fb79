"""From a folder to a model: what loads, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from groupwise.config import ModelConfig
from groupwise.errors import ConfigError
from groupwise.model.forward.attention import ATTENTION_NAME
from groupwise.model.loading import load_model, load_tokenizer, resolve_device, resolve_dtype, wrap_model
from groupwise.quickstart.tiny_model import build_tiny_model

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "good", texts=["one two three"], size="0.1m")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def config_of(path: Path | str, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(path), device="cpu", **settings)


def rewrite(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_folder_loads_ready_to_run(good: Path) -> None:
    loaded = load_model(config_of(good))
    assert loaded.model.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert loaded.model.config._attn_implementation == ATTENTION_NAME
    assert not loaded.model.training
    text = "one two — 日本 🎉"
    assert loaded.decode(loaded.tokenizer.encode(text)) == text
    assert loaded.stop_token_ids == (loaded.tokenizer.eos_token_id,)


def test_the_weights_are_the_folders(good: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(good, dtype=torch.float32).state_dict()
    mine = load_model(config_of(good)).model.state_dict()
    assert list(mine) == list(plain)
    assert all(torch.equal(mine[name], plain[name]) for name in plain)


def test_dtype_and_tokenizer_can_be_chosen(good: Path) -> None:
    tokenizer = load_tokenizer(config_of(good))
    loaded = load_model(config_of(good, dtype="bfloat16"), tokenizer=tokenizer)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.tokenizer is tokenizer


def test_decoding_leaves_special_tokens_out(good: Path) -> None:
    loaded = load_model(config_of(good))
    tokens = loaded.tokenizer.encode("one")
    assert loaded.decode([*tokens, loaded.stop_token_ids[0]]) == "one"
    assert loaded.decode([]) == ""


def test_a_chat_template_replaces_the_tokenizers(good: Path) -> None:
    tokenizer = load_tokenizer(config_of(good, chat_template="{% for m in messages %}<{{ m['content'] }}>{% endfor %}"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hé"}], tokenize=False) == "<hé>"


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "could not be loaded"),
    "broken config": (lambda p: (p / "config.json").write_text('{"model_type": '), "not a valid JSON"),
    "empty config": (lambda p: (p / "config.json").write_text("{}"), "could not be loaded"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "could not be loaded"),
    "config is binary": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "could not be loaded"),
    "unknown type": (lambda p: rewrite(p / "config.json", model_type="quux"), "quux"),
    "no causal model": (lambda p: (p / "config.json").write_text('{"model_type": "t5"}'), "T5Config"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), r"no file named model\.safetensors"),
    "empty weights": (lambda p: (p / "model.safetensors").write_bytes(b""), "damaged safetensors file"),
    "cut weights": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:1000]),
        "it is cut short: .* its head alone",
    ),
    "weights cut late": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1000]),
        "could not be loaded.*its weights end at",
    ),
    "a layer too many": (
        lambda p: rewrite(p / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"lacks 11 weights .* model\.layers\.2\.\S+ for one; give the config\.json",
    ),
    "another shape": (lambda p: rewrite(p / "config.json", intermediate_size=190), r"lacks 6 weights.*mlp"),
    "no tokenizer": (lambda p: [f.unlink() for f in p.glob("tok*")], "no tokenizer: got one without a vocabulary"),
    "broken tokenizer": (lambda p: (p / "tokenizer.json").write_text("{"), "no tokenizer that loads"),
    "empty tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), "no tokenizer that loads"),
}


@pytest.mark.parametrize("name", list(SPOILED))
def test_a_spoiled_folder_is_refused_by_name(folder: Path, name: str) -> None:
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(config_of(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_is_no_folder_is_refused(load: Callable[[ModelConfig], object], good: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", good / "config.json", "./nowhere", "../übung"):
        with pytest.raises(ConfigError, match="is no folder; give "):
            load(config_of(path))
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        load(config_of(""))
    with pytest.raises(ConfigError, match="not a name"):
        load(config_of("not a name"))


def small(**more: object) -> dict[str, Any]:
    shape = {"vocab_size": 283, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return shape | {"intermediate_size": 92, "num_key_value_heads": 2, "head_dim": 16} | more


UNFIT: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "linear or chunked layers": (
        lambda: Llama4ForCausalLM(Llama4TextConfig(**small(num_local_experts=2, intermediate_size_mlp=92))),
        r"llama4_text has layers of kind \['chunked_attention'\]",
    ),
    "attention of its own": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=283, hidden_size=64, n_layer=2, n_head=4)),
        "bloom computes attention by itself",
    ),
    "attention of its own, two": (
        lambda: FalconForCausalLM(
            FalconConfig(vocab_size=283, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        ),
        "falcon computes attention by itself",
    ),
    "no attention": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=283, hidden_size=64, num_hidden_layers=2)),
        "mamba",
    ),
    "capped scores": (lambda: Gemma2ForCausalLM(Gemma2Config(**small())), "gemma2 caps its attention scores"),
    "sinks": (lambda: GptOssForCausalLM(GptOssConfig(**small(num_local_experts=2))), "gpt_oss has attention sinks"),
}


@pytest.mark.parametrize("name", list(UNFIT))
def test_a_model_that_would_run_and_be_wrong_is_refused(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    build, message = UNFIT[name]
    with pytest.raises(ConfigError, match=f"{message}.*use a model whose layers are full or sliding"):
        wrap_model(build(), tiny_tokenizer)  # type: ignore[arg-type]


def test_stop_tokens_come_from_generation_config_and_tokenizer(
    make_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    own = tiny_tokenizer.eos_token_id
    for declared, wanted in [
        (None, (own,)),
        (7, (7, own)),
        ([9, own, 7], (9, own, 7)),
        ([9, 9], (9, own)),
        (0, (0, own)),
    ]:
        model = make_model("qwen3")
        model.generation_config = GenerationConfig(eos_token_id=declared)
        assert wrap_model(model, tiny_tokenizer).stop_token_ids == wanted  # type: ignore[arg-type]


def test_wrapping_switches_dropout_off(make_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert not wrap_model(make_model("qwen3").train(), tiny_tokenizer).model.training  # type: ignore[arg-type]


def test_devices_are_resolved_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="torch sees no GPU; use auto or cpu"):
            resolve_device(name)
    for name in ("gpu", "", "cuda:x", "meta", "übung"):
        with pytest.raises(ConfigError, match=r"model\.device = .* is no device; use auto, cpu, cuda or cuda:N"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


def test_dtypes_are_resolved() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("auto", gpu) == torch.bfloat16
    assert resolve_dtype("float32", gpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
