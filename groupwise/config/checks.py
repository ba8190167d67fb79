"""What can be checked before a model is loaded: settings that are missing, contradict each other, or name no file.

Nothing here reads data or imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from groupwise.config import Config, LoraConfig, ModelConfig, OptimConfig
from groupwise.config.algorithm.advantages import PassK
from groupwise.config.limits import rate_problem
from groupwise.config.lora import ADAPTER_FILE, AdapterShape, read_adapter_file
from groupwise.config.model_name import RunCheckpoint, base_of, is_model, named_checkpoint, settled_model
from groupwise.errors import ConfigError, nearest
from groupwise.installed import adapter_problems, version_problems

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def check_trainable(config: Config, *, provided: Collection[str] = ()) -> None:
    """Refuse a config that group-relative RL cannot train with.

    Args:
        provided: settings that the caller gives as Python objects instead: any of `model.path`, `data.train`,
            `data.eval`, `reward`.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    rollout = config.rollout
    found = _common(config, provided)
    advantage = config.algorithm.advantage
    if not config.reward and "reward" not in provided and advantage.needs_reward and config.environment.name is None:
        found.append("reward: got none; training needs at least one, e.g. `--reward gsm8k` or `--reward my_file.py:fn`")
    if rollout.group_size < 2 and advantage.needs_group:
        found.append(
            f"rollout.group_size = {rollout.group_size}: expected at least 2; an advantage compares the samples of one "
            "prompt with each other, and a single sample compared with itself teaches nothing; use 4 to 16"
        )
    if rollout.temperature == 0:
        found.append(
            "rollout.temperature = 0: greedy sampling gives each prompt the same answer group_size times, so all "
            "advantages are 0; set it above 0 (1.0 is usual)"
        )
    found += _algorithm_problems(config) + _keep_best_problems(config) + _environment_problems(config)
    _refuse(found)


def _keep_best_problems(config: Config) -> list[str]:
    if config.train.keep_best is None or config.eval.every:
        return []
    return [
        f"train.keep_best = {config.train.keep_best!r}: nothing is evaluated, so no checkpoint is the best; set "
        "eval.every (and data.eval), or leave it out"
    ]


def _environment_problems(config: Config) -> list[str]:
    environment = config.environment
    if environment.name is not None:
        return []
    set_ones = sorted(environment.model_fields_set - {"name"})
    neutral = type(environment)().model_dump()  # type: ignore[call-arg]
    return [
        f"environment.{name} = {getattr(environment, name)!r}: there is no environment for it to act on; set "
        "environment.name, or leave it out"
        for name in set_ones
        if getattr(environment, name) != neutral[name]
    ]


def _algorithm_problems(config: Config) -> list[str]:
    found = list[str]()
    advantage = config.algorithm.advantage
    if isinstance(advantage, PassK) and advantage.k >= config.rollout.group_size:
        found.append(
            f"algorithm.advantage.k = {advantage.k}: with rollout.group_size = {config.rollout.group_size} "
            "a group of k samples is the whole group, so all advantages are 0; lower k or raise group_size"
        )
    return found + _correction_problems(config) + _dynamic_sampling_problems(config) + _overlong_problems(config)


def _correction_problems(config: Config) -> list[str]:
    correction, found = config.algorithm.correction, list[str]()
    if correction.name != "none" or correction.veto is not None:
        name, value = ("name", correction.name) if correction.name != "none" else ("veto", correction.veto)
        setting = f"algorithm.correction.{name} = {value!r}"
        if not config.recomputes_logprobs(exact=config.rollout.engine == "native"):
            found.append(
                f"{setting}: it weighs the policy's log-probs against the sampler's, and here the sampler's stand for "
                "both, as they are exact; leave it out, or set algorithm.old_logprobs to 'policy' to compute them "
                "again and see"
            )
        if config.rollout.filters and not config.rollout.learns_cut:
            found.append(
                f"{setting} does not go with {' and '.join(config.rollout.filters)}: the sampler's log-probs are those "
                "before such filters, so the weight would not be that of the distribution that was sampled from; "
                "leave out one or the other"
            )
    if (
        correction.off_policy_mask is not None
        and config.rollout.engine == "native"
        and config.optim.updates_per_batch == 1
    ):
        found.append(
            f"algorithm.correction.off_policy_mask = {correction.off_policy_mask}: with optim.steps_per_batch = 1 "
            "every sample is learned by the very weights that drew it, so there is no drift to mask; leave it out, or "
            "take more steps"
        )
    return found


def _dynamic_sampling_problems(config: Config) -> list[str]:
    cap, found = config.rollout.dynamic_sampling_cap, list[str]()
    if cap == 0:
        return found
    setting = f"rollout.dynamic_sampling_cap = {cap}"
    if cap == 1:
        found.append(f"{setting}: no prompt could be replaced; use 2 or more, or 0 to keep every group")
    if config.algorithm.advantage.over_batch:
        found.append(
            f"{setting} does not go with algorithm.advantage.name = {config.algorithm.advantage.name!r}: its baseline "
            "is the whole batch's, so a group of equal rewards teaches as well; use 'reinforce_pp_baseline', or set "
            "the cap to 0"
        )
    return found


