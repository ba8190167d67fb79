"""Messages to text and tokens, and which of those tokens the assistant wrote.

Prompts are rendered as the model will meet them when it answers; conversations for supervised training start with
exactly that prompt, so that what is learned is what is asked later.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from groupwise.errors import ConfigError, DataError, nearest
from groupwise.protocols import Tokenizer
from groupwise.templates import TemplateFault, apply_template
from groupwise.texts import one_line
from groupwise.types import Message

logger = logging.getLogger(__name__)

_RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation split where the assistant first speaks.

    Attributes:
        prompt_ids: `[P]`, all up to the first trained turn, generation prompt included.
        token_ids: `[T]`, the rest, ending with the assistant's end-of-turn token.
        loss_mask: `[T]`, 1 on the tokens that the assistant wrote, end-of-turn included.
        num_untrained_turns: assistant turns without loss, because the template shows them otherwise than they were
            written (as templates do that drop the thoughts of earlier turns).

    Example:
        EncodedConversation(prompt_ids=(1, 5, 9), token_ids=(7, 2), loss_mask=(1, 1))
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    num_untrained_turns: int = 0


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters `start:end` of the rendered conversation that one assistant turn fills."""

    start: int
    end: int


def set_chat_template(tokenizer: Tokenizer, template_or_file: str | Path) -> None:
    """Give the tokenizer a Jinja chat template, or the one in a file.

    Raises:
        ConfigError: the file is missing or not UTF-8, or the template is empty or not valid Jinja.
    """
    given = str(template_or_file)
    inline = isinstance(template_or_file, str) and ("{{" in given or "{%" in given)
    template = given if inline else _template_file(Path(given))
    if not template.strip():
        raise ConfigError("model.chat_template is empty; give a Jinja template, or a file that holds one")
    tokenizer.chat_template = template
    try:
        apply_template(tokenizer, [{"role": "user", "content": "?"}])
    except TemplateFault as fault:
        # A template may refuse this one conversation and still suit the data, whose own rows will tell.
        if fault.hopeless:
            raise ConfigError(f"model.chat_template {fault}") from fault


def _template_file(path: Path) -> str:
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings, '; did you mean "{}"?')
        raise ConfigError(f"model.chat_template is neither a Jinja template nor a file: {path}{near}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template: {path} cannot be read as UTF-8 text: {error}") from error


def check_template(tokenizer: Tokenizer, template_kwargs: Mapping[str, Any]) -> None:
    """Check that messages can be rendered and that every keyword acts.

    Raises:
        ConfigError: there is no chat template, or a keyword is not the user's to set or not known to the template.
    """
    template = tokenizer.chat_template
    if not template:
        raise ConfigError(
            "the data has messages, but the tokenizer has no chat template; set model.chat_template to a Jinja "
            "template or a file that holds one, or give prompts as plain text"
        )
    if not template_kwargs:
        return
    read = _variables_of(str(template.get("default", "")) if isinstance(template, Mapping) else str(template))
    for name in template_kwargs:
        if name in _RESERVED_KWARGS:
            raise ConfigError(f"data.chat_template_kwargs.{name} is decided by Groupwise; remove it")
        if name not in read:
            raise ConfigError(
                f"data.chat_template_kwargs.{name} has no effect: the chat template never reads it; remove it"
                + nearest(name, read, '; did you mean "{}"?')
            )


def check_read(tokenizer: Tokenizer, names: Iterable[str]) -> None:
    """Check that the chat template reads what it is to be given.

    Raises:
        ConfigError: it does not, or there is none.
    """
    template = tokenizer.chat_template
    if not template:
        check_template(tokenizer, {})
    text = str(template.get("default", "")) if isinstance(template, Mapping) else str(template)
    if unread := sorted(set(names) - _variables_of(text)):
        raise ConfigError(f"the model's chat template has no place for {', '.join(unread)}; leave it out")


@lru_cache(maxsize=8)
def _variables_of(template: str) -> set[str]:
    """The variables that a template takes from outside; words in its comments and texts are none."""
    import jinja2
    from jinja2 import meta
    from jinja2.ext import Extension

    class Generation(Extension):
        """transformers' tag around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation])
    try:
        return meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as the model sees it when it is about to answer.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: the template refuses these messages; the caller knows the row's place.
    """
    if not tokenizer.chat_template:
        check_template(tokenizer, {})
    try:
        return apply_template(
            tokenizer, messages, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
        )
    except TemplateFault as fault:
        if fault.hopeless:
            raise ConfigError(f"the chat template {fault}; set model.chat_template to another") from fault
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(f"the chat template refuses a conversation of {one_line(roles)}: {fault}") from fault


