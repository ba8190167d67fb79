"""Environments: what answers a model's turns, called with a time limit, and whose failures are data.

A boundary package: an environment is a user's code, which may raise anything, hang, or return anything.
"""

from groupwise.environments.calls import EnvironmentFailed
from groupwise.environments.registry import environment_names, load_environments
from groupwise.environments.visit import ENVIRONMENT, SINGLE_TURN, Environments, Visit

__all__ = [
    "ENVIRONMENT",
    "SINGLE_TURN",
    "EnvironmentFailed",
    "Environments",
    "Visit",
    "environment_names",
    "load_environments",
]
