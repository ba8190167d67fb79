"""`groupwise chat`: a conversation, line by line."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from groupwise.cli.models import (
    ENGINE_SETTINGS,
    MODEL_SETTINGS,
    add_sampling_flags,
    open_session,
    sampling_config,
)
from groupwise.cli.output import say, tell
from groupwise.cli.parsing import Command, Parser
from groupwise.errors import ConfigError
from groupwise.texts import encodable

if TYPE_CHECKING:
    from groupwise.assembly.session import Session
    from groupwise.types import Message, SamplingParams

_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C ends a reply"


def _arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, RUN@STEP, model folder or Hub name")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_flags(parser)


def _chat(args: argparse.Namespace) -> None:
    from groupwise.rollout.sampling import training_sampling

    config = sampling_config(args)
    session = open_session(config)
    system: list[Message] = [] if args.system is None else [{"role": "system", "content": encodable(args.system)}]
    sampling = training_sampling(config)
    session.load()
    print(_HELP, file=sys.stderr)
    # One runner for all turns, because the engine's work belongs to one event loop.
    with asyncio.Runner() as runner:
        messages = list(system)
        for line in _lines():
            if line == "/exit":
                return
            if line == "/clear":
                messages = list(system)
            elif line.startswith("/"):
                tell(f"unknown command {line.split()[0]}; {_HELP}")
            elif line:
                messages.append({"role": "user", "content": line})
                # A seed of its own per turn, so that turns do not draw alike; after /clear the same again.
                own = dataclasses.replace(sampling, seed=sampling.seed + len(messages))
                reply = _reply(runner, session, messages, sampling=own)
                if reply is None:
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": reply})


def _reply(
    runner: asyncio.Runner, session: Session, messages: list[Message], *, sampling: SamplingParams
) -> str | None:
    """The printed reply; None when the user ended it with Ctrl-C, or there is no room for one."""
    try:
        prompt = session.chat_prompt(messages)
        try:
            within = session.within(prompt, sampling)
        except ConfigError as error:
            print(f"{error}\n/clear begins anew", file=sys.stderr)
            return None
        [completion] = runner.run(session.complete(prompt, sampling=within))
    except KeyboardInterrupt:
        runner.run(session.engine.abort())
        print("(reply ended)", file=sys.stderr)
        return None
    say(completion.text)
    if completion.finish_reason == "length":
        print(f"(cut off after {len(completion.token_ids)} tokens; --max-tokens allows more)", file=sys.stderr)
    return completion.text


def _lines() -> Iterator[str]:
    """What the user types, until the end of input; the prompt sign only where somebody sees it."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


CHAT = Command(
    name="chat",
    summary="talk with a model",
    add_arguments=_arguments,
    run=_chat,
    settings=(*MODEL_SETTINGS, *ENGINE_SETTINGS, "data.chat_template_kwargs", "data.chat_template_kwargs."),
    epilog=_HELP,
)
