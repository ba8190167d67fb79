"""What engines tell beside tokens, as far as a config decides it: chosen experts, and the tokens that filters left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from groupwise.errors import ConfigError

if TYPE_CHECKING:
    from groupwise.config import Config, RolloutConfig

SGLANG_MOST_LEFT = 4096
"""The largest set that SGLang tells of, unless it is started with another --sampling-mask-max-tokens."""

_RUNNER_V2 = (
    "vLLM tells of them by its model runner V2 alone, which needs Triton, and this machine has no GPU for it; start "
    "vLLM where one is"
)


def why_no_routes(rollout: RolloutConfig) -> str:
    """Why the engine cannot tell which experts it chose; empty where it can."""
    if rollout.engine == "lmdeploy":
        return "LMDeploy's server hands them out through Ray, and not over HTTP; use vllm or sglang"
    return _RUNNER_V2 if _starts_vllm_on_a_cpu(rollout) else ""


def _starts_vllm_on_a_cpu(rollout: RolloutConfig) -> bool:
    return rollout.engine == "vllm" and rollout.launch.python is not None and not has_gpu()


def check_replay(rollout: RolloutConfig) -> None:
    """Refuse a replay that could not be had.

    Raises:
        ConfigError: says why.
    """
    if rollout.replay_routes is True and (why := why_no_routes(rollout)):
        raise ConfigError(f"rollout.replay_routes = true does not go with rollout.engine = {rollout.engine!r}: {why}")


def check_filters(rollout: RolloutConfig) -> None:
    """Refuse filters whose distribution the trainer could not know.

    Raises:
        ConfigError: says which, and what would do.
    """
    name, given = rollout.engine, " and ".join(rollout.filters)
    if not rollout.filters:
        return
    if name not in ("vllm", "sglang"):
        raise ConfigError(
            f"{given} does not go with rollout.engine = {name!r}: the samples would come from a cut distribution, "
            "whose log-probs the trainer cannot compute without the tokens that were left, and this engine does not "
            "tell them; leave it out, or use rollout.engine = 'vllm', 'sglang' or 'native'"
        )
    if rollout.changes:
        raise ConfigError(
            f"{' and '.join(rollout.changes)} does not go with rollout.engine = {name!r}: it does more to the "
            "distribution than leave tokens out, and the trainer cannot compute its log-probs; leave it out, or use "
            "rollout.engine = 'native'"
        )
    if _starts_vllm_on_a_cpu(rollout):
        raise ConfigError(f"{given}: the trainer has to be told which tokens were left, and {_RUNNER_V2}")
    if name == "sglang" and rollout.min_p:
        raise ConfigError(
            f"rollout.min_p = {rollout.min_p} does not go with rollout.engine = 'sglang', which refuses it where a "
            "sample has a seed; use rollout.top_p"
        )
    _check_top_k(rollout, given)


def _check_top_k(rollout: RolloutConfig, given: str) -> None:
    most = SGLANG_MOST_LEFT if rollout.engine == "sglang" else None
    if rollout.top_k == 0 or (most is not None and rollout.top_k > most):
        bound = "" if most is None else f" of at most {most:,}"
        raise ConfigError(
            f"{given}: rollout.engine = {rollout.engine!r} tells which tokens were left only if rollout.top_k bounds "
            f"them; give one{bound}, such as rollout.top_k = 512"
        )
    if rollout.top_k == 1:
        raise ConfigError(
            f"rollout.top_k = 1 does not go with rollout.engine = {rollout.engine!r}: a group of equal answers teaches "
            "nothing; give more"
        )


def check_told(config: Config) -> None:
    """Refuse evaluations that an engine which tells of filters could not draw.

    Raises:
        ConfigError: says what would do.
    """
    rollout = config.rollout
    evaluates = config.eval.every > 0 and config.data.eval and config.eval.temperature > 0
    if rollout.engine == "vllm" and rollout.learns_cut and evaluates:
        raise ConfigError(
            f"eval.temperature = {config.eval.temperature:g} does not go with {' and '.join(rollout.filters)} and "
            "rollout.engine = 'vllm': to tell which tokens were left, vLLM wants a top-k in every request, and "
            "evaluations have none; set eval.temperature to 0, or evaluate afterwards, by `groupwise eval`"
        )


def has_gpu() -> bool:
    """Whether this machine has one, of NVIDIA's or AMD's; asked of the system, since no engine is imported."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd"))
