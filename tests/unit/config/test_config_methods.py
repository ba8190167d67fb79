"""Settings of LoRA, quantisation and the optimiser: what is refused before anything is loaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Config, LoraConfig
from groupwise.config.checks import (
    check_model_path,
    check_supervised,
    check_trainable,
    require_batch_invariance,
    require_bitsandbytes,
)
from groupwise.config.loading import config_json, load_config
from groupwise.config.lora import read_adapter_file
from groupwise.errors import ConfigError

GIVEN = {"model.path", "data.train", "reward"}
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "owner/base",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["v_proj", "q_proj"],
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
}


def config(**values: object) -> Config:
    return load_config(None, {name.replace("__", "."): value for name, value in values.items()}).config


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    return tmp_path


def rewrite(folder: Path, **changes: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **changes}))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"lora__alpha": 8}, r"lora\.alpha: got a setting of LoRA, but lora\.rank = 0"),
        ({"lora__dropout": 0.1, "lora__rslora": True}, r"lora\.dropout, lora\.rslora"),
        ({"lora__target_modules": ["q_proj"]}, r"lora\.target_modules"),
        ({"model__quantization": "nf4"}, "weights of 4 bits cannot be trained"),
        ({"optim__momentum": 0.9}, "optim.momentum is a setting of muon"),
        ({"optim__name": "adamw_8bit", "optim__momentum": 0.9}, "optim.momentum is a setting of muon"),
    ],
)
def test_settings_that_would_not_act_are_refused(values: dict[str, object], part: str) -> None:
    for check in (check_trainable, check_supervised):
        with pytest.raises(ConfigError, match=part):
            check(config(**values), provided=GIVEN)


def test_settings_that_act_pass() -> None:
    check_trainable(config(lora__rank=8, lora__alpha=4, lora__dropout=0.1, lora__rslora=True), provided=GIVEN)
    check_trainable(config(optim__name="muon", optim__momentum=0.9), provided=GIVEN)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("values", [{"optim__name": "adamw_8bit"}, {"model__quantization": "nf4", "lora__rank": 8}])
def test_without_bitsandbytes_the_command_that_installs_it_is_named(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*pip install 'groupwise\[lowbit\]'"):
        check_trainable(config(**values), provided=GIVEN)
    with pytest.raises(ConfigError, match="this one needs bitsandbytes"):
        require_bitsandbytes("this one")


@pytest.mark.parametrize(
    "values",
    [
        {"lora__rank": -1},
        {"lora__rank": 8, "lora__dropout": 1.0},
        {"lora__rank": 8, "lora__alpha": 0},
        {"lora__rank": 8, "lora__target_modules": []},
        {"optim__weight_decay_groups": {"*": -0.1}},
        {"optim__name": "sgd"},
        {"model__quantization": "int8"},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        config(**values)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model__device": "cpu"}, r"model\.device = 'cpu', where sampler and trainer agree to the bit without it"),
        ({"model__quantization": "nf4", "lora__rank": 8}, r"does not go with model\.quantization = 'nf4'"),
        pytest.param(
            {"model__device": "cuda"},
            "needs triton, which is not installed: `pip install triton`",
            marks=pytest.mark.skipif(find_spec("triton") is not None, reason="triton is installed"),
        ),
    ],
)
def test_batch_invariance_is_refused_where_it_cannot_act(values: dict[str, object], part: str) -> None:
    for check in (check_trainable, check_supervised):
        with pytest.raises(ConfigError, match=rf"model\.batch_invariant = true:? .*{part}"):
            check(config(model__batch_invariant=True, **values), provided=GIVEN)
    with pytest.raises(ConfigError, match=part):
        require_batch_invariance(config(model__batch_invariant=True, **values).model)


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert config(lora__rank=8).lora.scaling_alpha == 16
    assert config(lora__rank=8, lora__alpha=3).lora.scaling_alpha == 3


def test_names_from_other_trainers_lead_here() -> None:
    for there, here in (("lora_r", "lora.rank"), ("lora_alpha", "lora.alpha"), ("load_in_4bit", "model.quantization")):
        with pytest.raises(ConfigError, match=here):
            load_config(None, [f"--{there}", "8"])


# --- adapter folders ---


def test_an_adapter_folder_is_a_model(adapter: Path) -> None:
    check_model_path(str(adapter))
    found = read_adapter_file(adapter)
    assert found is not None
    assert (found.base, found.shape.rank, found.shape.target_modules) == ("owner/base", 8, ("q_proj", "v_proj"))
    assert found.shape.flags == "--lora.rank 8 --lora.alpha 16 --lora.target_modules q_proj,v_proj"
    assert read_adapter_file(adapter / "nothing") is None
    assert read_adapter_file(Path("owner/name")) is None


def test_a_relative_base_is_looked_for_beside_the_adapter(adapter: Path) -> None:
    (adapter / "base").mkdir()
    rewrite(adapter, base_model_name_or_path="base")
    found = read_adapter_file(adapter)
    assert found is not None
    assert found.base == str(adapter / "base")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"base_model_name_or_path": "/no/such/base"}, "is a LoRA adapter on '/no/such/base', which is not there"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path is ''"),
        ({"peft_type": "IA3"}, "kind 'IA3'; expected LORA"),
        ({"use_dora": True}, "use_dora = True is more than plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": "8"}, "expected r, lora_alpha and target_modules"),
        ({"target_modules": None}, "expected r, lora_alpha and target_modules"),
    ],
)
def test_an_adapter_that_cannot_be_used_says_why(adapter: Path, changes: dict[str, object], part: str) -> None:
    rewrite(adapter, **changes)
    with pytest.raises(ConfigError) as caught:
        check_model_path(str(adapter))
    assert part in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"LORA"', "\x00"])
def test_a_damaged_adapter_config_is_refused(adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match="expected what peft writes"):
        read_adapter_file(adapter)


def test_training_an_adapter_takes_the_settings_that_it_was_made_with(adapter: Path) -> None:
    given = {"data.train", "reward"}
    path = {"model__path": str(adapter)}
    check_trainable(config(**path, lora__rank=8), provided=given)
    check_trainable(config(**path, lora__rank=8, lora__target_modules=["v_proj", "q_proj"]), provided=given)
    for values, part in (
        ({}, "lora.rank = 0, but the adapter has 8; give --lora.rank 8 --lora.alpha 16"),
        ({"lora__rank": 4}, "lora.rank = 4, but the adapter has 8; lora.alpha = 8.0, but the adapter has 16.0"),
        ({"lora__rank": 8, "lora__rslora": True}, "lora.rslora = True, but the adapter has False"),
        ({"lora__rank": 8, "lora__target_modules": ["o_proj"]}, "['o_proj'], but the adapter has ['q_proj', 'v_proj']"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_trainable(config(**path, **values), provided=given)
        assert part in str(caught.value)


def test_a_run_whose_final_model_is_an_adapter_leads_to_it(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(config_json(Config()))  # pyright: ignore[reportCallIssue]
    (run / "final").mkdir()
    (run / "final" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    check_model_path(str(run))
    check_model_path(str(run / "final"))
    with pytest.raises(ConfigError, match=r"lora\.rank = 0, but the adapter has 8"):
        check_trainable(config(**{"model.path": str(run)}), provided={"data.train", "reward"})


def test_dropout_may_change_between_runs(adapter: Path) -> None:
    found = read_adapter_file(adapter)
    assert found is not None
    assert found.shape.disagreements(LoraConfig.model_validate({"rank": 8, "dropout": 0.3})) == []
