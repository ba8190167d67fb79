"""LoRA inside the module: it starts as nothing, is saved as peft knows it, and keeps a row's bits in any company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from groupwise.batches import TrainingRow
from groupwise.config import LoraConfig, ModelConfig
from groupwise.errors import ConfigError
from groupwise.inputs import ModelInput
from groupwise.model.adapters import FullTileLinear, adds_nothing, dropout_layers
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import pack
from groupwise.model.loading import LoadedModel, load_model, with_adapter, wrap_model

MakeModel = Any


def lora(**settings: object) -> LoraConfig:
    return LoraConfig.model_validate({"rank": 4, **settings})


def row(length: int = 9) -> TrainingRow:
    neutral = (0.0,) * length
    return TrainingRow(
        0, ModelInput.of((5, 6, 7)), ModelInput.of(range(10, 10 + length)), (1,) * length, neutral, neutral
    )


@torch.no_grad()
def logits(loaded: LoadedModel, length: int = 9) -> Tensor:
    packed = pack([row(length)])
    return loaded.head.logits(packed_hidden_states(loaded.model, packed)[packed.predictors])


def stir(loaded: LoadedModel) -> None:
    """Make the adapter matter."""
    generator = torch.Generator().manual_seed(1)
    for name, p in loaded.model.named_parameters():
        if ".lora_B." in name:
            p.data = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.fixture
def base(make_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A model folder."""
    folder = tmp_path / "base"
    make_model("qwen3").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, **settings: object) -> LoadedModel:
    return load_model(ModelConfig.model_validate({"path": str(folder), "device": "cpu", **settings}))


def save(loaded: LoadedModel, folder: Path) -> Path:
    loaded.model.save_pretrained(folder)
    return folder


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(base: Path) -> None:
    plain = logits(load(base))
    adapted = with_adapter(load(base), lora(), seed=3)
    assert torch.equal(logits(adapted), plain)
    assert adds_nothing(adapted.model)
    trained = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of seven layers in two blocks
    assert all(".lora_" in name for name in trained)
    stir(adapted)
    assert not adds_nothing(adapted.model)
    assert not torch.equal(logits(adapted), plain)


def test_rank_zero_is_no_adapter(base: Path) -> None:
    loaded = load(base)
    assert with_adapter(loaded, lora(rank=0)) is loaded
    assert loaded.adapter is None


def test_the_seed_decides_the_adapter_and_touches_no_other_draw(base: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = [with_adapter(load(base), lora(), seed=seed).model.state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    name = next(name for name in found[0] if ".lora_A." in name)
    assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0][name], found[2][name])


@pytest.mark.parametrize(("settings", "scale"), [({"alpha": 6}, 1.5), ({"alpha": 6, "rslora": True}, 3.0), ({}, 2.0)])
def test_the_adapter_is_scaled_as_the_papers_say(base: Path, settings: dict[str, object], scale: float) -> None:
    layer: Any = with_adapter(load(base), lora(**settings)).model.get_decoder().layers[0].self_attn.q_proj  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(8, 64)
    inner = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = x @ (layer.base_layer.weight + scale * inner).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        (["q_prj"], "q_prj"),
        (["q_proj", "nothing"], "got nothing, which the model does not have"),
        (["lm_head"], "the embedding or the head"),
        (["q_proj", "embed_tokens"], "the embedding or the head"),
    ],
)
def test_targets_that_the_model_cannot_have_are_refused(base: Path, targets: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_adapter(load(base), lora(target_modules=targets))
    assert part in str(caught.value)
    assert "down_proj, gate_proj, k_proj" in str(caught.value)


def test_only_the_named_layers_get_one(base: Path) -> None:
    adapted = with_adapter(load(base), lora(target_modules=["q_proj", "v_proj"]))
    names = {
        name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.model.named_parameters() if "lora" in name
    }
    assert names == {"q_proj", "v_proj"}


# --- exactness ---


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 7])
def test_a_small_rank_gives_each_row_the_same_bits_in_any_company(rank: int) -> None:
    with torch.inference_mode():
        for width in (16, 24, 32, 48, 64, 160, 1024):
            layer = FullTileLinear(width, rank, bias=False)
            x = torch.randn(96, width)
            whole = layer(x)
            assert whole.shape == (96, rank)
            for count in (4, 8, 12, 16, 28, 64):
                assert torch.equal(layer(x[:count].clone()), whole[:count]), (width, count)


