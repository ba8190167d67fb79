"""Unsloth's model by name and argument, on Groupwise: change the import lines of a program, and it runs.

    from groupwise.compat.unsloth import FastLanguageModel, SamplingParams

Read it in this order: `settings` says what becomes of each argument, `fast` loads models and gives them adapters,
`models` is what such a model can do beside transformers' and peft's own, `sampling` and `generation` are vLLM's part,
and `saving` hands the model to `groupwise.export`. Trainers are TRL's: `groupwise.compat.trl` trains these models.
"""

from __future__ import annotations

from groupwise.compat.unsloth.fast import FastLanguageModel
from groupwise.compat.unsloth.models import FastModel, FastPeftModel
from groupwise.compat.unsloth.sampling import LoRARequest, SamplingParams

__all__ = ["FastLanguageModel", "FastModel", "FastPeftModel", "LoRARequest", "SamplingParams"]
