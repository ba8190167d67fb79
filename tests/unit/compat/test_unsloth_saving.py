"""Saving and pushing by Unsloth's names: what is written loads, nothing foreign is lost, and what cannot be is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.compat import keeping
from groupwise.compat.unsloth import FastLanguageModel, FastPeftModel
from groupwise.errors import ConfigError
from groupwise.export.source import find_source
from groupwise.export.verify import verify
from groupwise.model.borrowing import borrow

IDS = torch.tensor([[5, 9, 12, 20, 33]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To bfloat16's rounding."""
    return bool((found - expected).abs().max() < 0.03 * expected.abs().max())


def test_a_merged_model_is_base_and_adapter(peft_model: FastPeftModel, tmp_path: Path) -> None:
    out = peft_model.save_pretrained_merged(tmp_path / "model", None, save_method="merged_16bit")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == torch.bfloat16
    with_it = logits(peft_model)
    with peft_model.disable_adapter():
        base = logits(peft_model)
    assert near(logits(merged), with_it)
    assert not near(base, with_it)
    assert AutoTokenizer.from_pretrained(out).encode("red") == peft_model.settings.tokenizer.encode("red")


def test_the_template_that_the_program_set_is_saved(peft_model: FastPeftModel, tmp_path: Path) -> None:
    tokenizer = peft_model.settings.tokenizer
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    for method in ("merged_16bit", "lora"):
        out = peft_model.save_pretrained_merged(tmp_path / method, tokenizer, save_method=method)
        assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_a_saved_adapter_goes_on_and_verifies_exports(peft_model: FastPeftModel, tmp_path: Path) -> None:
    out = peft_model.save_pretrained_merged(tmp_path / "adapter", save_method="lora")
    again, _ = FastLanguageModel.from_pretrained(str(out), load_in_4bit=False)
    assert isinstance(again, FastPeftModel)
    with borrow(again.base, again.settings.tokenizer):  # its adapter computes as the other's does, which was at work
        pass
    assert torch.equal(logits(again), logits(peft_model))
    merged = peft_model.save_pretrained_merged(tmp_path / "merged")
    assert verify(merged, source=find_source(out), max_tokens=4).agreement > 0.9
    with pytest.raises(ConfigError, match="the model that was in memory: no such folder"):
        verify(merged)


