"""An Ollama Modelfile for a GGUF: where the weights are, how a conversation is rendered, and what ends an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.errors import ConfigError
from groupwise.files import write_text_atomic
from groupwise.templates import apply_template
from groupwise.texts import one_line
from groupwise.types import Message

_ROLES = ("system", "user", "assistant")
_MARKS = {role: f"\ue000{role}\ue000" for role in _ROLES}
_TALKS = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))
_QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class TurnTemplate:
    """A chat template that is nothing but text before and after each message.

    Attributes:
        before, after: by role.
        opening: what begins the assistant's answer.
        first: what stands before everything, such as a token that begins every text.
    """

    first: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    opening: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        turns = (f"{self.before[m['role']]}{m['content']}{self.after[m['role']]}" for m in messages)
        return f"{self.first}{''.join(turns)}{self.opening}"

    def go_template(self) -> str:
        """In the language of Ollama's templates (Go's text/template).

        The first token is left out: the reader of the GGUF puts it there.
        """
        branches = "".join(
            f'{{{{ {"if" if index == 0 else "else if"} eq .Role "{role}" }}}}'
            f"{_as_go(self.before[role])}{{{{ .Content }}}}{_as_go(self.after[role])}"
            for index, role in enumerate(_ROLES)
        )
        return f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{_as_go(self.opening)}"


def write_modelfile(
    out: str | Path, *, gguf_file: str | Path, tokenizer: Any, stops: Sequence[str], base_gguf: str | Path | None = None
) -> str:
    """Write the Modelfile; returns its text. `ollama create NAME -f FILE` reads it.

    Args:
        stops: texts that end an answer.
        base_gguf: of a GGUF adapter: the file that it goes on top of.

    Raises:
        ConfigError: the GGUF file is not there.
    """
    place = Path(out)
    for file in (gguf_file, base_gguf):
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"{file}: no such file; write it with `groupwise export gguf` first")
    lines = [f"FROM {_seen_from(place, base_gguf or gguf_file)}"]
    if base_gguf is not None:
        lines.append(f"ADAPTER {_seen_from(place, gguf_file)}")
    template = find_turns(tokenizer)
    framed = None if template is None else _quoted(template.go_template())
    if framed is not None:
        lines.append(f"TEMPLATE {framed}")
    else:
        lines.append("# No TEMPLATE: the chat template does more than frame each message; the GGUF file holds it.")
    written = [(stop, _quoted_stop(stop)) for stop in stops]
    lines += [f"PARAMETER stop {quoted}" for _, quoted in written if quoted is not None]
    if lost := sum(quoted is None for _, quoted in written):
        lines.append(f"# {lost} stop text(s) left out: a Modelfile cannot say them; the GGUF file holds the tokens.")
    text = "\n".join(lines) + "\n"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(place, text)
    return text


def find_turns(tokenizer: Any) -> TurnTemplate | None:
    """The frame of each message, found by rendering marks; None where rendering is more than a frame."""
    if not tokenizer.chat_template:
        return None
    try:
        found = _cut(tokenizer)
        return found if found is not None and all(_agrees(found, tokenizer, talk) for talk in _TALKS) else None
    except Exception:  # noqa: BLE001 - a template is a program; one that refuses a system message, say, is no frame
        return None


def rendered(tokenizer: Any, messages: Sequence[Message], *, opening: bool) -> str:
    """The messages in the tokenizer's template, with `opening` up to where the assistant answers."""
    return apply_template(tokenizer, list(messages), add_generation_prompt=opening)


def _cut(tokenizer: Any) -> TurnTemplate | None:
    """Cut renderings at the marks; whatever is cut wrongly does not agree with the template later."""
    system, user, assistant = ({"role": role, "content": _MARKS[role]} for role in _ROLES)
    start, user_answer, answer_user, end = _pieces(tokenizer, [user, assistant, user])
    system_start, system_user, _ = _pieces(tokenizer, [system, user])
    alone = rendered(tokenizer, [user], opening=False)
    first = tokenizer.bos_token if tokenizer.bos_token and start.startswith(tokenizer.bos_token) else ""
    before_user = start.removeprefix(first)
    if not answer_user.endswith(before_user) or not system_user.endswith(before_user):
        return None
    return TurnTemplate(
        first,
        before={
            "system": system_start.removeprefix(first),
            "user": before_user,
            "assistant": user_answer.removeprefix(end),
        },
        after={
            "system": system_user.removesuffix(before_user),
            "user": end,
            "assistant": answer_user.removesuffix(before_user),
        },
        opening=rendered(tokenizer, [user], opening=True).removeprefix(alone),
    )


def _pieces(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[str]:
    """What stands before, between and after the messages' contents."""
    rest = rendered(tokenizer, messages, opening=False)
    found: list[str] = []
    for message in messages:
        piece, mark, rest = rest.partition(message["content"])
        if not mark:
            raise ValueError(f"the template leaves out the {message['role']}'s message")
        found.append(piece)
    return [*found, rest]


def _agrees(template: TurnTemplate, tokenizer: Any, roles: Sequence[str]) -> bool:
    talk = [{"role": role, "content": f"Message {place}:\nwhat?"} for place, role in enumerate(roles)]
    return template.render(talk) == rendered(tokenizer, talk, opening=True)


def _as_go(text: str) -> str:
    """Text that Go's templates write as it is: two braces would begin an action."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str | None:
    """In three quotes, which nothing escapes: None where the text would end them itself."""
    ends = _QUOTES in text or text.endswith('"') or "\x00" in text
    return None if ends else f"{_QUOTES}{text}{_QUOTES}"


def _quoted_stop(text: str) -> str | None:
    return f'"{text}"' if text.isprintable() and '"' not in text else _quoted(text)


def _seen_from(modelfile: Path, file: str | Path) -> str:
    """Relative to the Modelfile where it lies below it, so that the folder can be moved.

    Raises:
        ConfigError: a line of a Modelfile cannot say it.
    """
    target, folder = Path(file).resolve(), modelfile.resolve().parent
    seen = f"./{target.relative_to(folder)}" if target.is_relative_to(folder) else str(target)
    if not seen.isprintable():
        raise ConfigError(f"{one_line(seen)}: a Modelfile cannot name a file like this; rename it")
    return seen
