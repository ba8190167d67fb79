"""A folder to the Hugging Face Hub. The token is the Hub client's own: `HF_TOKEN`, or what `hf auth login` kept."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import get_token

from groupwise.errors import ConfigError, ExportError
from groupwise.export.record import RECORD
from groupwise.export.source import ADAPTER_CONFIG, MODEL_CONFIG, is_run

REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class PushedFile:
    name: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Push:
    """What goes where.

    Attributes:
        endpoint: None is the Hub, or what HF_ENDPOINT says.
        url: of the commit; empty until it is made.
    """

    folder: Path
    repo: str
    private: bool
    endpoint: str | None
    files: tuple[PushedFile, ...]
    url: str = ""

    def describe(self) -> str:
        total = sum(file.size for file in self.files)
        kind = "private" if self.private else "public"
        lines = [f"  {file.size:>14,}  {file.name}" for file in self.files]
        return "\n".join([f"{self.folder} -> {self.repo} ({kind}): {len(self.files)} files, {total:,} bytes", *lines])


def plan_push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    endpoint: str | None = None,
    only: Collection[str] | None = None,
) -> Push:
    """What `push` would send; nothing is sent, and no token is needed.

    Hidden files and the export's record, which holds paths of this machine, stay here.

    Args:
        only: names in the folder, where other things lie beside the model; None is all.

    Raises:
        ConfigError: there is no model or GGUF file in the folder, or the name is no repository's.
    """
    place = Path(folder)
    check_repo(repo)
    if is_run(place):
        raise ConfigError(f"{place} is a run directory; push its model, {place / 'final'}, or an export")
    files = tuple(
        PushedFile(name, (place / name).stat().st_size)
        for name in _names(place)
        if only is None or Path(name).parts[0] in only
    )
    names = {file.name for file in files}
    if not {MODEL_CONFIG, ADAPTER_CONFIG} & names and not any(name.endswith(".gguf") for name in names):
        raise ConfigError(f"{place}: got a folder without a model, an adapter or a GGUF file; nothing to push")
    return Push(place, repo, private, endpoint, files)


def check_repo(repo: str) -> None:
    """Raises ConfigError where the name is no repository's."""
    if not REPO.fullmatch(repo):
        raise ConfigError(f"--repo {repo!r}: expected `owner/name`, in letters, digits, `-`, `_` and `.`")


def require_token(token: str | None = None) -> str:
    """This token, or else the Hub client's own.

    Raises:
        ConfigError: there is none.
    """
    found = token or get_token()
    if found is None:
        raise ConfigError("no Hugging Face token: set HF_TOKEN, or run `hf auth login`")
    return found


def push(plan: Push, *, message: str = "Model trained with Groupwise", token: str | None = None) -> str:
    """Make the repository if it is missing, and one commit with the plan's files; returns the commit's address.

    Args:
        token: instead of the Hub client's own.

    Raises:
        ConfigError: there is no token.
        ExportError: the Hub refused, or could not be reached.
    """
    if [file.name for file in plan.files] != _names(plan.folder):
        raise ConfigError(f"{plan.folder}: it has changed since the push was planned; look at it, and push again")
    api = HfApi(endpoint=plan.endpoint, token=require_token(token))
    try:
        api.create_repo(plan.repo, private=plan.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=plan.repo,
            folder_path=plan.folder,
            allow_patterns=[_literally(file.name) for file in plan.files],
            commit_message=message,
        )
    except Exception as error:
        raise ExportError(f"could not push to {plan.repo}: {error}") from error
    return str(commit.commit_url)


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected what `groupwise export` wrote, or a run's `final`")
    found: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(place, name) for name in (*folders, *names) if not name.startswith(".")):
            if file.is_symlink():
                raise ConfigError(
                    f"{file}: it is a link, to {file.resolve()}, and no link is followed into what is made public; "
                    "put the file itself there, or move the link away"
                )
            if file.is_file() and not _is_record(file):
                found.append(str(file.relative_to(folder)))
    return sorted(found)


def _is_record(file: Path) -> bool:
    return file.name == RECORD or file.name.endswith(f".{RECORD}")


def _literally(name: str) -> str:
    """A file's name as a pattern that fits it alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
