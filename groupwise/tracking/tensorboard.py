"""TensorBoard event files under `run_dir/tensorboard`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupwise.files import json_line
from groupwise.tracking.base import Sample, SampleTable

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Writes every metric as a scalar, the config as a text, and samples as a table.

    Args:
        resumed_step: as in `JsonlTracker`; TensorBoard hides what an earlier file of the run has after it.
    """

    def __init__(self, *, title: str, resumed_step: int | None = None) -> None:
        self._title = title
        self._resumed_step = resumed_step
        self._writer: SummaryWriter | None = None

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        # Imported here: it takes a second, and a run without this tracker need not have tensorboard installed.
        from torch.utils.tensorboard.writer import SummaryWriter

        purge = None if self._resumed_step is None else self._resumed_step + 1
        self._writer = SummaryWriter(str(run_dir / FOLDER), purge_step=purge)
        self._writer.add_text(self._title, f"```json\n{json_line(config)}```", self._resumed_step or 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._writer is not None, "start() comes before log()"
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        assert self._writer is not None, "start() comes before samples()"
        self._writer.add_text("samples", _markdown(SampleTable.of(step, samples)), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _markdown(table: SampleTable) -> str:
    lines = [
        list(table.columns),
        ["---"] * len(table.columns),
        *([_cell(value) for value in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | float | None) -> str:
    """One line, and no sign that would end the cell or be read as markup."""
    if not isinstance(value, str):
        return "" if value is None else f"{value:g}"
    return html.escape(value).replace("|", "&#124;").replace("\n", "<br>")
