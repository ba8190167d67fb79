"""What the terminal shows: which columns fit, which steps have a line, samples as text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from groupwise.tracking.base import Sample
from groupwise.tracking.cards import cards
from groupwise.tracking.console import ConsoleTracker
from groupwise.tracking.line import step_line

ALL = {
    "reward": 0.5,
    "rewards/gsm8k/mean": 0.4,
    "rewards/gsm8k/std": 0.1,
    "rewards/format/mean": 0.2,
    "eval/accuracy": 0.25,
    "frac_reward_zero_std": 0.3,
    "completions/clipped_ratio": 0.04,
    "loss": 0.01,
    "kl": 0.002,
    "completions/mean_length": 31.4,
    "throughput/tokens_per_second": 1234.5,
    "time/step": 1.25,
}
WHOLE = (
    "step 3/20  reward 0.500  gsm8k 0.400  format 0.200  gsm8k accuracy 25.0%  equal 30%  cut 4%  loss 0.0100  "
    "kl 0.0020  length 31  tok/s 1234  seconds 1.2"
)


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (None, WHOLE),
        (200, WHOLE),
        (80, "step 3/20  reward 0.500  gsm8k accuracy 25.0%  equal 30%  cut 4%  loss 0.0100"),
        (60, "step 3/20  reward 0.500  gsm8k accuracy 25.0%  equal 30%"),
        (40, "step 3/20  reward 0.500  accuracy 25.0%"),
        (10, "step 3/20"),
    ],
)
def test_the_columns_that_matter_most_stay(width: int | None, line: str) -> None:
    assert step_line("step 3/20", ALL, accuracy_of="gsm8k", width=width) == line


@pytest.mark.parametrize("width", range(40, 201, 7))
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    named = {**ALL, "rewards/日本語の報酬/mean": 1.0, "rewards/" + "x" * 300 + "/mean": 1.0}
    assert cell_len(step_line("step 12345/20000", named, accuracy_of="日本語の報酬", width=width)) <= width


def test_one_reward_is_not_told_twice() -> None:
    assert step_line("step 1", {"reward": 0.5, "rewards/a/mean": 0.5}) == "step 1  reward 0.500"


def test_lines_are_thinned_and_first_and_last_stay() -> None:
    now = [0.0]
    file = io.StringIO()
    tracker = ConsoleTracker(title="t", total_steps=9, lines_every=5.0, file=file, clock=lambda: now[0])
    tracker.start({}, Path("run"))
    for step in range(1, 10):
        tracker.log(step, {"loss": step / 10})
        now[0] += 1.0
    tracker.close()
    assert [line.split()[1] for line in file.getvalue().splitlines()[1:]] == ["1/9", "6/9", "9/9"]


def test_the_last_line_of_a_run_that_ends_early_is_shown() -> None:
    file = io.StringIO()
    tracker = ConsoleTracker(title="t", total_steps=9, lines_every=5.0, file=file, clock=lambda: 0.0)
    tracker.start({}, Path("run"))
    for step in (1, 2, 3):
        tracker.log(step, {"loss": step / 10})
    tracker.close()
    tracker.close()
    assert file.getvalue().splitlines()[1:] == ["step 1/9  loss 0.1000", "step 3/9  loss 0.3000"]


def lines_of(samples: list[Sample], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    return [line.plain for line in cards(3, samples, console)]


def sample(prompt: str, answer: str, **rewards: float | None) -> Sample:
    return Sample(prompt, answer, 0.75, rewards or {"gsm8k": 0.75}, -0.5)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_an_answer_is_wrapped_and_whole(width: int) -> None:
    words = [f"word{number}" for number in range(2_000)]
    lines = lines_of([sample("Why?\nTell me.", " ".join(words) + "\n\n[bold]#### 4[/bold]")], width)
    assert lines[:6] == [
        "samples of step 3",
        "",
        "1 of 1  reward 0.75  advantage -0.5",
        "prompt",
        "  Why?",
        "  Tell me.",
    ]
    assert max(map(cell_len, lines)) <= width
    assert " ".join(" ".join(lines[7:-2]).split()) == " ".join(words)
    assert lines[-2:] == ["", "  [bold]#### 4[/bold]"]


def test_of_long_prompts_the_middle_is_left_out() -> None:
    lines = lines_of([sample("Begin. " + "x" * 5_000 + " How many?", "4")], 80)
    assert "  Begin." in lines
    assert "(4,617 characters left out)" in " ".join(line.strip() for line in lines)
    assert any(line.endswith("x How many?") for line in lines)


def test_of_an_answer_without_end_both_ends_stay() -> None:
    lines = lines_of([sample("?", "first " + "y" * 100_000 + " #### 7")], 80)
    assert lines[-1].endswith(" #### 7")
    assert "  first" in lines
    assert sum(map(len, lines)) < 25_000


def test_samples_of_one_prompt_have_it_once_and_numbers_their_names() -> None:
    lines = lines_of([sample("2+2?", "4", right=1.0, form=None), sample("2+2?", ""), sample("3+3?", "6")], 40)
    assert lines.count("prompt") == 2
    assert lines.count("answer") == 3
    assert "  (no text)" in lines
    assert lines[2:4] == ["1 of 3  reward 0.75  right 1  form none", "  advantage -0.5"]


def test_nothing_in_a_sample_acts_on_the_terminal() -> None:
    text = "\n".join(lines_of([sample("\x1b[2Jgone \u202e", "日本\x00\udcff", **{"\x1b[31mname": 1.0})], 40))
    assert "\x1b" not in text
    assert "\x00" not in text
    assert "\u202e" not in text
    assert r"\x1b[2Jgone" in text
    assert r"日本\x00\udcff" in text