def test_its_gradient_is_a_linear_layers() -> None:
    x = torch.randn(8, 16)
    ours, theirs = FullTileLinear(16, 3, bias=False), nn.Linear(16, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert ours.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


# --- saved and loaded ---


def test_a_saved_adapter_comes_back_bitwise_and_trains_on(base: Path, tmp_path: Path) -> None:
    adapted = with_adapter(load(base), lora(rank=3, rslora=True))
    stir(adapted)
    folder = save(adapted, tmp_path / "adapter")
    assert sorted(p.name for p in folder.glob("*.safetensors")) == ["adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    assert config["target_modules"] == sorted(config["target_modules"])  # not in the order of a set
    back = load(folder)
    assert torch.equal(logits(back), logits(adapted))
    assert [n for n, p in back.model.named_parameters() if p.requires_grad] == [
        n for n, p in adapted.model.named_parameters() if p.requires_grad
    ]
    again = with_adapter(back, lora(rank=3, rslora=True, dropout=0.25))
    assert torch.equal(logits(again), logits(adapted))
    assert len(dropout_layers(again.model)) == 14


def test_peft_itself_loads_it(base: Path, tmp_path: Path) -> None:
    adapted = with_adapter(load(base), lora())
    stir(adapted)
    folder = save(adapted, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(torch.tensor([[*row().prompt_ids, *row().token_ids]])).logits[0, 2:-1]
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-3, atol=1e-3)


def test_what_peft_saved_is_loaded(base: Path, make_model: MakeModel, tmp_path: Path) -> None:
    plain = make_model("qwen3")
    plain.name_or_path = str(base)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(plain, config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    theirs.save_pretrained(tmp_path / "theirs")  # pyright: ignore[reportArgumentType]
    loaded = load(tmp_path / "theirs")
    expected = logits(wrap_model(theirs.merge_and_unload(), loaded.tokenizer))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)
    assert loaded.tokenizer.encode("one")  # the base's: the adapter's folder has none


def test_another_shape_than_the_adapters_is_refused(base: Path) -> None:
    adapted = with_adapter(load(base), lora(target_modules=["q_proj"]))
    for settings, part in (
        ({"rank": 0}, "lora.rank = 0, but the adapter has 4"),
        ({"rank": 8, "target_modules": ["q_proj"]}, "lora.rank = 8, but the adapter has 4"),
        ({"target_modules": ["k_proj"]}, "but the adapter has ['q_proj']"),
        ({}, "'all-linear'], but the adapter leaves out down_proj, gate_proj, k_proj"),
    ):
        with pytest.raises(ConfigError) as caught:
            with_adapter(adapted, lora(**settings))
        assert part in str(caught.value)


def test_an_adapter_of_another_model_or_without_weights_is_refused(
    base: Path, make_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = save(with_adapter(load(base), lora()), tmp_path / "adapter")
    make_model("qwen3", hidden_size=32).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    content = json.loads((folder / "adapter_config.json").read_text())
    for other in (tmp_path / "other", tmp_path / "nowhere"):
        content["base_model_name_or_path"] = str(other)
        (folder / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=r"does not fit|its base is not there"):
            load(folder)
    content["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ConfigError, match="does not fit"):
        load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="does not fit"):
        load(folder)


def test_bfloat16_adapters_compute_in_bfloat16(base: Path) -> None:
    adapted = with_adapter(load(base, dtype="bfloat16"), lora())
    assert {p.dtype for p in adapted.model.parameters()} == {torch.bfloat16}
