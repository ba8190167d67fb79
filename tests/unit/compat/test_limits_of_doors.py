"""Positions, streams and stop tokens, through each way in, before anything is sampled."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from groupwise.cli.app import main
from groupwise.compat.trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from groupwise.compat.unsloth import FastLanguageModel
from groupwise.errors import ConfigError, DataError

ROWS = [{"prompt": f"{i} + 1 ="} for i in range(8)]


@pytest.fixture
def short_model(tiny_folder: Path, tmp_path: Path) -> Path:
    """GPT-2 with 24 learned positions."""
    with torch.random.fork_rng():
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=280, n_embd=32, n_layer=1, n_head=2, n_positions=24, eos_token_id=2, bos_token_id=1)
        )
    model.save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "short")
    return tmp_path / "short"


def args(out: Path, **options: Any) -> GRPOConfig:
    base: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOConfig(str(out), **{**base, **options})


def reward(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(text) % 5) for text in completions]


def endless() -> Iterator[dict[str, str]]:
    for i in itertools.count():
        yield {"prompt": f"{i} + 1 =", "completion": "2"}


def test_the_trainer_refuses_more_tokens_than_positions(short_model: Path, tmp_path: Path) -> None:
    module = GPT2LMHeadModel.from_pretrained(short_model)
    tokenizer = AutoTokenizer.from_pretrained(short_model)
    for given in (module, str(short_model)):
        made = GRPOTrainer(
            given, reward, args(tmp_path / "o", max_completion_length=100), train_dataset=ROWS,
            processing_class=tokenizer,
        )  # fmt: skip
        with pytest.raises(ConfigError, match=r"= 100 after .* knows 24 positions \(n_positions .* to at most 17"):
            made.train()
        with pytest.raises(ConfigError, match="knows 24 positions"):
            made.generate_completions(ROWS)
        with pytest.raises(ConfigError, match="knows 24 positions"):
            made.evaluate(ROWS)
    rows = [{"text": "1 2 3 " * 20}]
    with pytest.raises(ConfigError, match=r"conversations have up to .* set sft\.max_tokens to 24"):
        SFTTrainer(module, SFTConfig(str(tmp_path / "s"), max_steps=1, use_cpu=True, report_to="none"),
                   train_dataset=rows, processing_class=tokenizer).train()  # fmt: skip


def test_the_last_position_is_used(short_model: Path, tmp_path: Path) -> None:
    module = GPT2LMHeadModel.from_pretrained(short_model)
    tokenizer = AutoTokenizer.from_pretrained(short_model)
    made = GRPOTrainer(
        module, reward, args(tmp_path / "o", max_completion_length=17, max_steps=1), train_dataset=ROWS,
        processing_class=tokenizer,
    )  # fmt: skip
    made.train()


def test_commands_refuse_it_or_keep_to_it(
    short_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.py").write_text("def n(completions, **columns):\n    return [0.0] * len(completions)\n")
    judge = f"{tmp_path / 'mine.py'}:n"
    common = ["--model", str(short_model), "--data", str(rows), "--reward", judge, "--output", str(tmp_path / "r")]
    assert main(["train", *common, "--rollout.max_completion_tokens", "18", "--rollout.prompts_per_step", "2"]) == 2
    assert "24 positions" in capsys.readouterr().err
    judged = ["eval", str(short_model), "--data", str(rows), "--reward", judge, "--max-completion-tokens", "18"]
    assert main(judged) == 2
    assert "eval.max_completion_tokens = 18" in capsys.readouterr().err
    assert main(["generate", str(short_model), "--raw", "--prompt", "1 + 1 =", "--seed", "1"]) == 0
    assert main(["generate", str(short_model), "--raw", "--prompt", "1 + 1 =" * 9]) == 2
    assert "24 positions" in capsys.readouterr().err
    assert main(["generate", str(short_model), "--raw", "--prompt", "1", "--stop", ""]) == 2
    assert "empty text" in capsys.readouterr().err


def test_fast_generate_begins_once_and_keeps_to_the_vocabulary(tiny_folder: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_folder), max_seq_length=64, load_in_4bit=False)
    with pytest.raises(
        ConfigError, match=r"SamplingParams\.stop_token_ids: got 280, and the model's tokens are 0 to 279"
    ):
        model.fast_generate("a", {"stop_token_ids": [280], "max_tokens": 2})
    start = tokenizer.convert_ids_to_tokens(1)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    asked = [model.fast_generate(text, {"max_tokens": 1})[0].prompt_token_ids for text in ("a", start + "a")]
    assert asked[0] == asked[1]
    assert asked[0].count(1) == 1


@pytest.mark.parametrize("make", [endless, lambda: datasets.IterableDataset.from_generator(endless)])
def test_a_stream_without_end_is_read_as_far_as_the_steps_go(make: Any, tiny_folder: Path, tmp_path: Path) -> None:
    for name, trainer, options in (
        ("g", GRPOTrainer, {"reward_funcs": reward, "args": args(tmp_path / "g")}),
        ("s", SFTTrainer, {"args": SFTConfig(str(tmp_path / "s"), max_steps=2, per_device_train_batch_size=1,
                                             gradient_accumulation_steps=1, use_cpu=True, report_to="none")}),
    ):  # fmt: skip
        made = trainer(str(tiny_folder), train_dataset=make(), **options)  # pyright: ignore[reportArgumentType]
        made.train()
        assert (tmp_path / name / "run" / "final").is_dir()
        assert len(made._plan.rows) == 2


@pytest.mark.parametrize("make", [endless, lambda: datasets.IterableDataset.from_generator(endless)])
def test_a_stream_without_steps_is_refused(make: Any, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no length and may never end; set max_steps, or give a list"):
        GRPOTrainer(str(tiny_folder), reward, args(tmp_path / "g", max_steps=-1), train_dataset=make())
    with pytest.raises(DataError, match="has no length and may never end; set max_steps"):
        SFTTrainer(str(tiny_folder), SFTConfig(str(tmp_path / "s"), report_to="none"), train_dataset=make())
    with pytest.raises(DataError, match="has no length and may never end"):
        GRPOTrainer(str(tiny_folder), reward, args(tmp_path / "g"), train_dataset=ROWS, eval_dataset=make())
