"""Running numbers of one reward, which do not depend on the order in which its calls end."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from groupwise.metrics import Last, Mean, Metric, Sum


@dataclass(slots=True)
class Tally:
    """What happened since it was last read. Values are kept, since only their exact sum is the same in any order."""

    values: array[float] = field(default_factory=lambda: array("d"))
    errors: int = 0
    seconds: float = 0.0

    def metrics(self, name: str) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {}
        count = len(self.values)
        total = math.fsum(self.values)
        if count:
            metrics[f"rewards/{name}/mean"] = Mean(total, count)
        if count > 1:
            mean = total / count
            squares = math.fsum((value - mean) ** 2 for value in self.values)
            metrics[f"rewards/{name}/std"] = Last(math.sqrt(squares / (count - 1)))
        metrics[f"rewards/{name}/errors"] = Sum(float(self.errors))
        metrics[f"rewards/{name}/seconds"] = Sum(self.seconds)
        return metrics
