"""The notebook as a program: it runs from base model to exports, and its reward rises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unsloth_grpo", ROOT / "examples" / "unsloth_grpo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--steps", "1", "--base-steps", "2", "--warm-up-rows", "32", "--output", str(tmp_path)]
    assert len(example.main(["--tiny", *flags])) == 1
    said = capsys.readouterr().out
    assert "without the adapter:" in said
    assert "with it:" in said
    config = json.loads((tmp_path / "grpo" / "run" / "config.json").read_text())
    assert config["rollout"]["min_p"] == 0.1
    assert config["model"]["gradient_checkpointing"] is True
    assert (config["lora"]["rank"], config["lora"]["alpha"]) == (32, 64.0)
    assert (tmp_path / "grpo_saved_lora" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged_16bit").config.hidden_size == 128
    if importlib.util.find_spec("gguf"):
        assert sorted(file.name for file in (tmp_path / "gguf").glob("*.gguf"))[:1] == ["gguf.F16.gguf"]


def test_the_template_and_the_rewards(example: ModuleType) -> None:
    from jinja2 import Environment

    template = Environment().from_string(example.CHAT_TEMPLATE)
    asked = [{"role": "user", "content": "What is 1 + 1?"}]
    text = template.render(messages=asked, eos_token="<eos>", add_generation_prompt=True)
    assert text == f"{example.SYSTEM_PROMPT}<eos>What is 1 + 1?{example.WORKING_START}"
    rewards = example.Rewards("<eos>", print_every=100)
    right = "1 + 1 = 2<end_working_out><SOLUTION>2</SOLUTION>"
    wrong = "1 + 1 = 3<end_working_out><SOLUTION>x</SOLUTION>"
    bare = "2"
    said = [[{"content": text}] for text in (right, wrong, bare)]
    given = {"prompts": [asked] * 3, "completions": said, "answer": ["2"] * 3}
    scores = [function(**given) for function in rewards.functions()]
    assert scores == [[3.0, 3.0, 0.0], [1.5, 1.5, -3.0], [5.0, -4.5, -2.0], [3.5, -2.5, -2.5]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_reward_of_the_example_rises(example: ModuleType, tmp_path: Path) -> None:
    rewards = example.main(["--tiny", "--output", str(tmp_path)])
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 4