def encode_rendered(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """`[P]` tokens of rendered chat text. The template wrote the special tokens, so none are added."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


_TURN = "turnwrittenhere"


def encode_answer(
    messages: Sequence[Message], tokenizer: Tokenizer, *, template_kwargs: Mapping[str, Any], last_token: int
) -> tuple[tuple[int, ...], str]:
    """Tokens and text of messages that answer the assistant's turn, up to where it is to speak again.

    They are what the template writes after a turn, whatever was said before: the conversation is not rendered again.

    Args:
        last_token: of the turn; if it is the template's end of a turn already, that is not written twice.

    Raises:
        DataError: the template refuses such messages, or does not show a turn's text before them.
    """
    spoken = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN}]
    answer = [dict(message) for message in messages]
    whole = render([*spoken, *answer], tokenizer, template_kwargs=template_kwargs)
    _, turn, after = whole.rpartition(_TURN)
    if not turn:
        raise DataError("the chat template does not show the assistant's turn before an answer; use another template")
    end = tokenizer.decode([last_token], skip_special_tokens=False)
    if end and after.startswith(end):
        after = after[len(end) :]
    return encode_rendered(after, tokenizer), after


def encode_going_on(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """`[S]` tokens of a text in the middle of another; some tokenizers put a space in front of a text that stands
    alone."""
    before = encode_rendered(">", tokenizer)
    return _after(before, encode_rendered(f">{text}", tokenizer)) or encode_rendered(text, tokenizer)


def encode_text(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """`[P]` tokens of a plain-text prompt, with the tokenizer's own beginning-of-sequence token.

    A text that begins with that token already, as rendered chats do, gets no second one. What the tokenizer appends,
    an end-of-sequence token mostly, is taken off: nothing would be left to continue.
    """
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=True))
    bare = tuple(tokenizer.encode(text, add_special_tokens=False))
    added = len(token_ids) - len(bare)
    start = next((i for i in range(added + 1) if token_ids[i : i + len(bare)] == bare), None) if bare else None
    if start is None:  # no text, or one that special tokens change
        return token_ids[:-1] if added > 0 and token_ids[-1] == tokenizer.eos_token_id else token_ids
    prefix = token_ids[:start]
    return bare if bare[:start] == prefix else (*prefix, *bare)


def say_missing_start(token_ids: Sequence[int] | None, tokenizer: Tokenizer) -> None:
    """Warn where a rendered prompt lacks what the tokenizer puts before any text.

    Args:
        token_ids: of one rendered prompt; None where there is none.
    """
    plain, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    prefix = full[: len(full) - len(plain)] if plain and full[-len(plain) :] == plain else []
    if token_ids is not None and prefix and list(token_ids[: len(prefix)]) != prefix:
        logger.warning(
            "the chat template begins without %s, which the tokenizer puts before plain texts: prompts are as the "
            "template writes them; if the model was trained with it, put it into model.chat_template",
            tokenizer.decode(prefix, skip_special_tokens=False),
        )


def encode_text_pair(prompt: str, completion: str, *, tokenizer: Tokenizer) -> EncodedConversation:
    """A plain prompt and its plain completion, which the end-of-sequence token closes.

    Raises:
        ConfigError: the tokenizer has no end-of-sequence token.
    """
    prompt_ids = encode_text(prompt, tokenizer)
    whole = encode_text(prompt + completion, tokenizer)
    token_ids = _after(prompt_ids, whole) or encode_rendered(completion, tokenizer)
    eos = _end_of_sequence(tokenizer)
    if token_ids[-1:] != (eos,):
        token_ids = (*token_ids, eos)
    return EncodedConversation(prompt_ids, token_ids, (1,) * len(token_ids))


def encode_whole_text(text: str, tokenizer: Tokenizer) -> EncodedConversation:
    """A text that is learned from its second token on; the end-of-sequence token closes it.

    Special tokens that the text holds, as rendered chats do, are not added a second time.

    Raises:
        ConfigError: the tokenizer has no end-of-sequence token.
    """
    token_ids = encode_text(text, tokenizer)
    eos = _end_of_sequence(tokenizer)
    if eos not in token_ids[-2:]:  # a template may write a line end after it
        token_ids = (*token_ids, eos)
    return EncodedConversation(token_ids[:1], token_ids[1:], (1,) * (len(token_ids) - 1))


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    template_kwargs: Mapping[str, Any],
    num_context: int = 0,
) -> EncodedConversation:
    """Tokens of a conversation, with loss on the assistant's alone.

    Turns are found by rendering prefixes: what the template adds when the assistant is about to speak, up to what it
    has added once the assistant spoke. Text between two turns gets no loss, nor do turns among the first `num_context`
    messages, nor earlier turns that the template rewrites later on.

    Raises:
        ConfigError: there is no chat template, or it writes no end of turn and the tokenizer has no end token.
        DataError: the last message is not the assistant's, or the template rewrites even the last turn's prompt.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError("the conversation does not end with a message of the assistant; there is nothing to learn")
    full = render(messages, tokenizer, template_kwargs=template_kwargs, add_generation_prompt=False)
    turns = [i for i, message in enumerate(messages) if i >= num_context and message["role"] == "assistant"]
    found = {i: _turn_span(messages, i, full=full, tokenizer=tokenizer, template_kwargs=template_kwargs) for i in turns}
    spans = [span for span in found.values() if span is not None]
    if found[turns[-1]] is None:
        raise DataError(
            "the chat template does not show the last answer after the prompt it writes for it, so the answer's tokens "
            "cannot be told apart; set model.chat_template to one whose prompt is the beginning of the conversation"
        )
    encoded = _encode_spans(full, spans, tokenizer=tokenizer, num_untrained_turns=len(turns) - len(spans))
    if _wrote_end(full[spans[-1].start : spans[-1].end], messages[-1]["content"]):
        return encoded
    eos = _end_of_sequence(tokenizer)
    if encoded.token_ids[-1:] == (eos,):
        return encoded
    return replace(encoded, token_ids=(*encoded.token_ids, eos), loss_mask=(*encoded.loss_mask, 1))


def _turn_span(
    messages: Sequence[Message], i: int, *, full: str, tokenizer: Tokenizer, template_kwargs: Mapping[str, Any]
) -> _Span | None:
    """Where turn `i` stands in the whole rendering, or None when the template renders it differently there."""
    if i == 0:
        raise DataError("the conversation begins with the assistant; expected a message to answer first")
    before = render(messages[:i], tokenizer, template_kwargs=template_kwargs)
    after = full
    if i < len(messages) - 1:
        after = render(messages[: i + 1], tokenizer, template_kwargs=template_kwargs, add_generation_prompt=False)
    if not full.startswith(after) or not after.startswith(before) or len(after) == len(before):
        return None
    written = after[len(before) :]
    # White space after an end-of-turn token is the template's, and no model ever samples it.
    if _wrote_end(written, messages[i]["content"]):
        written = written.rstrip()
    return _Span(len(before), len(before) + len(written))


def _wrote_end(written: str, content: str) -> bool:
    """Whether the template put an end-of-turn mark after the content."""
    # Templates trim and reshape content, but its last line stays in one piece.
    last_line = content.strip().rsplit("\n", 1)[-1].strip()
    return not written.rstrip().endswith(last_line)


def _encode_spans(
    full: str, spans: Sequence[_Span], *, tokenizer: Tokenizer, num_untrained_turns: int
) -> EncodedConversation:
    prompt_ids = encode_rendered(full[: spans[0].start], tokenizer)
    token_ids: tuple[int, ...] = ()
    loss_mask: tuple[int, ...] = ()
    position = spans[0].start
    for span in spans:
        for end, loss in ((span.start, 0), (span.end, 1)):
            if end > position:
                piece = _continue(
                    (*prompt_ids, *token_ids), full[position:end], whole_text=full[:end], tokenizer=tokenizer
                )
                token_ids, loss_mask = (*token_ids, *piece), (*loss_mask, *(loss,) * len(piece))
                position = end
    return EncodedConversation(prompt_ids, token_ids, loss_mask, num_untrained_turns)


def _continue(so_far: tuple[int, ...], piece: str, *, whole_text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    # The piece is encoded in its place, since some tokenizers add a space in front of any text. Where the encoding of
    # the whole merges over the border, it is encoded alone: when sampling, too, the prompt's tokens are fixed first.
    return _after(so_far, encode_rendered(whole_text, tokenizer)) or encode_rendered(piece, tokenizer)


def _after(prefix: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
    return whole[len(prefix) :] if whole[: len(prefix)] == prefix else ()


def _end_of_sequence(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "nothing ends the answers: the tokenizer has no end-of-sequence token and the chat template writes none; "
            "use the tokenizer that belongs to the model, or a model.chat_template that closes the assistant's turns"
        )
    return tokenizer.eos_token_id
