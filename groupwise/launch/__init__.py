"""Runs, from Python and from the command line.

Example:
    summary = run_training(config, given=Given(rewards=[says_please]))
"""

from groupwise.assembly.preparation import Given, prepare, run_folder
from groupwise.assembly.supervised import prepare_sft, supervised_folder
from groupwise.launch.ending import ending
from groupwise.launch.run import run_async, run_sft, run_training

__all__ = [
    "Given",
    "ending",
    "prepare",
    "prepare_sft",
    "run_async",
    "run_folder",
    "run_sft",
    "run_training",
    "supervised_folder",
]
