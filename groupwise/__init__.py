"""Group-relative reinforcement learning for language models, from a laptop to a cluster."""

from groupwise import notices

__version__ = "0.1.0"

notices.attach()
