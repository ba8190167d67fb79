"""Which model is trained, and how it is held in memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from groupwise.config.base import Section


class ModelConfig(Section):
    path: str = Field("", description="folder with a model or with a LoRA adapter, or a Hugging Face Hub name")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="of the weights that compute; auto is bfloat16 on a GPU and float32 on a CPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    quantization: Literal["none", "nf4"] = Field(
        "none", description="of the frozen weights under LoRA; nf4 takes 4 bits each (QLoRA) and needs bitsandbytes"
    )
    batch_invariant: bool = Field(
        False,
        description="on a GPU, compute each token with the same bits in any company, so that sampler and trainer agree "
        "exactly: slower, needs triton; on a CPU they do without",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute each layer in the backward pass: less memory, about a third more time"
    )
    chat_template: str | None = Field(None, description="a Jinja template, or a file that holds one")
    trust_remote_code: bool = Field(False, description="run code that comes with the model folder")
