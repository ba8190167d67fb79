'''Rewards: from a group's completions to one number each.

A reward is a plain function. It gets all G completions of one prompt in one call and returns one number per completion,
or None where it has nothing to say. Arguments are given by name, and only those that the function names:

    prompts         list of message lists, or of strings when the data has text prompts; G times the same one
    completions     list of `[{"role": "assistant", "content": text}]`, or of strings when the data has text prompts
    completion_ids  list of token-id lists
    rendered_prompts  list of the prompt's text as the model saw it, G times; only for functions that name it
    <column>        list of that column's value, one entry per completion; `**columns` gets every column

Example, `my_rewards.py`:

    from groupwise.rewards import completion_texts

    def says_please(completions, **columns):
        """1 for a polite completion."""
        return [1.0 if "please" in text.lower() else 0.0 for text in completion_texts(completions)]

    def close_to(completions, answer, scale=10.0):
        """1 at the reference number, falling to 0; None when the text is no number."""
        rewards = []
        for text, truth in zip(completion_texts(completions), answer, strict=True):
            try:
                rewards.append(max(0.0, 1.0 - abs(float(text) - float(truth)) / scale))
            except ValueError:
                rewards.append(None)
        return rewards

Use it with `--reward my_rewards.py:close_to`, or in a recipe:

    [[reward]]
    name = "my_rewards.py:close_to"
    weight = 0.5
    args = { scale = 20.0 }

Test it like any function, before any model is loaded:

    def test_close_to():
        assert close_to(["15", "no idea"], answer=["10", "10"]) == [0.5, None]

What the scorer promises: a reward that raises, hangs, or returns something that is no reward does what `on_error` says
and never changes the score of another. What a call is given is its own to change. A sync reward runs in a thread of its
own, one call at a time, so it needs no locks; declare it `async` when calls should overlap (a judge behind HTTP, say).
A call that outlives `timeout` is abandoned, or killed where the reward has a process (`isolated = true`, or by itself
where it turns out to need a main thread). Python cannot abandon C code that keeps the interpreter's lock: give such a
function a process.
'''

from __future__ import annotations

from groupwise.rewards.loading import LoadedReward, load_reward
from groupwise.rewards.registry import reward_for, reward_names
from groupwise.rewards.scorer import RewardScorer, Score
from groupwise.rewards.texts import completion_texts

__all__ = ["LoadedReward", "RewardScorer", "Score", "completion_texts", "load_reward", "reward_for", "reward_names"]
