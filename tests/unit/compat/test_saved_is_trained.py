"""A model in memory that is not the base on disk: what is saved, merged, exported and loaded is what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.compat.trl import GRPOConfig, GRPOTrainer
from groupwise.compat.unsloth import FastLanguageModel, FastPeftModel
from groupwise.config import ModelConfig
from groupwise.errors import ConfigError
from groupwise.export.hf import export_hf
from groupwise.export.source import find_source
from groupwise.export.verify import verify
from groupwise.model.loading import load_model

IDS = torch.tensor([[5, 9, 12, 20, 33]])
ROWS = [{"prompt": f"{i} + 1 ="} for i in range(8)]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def same(found: Any, expected: torch.Tensor) -> bool:
    """Where weights lie in memory may decide a sum's order; the weights themselves are compared by the product."""
    return torch.allclose(logits(found), expected, atol=1e-5, rtol=1e-5)


def loaded_again(place: Path) -> Any:
    """By the command line's loader."""
    model = load_model(ModelConfig.model_validate({"path": str(place), "device": "cpu"})).model
    model.set_attn_implementation("sdpa")
    return model


def loud(model: Any) -> Any:
    """An adapter that says something."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.data.normal_(std=0.4)
    return model


def trainer(model: Any, tokenizer: Any, out: Path) -> GRPOTrainer:
    args = GRPOConfig(
        str(out), max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=4, use_cpu=True,
        report_to="none", learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip

    def length(completion_ids: list[Any], **columns: Any) -> list[float]:
        return [float(ids[0] % 5) for ids in completion_ids]

    return GRPOTrainer(model, length, args, train_dataset=ROWS, processing_class=tokenizer)


@pytest.fixture
def widened(tiny_folder: Path) -> tuple[FastPeftModel, Any]:
    """With two tokens more than the base on disk."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_folder), max_seq_length=64, load_in_4bit=False)
    tokenizer.add_tokens(["<reasoning>", "</reasoning>"])
    with torch.random.fork_rng():
        model.resize_token_embeddings(len(tokenizer))
    return loud(FastLanguageModel.get_peft_model(model, r=4)), tokenizer


@pytest.fixture
def second_stage(tiny_folder: Path) -> FastPeftModel:
    """A new adapter on a base that another one was merged into; its B is not zero."""
    model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), max_seq_length=64, load_in_4bit=False)
    first = loud(FastLanguageModel.get_peft_model(model, r=4))
    return loud(FastLanguageModel.get_peft_model(first.merge_and_unload(), r=2))


