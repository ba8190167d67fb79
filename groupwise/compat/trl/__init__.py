"""TRL's trainers and configs, by name and argument, on Groupwise: change the import line of a program, and it runs.

    from groupwise.compat.trl import GRPOConfig, GRPOTrainer

Read it in this order: `settings` says what each argument becomes, `translate` makes the one config of them, `models`
takes models and adapters as objects, `callbacks` tells transformers' callbacks what happens, and `grpo` and `sft` put
them together (`trainer` is what these two share) and call `groupwise.launch.run.run_training` and
`groupwise.launch.run_sft`.
"""

from __future__ import annotations

from groupwise.compat.trl.arguments import GRPOConfig, SFTConfig
from groupwise.compat.trl.grpo import GRPOTrainer
from groupwise.compat.trl.models import AutoModelForCausalLM
from groupwise.compat.trl.sft import SFTTrainer

__all__ = ["AutoModelForCausalLM", "GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer"]
