"""Every error that Groupwise raises on purpose, and the exit code of each.

`ConfigError` and `DataError` are the user's to mend (exit code 2). The boundary errors name the part of the system
that failed (exit code 1). A bad *rollout* is none of these: it is data with a status, see `groupwise.types.Rollout`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
NEAR = 0.6
"""How alike two names are, from 0 to 1, for one to be taken for a slip in the other: `difflib`'s ratio."""


def nearest(name: str, candidates: Iterable[str], form: str = "{}", *, cutoff: float = NEAR) -> str:
    """The candidate that was meant by a name that does not exist, in a message; nothing when none is near.

    Capitals count for nothing.

    Args:
        form: the words around it.
        cutoff: another one where more depends on it than a hint.

    Example:
        >>> nearest("trian", ["train", "eval"], "; did you mean `{}`?")
        '; did you mean `train`?'
    """
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=cutoff)
    return form.format(by_folded[found[0]]) if found else ""


class GroupwiseError(Exception):
    """Base of all errors raised on purpose; its message is complete without a traceback."""

    exit_code = EXIT_FAILURE


class ConfigError(GroupwiseError, ValueError):
    """A setting is wrong: says what was got, what was expected and what to do."""

    exit_code = EXIT_USER


class DataError(GroupwiseError, ValueError):
    """A data file or row is wrong: names the file and the line."""

    exit_code = EXIT_USER


class FileError(GroupwiseError, OSError):
    """A file or folder cannot be read or written; names it, says why and what to do. What is an `OSError` stays one.

    Its exit code says whose it is: a full disk or a folder that went away is a failure, a place that cannot be is the
    user's.
    """


class EngineError(GroupwiseError, RuntimeError):
    """An inference engine failed."""


class EngineLost(EngineError):
    """An inference engine does not answer, or not any more; it may come back."""


class RewardError(GroupwiseError, RuntimeError):
    """A reward function raised, hung or returned something that is not a reward."""


class EpisodeError(GroupwiseError, RuntimeError):
    """Environments as a whole failed: too many of their calls hang."""


class TrainingError(GroupwiseError, RuntimeError):
    """Training cannot go on, such as after several gradients that are not finite."""


class CheckpointError(GroupwiseError, RuntimeError):
    """A checkpoint could not be written or read."""


class ExportError(GroupwiseError, RuntimeError):
    """A model could not be written, or what was written is not the model that it came from."""


class Interrupted(GroupwiseError):
    """The user interrupted the run, and a checkpoint was saved."""

    exit_code = EXIT_INTERRUPTED
