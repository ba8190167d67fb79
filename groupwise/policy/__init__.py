"""What training adds to a model: backward passes, the optimiser, schedules, the reference."""

from groupwise.policy.policy import Objective, Policy

__all__ = ["Objective", "Policy"]
