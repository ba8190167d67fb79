"""`groupwise plan`, and what `--dry-run` says of the plan."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, Qwen3Config

from groupwise.cli import main

ROOT = Path(__file__).parents[3]
QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def qwen(tiny: Path, tmp_path: Path) -> Path:
    """Qwen3-0.6B without its weights: config.json, and a small tokenizer."""
    folder = tmp_path / "qwen"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    Qwen3Config(**QWEN3).save_pretrained(folder)
    return folder


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_model_without_its_weights_is_planned_for_a_gpu(
    training: list[str], qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*training, "--model", str(qwen), "--train.steps", "10", "--rollout.prompts_per_step", "2"]
    plan = planned(capsys, *flags, "--device", "h100-80gb")
    assert plan["model"]["parameters"] == plan["model"]["trained"] == 596_049_920
    assert plan["memory"]["held"]["weights"] == 2 * 596_049_920
    assert plan["memory"]["held"]["master weights"] == 4 * 596_049_920
    assert plan["sampling"]["cache_bytes_per_token"] == 114_688
    assert plan["sampling"]["lanes"] == 16
    # Arenas of 256 and 512 tokens, of 2 prompts and of 16 samples.
    assert plan["memory"]["held"]["KV caches"] == 114_688 * (2 * 256 + 16 * 512)
    assert (plan["run"]["steps"], plan["run"]["samples"], plan["run"]["tokens"]) == (10, 160, 160 * 512)
    assert plan["memory"]["fits"]
    assert plan["seconds"]["basis"] == "computed with shares measured on this device"
    other = planned(capsys, *flags, "--device", "l4", "--answer-tokens", "100")
    assert other["seconds"]["basis"] == "computed"
    assert other["run"]["tokens"] == 160 * 100
    assert other["memory"]["peak"] == plan["memory"]["peak"]
    said = refused(capsys, "plan", *flags, "--device", "l4", "--answer-tokens", "513")
    assert "--answer-tokens 513: an answer of this run has at most 512 tokens" in said


def test_what_does_not_fit_is_said(training: list[str], qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", *training, "--model", str(qwen), "--train.steps", "10", "--device", "cpu", "--memory"]
    assert main([*flags, "8"]) == 0
    said = capsys.readouterr().out
    assert "of 8.00 GiB: does not fit" in said
    assert "train.micro_batch_tokens = 4,096: no size fits" in said
    assert re.search(r"^samples decoded together: \d+ \(of 256 a step\); not one fits$", said, re.MULTILINE)
    assert re.search(r"^note: 4\.0 GiB of keys and values \(rollout\.kv_cache_gib\) have room for", said, re.MULTILINE)
    assert "seconds: not known of this device" in said
    assert main([*flags, "64", "--lora.rank", "8"]) == 0
    fits = capsys.readouterr().out
    assert "of 64.00 GiB: fits" in fits
    assert "LoRA of 5,046,272" in fits
    assert len(fits.splitlines()) < 40, "one screen"


def test_a_larger_micro_batch_and_more_samples_are_found(
    training: list[str], qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*training, "--model", str(qwen), "--train.steps", "10", "--device", "a100-40gb"]
    most = planned(capsys, *flags)["largest"]["train.micro_batch_tokens"]
    for tokens, fits in ((most, True), (int(1.3 * most), False)):
        again = planned(capsys, *flags, "--train.micro_batch_tokens", str(tokens))
        assert again["memory"]["fits"] is fits


def test_devices_and_memory_go_together(training: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cpu needs --memory" in refused(capsys, "plan", *training, "--device", "cpu")
    assert "without --device" in refused(capsys, "plan", *training, "--memory", "8")
    assert "did you mean rtx4090?" in refused(capsys, "plan", *training, "--device", "rtx490")
    assert "has no flag --dry-run" in refused(capsys, "plan", *training, "--dry-run")


def test_a_run_that_stands_there_can_be_planned(
    training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    flags = [*training, "--output", str(tmp_path / "run"), "--device", "cpu", "--memory", "8"]
    assert planned(capsys, *flags)["run"]["rows"] == 2


def test_the_device_at_hand_is_measured(training: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*training, "--model.device", "cpu", "--rollout.prompts_per_step", "2", "--rollout.group_size", "2"]
    plan = planned(capsys, *flags, "--rollout.max_completion_tokens", "8")
    assert plan["device"]["at_hand"]
    assert plan["seconds"]["basis"] == "measured"
    phases = [plan["seconds"][name] for name in ("rollout", "train", "update")]
    assert all(0 < seconds < 60 for seconds in phases)
    assert plan["seconds"]["step"] == pytest.approx(sum(phases))


def test_a_dry_run_sums_the_plan_up(training: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *training, "--model.device", "cpu", "--dry-run"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    first = next(place for place, line in enumerate(said) if line.startswith("# plan for this CPU"))
    assert re.search(r"peak \d+ MiB of [\d.]+ GiB, at the .*: fits$", said[first])
    assert "train.micro_batch_tokens = 4,096: any size fits" in said[first + 1]
    assert "samples of up to 512 tokens" in said[first + 2]


@pytest.mark.parametrize("command", [("train", "--dry-run"), ("plan", "--device", "l4")])
def test_prompts_and_answers_that_the_model_has_no_positions_for_are_refused(
    command: tuple[str, ...], training: list[str], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every row: the last of three is the long one."""
    positions = AutoConfig.from_pretrained(tiny).max_position_embeddings
    rows = Path(training[3])
    rows.write_text(rows.read_text() + json.dumps({"prompt": "4+4? " * 20, "answer": "8"}) + "\n")
    most = str(positions - 30)
    said = refused(capsys, command[0], *training, "--rollout.max_completion_tokens", most, *command[1:])
    assert len(said.splitlines()) == 1
    assert f"rollout.max_completion_tokens = {most} after prompts of up to" in said
    assert f"the model knows {positions} positions (max_position_embeddings of its config.json)" in said


def test_the_pages_commands_run(
    training: list[str], qwen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    Path(training[3]).write_text(json.dumps({"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}) + "\n")
    template = qwen / "chat_template.jinja"  # with Qwen3's switch, which the recipe sets
    template.write_text(template.read_text() + "{% if enable_thinking is defined %}{% endif %}")
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert len(commands) == 3
    for words in commands:
        arguments = [str(qwen) if word == "Qwen/Qwen3-0.6B" else word for word in words]
        assert main([*arguments, *training[2:4], "--eval-data", training[3]]) == 0
        assert capsys.readouterr().out


@pytest.mark.slow
def test_a_large_model_takes_little_memory_to_plan(training: list[str], qwen: Path) -> None:
    code = (
        "import sys; from groupwise.cli import main\n"
        "import groupwise.plan, re, pathlib\n"
        "kib = lambda name: int(re.search(name + r':\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        "before = kib('VmRSS'); assert main(sys.argv[1:]) == 0; print(kib('VmHWM') - before)"
    )
    flags = ["plan", *training, "--model", str(qwen), "--device", "h100-80gb"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True, timeout=100
    )
    assert int(ended.stdout.splitlines()[-1]) < 200 * 1024, "its weights would be 1,137 MiB"
