"""Entry point: find the command, run it, and turn every error into one message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

from groupwise import __version__
from groupwise.cli.commands import (
    chat,
    data,
    engine,
    evaluate,
    export,
    generate,
    info,
    model,
    plan,
    quickstart,
    report,
    reward,
    runs,
    serve,
    train,
    xtuner,
)
from groupwise.cli.output import take_any_text, tell
from groupwise.cli.parsing import DID_YOU_MEAN, Command
from groupwise.errors import EXIT_FAILURE, EXIT_INTERRUPTED, ConfigError, GroupwiseError, Interrupted, nearest
from groupwise.files import file_error
from groupwise.notices import once_each

COMMANDS: tuple[Command, ...] = (
    quickstart.QUICKSTART,
    train.TRAIN,
    plan.PLAN,
    train.SFT,
    xtuner.XTUNER,
    evaluate.EVAL,
    reward.REWARD_CHECK,
    runs.RUNS,
    runs.PLOT,
    report.REPORT,
    report.WATCH,
    generate.GENERATE,
    chat.CHAT,
    serve.SERVE,
    engine.CHECK,
    engine.COMMAND,
    engine.METADATA,
    data.GSM8K,
    data.STATS,
    model.TINY,
    *export.COMMANDS,
    info.ALGORITHMS,
    info.CONFIG,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `groupwise ARGUMENTS` (none: the process's own) and return the exit code.

    0 done · 1 something failed · 2 the arguments, the config or the data are wrong · 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        take_any_text()
        with once_each():
            _dispatch(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        tell("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output (`| head`) has enough; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Interrupted as error:
        tell(str(error))
        return EXIT_INTERRUPTED
    except GroupwiseError as error:
        return _fail(error, str(error), code=error.exit_code, debug="--debug" in arguments)
    except OSError as error:
        return _os_error(error, debug="--debug" in arguments)
    except Exception as error:  # noqa: BLE001 - nothing is above this that could say it better than a traceback
        debug = "--debug" in arguments
        return _fail(error, f"{type(error).__name__}: {error}{_hint(debug)}", code=EXIT_FAILURE, debug=debug)
    return 0


def _hint(debug: bool) -> str:
    return "" if debug else "\nThis was not foreseen; run it again with --debug to see where it happened."


def _os_error(error: OSError, *, debug: bool) -> int:
    """A file that somebody used without a sentence of their own still has a name and a cause."""
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return _fail(error, f"{type(error).__name__}: {error}{_hint(debug)}", code=EXIT_FAILURE, debug=debug)
    found = file_error(error)
    return _fail(error, str(found), code=found.exit_code, debug=debug)


def _fail(error: Exception, message: str, *, code: int, debug: bool) -> int:
    if debug:
        tell("".join(traceback.format_exception(error)).rstrip())
    tell(f"error: {message}")
    return code


def _dispatch(arguments: Sequence[str]) -> None:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "help"):
        print(_overview())
    elif first in ("-V", "--version"):
        print(f"groupwise {__version__}")
    elif not first:
        raise ConfigError(f"no command given\n\n{_overview()}")
    else:
        command = _find(arguments)
        args = command.parse(arguments[len(command.name.split()) :])
        command.run(args)


def _find(arguments: Sequence[str]) -> Command:
    names = [command.name for command in COMMANDS]
    for command in COMMANDS:
        words = command.name.split()
        if list(arguments[: len(words)]) == words:
            return command
    first = arguments[0]
    inside = [name.split()[1] for name in names if name.startswith(f"{first} ")]
    if inside:
        second = arguments[1] if len(arguments) > 1 else ""
        if second in ("-h", "--help", ""):
            listing = "\n".join(_line(command) for command in COMMANDS if command.name.startswith(f"{first} "))
            if second:
                print(f"usage: groupwise {first} COMMAND …\n\n{listing}")
                raise SystemExit(0)
            raise ConfigError(f"`groupwise {first}` needs one of these commands\n\n{listing}")
        hint = nearest(second, inside, DID_YOU_MEAN) or f"; expected {' or '.join(inside)}"
        raise ConfigError(f"`groupwise {first}` has no command {second!r}{hint}")
    if first.startswith("-"):
        raise ConfigError(
            f"`groupwise` has no flag {first}{nearest(first, ['--help', '--version'], DID_YOU_MEAN)}; a command comes "
            "first"
        )
    hint = nearest(first, {name.split()[0] for name in names}, DID_YOU_MEAN) or "; see `groupwise --help`"
    raise ConfigError(f"unknown command {first!r}{hint}")


def _overview() -> str:
    return (
        "usage: groupwise COMMAND …\n\n"
        "Trains language models by group-relative reinforcement learning.\n\n"
        + "\n".join(_line(command) for command in COMMANDS)
        + "\n\n`groupwise COMMAND --help` tells more of each; `groupwise --version` tells the version.\n"
        "Exit codes: 0 done, 1 failed, 2 arguments, config or data are wrong, 130 interrupted."
    )


def _line(command: Command) -> str:
    return f"  {command.name:<16} {command.summary}"