def test_all_saves_share_a_folder_as_in_the_notebook(peft_model: FastPeftModel, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    place = tmp_path / "model"
    for _ in range(2):
        peft_model.save_pretrained_merged(place, save_method="merged_16bit")
        peft_model.save_pretrained_gguf(place)
        files = peft_model.save_pretrained_gguf(place, quantization_method=["f16", "q8_0", "not_quantized"])
        assert [file.name for file in files] == ["model.F16.gguf", "model.Q8_0.gguf"]
        peft_model.save_pretrained_merged(place, save_method="lora")
    assert sorted(file.name for file in place.glob("*.gguf")) == ["model.F16.gguf", "model.Q8_0.gguf"]
    assert (place / "adapter_config.json").is_file()
    assert not (place / "model.safetensors").exists(), "a merged model beside an adapter would be read as one of them"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_an_earlier_program_saved_is_kept(
    peft_model: FastPeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("gguf")

    def saves() -> dict[str, bytes]:
        peft_model.save_pretrained_merged(tmp_path / "model", save_method="lora")
        peft_model.save_pretrained_gguf(tmp_path / "model", quantization_method="f16")
        peft_model.save_lora(tmp_path / "adapter")
        files = [path for path in tmp_path.rglob("*") if path.is_file() and "earlier-1" not in path.parts]
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}

    first = saves()
    monkeypatch.setattr(keeping, "_PLACES", {})  # as in another process
    peft_model.base.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.add_(1.0)
    second = saves()
    assert first.keys() == second.keys()
    for name, content in first.items():
        folder, _, file = name.partition("/")
        kept = tmp_path / folder / "earlier-1" / file
        assert content == second[name] or (kept.is_file() and kept.read_bytes() == content), name
    assert caplog.text.count("what an earlier run left is now in") >= 3
    assert first["model/model.F16.gguf"] != second["model/model.F16.gguf"]


def test_a_whole_model_is_saved_too(fast_load: Callable[..., Any], tmp_path: Path) -> None:
    model = fast_load(full_finetuning=True)
    model.lm_head.weight.data[0] += 1.0
    merged = AutoModelForCausalLM.from_pretrained(model.save_pretrained_merged(tmp_path / "model"), dtype="auto")
    assert near(logits(merged), logits(model))
    with pytest.raises(ConfigError, match="save_method = 'lora'"):
        model.save_pretrained_merged(tmp_path / "other", save_method="lora")
    assert not (tmp_path / "other").exists()


def test_nothing_foreign_is_replaced(peft_model: FastPeftModel, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear")
    for place in (tmp_path / "mine", tiny_folder, tmp_path / "mine" / "letters.txt"):
        with pytest.raises(ConfigError, match="exists, and no export wrote it"):
            peft_model.save_pretrained_merged(place)
    foreign = tmp_path / "mine" / "mine.Q8_0.gguf"
    foreign.write_bytes(b"GGUF of another")
    pytest.importorskip("gguf")
    with pytest.raises(ConfigError, match="exists, and no export wrote it"):
        peft_model.save_pretrained_gguf(tmp_path / "mine")
    assert foreign.read_bytes() == b"GGUF of another"
    assert (tmp_path / "mine" / "letters.txt").read_text() == "dear"


def test_a_save_that_fails_leaves_the_earlier_one(peft_model: FastPeftModel, tmp_path: Path, monkeypatch: Any) -> None:
    place = peft_model.save_pretrained_merged(tmp_path / "model")
    before = sorted(file.name for file in place.iterdir())
    monkeypatch.setattr("groupwise.export.hf.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"save_method = 'merged_4bit': .* pip install bitsandbytes"):
        peft_model.save_pretrained_merged(place, save_method="merged_4bit")
    assert sorted(file.name for file in place.iterdir()) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, p: m.save_pretrained_merged(p, save_method="fp8"), "expected merged_16bit, merged_4bit or lora"),
        (lambda m, p: m.save_pretrained_merged(p, save_method=3), "save_method = 3: expected merged_16bit"),
        (lambda m, p: m.save_pretrained_merged(p, "my tokenizer"), "tokenizer: got a str; expected the model's"),
        (lambda m, p: m.base.save_pretrained_merged(p, save_method="lora"), "save_method = 'lora': the model has no"),
        (lambda m, p: m.save_pretrained_gguf(p, quantization_method=[]), "quantization_method = []: expected one"),
        (lambda m, p: m.save_pretrained_gguf(p, quantization_method=None), "'none': expected one or several"),
        (lambda m, p: m.save_pretrained_merged(p, push_to_hub=True), "call push_to_hub_merged"),
        (lambda m, p: m.save_pretrained_merged(p, safe_serialization=False), "weights are safetensors"),
        (lambda m, p: m.save_pretrained_merged(p, save_metod="lora"), "no argument 'save_metod'"),
        (lambda m, p: m.save_pretrained_gguf(p, quantization_method=["q8_0", "iq2_xxs"]), "'iq2_xxs': expected one"),
        (lambda m, p: m.save_pretrained_gguf(p, quantization_method=["q8_0", "q4_k_m"]), "needs llama-quantize"),
        (lambda m, p: m.push_to_hub_merged("no repo", token="x"), "owner/name"),
        (lambda m, p: m.push_to_hub_merged("a/b", token=""), "no Hugging Face token"),
        (lambda m, p: m.push_to_hub_gguf("a/b"), "no Hugging Face token"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(
    peft_model: FastPeftModel, tmp_path: Path, monkeypatch: Any, call: Any, says: str
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError) as caught:
        call(peft_model, tmp_path / "out")
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_pushes_arrive(hub: Any, peft_model: FastPeftModel, monkeypatch: Any) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    given = {"token": hub.token, "private": True}
    monkeypatch.delenv("HF_TOKEN")
    url = peft_model.push_to_hub_merged("someone/sums", save_method="lora", **given)
    assert url == f"{hub.address}/someone/sums/commit/abc"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert json.loads(hub.files["adapter_config.json"])["r"] == 4
    assert "export.json" not in hub.files
    hub.files.clear()
    peft_model.push_to_hub_gguf("someone/sums", quantization_method=["f16", "q8_0"], **given)
    assert sorted(hub.files) == ["sums.F16.gguf", "sums.Q8_0.gguf"]
    assert hub.files["sums.F16.gguf"].startswith(b"GGUF")
