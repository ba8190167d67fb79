"""The one module that sampler and trainer both run: loading, packing, attention, the language-model head."""
