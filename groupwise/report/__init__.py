"""What a run directory holds, as a page to look at: a file, or live from a small server."""

from groupwise.report.building import ROOM, Report, write_report

__all__ = ["ROOM", "Report", "write_report"]
