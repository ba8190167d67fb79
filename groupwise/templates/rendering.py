"""A chat template applied to messages: the boundary where whatever a template raises becomes a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from groupwise.protocols import Tokenizer
from groupwise.templates.bounded import TemplateLimitError, limited
from groupwise.texts import encodable, one_line
from groupwise.types import Message


class TemplateFault(ValueError):
    """A template did not render; the message goes on after "the chat template".

    Attributes:
        hopeless: it renders no other conversation either: it is no Jinja, or does more than it may.
    """

    def __init__(self, message: str, *, hopeless: bool) -> None:
        super().__init__(message)
        self.hopeless = hopeless


def apply_template(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that the tokenizer's own template makes of the messages, within the limits of `bounded.py`.

    Raises:
        TemplateFault: it makes none.
    """
    template = tokenizer.chat_template
    try:
        with limited(template if isinstance(template, str) else ""):
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(template_kwargs or {}),
            )
    except Exception as error:
        raise _fault(error) from error
    if not isinstance(text, str):
        raise TemplateFault(f"gave {type(text).__name__}, expected text", hopeless=True)
    if encodable(text) != text:
        raise TemplateFault(
            f"it writes half a surrogate pair, which no tokenizer takes: {one_line(text)}", hopeless=False
        )
    return text


def _fault(error: Exception) -> TemplateFault:
    import jinja2

    said = one_line(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, TemplateLimitError):
        return TemplateFault(f"does more than it may: {said}", hopeless=True)
    if isinstance(error, jinja2.TemplateSyntaxError):
        return TemplateFault(f"is not valid Jinja: line {error.lineno}: {said}", hopeless=True)
    if isinstance(error, SyntaxError):  # what Jinja lets pass, and Python does not
        return TemplateFault(f"is not valid Jinja: {one_line(error.msg)}", hopeless=True)
    if isinstance(error, RecursionError):
        return TemplateFault("is nested too deeply, or calls itself without end", hopeless=True)
    if isinstance(error, MemoryError):
        return TemplateFault("does more than it may: it fills the memory, or is nested too deeply", hopeless=True)
    named = said if isinstance(error, jinja2.TemplateError | ValueError) else f"{type(error).__name__}: {said}"
    return TemplateFault(named, hopeless=False)
