"""A sample that goes on: after a turn of an environment, after an abort, after a prefix that was given."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.batches import TrainingRow
from groupwise.engines.native import NativeEngine
from groupwise.errors import EngineError
from groupwise.inputs import ImagePiece, ImageSource, ModelInput, TokenPiece
from groupwise.model.forward.head import token_scores
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import pack
from groupwise.model.loading import LoadedModel
from groupwise.types import Completion, SampleRequest, SamplingParams

Lab = Any

ANSWERS = ((11, 12, 13), tuple(range(20, 95)), (7,))
"""What environments say after a turn, in tokens; the second one crosses a block."""


def without_stops(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, stop_token_ids=())


def going_on(request: SampleRequest, *said: tuple[int, ...], **changes: Any) -> SampleRequest:
    continues = request.continues
    for tokens in said:
        continues = continues + ModelInput.of(tokens)
    return replace(request, continues=continues, **changes)


def turns(lab: Lab, engine: NativeEngine, requests: list[SampleRequest], count: int) -> list[Rollout]:
    """Every request over `count` turns, with an environment's answer between them."""
    rollouts = [Rollout(request) for request in requests]
    for turn in range(count):
        asked = [rollout.request for rollout in rollouts]
        found = lab.run(engine, asked)
        for index, rollout in enumerate(rollouts):
            rollout.takes(found[rollout.request.id], () if turn == count - 1 else ANSWERS[index % len(ANSWERS)])
    return rollouts


class Rollout:
    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float | None] = []

    def takes(self, completion: Completion, answer: tuple[int, ...]) -> None:
        self.tokens += [*completion.token_ids, *answer]
        self.logprobs += [*completion.logprobs, *[None] * len(answer)]
        self.request = going_on(self.request, completion.token_ids, answer)


def assert_no_mismatch(loaded: LoadedModel, rollouts: list[Rollout]) -> None:
    names = list(dict.fromkeys(rollout.request.prompt for rollout in rollouts))
    rows = [
        TrainingRow(
            names.index(r.request.prompt),
            ModelInput.of(r.request.prompt.token_ids),
            ModelInput.of(tuple(r.tokens)),
            *[(0,) * len(r.tokens)] * 3,
        )
        for r in rollouts
    ]
    packed = pack(rows)
    hidden = packed_hidden_states(loaded.model, packed)[packed.predictors]
    scores = token_scores(loaded.head, hidden, packed.targets, temperature=1.0).logprobs.detach()
    for rollout, wanted in zip(rollouts, scores.split([len(row.token_ids) for row in rows]), strict=True):
        pairs = [(got, want) for got, want in zip(rollout.logprobs, wanted.tolist(), strict=True) if got is not None]
        assert len(pairs) > 5
        assert all(got == want for got, want in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("limit", [1, 7, 64])
def test_later_turns_have_the_trainers_log_probs_to_the_bit(
    lab: Lab, architecture: str, dtype: torch.dtype, limit: int
) -> None:
    loaded = without_stops(lab.model(architecture, dtype=dtype))
    prompts = [lab.prompt("a", 5), lab.prompt("b", 66)]
    requests = lab.requests(prompts, [SamplingParams(max_tokens=count) for count in (9, 3, 12)])
    rollouts = turns(lab, lab.engine(loaded, max_concurrent_samples=limit), requests, 3)
    assert_no_mismatch(loaded, rollouts)


def test_what_comes_later_does_not_depend_on_the_company(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    requests = lab.requests([lab.prompt("a", 5), lab.prompt("b", 66)], [SamplingParams(max_tokens=8)] * 4)
    together = turns(lab, lab.engine(loaded), requests, 2)
    for request, rollout in zip(requests, together, strict=True):
        place = requests.index(request)
        alone = Rollout(request)
        first = lab.run(lab.engine(loaded), [alone.request])[request.id]
        alone.takes(first, ANSWERS[place % len(ANSWERS)])
        alone.takes(lab.run(lab.engine(loaded), [alone.request])[request.id], ())
        assert (alone.tokens, alone.logprobs) == (rollout.tokens, rollout.logprobs)


def test_a_later_turn_has_numbers_of_its_own(lab: Lab) -> None:
    """With numbers of the first turn again, a model that sees the same would say the same."""
    loaded = without_stops(lab.model())
    request = SampleRequest.of(lab.prompt("a", 9), 0, SamplingParams(max_tokens=30, temperature=3.0))
    engine = lab.engine(loaded)
    first = lab.run(engine, [request])[request.id]
    second = lab.run(engine, [going_on(request, first.token_ids)])[request.id]
    long = lab.run(engine, [replace(request, sampling=replace(request.sampling, max_tokens=60))])[request.id]
    assert first.token_ids + second.token_ids == long.token_ids
    assert first.logprobs + second.logprobs == long.logprobs


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=40),
        SamplingParams(max_tokens=40, top_k=20, repetition_penalty=1.3),
        SamplingParams(max_tokens=40, min_tokens=25, stop=("e", "o")),
        SamplingParams(max_tokens=40, stop=("three", "six")),
    ],
    ids=["plain", "filtered", "least", "stops"],
)
def test_abort_and_go_on_is_as_if_never_aborted(lab: Lab, sampling: SamplingParams) -> None:
    loaded = lab.model()
    requests = lab.requests([lab.prompt("a", 5), lab.prompt("b", 66)], [sampling] * 5)
    whole = lab.run(lab.engine(loaded), requests)
    ended = 0
    for after in (1, 3, 20):
        engine = lab.engine(loaded, max_concurrent_samples=7)

        async def cut(engine: NativeEngine = engine, after: int = after) -> dict[str, Completion]:
            task = asyncio.ensure_future(lab.collect(engine, requests))
            for _ in range(after):
                await asyncio.sleep(0)
            await engine.abort()
            return await task

        parts = asyncio.run(cut())
        rest = [
            going_on(request, parts[request.id].token_ids, resumed=len(parts[request.id].token_ids))
            for request in requests
            if parts[request.id].finish_reason == "abort"
        ]
        ended += len(rest)
        later = lab.run(engine, rest)
        for request in requests:
            part, more = parts[request.id], later.get(request.id)
            tokens = part.token_ids + (more.token_ids if more else ())
            logprobs = part.logprobs + (more.logprobs if more else ())
            wanted = whole[request.id]
            assert (tokens, logprobs) == (wanted.token_ids, wanted.logprobs)
            assert (more or part).finish_reason == wanted.finish_reason
    assert ended > 10


