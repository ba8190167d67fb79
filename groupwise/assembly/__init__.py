"""A run's parts from its config, wherever they are placed; and `Session`, a model to be asked without training."""
