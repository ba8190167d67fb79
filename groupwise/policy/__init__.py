"""What training adds to a model: backward passes, the optimiser, schedules, the reference."""

from groupwise.policy.learner import Learner, Objective
from groupwise.policy.local import LocalPolicy

__all__ = ["Learner", "LocalPolicy", "Objective"]
