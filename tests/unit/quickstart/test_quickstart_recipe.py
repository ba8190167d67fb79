"""The recipe: configs that pass every check, on files that fit the limits they set."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from groupwise.config.checks import check_supervised, check_trainable
from groupwise.data import load_prompts, load_supervised
from groupwise.errors import ConfigError
from groupwise.quickstart import recipe as plan
from groupwise.quickstart.recipe import QuickstartRecipe, prepare, quickstart_recipe


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> QuickstartRecipe:
    return prepare(tmp_path_factory.mktemp("quickstart") / "run", seed=3)


def test_prepare_gives_the_recipe_of_the_same_root_and_seed(prepared: QuickstartRecipe) -> None:
    assert prepared == quickstart_recipe(prepared.folders.root, seed=3)
    assert prepared.sft.train.seed == prepared.grpo.train.seed == 3
    assert prepared.grpo.model.path == str(prepared.folders.sft / "final")


def test_nothing_is_written_without_prepare(tmp_path: Path) -> None:
    quickstart_recipe(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_configs_pass_the_checks_that_runs_make(prepared: QuickstartRecipe) -> None:
    check_supervised(prepared.sft)
    check_trainable(prepared.grpo, provided=["model.path"])


def test_the_tokenizer_fills_the_models_vocabulary(prepared: QuickstartRecipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared.folders.model)
    assert len(tokenizer) == AutoConfig.from_pretrained(prepared.folders.model).vocab_size == plan.VOCAB_SIZE
    for word in ("assistant", "user", " apples"):
        assert len(tokenizer.encode(word)) == 1, word


def test_no_row_is_too_long_and_completions_have_room(prepared: QuickstartRecipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared.folders.model)
    supervised = load_supervised(
        str(prepared.task.sft), prepared.sft.data, tokenizer, max_tokens=prepared.sft.sft.max_tokens
    )
    assert (len(supervised.rows), supervised.num_too_long) == (plan.NUM_SFT, 0)
    longest = max(sum(row.loss_mask) for row in supervised.rows)
    assert longest < prepared.grpo.rollout.max_completion_tokens
    for source, count in ((prepared.task.train, plan.NUM_TRAIN), (prepared.task.test, 256)):
        prompts = load_prompts(str(source), prepared.grpo.data, tokenizer)
        assert (len(prompts.prompts), prompts.num_too_long) == (count, 0)


def test_every_training_prompt_is_used_once(prepared: QuickstartRecipe) -> None:
    assert prepared.grpo.rollout.prompts_per_step * (prepared.grpo.train.steps or 0) == plan.NUM_TRAIN


def test_a_second_prepare_in_the_same_root_is_refused_and_changes_nothing(prepared: QuickstartRecipe) -> None:
    before = prepared.task.train.read_bytes()
    with pytest.raises(ConfigError, match="not an empty folder"):
        prepare(prepared.folders.root, seed=4)
    assert prepared.task.train.read_bytes() == before