def test_added_tokens_are_saved_merged_and_loaded(widened: tuple[FastPeftModel, Any], tmp_path: Path) -> None:
    model, tokenizer = widened
    expected = logits(model)
    model.save_lora(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    again, read = FastLanguageModel.from_pretrained(str(tmp_path / "lora"), max_seq_length=64, load_in_4bit=False)
    assert same(again, expected)
    assert read.encode("<reasoning>", add_special_tokens=False) == [len(tokenizer) - 2]
    merged = model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit")
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert whole.get_input_embeddings().num_embeddings == len(tokenizer)
    assert (logits(whole) - expected).abs().max() < 0.03 * expected.abs().max()
    assert verify(merged, source=find_source(tmp_path / "lora"), max_tokens=4).passed


def test_added_tokens_go_through_a_run(widened: tuple[FastPeftModel, Any], tmp_path: Path) -> None:
    model, tokenizer = widened
    made = trainer(model, tokenizer, tmp_path / "out")
    made.train()
    made.save_model(str(tmp_path / "saved"))
    expected = logits(model)
    for place in (tmp_path / "saved", tmp_path / "out" / "run" / "final"):
        assert same(loaded_again(place), expected), place
        assert "<reasoning>" in AutoTokenizer.from_pretrained(place).get_vocab()
        with_peft = peft.AutoPeftModelForCausalLM.from_pretrained(str(place))
        assert torch.allclose(logits(with_peft), expected, atol=1e-4, rtol=1e-4), place
    assert "weights compared with those in memory, all the same" in (tmp_path / "out" / "run" / "log.txt").read_text()


def test_added_tokens_go_into_a_gguf_file(widened: tuple[FastPeftModel, Any], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model, tokenizer = widened
    (file,) = model.save_pretrained_gguf(tmp_path / "gguf", tokenizer, quantization_method="f32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    expected = model.base.get_input_embeddings().weight.detach()  # pyright: ignore[reportCallIssue]
    assert torch.equal(torch.from_numpy(found["token_embd.weight"].copy()), expected)


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_a_second_stage_keeps_the_first(second_stage: FastPeftModel, tmp_path: Path, form: Any) -> None:
    expected = logits(second_stage)
    second_stage.save_lora(tmp_path / "lora")
    out = tmp_path / "exported"
    export_hf(find_source(tmp_path / "lora"), out, form=form)
    moved = (tmp_path / "lora").rename(tmp_path / "moved")
    for place in (moved, out):
        again, _ = FastLanguageModel.from_pretrained(str(place), max_seq_length=64, load_in_4bit=False)
        assert torch.allclose(logits(again), expected, atol=1e-4, rtol=1e-4), place


def test_a_second_stage_of_the_trainer_keeps_the_first(tiny_folder: Path, tmp_path: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    first = loud(peft.get_peft_model(module, config))
    made = trainer(peft.get_peft_model(first.merge_and_unload(), config), tokenizer, tmp_path / "out")
    made.train()
    assert same(loaded_again(tmp_path / "out/run/final"), logits(made.model))


def test_an_adapter_on_its_own_base_is_saved_alone(
    peft_model: FastPeftModel, tiny_folder: Path, tmp_path: Path
) -> None:
    peft_model.save_lora(tmp_path / "lora")
    assert not (tmp_path / "lora" / "base").exists()
    assert json.loads((tmp_path / "lora/adapter_config.json").read_bytes())["base_model_name_or_path"] == str(
        tiny_folder
    )


def test_half_precision_is_no_other_base(tiny_folder: Path, tmp_path: Path) -> None:
    """Rounding alone, also twice, is what loading does."""
    for dtype in (torch.bfloat16, torch.float16):
        module = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
        model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), load_in_4bit=False, dtype=torch.float32)
        model.load_state_dict(module.to(torch.float32).state_dict())  # pyright: ignore[reportArgumentType]
        FastLanguageModel.get_peft_model(model, r=2).save_lora(tmp_path / str(dtype))
        assert not (tmp_path / str(dtype) / "base").exists()


def test_a_base_that_changed_on_disk_is_written_too(tmp_path: Path, tiny_folder: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_4bit=False)
    made = loud(FastLanguageModel.get_peft_model(model, r=2))
    expected = logits(made)
    changed = AutoModelForCausalLM.from_pretrained(folder)
    changed.model.norm.weight.data[0] += 0.5
    changed.save_pretrained(folder)
    made.save_lora(tmp_path / "lora")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora"), max_seq_length=64, load_in_4bit=False)
    assert same(again, expected)


def test_a_setting_of_the_model_that_the_program_changed_is_saved(tiny_folder: Path, tmp_path: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), max_seq_length=64, load_in_4bit=False)
    model.config.rms_norm_eps = 0.25
    model.config.pad_token_id = 3  # decides no logit
    FastLanguageModel.get_peft_model(model, r=2).save_lora(tmp_path / "lora")
    assert json.loads((tmp_path / "lora/base/config.json").read_bytes())["rms_norm_eps"] == 0.25


def test_saving_again_in_the_same_place_keeps_the_base(second_stage: FastPeftModel, tmp_path: Path) -> None:
    """The base that a reloaded adapter names lies in the folder that is replaced."""
    place = second_stage.save_pretrained_merged(tmp_path / "lora", save_method="lora")
    again, tokenizer = FastLanguageModel.from_pretrained(str(place), max_seq_length=64, load_in_4bit=False)
    again.save_pretrained_merged(place, tokenizer, save_method="lora")
    third, _ = FastLanguageModel.from_pretrained(str(place), max_seq_length=64, load_in_4bit=False)
    assert same(third, logits(second_stage))
    assert json.loads((place / "adapter_config.json").read_bytes())["base_model_name_or_path"] == str(place / "base")


def test_an_adapter_that_is_merged_and_still_there_is_refused(peft_model: FastPeftModel, tmp_path: Path) -> None:
    peft_model.merge_adapter()
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) to go on"):
        peft_model.save_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) to go on"):
        trainer(peft_model, peft_model.settings.tokenizer, tmp_path / "out")
    peft_model.unmerge_adapter()
    peft_model.save_lora(tmp_path / "lora")


def test_files_have_what_is_in_memory_or_are_refused(
    peft_model: FastPeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a byte is noticed."""
    from groupwise.errors import ExportError
    from groupwise.model import saving

    def damaged(file: Path) -> dict[str, torch.Tensor]:
        found = load_file(file)
        found[min(found)][0, 0] += 1
        return found

    monkeypatch.setattr(saving, "load_file", damaged)
    with pytest.raises(ExportError, match="is not the adapter in memory: 1 of 8 weights differ"):
        peft_model.save_lora(tmp_path / "lora")


@pytest.fixture
def fast(fast_load: Callable[..., Any]) -> Any:
    return fast_load()


def test_a_whole_model_that_was_changed_is_saved_whole(fast: Any, tmp_path: Path) -> None:
    fast.get_input_embeddings().weight.data[3] += 1
    made = trainer(fast, fast.settings.tokenizer, tmp_path / "out")
    made.train()
    assert same(loaded_again(tmp_path / "out/run/final"), logits(fast))
