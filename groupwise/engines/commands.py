"""How each engine is started: its command line and environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from groupwise.config import RolloutConfig

MODEL_NAME = "policy"
_WORKER = Path(__file__).parent / "vllm_worker"
_NOT_THEIRS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP", "GROUPWISE_API_KEY", "VLLM_API_KEY")
"""What is the trainer's environment's own, and would break another one; and the key, which is no matter of a child."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a start needs to know.

    Attributes:
        python: interpreter of the engine's environment.
        model: folder, or Hub name.
        length: tokens of the longest prompt and completion.
        dtype: of the weights, as torch names it.
        lora_rank: of the adapter that is trained; 0: none. LMDeploy gets it merged into its base, and is not told.
        gpus: that it sees; None: all.
        on_gpu: whether it computes on one.
        routes: it is to tell which experts of a mixture it chose.
    """

    python: str
    model: str
    port: int
    length: int
    dtype: str
    seed: int
    rollout: RolloutConfig
    lora_rank: int = 0
    gpus: tuple[str, ...] | None = None
    on_gpu: bool = True
    routes: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """Words, and what they see in the environment beside the trainer's own."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def full_environment(self) -> dict[str, str]:
        """For a process."""
        return {name: value for name, value in os.environ.items() if name not in _NOT_THEIRS} | dict(self.environment)

    def shell(self) -> str:
        """To be pasted."""
        import shlex

        given = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return f"{given} {shlex.join(self.words)}".strip()


def command_of(engine: str, start: Start) -> Command:
    """The command that starts `engine` as its dialect expects it; the user's own flags come last, and win."""
    builders: dict[str, Callable[[Start], Command]] = {"vllm": _vllm, "sglang": _sglang, "lmdeploy": _lmdeploy}
    command = builders[engine](start)
    environment = dict(command.environment)
    if start.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(start.gpus)
    return Command((*command.words, *start.rollout.launch.flags), environment)


def _vllm(start: Start) -> Command:
    rollout, launch = start.rollout, start.rollout.launch
    words = [
        *(start.python, "-m", "vllm.entrypoints.cli.main", "serve", start.model),
        *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(start.port)),
        *("--dtype", start.dtype, "--max-model-len", str(start.length), "--seed", str(start.seed)),
        *("--max-num-seqs", str(rollout.max_concurrent_samples), "--generation-config", "vllm"),
        *("--logprobs-mode", "processed_logprobs", "--enable-scale-out"),
        *("--worker-extension-cls", "groupwise_vllm_worker.GroupwiseWorker"),
    ]
    if rollout.learns_cut:
        words += ["--return-sampling-mask"]
    if start.routes:
        words += ["--enable-return-routed-experts"]
    environment = {
        "PYTHONPATH": str(_WORKER),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if start.lora_rank:
        words += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(max(8, _power_of_two(start.lora_rank)))]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if start.on_gpu:
        words += ["--tensor-parallel-size", str(launch.tensor_parallel)]
        if rollout.engine_sleeps:
            words += ["--enable-sleep-mode"]
        if launch.gpu_memory is not None:
            words += ["--gpu-memory-utilization", str(launch.gpu_memory)]
    else:
        # A prefill in chunks ends vLLM's CPU engine where a request has a seed.
        words += ["--enforce-eager", "--no-enable-chunked-prefill"]
        words += ["--max-num-batched-tokens", str(max(2048, start.length))]
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(rollout.kv_cache_gib or 1)))
    return Command(tuple(words), environment)


def _sglang(start: Start) -> Command:
    rollout, launch = start.rollout, start.rollout.launch
    words = [
        *(start.python, "-m", "sglang.launch_server", "--model-path", start.model, "--served-model-name", MODEL_NAME),
        *("--host", "127.0.0.1", "--port", str(start.port), "--dtype", start.dtype),
        *("--context-length", str(start.length), "--random-seed", str(start.seed)),
        *("--max-running-requests", str(rollout.max_concurrent_samples), "--enable-deterministic-inference"),
        *("--tp-size", str(launch.tensor_parallel)),
    ]
    if start.routes:
        words += ["--enable-return-routed-experts"]
    if launch.gpu_memory is not None:
        words += ["--mem-fraction-static", str(launch.gpu_memory)]
    if rollout.engine_sleeps:
        words += ["--enable-memory-saver"]
    if start.lora_rank:
        words += ["--enable-lora", "--max-loras-per-batch", "2", "--max-lora-rank", str(start.lora_rank)]
        words += ["--lora-target-modules", "all"]
    return Command(tuple(words), {})


def _lmdeploy(start: Start) -> Command:
    launch = start.rollout.launch
    words = [
        *(start.python, "-m", "lmdeploy", "serve", "api_server", start.model, "--model-name", MODEL_NAME),
        *("--server-name", "127.0.0.1", "--server-port", str(start.port), "--backend", "pytorch"),
        *("--dtype", start.dtype, "--session-len", str(start.length), "--tp", str(launch.tensor_parallel)),
        *("--max-batch-size", str(start.rollout.max_concurrent_samples)),
        *("--logprobs-mode", "raw_logprobs", "--enable-abort-handling"),
    ]
    if launch.gpu_memory is not None:
        words += ["--cache-max-entry-count", str(launch.gpu_memory)]
    return Command(tuple(words), {})


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
