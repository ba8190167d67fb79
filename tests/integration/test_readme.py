"""Every command of README.md and docs/tutorial.md is run, in order, in a folder that starts as a checkout would.

Substitutions are declared below: a tiny model stands in for Qwen, a few rows of arithmetic for GSM8K, and runs are
made short. A command that is not known here fails the test.
"""

from __future__ import annotations

import _thread
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main
from groupwise.cli.commands.quickstart import QUICKSTART
from groupwise.quickstart import recipe as quickstart_recipe
from groupwise.quickstart.task import make_task
from groupwise.quickstart.tiny_model import build_tiny_model, read_texts

ROOT = Path(__file__).parents[2]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED_FENCE = re.compile(r"`([\w./-]+\.\w+)`:\s+```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)

STAND_INS = {"Qwen/Qwen3-0.6B": "stand-ins/qwen3", "5.8m": "0.1m"}
"""Whole arguments that are replaced."""

SHORT = ("--model.device=cpu", "--model.dtype=float32", "--tracking.backends=jsonl", "--train.save_every=0")
SHORT_RUN = {
    "train": (
        *SHORT,
        *("--train.steps=2", "--rollout.group_size=2", "--rollout.prompts_per_step=2", "--eval.limit=2"),
        "--rollout.max_completion_tokens=4",
    ),
    "sft": (*SHORT, "--train.steps=2", "--sft.rows_per_step=2"),
    "eval": ("--model.device=cpu", "--model.dtype=float32", "--eval.limit=2", "--eval.max_completion_tokens=4"),
    "generate": ("--model.device=cpu", "--model.dtype=float32", "--max-tokens=4"),
    "chat": ("--model.device=cpu", "--model.dtype=float32", "--max-tokens=4"),
}
"""What is appended to each command; later wins."""

SHORT_QUICKSTART = {
    "SIZE": "0.1m",
    "SFT_STEPS": 2,
    "SFT_ROWS_PER_STEP": 2,
    "NUM_SFT": 300,  # enough text for the tokenizer to fill its vocabulary
    "GRPO_STEPS": 2,
    "PROMPTS_PER_STEP": 2,
    "NUM_TRAIN": 4,
    "MAX_COMPLETION_TOKENS": 4,
}

MAKE_TARGETS = {"demo": "groupwise quickstart", "test": "-m pytest"}
"""Targets that are not run in here, and what their recipe must run."""


@dataclass(frozen=True)
class Command:
    """One line of a bash block, with `\\` line ends joined and comments gone."""

    page: str
    words: tuple[str, ...]


def commands_of(page: Path) -> list[Command]:
    text = page.read_text(encoding="utf-8")
    found: list[Command] = []
    for language, block in FENCE.findall(text):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append(Command(page.name, tuple(words)))
    # What the text asks for in a line of its own before the block.
    return [
        Command(page.name, tuple(shlex.split(span))) for span in re.findall(r"`(hf download [^`\n]+)`", text)
    ] + found


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkout's recipes and docs, and the stand-ins."""
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("constraints.txt", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    raw = tmp_path / "stand-ins" / "gsm8k"
    raw.mkdir(parents=True)
    made = make_task(tmp_path / "stand-ins" / "task", num_sft=40, num_train=40, num_eval=10)
    for split, file in (("train", made.train), ("test", made.test)):
        rows = [json.loads(line)["extra_info"] for line in file.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n" for row in rows]
        (raw / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    qwen = build_tiny_model(tmp_path / "stand-ins" / "qwen3", texts=read_texts(made.train), size="0.1m", vocab_size=300)
    template = qwen / "chat_template.jinja"  # with Qwen3's switch, which the recipes set
    switch = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    template.write_text(template.read_text(encoding="utf-8") + switch, encoding="utf-8")
    return tmp_path


def run_groupwise(words: list[str]) -> None:
    arguments = [STAND_INS.get(word, word) for word in words]
    if "--resume" in arguments:  # the run's own settings, which were short
        arguments = [re.sub(r"^40$", "3", word) for word in arguments]
    else:
        arguments += SHORT_RUN.get(arguments[0], ())
    if arguments[0] == "watch":  # until Ctrl-C
        threading.Timer(3.0, _thread.interrupt_main).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("What is 2+3?\n/exit\n"))  # what is said to `groupwise chat`
        assert main(arguments) == 0, f"`groupwise {shlex.join(arguments)}` failed"


def run_make(words: list[str]) -> None:
    """Asserts that the target exists and what it runs."""
    [target] = words
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", makefile, re.MULTILINE)
    assert found, f"the Makefile has no target {target}"
    assert MAKE_TARGETS[target] in found[1]
    if target == "demo":
        QUICKSTART.parse(shlex.split(found[1].partition("groupwise quickstart")[2]))


def run_pip(words: list[str]) -> None:
    """Asserts that what would be installed is there: this environment is the outcome."""
    constrained = ["install", "-c", "constraints.txt"]
    assert words in ([*constrained, "torch"], [*constrained, "-e", ".[plot]"])
    assert "\nplot = [" in Path("pyproject.toml").read_text(encoding="utf-8")
    assert "torch==" in Path("constraints.txt").read_text(encoding="utf-8")
    assert 'name = "groupwise"' in Path("pyproject.toml").read_text(encoding="utf-8")


def run_hf(words: list[str]) -> None:
    """Puts the stand-in where the download would have gone."""
    verb, name, *rest = words
    assert verb == "download"
    source = "stand-ins/gsm8k" if name == "openai/gsm8k" else "stand-ins/qwen3"
    kind = ["--repo-type", "dataset"] if name == "openai/gsm8k" else []
    assert name == "openai/gsm8k" or name.startswith("Qwen/")
    assert rest[:-1] == [*kind, "--local-dir"]
    shutil.copytree(source, rest[-1])


def run_python(words: list[str]) -> None:
    script, *arguments = words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")


RUNNERS: dict[str, Callable[[list[str]], None]] = {
    "groupwise": run_groupwise,
    "make": run_make,
    "pip": run_pip,
    "hf": run_hf,
    "python": run_python,
}


def run(command: Command) -> None:
    runner = RUNNERS.get(command.words[0])
    if runner is None:
        pytest.fail(f"{command.page} has a command that this test does not know: {shlex.join(command.words)}")
    runner(list(command.words[1:]))


@pytest.fixture
def short_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHORT_QUICKSTART.items():
        assert type(getattr(quickstart_recipe, name)) is type(value)
        monkeypatch.setattr(quickstart_recipe, name, value)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("short_quickstart")
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_every_command_runs(page: str, checkout: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, content in NAMED_FENCE.findall(text):
        Path(name).write_text(content, encoding="utf-8")
    commands = commands_of(ROOT / page)
    assert len(commands) > 8
    for command in commands:
        run(command)
    written = set(re.findall(r"^groupwise (?:train|sft) .*--output (\S+)(?!.*--dry-run)", text, re.MULTILINE))
    assert written
    assert all((checkout / folder / "final" / "config.json").is_file() for folder in written)
    for language, block in FENCE.findall(NAMED_FENCE.sub("", text)):
        if language == "python":
            exec(block, {})


def test_a_command_that_nobody_knows_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="does not know: curl somewhere"):
        run(Command("README.md", ("curl", "somewhere")))
    with pytest.raises(AssertionError, match="no target dmeo"):
        run(Command("README.md", ("make", "dmeo")))
    with pytest.raises(AssertionError, match="failed"):
        run(Command("README.md", ("groupwise", "trian")))


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_commands_are_found(page: str) -> None:
    commands = commands_of(ROOT / page)
    first_words = {command.words[0] for command in commands}
    assert first_words <= set(RUNNERS)
    assert "groupwise" in first_words
    # A block without a language would be run by nobody.
    assert all(language for language, _ in FENCE.findall((ROOT / page).read_text(encoding="utf-8")))


def test_the_two_commands_are_targets() -> None:
    readme = [command.words for command in commands_of(ROOT / "README.md")]
    for target in MAKE_TARGETS:
        assert ("make", target) in readme
        run(Command("README.md", ("make", target)))


def test_the_reward_of_the_readme_does_what_it_says() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [source] = [block for name, block in NAMED_FENCE.findall(text) if name == "my_rewards.py"]
    scope: dict[str, Any] = {}
    exec(source, scope)
    answers = ["Red.", "It is red", "Beige", ""]
    assert scope["one_word"](completions=answers, allowed=[["red", "blue"]] * 4) == [1.0, 1 / 3, 0.0, 0.0]
