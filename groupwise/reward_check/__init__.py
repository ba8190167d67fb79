"""Rewards by themselves: what they give to answers that are there already, before a model is trained on them.

Loads neither torch nor a model.
"""

from groupwise.reward_check.checking import RewardCheck, check_rewards
from groupwise.reward_check.findings import NAMES, Finding, findings_of
from groupwise.reward_check.sources import Answers, answers_of_data, answers_of_file, answers_of_run

__all__ = [
    "NAMES",
    "Answers",
    "Finding",
    "RewardCheck",
    "answers_of_data",
    "answers_of_file",
    "answers_of_run",
    "check_rewards",
    "findings_of",
]
