"""OpenAI's routes: chats and completions, whole or as they are drawn."""

from __future__ import annotations

import asyncio
import json
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from groupwise.data import check_read, encode_rendered, encode_text, render
from groupwise.engines.native.engine import Drawing
from groupwise.errors import GroupwiseError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.protocols import Tokenizer
from groupwise.serve.bodies import ChatBody, CompletionBody, StreamOptions
from groupwise.serve.forms import ChatForm, CompletionForm, Form, Growing, Usage
from groupwise.serve.front import Front, Refusal, unless_gone
from groupwise.serve.served import Served
from groupwise.serve.text import characters, for_template
from groupwise.texts import one_line
from groupwise.types import Completion, SampleRequest

T = TypeVar("T")

_SEEDS = 2**62
_LONG_TEXT = 20_000
"""Characters that are cut into tokens in about ten milliseconds."""

_Part: TypeAlias = tuple[int, Drawing | Completion | BaseException]
_Parts: TypeAlias = asyncio.Queue[_Part]


@dataclass(frozen=True, slots=True)
class _Choice:
    """One sample of the answer."""

    index: int
    request: SampleRequest


class OpenAi:
    """Routes over one model.

    Args:
        most: tokens of an answer for which the client names no bound.
    """

    def __init__(self, served: Served, front: Front, *, most: int) -> None:
        self._served = served
        self._front = front
        self._most = most
        self._longest_token = max(map(len, served.loaded.tokenizer.get_vocab()))

    def routes(self) -> list[Route]:
        """For the application."""
        chat, completion = self._front.route(self._chat, openai=True), self._front.route(self._completion, openai=True)
        return [
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
        ]

    async def _chat(self, request: Request) -> Response:
        body = await self._front.read(request, ChatBody)
        self._check_model(body.model)
        prompt = await self._chat_tokens(body)
        form = ChatForm(self._served.name, self._served.version, body, self._tokenizer)
        return await self._answer(request, form, [prompt], most=body.most_tokens)

    async def _completion(self, request: Request) -> Response:
        body = await self._front.read(request, CompletionBody)
        self._check_model(body.model)
        if (count := len(body.prompts) * body.n) > self._served.max_samples:
            raise Refusal(
                400,
                f"prompt and n ask for {count:,} answers, and this server takes up to "
                f"{self._served.max_samples:,}; ask for fewer at a time",
            )
        prompts = await self._prompt_tokens(body)
        form = CompletionForm(self._served.name, self._served.version, body, self._tokenizer)
        return await self._answer(request, form, prompts, most=body.max_tokens)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._served.loaded.tokenizer

    def _check_model(self, name: str | None) -> None:
        if name and name != self._served.name:
            raise Refusal(
                404,
                f"the model '{one_line(name)}' does not exist here; this server has {self._served.name!r}",
                code="model_not_found",
            )

    async def _chat_tokens(self, body: ChatBody) -> tuple[int, ...]:
        try:
            messages = [for_template(message) for message in body.messages]
        except ValueError as error:
            raise Refusal(400, f"messages: {error}") from error
        kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if tools := body.template_tools:
            kwargs["tools"] = tools
        size = characters([messages, kwargs])
        self._check_size(size)

        def tokens() -> tuple[int, ...]:
            try:
                check_read(self._tokenizer, kwargs)
                text = render(
                    messages,
                    self._tokenizer,
                    template_kwargs=kwargs,
                    add_generation_prompt=body.add_generation_prompt,
                )
            except (GroupwiseError, ValueError, TypeError) as error:
                raise Refusal(400, f"messages: {error}") from error
            self._check_size(len(text))
            return encode_rendered(text, self._tokenizer)

        return await _beside(tokens, size)

    async def _prompt_tokens(self, body: CompletionBody) -> list[tuple[int, ...]]:
        sizes = [len(prompt) if isinstance(prompt, str) else 0 for prompt in body.prompts]
        self._check_size(max(sizes))
        return await _beside(
            lambda: [self._tokens(prompt, special=body.add_special_tokens) for prompt in body.prompts], sum(sizes)
        )

    def _check_size(self, characters: int) -> None:
        """Refuse a text that is too long for the model however it is cut into tokens, before it is cut."""
        positions = self._served.positions
        if positions is not None and characters > positions * self._longest_token:
            raise Refusal(
                400,
                f"the model has {positions} positions; the prompt's {characters:,} characters are too many",
                code="context_length_exceeded",
            )

    def _tokens(self, prompt: str | tuple[int, ...], *, special: bool) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        if special:
            return encode_text(prompt, self._tokenizer)
        return tuple(self._tokenizer.encode(prompt, add_special_tokens=False))

    def _choices(self, form: Form, prompts: Sequence[tuple[int, ...]], *, most: int | None) -> list[_Choice]:
        """One request for each prompt and sample. Without a seed no two answers of the server are alike; with one,
        equal prompts are answered alike, whatever else runs."""
        body, found = form.body, list[_Choice]()
        uid, seed = ("seeded", body.seed) if body.seed is not None else (uuid.uuid4().hex, secrets.randbelow(_SEEDS))
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise Refusal(400, "the prompt has no tokens; give it some text")
            sampling = body.sampling(max_tokens=self._room(prompt, most), seed=seed)
            for sample in range(body.n):
                key = SampleKey(uid, number if body.seed is None else 0, sample)
                asked = SampleRequest(
                    key,
                    ModelInput.of(prompt),
                    sampling,
                    policy_version=self._served.version,
                    likeliest=body.likeliest,
                )
                found.append(_Choice(number * body.n + sample, asked))
        return found

    def _room(self, prompt: Sequence[int], most: int | None) -> int:
        positions = self._served.positions
        if positions is None:
            return most or self._most
        rest = positions - len(prompt)
        if rest < 1 or (most is not None and most > rest):
            asked = f" and {most} of the answer" if most is not None else ""
            raise Refusal(
                400,
                f"the model has {positions} positions; the prompt's {len(prompt)} tokens{asked} are too many",
                code="context_length_exceeded",
            )
        return most or min(rest, self._most)

    async def _answer(
        self, request: Request, form: Form, prompts: Sequence[tuple[int, ...]], *, most: int | None
    ) -> Response:
        choices = self._choices(form, prompts, most=most)
        if form.body.stream:
            parts = self._parts(form, choices, prompts)
            first = await unless_gone(request, anext(parts))  # what is refused is refused with a status
            return StreamingResponse(_with_first(first, parts), media_type="text/event-stream")
        drawn = await unless_gone(request, self._drawn(choices))
        usage = Usage.of(prompts, [len(one.token_ids) for one in drawn])
        return JSONResponse(form.whole(drawn, prompts, usage))

    async def _drawn(self, choices: Sequence[_Choice]) -> list[Completion]:
        running = [asyncio.ensure_future(self._served.draw(choice.request)) for choice in choices]
        try:
            return list(await asyncio.gather(*running))
        finally:
            for one in running:
                one.cancel()

    async def _parts(
        self, form: Form, choices: Sequence[_Choice], prompts: Sequence[tuple[int, ...]]
    ) -> AsyncIterator[str]:
        """Server-sent events; closing it ends the samples."""
        queue: _Parts = asyncio.Queue()
        running = [asyncio.ensure_future(self._feed(choice, queue)) for choice in choices]
        options = form.body.stream_options or StreamOptions()
        counts, whole = [0] * len(choices), 0
        try:
            first = await queue.get()
            if isinstance(first[1], BaseException):
                raise first[1]
            for number in range(len(choices)):
                for chunk in form.begin(number, prompts[number // form.body.n]):
                    yield _event(chunk)
            written = [form.growing() for _ in choices]
            async for index, part in _until_all(first, queue, len(choices)):
                if not isinstance(part, BaseException):
                    counts[index] = len(part.token_ids) + (counts[index] if isinstance(part, Drawing) else 0)
                whole += isinstance(part, Completion)
                so_far = {"usage": Usage.of(prompts, counts).json} if options.continuous_usage_stats else {}
                for chunk in _said(form, index, written[index], part):
                    yield _event({**chunk, **so_far})
            if whole == len(choices) and options.include_usage:
                yield _event(form.usage(Usage.of(prompts, counts)))
            yield "data: [DONE]\n\n"
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _feed(self, choice: _Choice, queue: _Parts) -> None:
        stream = self._served.stream(choice.request)
        try:
            async for part in stream:
                queue.put_nowait((choice.index, part))
        except Exception as error:  # noqa: BLE001 - the reader of the queue raises it
            queue.put_nowait((choice.index, error))
        finally:
            await stream.aclose()


async def _beside(work: Callable[[], T], size: int) -> T:
    """In a thread where a text of this size would keep the other clients waiting."""
    return await asyncio.to_thread(work) if size > _LONG_TEXT else work()


async def _until_all(first: _Part, queue: _Parts, count: int) -> AsyncIterator[_Part]:
    """Parts until each choice is whole, or one failed."""
    part, left = first, count
    while True:
        yield part
        left -= isinstance(part[1], Completion)
        if not left or isinstance(part[1], BaseException):
            return
        part = await queue.get()


def _said(
    form: Form, index: int, growing: Growing, part: Drawing | Completion | BaseException
) -> Iterator[Mapping[str, Any]]:
    if isinstance(part, BaseException):
        yield {"error": {"message": str(part), "type": "server_error", "code": None}}
    elif isinstance(part, Completion):
        yield from form.end(index, growing, part)
    else:
        yield from form.part(index, growing, part)


async def _with_first(first: str, parts: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for part in parts:
            yield part
    finally:
        await cast(Any, parts).aclose()


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