def test_a_forced_prefix_is_not_drawn(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    request = going_on(SampleRequest.of(lab.prompt("a", 9), 0, SamplingParams(max_tokens=6)), (5, 6, 7))
    done = lab.run(lab.engine(loaded), [request])[request.id]
    assert len(done.token_ids) == len(done.logprobs) == len(done.policy_versions) == 6
    assert done.text == loaded.decode(done.token_ids)


def test_least_and_most_tokens_count_for_each_turn(lab: Lab) -> None:
    loaded = lab.model()
    request = SampleRequest.of(lab.prompt("a", 9), 0, SamplingParams(max_tokens=10, min_tokens=10))
    later = going_on(request, tuple(range(30, 50)))
    assert len(lab.run(lab.engine(loaded), [later])[request.id].token_ids) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continues": ModelInput.of((5, 300))}, "has tokens from"),
        ({"continues": ModelInput.of(range(3, 13)), "resumed": 10}, "nothing is left to draw"),
    ],
)
def test_what_cannot_go_on_is_refused(lab: Lab, changes: dict[str, Any], message: str) -> None:
    request = replace(SampleRequest.of(lab.prompt("a", 9), 0, SamplingParams(max_tokens=10)), **changes)
    with pytest.raises(EngineError, match=message):
        lab.run(lab.engine(lab.model()), [request])


def test_too_long_for_the_memory_counts_what_is_given(lab: Lab) -> None:
    loaded = lab.model()
    request = SampleRequest.of(lab.prompt("a", 9), 0, SamplingParams(max_tokens=10))
    small = lab.engine(loaded, kv_cache_gib=128 * 2 * 2 * 2 * 16 * 4 / 2**30)
    assert lab.run(small, [request])
    with pytest.raises(EngineError, match="9 prompt and 110 completion tokens"):
        lab.run(small, [going_on(request, tuple(range(3, 103)))])


def test_equal_tokens_and_other_images_are_other_inputs() -> None:
    source = ImageSource("file", "a.png", 8, 8)
    images = [ImagePiece((9, 9), ((0, 2),), (1, 2, 4), digest, source) for digest in ("5f", "60")]
    text = TokenPiece((1, 2))
    one, two = (ModelInput((text, image)) for image in images)
    assert one.token_ids == two.token_ids == (1, 2, 9, 9)
    assert one != two
    assert one == ModelInput((text, replace(images[0], source=replace(source, place="b.png"))))
    assert ModelInput((text, TokenPiece((9, 9)))) == ModelInput.of((1, 2, 9, 9)) != one
    assert ModelInput.of((12,)) != ModelInput.of((1, 2))


