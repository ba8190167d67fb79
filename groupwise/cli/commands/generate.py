"""`groupwise generate`: what a model says to one prompt."""

from __future__ import annotations

import argparse
import asyncio
import sys

from groupwise.cli.models import (
    ENGINE_SETTINGS,
    MODEL_SETTINGS,
    add_sampling_flags,
    open_session,
    sampling_config,
)
from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, whole_number
from groupwise.errors import ConfigError
from groupwise.texts import encodable


def _arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, RUN@STEP, model folder or Hub name")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message; - reads standard input")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as text, without the chat template")
    parser.add_argument("-n", type=whole_number(1), default=1, metavar="N", help="how many samples (default 1)")
    add_sampling_flags(parser)


def _generate(args: argparse.Namespace) -> None:
    if args.raw and args.system is not None:
        raise ConfigError("--system has no place in --raw text; leave one of them out")
    of_chat = [
        word for word in args.overrides if word.startswith(("--data.chat_template_kwargs", "--model.chat_template"))
    ]
    if args.raw and of_chat:
        raise ConfigError(f"{of_chat[0].partition('=')[0]} has no effect on --raw text; leave one of them out")
    text = encodable(sys.stdin.read() if args.prompt == "-" else args.prompt)
    if not text:
        raise ConfigError("the prompt is empty; give --prompt some text")
    from groupwise.rollout.sampling import training_sampling

    config = sampling_config(args)
    session = open_session(config)
    system = [] if args.system is None else [{"role": "system", "content": encodable(args.system)}]
    prompt = session.raw_prompt(text) if args.raw else session.chat_prompt([*system, {"role": "user", "content": text}])
    sampling = session.within(prompt, training_sampling(config))
    replies = asyncio.run(session.complete(prompt, sampling=sampling, count=args.n))
    for reply in replies:
        if len(replies) > 1:
            print(f"--- {reply.sample_index + 1} of {len(replies)} ({len(reply.token_ids)} tokens)")
        say(reply.text)
        if reply.finish_reason == "length":
            print(f"(cut off after {len(reply.token_ids)} tokens; --max-tokens allows more)", file=sys.stderr)


GENERATE = Command(
    name="generate",
    summary="print what a model answers to a prompt",
    add_arguments=_arguments,
    run=_generate,
    settings=(*MODEL_SETTINGS, *ENGINE_SETTINGS, "data.chat_template_kwargs", "data.chat_template_kwargs."),
)
