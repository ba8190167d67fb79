"""Where a run's numbers go: the console, files, and trackers by other hands; fed once per step, by the loop alone."""

from __future__ import annotations

from groupwise.tracking.base import Tracker
from groupwise.tracking.composite import Trackers
from groupwise.tracking.registry import build_trackers, check_backends, missing_packages

__all__ = ["Tracker", "Trackers", "build_trackers", "check_backends", "missing_packages"]
