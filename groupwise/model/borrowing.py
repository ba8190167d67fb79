"""A program's own module at work for a while: it samples and learns in place, and is transformers' again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from groupwise.model.adapters import adopt_adapter, has_adapter_layers
from groupwise.model.forward.recompute import recompute_layers, recomputes_layers
from groupwise.model.loading import LoadedModel, wrap_model
from groupwise.protocols import Tokenizer


@contextmanager
def borrow(module: PreTrainedModel, tokenizer: Tokenizer) -> Iterator[LoadedModel]:
    """The module ready for engine and policy, with the adapter that peft put into it, if there is one.

    Attention, the mark of an adapter, gradient checkpointing and the modes of training or not are afterwards as they
    were before.

    Raises:
        ConfigError: it cannot run packed, or its adapter is more than plain LoRA.
    """
    attention, adopted = module.config._attn_implementation, module._hf_peft_config_loaded
    checkpointing = recomputes_layers(module)
    modes = {name: part.training for name, part in module.named_modules()}
    try:
        if has_adapter_layers(module):
            adopt_adapter(module)
        yield wrap_model(module, tokenizer)
    finally:
        module._hf_peft_config_loaded = adopted
        if attention is not None and module.config._attn_implementation != attention:
            module.set_attn_implementation(attention)
        if checkpointing:
            recompute_layers(module)
        for name, part in module.named_modules():
            part.training = modes.get(name, part.training)
