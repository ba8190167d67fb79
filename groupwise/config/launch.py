"""An engine that the run starts itself, in an environment of its own."""

from __future__ import annotations

from pydantic import Field

from groupwise.config.base import Section


class LaunchConfig(Section):
    python: str | None = Field(
        None,
        description="interpreter of the environment that has the engine, such as /opt/vllm/bin/python; with it the run "
        "starts the engine, and ends it",
    )
    replicas: int = Field(1, ge=1, description="servers with the same weights")
    port: int = Field(
        0, ge=0, le=65535, description="of the first server, the others take those after it; 0: free ones"
    )
    gpus: tuple[str, ...] = Field((), description="GPUs of all servers, shared out evenly; none: those that are seen")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one server's model is spread over")
    gpu_memory: float | None = Field(
        None, gt=0, lt=1, description="share of each GPU's memory that the engine may take"
    )
    max_model_len: int | None = Field(
        None, ge=2, description="tokens of prompt and completion; none: the longest that this run has"
    )
    ready_seconds: float = Field(600.0, gt=0, description="longest wait until the engine answers")
    flags: tuple[str, ...] = Field((), description="further arguments of the engine's command line; they win")
