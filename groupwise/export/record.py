"""What an export remembers of its source, so that `groupwise export verify` can compare the two."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from groupwise import __version__
from groupwise.errors import ConfigError
from groupwise.export.source import Source, find_source, read_object
from groupwise.files import write_json_atomic

RECORD = "export.json"


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """Lies beside what was written, and is never pushed: it holds paths of this machine.

    Attributes:
        source, base: absolute where they are folders, or a checkpoint (`/runs/sums@40`).
        form: `full`, `4bit`, `adapter`, `gguf` or `gguf-adapter`.
        precision: the dtype or quantisation of the weights.
        merge_difference: what merging changed in the logits, as a share of the largest; None if nothing was merged.

    Example:
        ExportRecord("/runs/sums/final", base="/models/tiny", form="gguf", precision="q8_0", groupwise="1.0")
    """

    source: str
    base: str | None
    form: str
    precision: str
    groupwise: str
    merge_difference: float | None = None

    @classmethod
    def of(cls, source: Source, *, form: str, precision: str, merge_difference: float | None = None) -> ExportRecord:
        base = source.base
        if base is not None and Path(base).is_dir():
            base = str(Path(base).resolve())
        return cls(source.name or str(source.folder.resolve()), base, form, precision, __version__, merge_difference)

    def write(self, exported: Path) -> None:
        write_json_atomic(record_file(exported), asdict(self))

    def find_source(self) -> Source:
        return find_source(self.source, base=self.base)


def record_file(exported: Path) -> Path:
    """In an exported folder, or beside an exported file."""
    return exported / RECORD if exported.is_dir() else exported.with_name(f"{exported.name}.{RECORD}")


def read_record(exported: Path) -> ExportRecord:
    """What was written beside `exported`.

    Raises:
        ConfigError: nothing was.
    """
    content: dict[str, Any] = dict(read_object(record_file(exported)))
    try:
        return ExportRecord(**content)
    except TypeError:
        raise ConfigError(
            f"{record_file(exported)} is missing or not an export's record; `groupwise export` writes it beside what "
            "it exports; without it, name what to compare with by --source"
        ) from None
