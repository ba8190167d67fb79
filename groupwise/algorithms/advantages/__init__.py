"""Advantages: one number per rollout from the rewards of its batch, one file each."""
