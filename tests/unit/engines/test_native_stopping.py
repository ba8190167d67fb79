"""When completions end, on a real engine: the same sample without limits says where each limit must cut it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from groupwise.engines.native.scheduler import Sample
from groupwise.engines.native.stopping import find_finish
from groupwise.inputs import ModelInput
from groupwise.model.loading import LoadedModel
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

Lab = Any
FREE = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def loaded(lab: Lab) -> LoadedModel:
    return replace(lab.model(), stop_token_ids=())


@pytest.fixture(scope="module")
def free(lab: Lab, loaded: LoadedModel) -> Completion:
    """What the model writes when nothing but the length ends it."""
    return sample(lab, loaded, FREE)


def sample(lab: Lab, loaded: LoadedModel, sampling: SamplingParams) -> Completion:
    (completion,) = lab.run(lab.engine(loaded), [SampleRequest.of(lab.prompt("a", 5), 0, sampling)]).values()
    return completion


def first(tokens: tuple[int, ...], wanted: int, start: int = 0) -> int:
    return tokens.index(wanted, start) + 1


@pytest.mark.parametrize("count", [1, 2, 39])
def test_max_tokens_cuts_and_changes_nothing_before(
    lab: Lab, loaded: LoadedModel, free: Completion, count: int
) -> None:
    short = sample(lab, loaded, replace(FREE, max_tokens=count))
    assert short.finish_reason == free.finish_reason == "length"
    assert len(free.token_ids) == 40
    assert short.token_ids == free.token_ids[:count]
    assert short.logprobs == free.logprobs[:count]
    assert short.policy_versions == (0,) * count
    assert short.text == loaded.decode(short.token_ids)


def test_a_stop_token_ends_and_is_kept(lab: Lab, loaded: LoadedModel, free: Completion) -> None:
    stop = free.token_ids[20]
    ended = sample(lab, loaded, replace(FREE, stop_token_ids=(stop, 99_999)))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: first(free.token_ids, stop)]
    own = sample(lab, replace(loaded, stop_token_ids=(stop,)), FREE)
    assert (own.token_ids, own.finish_reason) == (ended.token_ids, "stop")


def test_a_stop_counts_before_the_length(lab: Lab, loaded: LoadedModel, free: Completion) -> None:
    ended = sample(lab, loaded, SamplingParams(max_tokens=1, stop_token_ids=(free.token_ids[0],)))
    assert ended.finish_reason == "stop"


def test_min_tokens_forbids_stop_tokens_until_then(lab: Lab, loaded: LoadedModel) -> None:
    everything = tuple(range(3, 283))
    ended = sample(lab, loaded, replace(FREE, stop_token_ids=everything, min_tokens=6))
    assert ended.finish_reason == "stop"
    assert len(ended.token_ids) == 7
    assert not set(ended.token_ids[:6]) & set(everything)
    assert set(sample(lab, loaded, replace(FREE, stop_token_ids=everything)).token_ids) & set(everything)


def test_min_tokens_with_stop_tokens_that_the_vocabulary_lacks(lab: Lab, loaded: LoadedModel, free: Completion) -> None:
    odd = sample(lab, loaded, replace(FREE, stop_token_ids=(283, 10**6), min_tokens=5))
    assert odd.token_ids == free.token_ids


def cut_by(loaded: LoadedModel, free: Completion, stop: str, start: int = 0) -> int:
    """How many tokens there are when the text first holds `stop` anew after `start` tokens."""
    for count in range(max(start, 1), len(free.token_ids) + 1):
        before, text = (loaded.decode(free.token_ids[:n]) for n in (count - 1, count))
        if text.count(stop) > before.count(stop):
            return count
    raise AssertionError(f"{stop!r} does not occur")


@pytest.mark.parametrize(("place", "length"), [(3, 1), (10, 2), (10, 5), (0, 3), (25, 9)])
def test_a_stop_string_ends_with_the_token_that_completes_it(
    lab: Lab, loaded: LoadedModel, free: Completion, place: int, length: int
) -> None:
    stop = free.text[place : place + length]
    assert len(stop) == length
    count = cut_by(loaded, free, stop)
    ended = sample(lab, loaded, replace(FREE, stop=("never in there", stop)))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[:count]
    assert stop in ended.text, "the text keeps the stop string"


def written(lab: Lab, text: str, sampling: SamplingParams) -> list[str | None]:
    """The verdict after each token of a text of the tokenizer's own."""
    sample = Sample(SampleRequest.of(Prompt("a", (), "", ModelInput.of((3,))), 0, sampling), outbox=None)  # type: ignore[arg-type]
    model = lab.model()
    verdicts: list[str | None] = []
    for token in lab.tokenizer.encode(text):
        sample.tokens.append(token)
        verdicts.append(find_finish(sample, model))
    return verdicts


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("a b </answer>", "</answer>"),
        ("der Fluß fließt über", "über"),
        ("答えは四十二です", "四十二です"),
        ("so 👩‍👩‍👧 it is 🎉", "🎉"),
        ("line\n\n", "\n\n"),
        ("é", "é"),
    ],
)
def test_stop_strings_of_many_tokens_and_any_script(lab: Lab, text: str, stop: str) -> None:
    verdicts = written(lab, text, SamplingParams(max_tokens=500, stop=(stop,)))
    assert verdicts == [None] * (len(verdicts) - 1) + ["stop"]


def test_an_unfinished_character_is_no_stop(lab: Lab) -> None:
    tokens = lab.tokenizer.encode("日")
    assert len(tokens) == 3
    assert written(lab, "日", SamplingParams(max_tokens=9, stop=("日",))) == [None, None, "stop"]


def test_min_tokens_passes_over_a_stop_string_that_stands_already(lab: Lab) -> None:
    sampling = SamplingParams(max_tokens=500, stop=("xy",), min_tokens=6)
    assert written(lab, "xyabcd", sampling) == [None] * 6
    assert written(lab, "xyabxy", sampling) == [None] * 5 + ["stop"]
    assert written(lab, "xyabcdexy", sampling) == [None] * 8 + ["stop"]


def test_repetition_penalty_counts_prompt_and_completion(lab: Lab, loaded: LoadedModel) -> None:
    """Against transformers: greedy with the same penalty over the whole sequence."""
    import copy

    import torch

    twin = copy.deepcopy(loaded.model)
    twin.set_attn_implementation("eager")
    assert twin.generation_config is not None
    twin.generation_config.eos_token_id = None
    prompt = lab.prompt("a", 5)
    wanted = twin.generate(  # pyright: ignore[reportCallIssue]
        torch.tensor([prompt.token_ids]), do_sample=False, repetition_penalty=1.3, max_new_tokens=25, pad_token_id=0
    )[0, 5:].tolist()
    got = sample(lab, loaded, SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=25))
    assert list(got.token_ids) == wanted
    plain = sample(lab, loaded, SamplingParams(temperature=0.0, max_tokens=25))
    assert plain.token_ids != got.token_ids
