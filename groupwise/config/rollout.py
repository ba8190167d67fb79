"""How completions are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from groupwise.config.base import Section
from groupwise.config.launch import LaunchConfig
from groupwise.config.temperature import temperature_problem


class RolloutConfig(Section):
    engine: str = Field(
        "native",
        description="native runs in this process on the policy's own weights; http is a server of `groupwise serve`; "
        "vllm, sglang, lmdeploy and openai (evaluation alone) are servers of these",
    )
    urls: tuple[str, ...] = Field(
        (), description="where the engine's servers are, such as http://127.0.0.1:8000; they get the same weights"
    )
    engine_timeout: float = Field(
        300.0, gt=0, description="seconds to wait for a server that does not answer, before the run ends"
    )
    engine_sleeps: bool = Field(
        False,
        description="vllm, sglang and lmdeploy give their GPU memory back while the policy learns, as where both share "
        "one",
    )
    weights_dir: str | None = Field(
        None,
        description="folder that weights travel through, under one name for trainer and servers, such as one in "
        "/dev/shm; each run has a folder of its own below it, and leaves none; none is weights/ in the run directory",
    )
    weights_by: Literal["directory", "ipc", "nccl", "delta"] = Field(
        "directory",
        description="how new weights reach the engine: directory writes them; ipc lets it read this process's memory, "
        "on one machine (vllm); nccl broadcasts them, to other GPUs or machines (vllm, sglang, lmdeploy); delta writes "
        "what changed (vllm, http); adapters travel by directory",
    )
    sync_tolerance: float | None = Field(
        None,
        gt=0,
        description="nats; largest difference between an engine's log-probs and the trainer's for new weights to count "
        "as arrived; none: 1e-4 in float32, 0.1 otherwise, 1.0 for a quantised engine",
    )
    quantized_engine: bool = Field(
        False,
        description="the engine rounds the weights that it is sent (FP8, INT4), so its numbers may stay as they were "
        "after a small step: they are compared with rollout.sync_tolerance alone",
    )
    replay_routes: bool | Literal["auto"] = Field(
        "auto",
        description="of a mixture of experts: the policy computes what an engine drew with the experts that the engine "
        "chose, and takes the live router's shares of them; auto where vllm or sglang can tell of them",
    )
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
    dynamic_sampling_cap: int = Field(
        0,
        ge=0,
        description="replace groups that teach nothing (equal rewards) by fresh prompts, until a step has sampled this "
        "many times prompts_per_step; 0 keeps every group",
    )
    max_concurrent_samples: int = Field(256, ge=1, description="samples decoded together")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="memory for keys and values; none is 60 % of what training leaves free on the GPU, 4 on a CPU",
    )
    launch: LaunchConfig = LaunchConfig()  # type: ignore[call-arg]

    @field_validator("urls", mode="before")
    @classmethod
    def _one_or_several(cls, urls: Any) -> Any:
        return (urls,) if isinstance(urls, str) else urls

    @field_validator("temperature")
    @classmethod
    def _acts(cls, value: float) -> float:
        if problem := temperature_problem(value):
            raise ValueError(problem)
        return value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("got an empty text, which would end every completion at once; leave it out")
        return stop

    @field_validator("stop_token_ids")
    @classmethod
    def _are_tokens(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if any(token < 0 for token in tokens):
            raise ValueError(f"got {min(tokens)}; tokens are numbered from 0")
        return tokens

    @property
    def filters(self) -> tuple[str, ...]:
        """The settings, as `name = value`, for which samples come from another distribution than the policy's."""
        return self._other_than(_CUTS | _CHANGES)

    @property
    def changes(self) -> tuple[str, ...]:
        """Of these, those that do more than leave tokens out."""
        return self._other_than(_CHANGES)

    @property
    def learns_cut(self) -> bool:
        """Whether log-probs are those of the distribution over the tokens that filters left, which the engine tells;
        elsewhere they are the policy's own, before filters."""
        return self.engine in _TELL_CUTS and bool(self._other_than(_CUTS))

    def _other_than(self, neutral: Mapping[str, float]) -> tuple[str, ...]:
        values = self.model_dump(include=set(neutral))
        return tuple(f"rollout.{name} = {values[name]}" for name, off in neutral.items() if values[name] != off)


_CUTS: dict[str, float] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
_CHANGES: dict[str, float] = {"repetition_penalty": 1.0, "min_completion_tokens": 0}
_TELL_CUTS = ("vllm", "sglang")
