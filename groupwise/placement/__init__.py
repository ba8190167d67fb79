"""Where policy and engines live. A placement makes both, and what brings weights from one to the other; nothing else
knows."""

from groupwise.placement.in_process import InProcess

__all__ = ["InProcess"]
