"""`fast_generate`: prompts to answers on the model's own weights, by Groupwise's engine, under vLLM's names."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from groupwise.assembly.session import Session
from groupwise.compat.unsloth.sampling import CompletionOutput, RequestOutput, SamplingParams
from groupwise.config import Config, ModelConfig
from groupwise.config.limits import check_stop_tokens
from groupwise.data import encode_text
from groupwise.errors import ConfigError
from groupwise.inputs import ModelInput
from groupwise.launch import run_async
from groupwise.model.limits import find_limits
from groupwise.model.loading import LoadedModel
from groupwise.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a call.

    Attributes:
        max_tokens: of prompt and answer together.
        gpu_share: of the GPU's memory that weights and caches may take.
        seed: where the program gives none.
        call: this call's number.
    """

    max_tokens: int
    gpu_share: float
    seed: int
    call: int


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt. `text` is None where tokens were given."""

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams


def answer(loaded: LoadedModel, prompts: Any, sampling_params: Any, *, limits: Limits) -> list[RequestOutput]:
    """All answers, in the prompts' order.

    Args:
        prompts: a text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or a list of these.
        sampling_params: one for all, or a list with one for each.

    Raises:
        ConfigError: a prompt is none, or leaves no room for an answer.
    """
    asked = _asked(loaded, prompts, sampling_params)
    for each in asked:
        if not 0 < len(each.token_ids) < limits.max_tokens:
            raise ConfigError(
                f"fast_generate: prompt {each.index} has {len(each.token_ids)} tokens; expected 1 to "
                f"{limits.max_tokens - 1}, less than max_seq_length = {limits.max_tokens}"
            )
        stops = tuple(each.params.stop_token_ids or ())
        check_stop_tokens(stops, find_limits(loaded, ModelConfig()), setting="SamplingParams.stop_token_ids")  # type: ignore[call-arg]
    session = Session(Config.model_validate({"rollout": {"kv_cache_gib": _cache_gib(loaded, limits)}}), loaded)

    async def all_of_them() -> list[RequestOutput]:
        return list(await asyncio.gather(*(_answer(session, loaded, each, limits) for each in asked)))

    return run_async(all_of_them()) if asked else []


async def _answer(session: Session, loaded: LoadedModel, asked: _Asked, limits: Limits) -> RequestOutput:
    params = asked.params
    sampling = params.groupwise(
        room=limits.max_tokens - len(asked.token_ids), seed=limits.seed, own_stop=_own_stop(loaded)
    )
    uid = f"{limits.call}/{asked.index}"
    if params.seed is not None:  # then the prompt alone decides, wherever it stands
        uid = hashlib.sha256(repr(asked.token_ids).encode()).hexdigest()[:16]
    prompt = Prompt(uid=uid, messages=(), text=asked.text or "", input=ModelInput.of(asked.token_ids))
    found = await session.complete(prompt, sampling=sampling, count=params.n)
    outputs = [_output(each, params, loaded) for each in found]
    return RequestOutput(f"{limits.call}-{asked.index}", asked.text, asked.token_ids, tuple(outputs))


def _output(completion: Completion, params: SamplingParams, loaded: LoadedModel) -> CompletionOutput:
    text = completion.text
    if not params.skip_special_tokens:
        text = loaded.tokenizer.decode(list(completion.token_ids), skip_special_tokens=False)
    stopped = completion.finish_reason == "stop"
    places = {stop: text.rfind(stop) for stop in params.stop_texts if stopped and stop in text}
    reason: str | int | None = max(places, key=lambda stop: places[stop], default=None)
    if reason is not None and not params.include_stop_str_in_output:
        text = text[: places[reason]]
    if reason is None and stopped and completion.token_ids[-1] in (params.stop_token_ids or ()):
        reason = completion.token_ids[-1]
    return CompletionOutput(
        index=completion.sample_index,
        text=text,
        token_ids=completion.token_ids,
        cumulative_logprob=math.fsum(completion.logprobs),
        logprobs=None if params.logprobs is None else completion.logprobs,
        finish_reason=completion.finish_reason,
        stop_reason=reason,
    )


def _asked(loaded: LoadedModel, prompts: Any, sampling_params: Any) -> list[_Asked]:
    listed = [prompts] if isinstance(prompts, str | Mapping) else prompts
    if not isinstance(listed, Sequence):
        raise ConfigError(
            f"fast_generate: got a {type(prompts).__name__} for prompts; expected a text or a list of them"
        )
    each = isinstance(sampling_params, list | tuple)
    params = [SamplingParams.of(one) for one in (sampling_params if each else [sampling_params])]
    if each and len(params) != len(listed):
        raise ConfigError(
            f"fast_generate: got {len(params)} sampling_params for {len(listed)} prompts; give one, or as many"
        )
    found: list[_Asked] = []
    for index, prompt in enumerate(listed):
        text, ids = _read(prompt, index)
        if ids is None:
            ids = encode_text(text or "", loaded.tokenizer)
        found.append(_Asked(index, text, tuple(ids), params[index] if each else params[0]))
    return found


def _read(prompt: Any, index: int) -> tuple[str | None, Sequence[int] | None]:
    """A prompt's text, or its tokens."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping) and isinstance(ids := prompt.get("prompt_token_ids"), list | tuple):
        if not all(isinstance(token, int) for token in ids):
            raise ConfigError(f"fast_generate: prompt {index} has the tokens {ids!r:.80}; expected whole numbers")
        return None, ids
    if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
        return prompt["prompt"], None
    raise ConfigError(
        f"fast_generate: prompt {index} is {prompt!r:.80}; expected a text; messages become one by "
        "tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
    )


def _own_stop(loaded: LoadedModel) -> str:
    end = loaded.tokenizer.eos_token_id
    return "" if end is None else loaded.tokenizer.decode([end], skip_special_tokens=False)


def _cache_gib(loaded: LoadedModel, limits: Limits) -> float | None:
    """What the share leaves beside everything that is on the GPU already; the engine's own bound on a CPU."""
    if loaded.device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(loaded.device).total_memory
    left = limits.gpu_share * total - torch.cuda.memory_allocated(loaded.device)
    if left <= 0:
        raise ConfigError(
            f"gpu_memory_utilization = {limits.gpu_share} of {total / 2**30:.0f} GiB leaves nothing beside "
            f"{torch.cuda.memory_allocated(loaded.device) / 2**30:.1f} GiB that are taken; raise it"
        )
    return left / 2**30
