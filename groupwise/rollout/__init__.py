"""From a prompt to a scored group, and from groups to the trainer's batch."""

from groupwise.rollout.batch import build_batch
from groupwise.rollout.buffer import Buffer
from groupwise.rollout.logprobs import LogprobPass
from groupwise.rollout.producer import Producer
from groupwise.rollout.selection import Selection

__all__ = ["Buffer", "LogprobPass", "Producer", "Selection", "build_batch"]
