"""Run directories, read by somebody who only looks: nothing is locked, written, or refused."""

from groupwise.runs.reading import RunRecord, find_runs, read_run
from groupwise.runs.table import SORTED_BY, differing, sort_runs, table

__all__ = ["SORTED_BY", "RunRecord", "differing", "find_runs", "read_run", "sort_runs", "table"]
