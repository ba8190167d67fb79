"""How completions are sampled."""

from __future__ import annotations

from pydantic import Field

from groupwise.config.base import Section


class RolloutConfig(Section):
    engine: str = Field("native", description="native runs in this process on the policy's own weights")
    group_size: int = Field(8, description="G, samples per prompt; group-relative advantages need at least 2")
    prompts_per_step: int = Field(32, ge=1, description="groups in one training step")
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 keeps all tokens")
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0)
    max_completion_tokens: int = Field(512, ge=1)
    min_completion_tokens: int = Field(0, ge=0)
    stop: tuple[str, ...] = Field((), description="strings that end a completion")
    stop_token_ids: tuple[int, ...] = Field((), description="tokens that end a completion, beside the model's own")
    max_concurrent_samples: int = Field(256, ge=1, description="samples decoded together")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="memory for keys and values; none is 60 % of what training leaves free on the GPU, 4 on a CPU",
    )
