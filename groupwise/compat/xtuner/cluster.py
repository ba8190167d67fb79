"""What a program for XTuner says to Ray before it trains: one process samples and trains, so nothing is started."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


class Ray:
    """Stands where the module `ray` does.

    Example:
        from groupwise.compat.xtuner import ray

        ray.init(num_cpus=128)
    """

    def __init__(self) -> None:
        self._initialized = False

    def init(self, *_: Any, **options: Any) -> None:
        """Says in a line what becomes of Ray's options."""
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        logger.warning("ray.init(%s): no cluster is started; this process samples and trains", given)
        self._initialized = True

    def is_initialized(self) -> bool:
        """Whether `init` was called."""
        return self._initialized

    def shutdown(self) -> None:
        """Nothing runs that could be ended."""
        self._initialized = False


ray = Ray()
