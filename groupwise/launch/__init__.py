"""Runs, from Python and from the command line.

Example:
    summary = run_training(config, given=Given(rewards=[says_please]))
"""

from groupwise.assembly.preparation import Given, prepare
from groupwise.assembly.supervised import prepare_sft
from groupwise.launch.run import run_async, run_sft, run_training

__all__ = ["Given", "prepare", "prepare_sft", "run_async", "run_sft", "run_training"]
