"""The built-in engine and its parts."""

from groupwise.engines.native.engine import NativeEngine

__all__ = ["NativeEngine"]
