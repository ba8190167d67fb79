"""From a prompt to a scored group, and from groups to the trainer's batch."""

from groupwise.rollout.batch import build_batch
from groupwise.rollout.buffer import Buffer
from groupwise.rollout.producer import Producer

__all__ = ["Buffer", "Producer", "build_batch"]
