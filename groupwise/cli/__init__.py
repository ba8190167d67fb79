"""The `groupwise` command. Nothing heavy loads before the arguments are parsed."""

from __future__ import annotations

from groupwise.cli.app import main

__all__ = ["main"]
