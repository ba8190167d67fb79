"""Every recipe loads, is trainable as soon as its files are there, and says what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from groupwise.config import Config
from groupwise.config.checks import check_supervised, check_trainable
from groupwise.config.loading import load_config
from groupwise.engines import check_engine
from groupwise.errors import ConfigError
from groupwise.rewards import RewardScorer

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def load(recipe: Path) -> Config:
    return load_config(recipe).config


def is_supervised(recipe: Path) -> bool:
    return recipe.stem.endswith("-sft")


@pytest.fixture
def in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where everything that recipes name exists, as far as checks look."""
    monkeypatch.chdir(tmp_path)
    for recipe in RECIPES:
        config = load(recipe)
        for name in (config.data.train, config.data.eval):
            if name:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch()
        if not config.model.path.startswith("Qwen/"):
            Path(config.model.path).mkdir(parents=True, exist_ok=True)
            Path(config.model.path, "config.json").touch()
    return tmp_path


def test_there_are_recipes() -> None:
    assert {recipe.stem for recipe in RECIPES} >= {"gsm8k", "gsm8k-8b", "gsm8k-lora", "gsm8k-tiny", "gsm8k-tiny-sft"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_trainable_with_its_files(recipe: Path, in_place: Path) -> None:
    config = load(recipe)
    if is_supervised(recipe):
        check_supervised(config)
    else:
        check_trainable(config)
        check_engine(config.rollout)
        RewardScorer(config.reward)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_without_its_files_a_recipe_is_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check = check_supervised if is_supervised(recipe) else check_trainable
    with pytest.raises(ConfigError, match=r"data\.train = 'gsm8k/train\.jsonl': no such file"):
        check(load(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_begins_with_its_command_and_writes_where_no_other_does(recipe: Path) -> None:
    command = "sft" if is_supervised(recipe) else "train"
    assert f"\n#   groupwise {command} recipes/{recipe.name}\n" in recipe.read_text(encoding="utf-8")
    outputs = [load(other).train.output for other in RECIPES]
    assert all(outputs)
    assert len(set(outputs)) == len(outputs)


def test_the_tiny_recipes_follow_each_other() -> None:
    warm_up, grpo = load(ROOT / "recipes" / "gsm8k-tiny-sft.toml"), load(ROOT / "recipes" / "gsm8k-tiny.toml")
    assert grpo.model.path == f"{warm_up.train.output}/final"
    assert (grpo.model.device, grpo.model.dtype) == ("cpu", "float32")
    assert grpo.reward[0].name == "gsm8k"  # the first one is what accuracy counts


def test_the_large_recipe_loads_no_reference_and_recomputes() -> None:
    config = load(ROOT / "recipes" / "gsm8k-8b.toml")
    assert config.algorithm.kl.coef == 0
    assert config.model.gradient_checkpointing
