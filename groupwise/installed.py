"""Whether the installed packages go together: asked of their metadata, before anything heavy is loaded.

Transformers refuses an older peft only when an adapter is made or saved, which may be hours into a run, and blames
the adapter. Its minimum stands in its source, so it is read there, for whichever version is installed.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from groupwise.errors import ConfigError

logger = logging.getLogger(__name__)

_MINIMUM = re.compile(r"""^MIN_PEFT_VERSION\s*=\s*["']([^"']+)["']""", re.MULTILINE)


@cache
def version_problems() -> tuple[str, ...]:
    """What keeps this version of Groupwise, or transformers, from running with what is installed.

    A package that is newer than any that was tested is no problem, but worth a warning in the log.

    Example:
        version_problems() == ("groupwise needs transformers>=5.16, and transformers 4.57.6 is installed; type: …",)
    """
    own = _requirements("groupwise")
    found = [_problem("groupwise", requirement) for requirement in own]
    found += [_problem("transformers", requirement) for requirement in _requirements("transformers")]
    if untested := [name for name in map(_newer_than_tested, own) if name]:
        logger.warning("%s: newer than this version of groupwise was tested with; %s", ", ".join(untested), _remedy())
    return tuple(problem for problem in found if problem)


@cache
def adapter_problems() -> tuple[str, ...]:
    """Why no LoRA adapter can be made, loaded or saved with what is installed; empty where it can.

    Example:
        adapter_problems() == ("transformers 5.24.0 needs peft>=0.22.0 for adapters, and peft 0.21.2 is installed; …",)
    """
    here, least = _version("peft"), _least_peft()
    if here is None:
        return (f"LoRA needs peft, which is not installed; {_remedy()}",)
    if least is None or here >= least:
        return ()
    return (
        f"transformers {version('transformers')} needs peft>={least} for LoRA adapters, and peft {here} is installed; "
        f"{_remedy()}",
    )


def require_adapters() -> None:
    """Refuse to make, load or save an adapter where it would fail.

    Raises:
        ConfigError: names both packages, and the line to type.
    """
    if problems := (*version_problems(), *adapter_problems()):
        raise ConfigError("\n".join(problems))


def require_versions() -> None:
    """Refuse to load a model with packages that cannot run it.

    Raises:
        ConfigError: names both packages, and the line to type.
    """
    if problems := version_problems():
        raise ConfigError("\n".join(problems))


def _least_peft() -> Version | None:
    """The oldest peft that the installed transformers takes; None where its source does not say."""
    try:
        file = distribution("transformers").locate_file("transformers/integrations/peft.py")
        found = _MINIMUM.search(Path(str(file)).read_text(encoding="utf-8"))
    except (PackageNotFoundError, OSError, UnicodeDecodeError):
        return None
    return Version(found[1]) if found else None


def _requirements(package: str) -> list[Requirement]:
    """What it needs here, optional extras left out; nothing where its metadata are missing, as in a bare checkout."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return []
    found: list[Requirement] = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement)
    return found


def _version(package: str) -> Version | None:
    try:
        return Version(version(package))
    except (PackageNotFoundError, InvalidVersion):
        return None


def _problem(package: str, requirement: Requirement) -> str | None:
    """An upper bound of ours is what was tested, and no reason to refuse; another's is one."""
    here, name = _version(requirement.name), requirement.name
    needed = f"{package} {version(package)} needs {requirement.name}{requirement.specifier}"
    if here is None:
        return f"{needed}, and {name} is not installed; {_remedy()}"
    bounds = [bound for bound in requirement.specifier if package != "groupwise" or bound.operator in (">=", ">")]
    if all(bound.contains(here, prereleases=True) for bound in bounds):
        return None
    return f"{needed}, and {name} {here} is installed; {_remedy()}"


def _newer_than_tested(requirement: Requirement) -> str | None:
    here = _version(requirement.name)
    bounds = [bound for bound in requirement.specifier if bound.operator in ("<", "<=")]
    if here is None or all(bound.contains(here, prereleases=True) for bound in bounds):
        return None
    return f"{requirement.name} {here}"


def _remedy() -> str:
    """The line to type: the bounds of this version for what models are loaded with."""
    loading = ("transformers", "peft", "tokenizers")
    bounds = [f"'{own.name}{own.specifier}'" for own in _requirements("groupwise") if own.name in loading]
    return f"type: pip install {' '.join(bounds) or '-e . -c constraints.txt in the checkout'}"
