"""The one forward: packed rows to log-probs and entropy, and the attention protocol that a layout answers."""
