"""Policy losses: per-token values from log-probs and advantages, one file each."""