def _overlong_problems(config: Config) -> list[str]:
    longest, found = config.rollout.max_completion_tokens, list[str]()
    for number, reward in enumerate(config.reward):
        most, buffer = reward.args.get("max_tokens"), reward.args.get("buffer_tokens")
        if reward.name != "overlong" or not isinstance(most, int) or not isinstance(buffer, int):
            continue
        start = most - buffer
        if start >= longest:
            found.append(
                f"reward.{number} (overlong): its penalty starts beyond {start} tokens, which no completion has with "
                f"rollout.max_completion_tokens = {longest}; set its max_tokens to {longest}"
            )
    return found


def sampling_remark(config: Config) -> str | None:
    """What to know about samples that do not come from the policy's own distribution; None where they do."""
    if not config.rollout.filters:
        return None
    if config.rollout.learns_cut:
        return (
            f"{' and '.join(config.rollout.filters)}: the engine tells which tokens were left to be drawn, and "
            "log-probs, ratios, KL and entropy are of these"
        )
    return (
        f"{' and '.join(config.rollout.filters)}: samples come from a filtered distribution, and are learned as if "
        "the policy itself had drawn them; ratios and log-probs are the policy's, before filters"
    )


def check_supervised(config: Config, *, provided: Collection[str] = ()) -> None:
    """Refuse a config that supervised training cannot use; arguments and errors as in `check_trainable`."""
    found = _common(config, provided)
    if config.train.keep_best is not None:
        found.append("train.keep_best: supervised training evaluates nothing, so no checkpoint is best; leave it out")
    _refuse(found)


def check_model_path(path: str) -> None:
    """Refuse a model that cannot be loaded: a folder without config.json, a file, or a path that does not exist.

    Raises:
        ConfigError: says what is there instead.
    """
    _refuse([problem for problem in [_model_problem(path)] if problem])


def _common(config: Config, provided: Collection[str]) -> list[str]:
    found: list[str | None] = []
    if "model.path" not in provided:
        found.append(_model_problem(config.model.path) or _adapter_disagreement(config))
    found += _method_problems(config)
    if "data.train" not in provided:
        missing = "data.train is empty: expected a JSONL, Parquet or CSV file, e.g. `--data train.jsonl`"
        found.append(_data_problem("data.train", config.data.train) if config.data.train else missing)
    if config.data.eval and "data.eval" not in provided:
        found.append(_data_problem("data.eval", config.data.eval))
    if config.eval.every and not config.data.eval and "data.eval" not in provided:
        found.append(
            f"eval.every = {config.eval.every} has nothing to evaluate: data.eval is empty; give held-out rows with "
            "`--eval-data test.jsonl`, or set eval.every to 0"
        )
    return [problem for problem in found if problem]


def _method_problems(config: Config) -> list[str]:
    """Settings of LoRA and the optimiser that would not act."""
    lora, optim, found = config.lora, config.optim, list(version_problems())
    if lora.rank or (Path(config.model.path) / ADAPTER_FILE).is_file():
        found += adapter_problems()
    if lora.rank == 0 and lora != LoraConfig():  # type: ignore[call-arg]
        named = ", ".join(f"lora.{name}" for name, value in lora if value != LoraConfig.model_fields[name].default)
        found.append(f"{named}: got a setting of LoRA, but lora.rank = 0 trains all weights; set lora.rank, e.g. to 16")
    if lora.rank == 0 and config.model.quantization != "none":
        found.append(
            f"model.quantization = {config.model.quantization!r}: weights of 4 bits cannot be trained, and lora.rank = "
            "0 trains all weights; set lora.rank, e.g. to 16, which trains adapters on them"
        )
    if problem := rate_problem(optim):
        found.append(problem)
    if config.model.batch_invariant:
        found += _batch_invariance_problems(config.model)
    if config.model.quantization != "none":
        found += _without_bitsandbytes(f"model.quantization = {config.model.quantization!r}")
    if optim.name == "adamw_8bit":
        found += _without_bitsandbytes("optim.name = 'adamw_8bit'")
    if optim.name != "muon" and optim.momentum != OptimConfig.model_fields["momentum"].default:
        found.append(
            f"optim.momentum is a setting of muon, and optim.name = {optim.name!r} has optim.betas; leave it out"
        )
    return found


def require_bitsandbytes(setting: str) -> None:
    """Refuse a setting that needs it.

    Raises:
        ConfigError: it is not installed.
    """
    _refuse(_without_bitsandbytes(setting))


def _without_bitsandbytes(setting: str) -> list[str]:
    if find_spec("bitsandbytes") is not None:
        return []
    return [f"{setting} needs bitsandbytes, which is not installed: `pip install 'groupwise[lowbit]'`"]


def require_batch_invariance(model: ModelConfig) -> None:
    """Refuse `model.batch_invariant` where it could not act.

    Raises:
        ConfigError: on a CPU, without triton, or with packed weights.
    """
    _refuse(_batch_invariance_problems(model))


