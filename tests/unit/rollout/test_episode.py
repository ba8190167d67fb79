"""Episodes over a scripted sampler: budgets, failures, rewards, and what follows the prompt as one stretch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from groupwise.environments import Environments
from groupwise.inputs import ModelInput, SampleKey
from groupwise.metrics import resolve
from groupwise.quickstart.tiny_model import build_tokenizer
from groupwise.rewards import RewardScorer
from groupwise.rollout.batch import batch_metrics
from groupwise.rollout.episode import run_group
from groupwise.types import (
    Completion,
    Done,
    FinishReason,
    Message,
    Prompt,
    Reply,
    RolloutGroup,
    SampleRequest,
    SamplingParams,
    Segment,
)

TOKENIZER: Any = build_tokenizer(["one two"], 270)
PROMPT = Prompt("p", ({"role": "user", "content": "count"},), "count", ModelInput.of((9, 8)))
PLAIN = Prompt("p", (), "count", ModelInput.of((9, 8)))


class Scripted:
    """Draws three tokens a turn, whatever is asked, and keeps what was."""

    def __init__(self, reasons: Callable[[SampleRequest], FinishReason] = lambda request: "stop") -> None:
        self.asked: list[SampleRequest] = []
        self._reasons = reasons

    async def __call__(self, request: SampleRequest) -> Completion:
        self.asked.append(request)
        await asyncio.sleep(0)
        place = len(request.continues)
        tokens = tuple(30 + place + i for i in range(min(3, request.sampling.max_tokens)))
        logprobs = tuple(-0.1 * (place + i + 1) for i in range(len(tokens)))
        reason = self._reasons(request)
        error = "out of memory" if reason == "error" else ""
        return Completion(request.key, tokens, logprobs, (5,) * len(tokens), f"turn{place} ", reason, error)


class Counter:
    """Replies twice, then says Done; what it does in a turn can be replaced."""

    made: list[Counter]

    def __init__(self, answer: Callable[[int, Segment], Any] | None = None, begin: Any = None) -> None:
        self.turns = 0
        self.closed = 0
        self._answer = answer
        self._begin = begin

    async def begin(self, prompt: Prompt, key: SampleKey) -> Sequence[Message] | None:
        self.key = key
        return self._begin() if self._begin else None

    async def answer(self, turn: Segment) -> Reply | Done:
        self.turns += 1
        if self._answer is not None:
            return self._answer(self.turns, turn)
        return Reply(text=f"[{self.turns}]") if self.turns < 3 else Done()

    async def close(self) -> None:
        self.closed += 1


def environments(answer: Any = None, begin: Any = None, **settings: Any) -> tuple[Environments, list[Counter]]:
    made: list[Counter] = []

    def make() -> Counter:
        made.append(Counter(answer, begin))
        return made[-1]

    return Environments(make, TOKENIZER, **({"max_turns": 8, "timeout": 2.0, "name": "mine"} | settings)), made


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def run(
    held: Environments,
    sampler: Scripted | None = None,
    *,
    prompt: Prompt = PROMPT,
    count: int = 2,
    rewards: Sequence[Any] = (length,),
    **sampling: Any,
) -> RolloutGroup:
    params = SamplingParams(**({"max_tokens": 100} | sampling))  # pyright: ignore[reportArgumentType]
    keys = [SampleKey("p", 1, i) for i in range(count)]
    scorer = RewardScorer([], functions=rewards, required=False)
    return asyncio.run(run_group(sampler or Scripted(), scorer, held, prompt, keys=keys, sampling=params, version=5))


def test_turns_and_answers_are_one_stretch() -> None:
    held, made = environments()
    sampler = Scripted()
    rollout = run(held, sampler, count=1).rollouts[0]
    one, two = TOKENIZER.encode("[1]"), TOKENIZER.encode("[2]")
    assert [s.by for s in rollout.segments] == ["model", "environment", "model", "environment", "model"]
    assert rollout.token_ids[:3] == (30, 31, 32)
    assert list(rollout.token_ids[3 : 3 + len(one)]) == one
    assert rollout.loss_mask == (*[1] * 3, *[0] * len(one), *[1] * 3, *[0] * len(two), *[1] * 3)
    assert rollout.num_written == 9
    assert rollout.logprobs[3 : 3 + len(one)] == (0.0,) * len(one)
    assert set(rollout.policy_versions) == {5}
    assert [len(request.continues) for request in sampler.asked] == [0, 3 + len(one), 6 + len(one) + len(two)]
    assert all(request.continues.token_ids == rollout.token_ids[: len(request.continues)] for request in sampler.asked)
    assert rollout.text == f"turn0 [1]turn{3 + len(one)} [2]turn{6 + len(one) + len(two)} "
    assert (rollout.finish_reason, rollout.reward, made[0].closed) == ("stop", float(len(rollout.token_ids)), 1)
    assert made[0].key == SampleKey("p", 1, 0)


def test_rewards_get_the_whole_conversation() -> None:
    seen: list[Any] = []

    def watch(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    def answer(turn: int, _: Segment) -> Reply | Done:
        if turn == 1:
            return Reply(text="<23>")
        return Reply(messages=({"role": "tool", "content": "cold"},)) if turn == 2 else Done()

    held, _ = environments(answer)
    TOKENIZER.chat_template = TEMPLATE
    run(held, count=1, rewards=[watch])
    assert [message["role"] for message in seen[0]] == ["assistant", "tool", "assistant"]
    assert seen[0][0]["content"].startswith("turn0 <23>turn")
    assert seen[0][1]["content"] == "cold"


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_messages_are_rendered_as_what_follows_the_turn() -> None:
    TOKENIZER.chat_template = TEMPLATE
    held, _ = environments(lambda turn, _: Reply(messages=({"role": "tool", "content": "7"},)) if turn == 1 else Done())
    rollout = run(held, count=1).rollouts[0]
    assert TOKENIZER.decode(rollout.segments[1].token_ids) == "<end><tool>7<end><assistant>"
    assert rollout.segments[1].messages == ({"role": "tool", "content": "7"},)


def test_messages_after_plain_text_are_the_users_to_mend() -> None:
    held, _ = environments(lambda turn, _: Reply(messages=({"role": "tool", "content": "7"},)))
    with pytest.raises(Exception, match=r"row 'p'.*answer with Reply\(text=…\)"):
        run(held, prompt=PLAIN)


def test_a_beginning_changes_the_samples_own_prompt() -> None:
    TOKENIZER.chat_template = TEMPLATE
    held, _ = environments(lambda *_: Done(), begin=lambda: [{"role": "user", "content": "level 3"}])
    sampler = Scripted()
    rollout = run(held, sampler, count=1).rollouts[0]
    rendered = "<user>count<end><user>level 3<end><assistant>"
    assert rollout.prompt is not None
    assert TOKENIZER.decode(rollout.prompt.token_ids) == rendered
    assert sampler.asked[0].prompt == rollout.prompt


@pytest.mark.parametrize(("turns", "reason"), [(1, "turns"), (2, "turns"), (3, "stop")])
def test_the_budget_of_turns(turns: int, reason: str) -> None:
    held, made = environments(max_turns=turns)
    rollout = run(held, count=1).rollouts[0]
    assert (rollout.finish_reason, rollout.num_turns, rollout.is_cut) == (reason, turns, reason == "turns")
    assert rollout.segments[-1].by == "model"
    assert made[0].closed == 1


def test_the_budget_of_tokens_counts_an_environments_too() -> None:
    size = len(TOKENIZER.encode("[1]"))
    held, _ = environments()
    sampler = Scripted()
    rollout = run(held, sampler, count=1, max_tokens=3 + size).rollouts[0]
    assert (rollout.finish_reason, len(rollout.token_ids)) == ("length", 3)  # no room for a turn after the answer
    sampler = Scripted()
    rollout = run(held, sampler, count=1, max_tokens=4 + size).rollouts[0]
    assert [request.sampling.max_tokens for request in sampler.asked] == [4 + size, 1]
    assert len(rollout.token_ids) == 4 + size


def test_least_tokens_are_those_that_the_model_writes() -> None:
    held, _ = environments()
    sampler = Scripted()
    run(held, sampler, count=1, min_tokens=5)
    assert [request.sampling.min_tokens for request in sampler.asked] == [5, 2, 0]


def test_an_environments_stops_stand_beside_the_users() -> None:
    held, _ = environments(stop=(">>", "!"))
    sampler = Scripted()
    run(held, sampler, count=1, stop=("!", "?"))
    assert sampler.asked[0].sampling.stop == ("!", "?", ">>")


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (lambda *_: 1 / 0, "raised ZeroDivisionError"),
        (lambda *_: "23", "answered with str; expected Reply or Done"),
        (lambda *_: Reply(), "a Reply has messages or a text"),
        (lambda *_: Reply(text="a", reward=float("nan")), "gave the reward nan"),
        (lambda *_: Reply(messages=({"role": "tool"},)), 'has no "content"'),
    ],
)
def test_what_an_environment_does_wrong_is_a_failed_rollout(answer: Any, cause: str) -> None:
    held, made = environments(lambda turn, segment: answer() if turn == 2 else Reply(text="a"))
    group = run(held, count=2)
    for rollout in group.rollouts:
        assert (rollout.status, rollout.boundary, rollout.reward) == ("failed", "environment", None)
        assert cause in rollout.cause
        assert set(rollout.loss_mask) == {0}
        assert [s.by for s in rollout.segments] == ["model", "environment", "model"]
    assert [environment.closed for environment in made] == [1, 1]
    found = resolve(batch_metrics([group]))
    assert (found["rollout/failed"], found["rollout/failed/environment"]) == (2.0, 2.0)


def test_one_that_hangs_takes_no_other_with_it() -> None:
    made: list[Any] = []

    class Hanging(Counter):
        async def answer(self, turn: Segment) -> Reply | Done:
            if self.key.sample_index == 1:
                await asyncio.sleep(60)
            return Done()

    def make() -> Hanging:
        made.append(Hanging())
        return made[-1]

    group = run(Environments(make, TOKENIZER, max_turns=2, timeout=0.1, name="mine"), count=3)
    assert [rollout.status for rollout in group.rollouts] == ["ok", "failed", "ok"]
    assert "no answer within 0.1 s" in group.rollouts[1].cause


def test_a_failed_engine_is_not_the_environments() -> None:
    held, made = environments()
    sampler = Scripted(lambda request: "error" if request.key.sample_index and len(request.continues) else "stop")
    group = run(held, sampler)
    assert [rollout.boundary for rollout in group.rollouts] == [None, "engine"]
    assert group.rollouts[1].cause == "out of memory"
    assert [environment.closed for environment in made] == [1, 1]


def test_environments_are_closed_when_the_run_is_cancelled() -> None:
    held, made = environments(lambda *_: Reply(text="a"), max_turns=10**6)

    async def go() -> None:
        scorer = RewardScorer([], functions=[length])
        keys = [SampleKey("p", 1, i) for i in range(3)]
        params = SamplingParams(max_tokens=10**6)
        work = asyncio.ensure_future(run_group(Scripted(), scorer, held, PROMPT, keys=keys, sampling=params))
        await asyncio.sleep(0.05)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await asyncio.sleep(0.05)

    asyncio.run(go())
    assert [environment.closed for environment in made] == [1, 1, 1]


def test_what_environments_give_is_part_of_the_reward() -> None:
    def answer(turn: int, _: Segment) -> Reply | Done:
        return Reply(text="a", reward=0.5) if turn == 1 else Done(reward=2.0)

    held, _ = environments(answer, weight=0.1)
    rollout = run(held, count=1).rollouts[0]
    assert rollout.rewards == {"length": float(len(rollout.token_ids)), "environment": 2.5}
    assert rollout.reward == pytest.approx(len(rollout.token_ids) + 0.25)
    assert [segment.reward for segment in rollout.segments] == [0.5, None, 2.0]
    alone = run(held, count=1, rewards=()).rollouts[0]
    assert (alone.rewards, alone.reward) == ({"environment": 2.5}, pytest.approx(0.25))


def test_calls_are_counted() -> None:
    held, _ = environments(lambda turn, segment: Reply(text="a") if turn <= 1 else Done())
    found = resolve(batch_metrics([run(held, count=4)]))
    assert found["environment/answers_per_episode"] == 1.0
    assert found["environment/share_of_episodes"] == 1.0
    assert found["environment/tokens_per_episode"] == len(TOKENIZER.encode("a"))
    assert found["completions/mean_length"] == 6.0
