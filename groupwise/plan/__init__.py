"""What a run will need and take, said before any weight is loaded: memory, steps and tokens, seconds.

`facts`, `devices`, `memory`, `amount` and `seconds` are arithmetic on plain numbers, without torch. `outline` finds the
numbers of a model, `sampler` asks the engine's own budget, `calibration` measures the device at hand, and `planning`
puts them together.
"""

from groupwise.plan.devices import DEVICES, Device
from groupwise.plan.planning import Plan, make_plan
from groupwise.plan.report import as_json, lines, summary

__all__ = ["DEVICES", "Device", "Plan", "as_json", "lines", "make_plan", "summary"]
