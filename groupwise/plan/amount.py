"""How much a run samples and learns, from its rows, epochs and steps."""

from __future__ import annotations

from dataclasses import dataclass

from groupwise.plan.facts import Load


@dataclass(frozen=True, slots=True)
class Amount:
    """Of the whole run. Tokens are those of completions of the planned length.

    Attributes:
        epochs: passes over the data.
        evaluations: how often the held-out rows are sampled.
        eval_samples: of one evaluation.

    Example:
        7,473 rows, 300 steps of 32 prompts with 8 samples of 512 tokens: 9,600 prompts, 76,800 samples, 39,321,600
        tokens, 1.28 epochs
    """

    rows: int
    steps: int
    epochs: float
    prompts: int
    samples: int
    tokens: int
    prompt_tokens: int
    evaluations: int
    eval_samples: int


def find_amount(
    load: Load, *, rows: int, steps: int, every: int, at_start: bool, eval_rows: int, eval_samples: int
) -> Amount:
    """Count it.

    Args:
        rows: that become prompts.
        every, at_start: when evaluations are, as in `eval`.
        eval_rows, eval_samples: held-out rows, and completions of each.
    """
    evaluations = 0
    if every and eval_rows:
        evaluations = int(at_start) + steps // every + int(steps % every != 0)
    prompts = steps * load.prompts
    return Amount(
        rows=rows,
        steps=steps,
        epochs=prompts / rows,
        prompts=prompts,
        samples=prompts * load.group,
        tokens=prompts * load.group * load.answer,
        prompt_tokens=prompts * load.prompt,
        evaluations=evaluations,
        eval_samples=eval_rows * eval_samples if evaluations else 0,
    )
