"""What the `export` commands share: from a name that the user gave to a folder that can be exported."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groupwise.export.source import Source


@contextmanager
def open_source(name: str, *, base: str | None = None) -> Iterator[Source]:
    """The model that `name` means. A checkpoint is written into a temporary folder first, which goes at the end.

    Raises:
        ConfigError: there is no such model.
    """
    from groupwise.config.model_name import named_checkpoint, settled_model
    from groupwise.export.source import find_source

    checkpoint = named_checkpoint(settled_model(name))
    if checkpoint is None:
        yield find_source(name, base=base)
        return
    from groupwise.model.checkpoints import write_checkpoint_model

    with tempfile.TemporaryDirectory(prefix="groupwise-checkpoint-") as folder:
        write_checkpoint_model(checkpoint, Path(folder), base=base if checkpoint.has_adapter else None)
        source = find_source(folder, base=base)
        named = f"{checkpoint.run.resolve()}@{checkpoint.step}"
        yield replace(source, run=checkpoint.run, step=checkpoint.step, name=named)


@contextmanager
def recorded_source(exported: Path) -> Iterator[Source]:
    """What `exported` was exported from.

    Raises:
        ConfigError: nothing is recorded of it, or it is gone.
    """
    from groupwise.export.record import read_record

    record = read_record(exported)
    with open_source(record.source, base=record.base) as source:
        yield source