def counting(engine: NativeEngine) -> list[int]:
    """Tokens of each packed pass that the engine makes from now on."""
    passes: list[int] = []
    compute = engine._steps._compute

    def counted(parts: Any, **how: Any) -> Any:
        passes.append(sum(part.num_tokens for part in parts))
        return compute(parts, **how)

    engine._steps._compute = counted  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("limit", [1, 3, 64])
def test_turns_that_take_their_keys_back_have_the_bits_of_those_that_do_not(
    lab: Lab, architecture: str, dtype: torch.dtype, limit: int
) -> None:
    loaded = without_stops(lab.model(architecture, dtype=dtype))
    prompts = [lab.prompt("a", 5), lab.prompt("b", 66)]
    requests = lab.requests(prompts, [SamplingParams(max_tokens=count) for count in (9, 3, 12)])
    keeping = [replace(request, keeps=True) for request in requests]
    expected = turns(lab, lab.engine(loaded, max_concurrent_samples=limit), requests, 3)
    engine = lab.engine(loaded, max_concurrent_samples=limit)
    found = turns(lab, engine, keeping, 3)
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
    assert_no_mismatch(loaded, found)


def test_what_is_kept_is_not_computed_again(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    request = replace(SampleRequest.of(lab.prompt("a", 200), 0, SamplingParams(max_tokens=50)), keeps=True)
    engine = lab.engine(loaded)
    passes = counting(engine)
    rollout = Rollout(request)
    for _ in range(3):
        rollout.takes(lab.run(engine, [rollout.request])[request.id], (11, 12, 13))
    assert passes == [200, 0, 0]
    assert engine._scheduler.kept.size > 0
    asyncio.run(engine.update_weights(0))
    assert engine._scheduler.kept.size == 0
    lab.run(engine, [rollout.request])
    assert passes[3:] == [200 + 200 + len(rollout.tokens)]  # the prompt for its lane, and once more before the sample


@pytest.mark.parametrize("change", ["other tokens", "other prompt", "shorter", "a long answer"])
def test_keys_of_another_text_are_not_taken(lab: Lab, change: str) -> None:
    loaded = without_stops(lab.model())
    request = replace(SampleRequest.of(lab.prompt("a", 30), 0, SamplingParams(max_tokens=20)), keeps=True)
    engine = lab.engine(loaded)
    first = lab.run(engine, [request])[request.id].token_ids
    said = {
        "other tokens": ((5, *first[1:]), (9,)),
        "other prompt": (first, (9,)),
        "shorter": (first[:7], ()),
        "a long answer": (first, tuple(range(20, 100))),
    }[change]
    later = going_on(request, *said)
    if change == "other prompt":
        later = replace(later, prompt=lab.prompt("b", 30).input)
    passes = counting(engine)
    assert lab.run(engine, [later]) == lab.run(lab.engine(loaded), [later])
    assert passes[0] > 30
    assert engine._scheduler.kept.size > 0  # of the later turn


def test_kept_keys_give_way_to_samples_that_run(lab: Lab) -> None:
    """The oldest first, within the bound of memory; nobody waits for them."""
    loaded = without_stops(lab.model())
    shape = lab.engine(loaded)._scheduler.shape
    gib = 1000 * shape.bytes_per_token / 2**30
    engine = lab.engine(loaded, kv_cache_gib=gib)
    scheduler = engine._scheduler
    for index in range(12):
        request = SampleRequest.of(lab.prompt("a", 60), index, SamplingParams(max_tokens=60))
        lab.run(engine, [replace(request, keeps=True)])
        assert scheduler._budget.held(scheduler._caches) + scheduler.kept.size <= 1000
    kept = scheduler.kept
    assert [key.sample_index for key in kept._samples] == list(range(12 - len(kept._samples), 12))
    many = lab.requests([lab.prompt("c", 60)], [SamplingParams(max_tokens=60)] * 12)
    assert lab.run(engine, many) == lab.run(lab.engine(loaded), many)
    assert scheduler._budget.held(scheduler._caches) + kept.size <= 1000


def test_min_tokens_penalty_and_stops_after_kept_keys(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    sampling = SamplingParams(
        max_tokens=12, min_tokens=6, repetition_penalty=1.3, stop_token_ids=tuple(range(20, 90)), temperature=0.9
    )
    request = SampleRequest.of(lab.prompt("a", 30), 0, sampling)
    found: list[list[int]] = []
    for keeps in (False, True):
        engine, rollout = lab.engine(loaded), Rollout(replace(request, keeps=keeps))
        others = lab.requests([lab.prompt("b", 40)], [SamplingParams(max_tokens=30)] * 3)
        for _ in range(3):
            asked = [rollout.request, *others]
            rollout.takes(lab.run(engine, asked)[request.id], (11, 12, 13))
        found.append(rollout.tokens)
    assert found[0] == found[1]
