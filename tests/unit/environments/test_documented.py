"""The environment that the documentation shows, played on its own data."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

from groupwise.environments import Environments
from groupwise.inputs import ModelInput, SampleKey
from groupwise.quickstart.tiny_model import build_tokenizer
from groupwise.rewards import RewardScorer
from groupwise.rollout.episode import run_group
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

PAGE = Path(__file__).parents[3] / "docs" / "environments.md"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_pages_environment_plays() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    tokenizer: Any = build_tokenizer(["one two"], 270)
    tokenizer.chat_template = TEMPLATE
    guesses = iter(["I say 50", "75?", "62"])

    async def sample(request: SampleRequest) -> Completion:
        return Completion(request.key, (30, 31), (-0.1, -0.2), (0, 0), next(guesses), "stop")

    prompt = Prompt(
        "p", ({"role": "user", "content": "guess"},), "guess", ModelInput.of((9,)), columns={"number": "62"}
    )
    held = Environments(names["Guess"], tokenizer, max_turns=6, name="guess")
    scorer = RewardScorer([], required=False)
    params = SamplingParams(max_tokens=500)
    group = asyncio.run(run_group(sample, scorer, held, prompt, keys=[SampleKey("p", 0, 0)], sampling=params))
    rollout = group.rollouts[0]
    said = [message["content"] for segment in rollout.segments for message in segment.messages]
    assert said == ["higher", "lower"]
    assert rollout.reward == 1 / 3
