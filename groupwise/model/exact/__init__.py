"""Sums in a fixed order on a CPU: attention in blocks of keys, its backward pass, experts."""