def _batch_invariance_problems(model: ModelConfig) -> list[str]:
    setting, found = "model.batch_invariant = true", list[str]()
    if model.device == "cpu":
        found.append(
            f"{setting}: its kernels are a GPU's, and model.device = 'cpu', where sampler and trainer agree to the bit "
            "without it; leave it out"
        )
    elif find_spec("triton") is None:
        found.append(f"{setting} needs triton, which is not installed: `pip install triton`")
    if model.quantization != "none":
        found.append(
            f"{setting} does not go with model.quantization = {model.quantization!r}: there is no kernel for packed "
            "weights; leave out one or the other"
        )
    return found


def _adapter_disagreement(config: Config) -> str | None:
    """A model that has an adapter goes on with it, and `lora` must describe it."""
    path, checkpoint = config.model.path, named_checkpoint(config.model.path)
    adapter = read_adapter_file(Path(settled_model(path))) if checkpoint is None else None
    shape = adapter.shape if adapter is not None else checkpoint and _shape_in(checkpoint, config.lora)
    wrong = shape.disagreements(config.lora) if shape else []
    if not shape or not wrong:
        return None
    what = "is a LoRA adapter" if checkpoint is None else "is a checkpoint of a LoRA adapter"
    return (
        f"model.path = {path!r} {what}, and training goes on with it: {'; '.join(wrong)}; "
        f"give {shape.flags}, or merge the adapter into its base first"
    )


def _shape_in(checkpoint: RunCheckpoint, asked: LoraConfig) -> AdapterShape | None:
    """Of the adapter that the checkpoint's run trained; None if it trained whole weights."""
    if not checkpoint.has_adapter:
        return None
    lora = LoraConfig.model_validate(checkpoint.config["lora"])
    targets = asked.target_modules if lora.target_modules == ("all-linear",) else tuple(sorted(lora.target_modules))
    return AdapterShape(lora.rank, lora.scaling_alpha, lora.rslora, targets)


def _refuse(found: list[str]) -> None:
    if found:
        raise ConfigError("\n".join(found))


def _data_problem(name: str, value: str) -> str | None:
    path = Path(value)
    if path.exists():
        return None
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := nearest(path.name, siblings):
        return f"{name} = {value!r}: no such file or folder; did you mean {str(path.with_name(near))!r}?"
    place = "" if path.parent.is_dir() else f" (there is no folder {str(path.parent)!r} either)"
    return f"{name} = {value!r}: no such file or folder{place}; paths are relative to {str(Path.cwd())!r}{_home(value)}"


def _model_problem(value: str, *, above: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a model's name, or with that of a base under it; `above` are the names that led here."""
    if value in above:
        return f"model.path = {value!r}: its bases lead back to itself"
    if not value:
        return "model.path is empty: expected a model folder or a Hugging Face Hub name, e.g. `--model Qwen/Qwen3-0.6B`"
    try:
        value = settled_model(value)
        checkpoint = named_checkpoint(value)
        base = "" if checkpoint is None else base_of(checkpoint)
    except ConfigError as error:
        return str(error)
    if checkpoint is not None:
        return _base_problem(f"is a checkpoint of a run that began with {base!r}", (*above, value), base)
    path = Path(value)
    if path.is_dir():
        if (path / ADAPTER_FILE).is_file():
            return _adapter_problem(path, above)
        return None if is_model(path) else _not_a_model(path)
    if path.exists():
        return f"model.path = {value!r}: got a file; expected the folder that holds config.json and the weights"
    if HUB_NAME.fullmatch(value):
        return None
    return (
        f"model.path = {value!r}: no such folder, and not a Hugging Face Hub name (`owner/name`) either; "
        f"paths are relative to {str(Path.cwd())!r}{_home(value)}{_no_run(value)}"
    )


def _adapter_problem(path: Path, above: tuple[str, ...]) -> str | None:
    """An adapter is a model when its base is."""
    try:
        adapter = read_adapter_file(path)
    except ConfigError as error:
        return str(error)
    assert adapter is not None, f"{path} has an {ADAPTER_FILE}"
    remedy = f"; put the base model there, or its place into base_model_name_or_path of {path / ADAPTER_FILE}"
    named = (*above, str(path))
    return _base_problem(f"is a LoRA adapter on {adapter.base!r}", named, adapter.base, remedy=remedy)


def _base_problem(what: str, names: tuple[str, ...], base: str, *, remedy: str = "; put it there") -> str | None:
    problem = _model_problem(base, above=names)
    if problem is None:
        return None
    cause = problem.removeprefix(f"model.path = {base!r}: ")
    return f"model.path = {names[-1]!r} {what}, which is not there: {cause}{remedy}"


def _not_a_model(path: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"model.path = {str(path)!r}: got a folder without a model's config.json (it holds {listing or 'nothing'}); "
        "expected a Hugging Face model folder: config.json, weights and tokenizer; or a run directory"
    )


def _no_run(value: str) -> str:
    run, at, _ = value.rpartition("@")
    return f"; for RUN@STEP, {run!r} would have to be a run directory" if at and run else ""


def _home(value: str) -> str:
    if value.startswith("~") and Path(value).expanduser().exists():
        return f"; `~` is not expanded here, write {str(Path(value).expanduser())!r}"
    return ""
