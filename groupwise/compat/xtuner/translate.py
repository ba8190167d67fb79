"""From a program's objects to the one config. What fields become stands with them; here is what takes several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from groupwise.compat.xtuner.base import Names, Translation
from groupwise.compat.xtuner.judging import Rewards
from groupwise.compat.xtuner.names import NO_LIMIT, GRPOLossConfig, LRConfig, RolloutConfig, WorkerConfig
from groupwise.compat.xtuner.presets import ModelPreset
from groupwise.config import Config
from groupwise.config.loading import LoadedConfig
from groupwise.config.problems import problems_of
from groupwise.config.values import tree_of
from groupwise.errors import ConfigError

KL_ESTIMATORS = {"low_var_kl": "k3", "k3": "k3", "kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2"}
OF_EVALUATION = {
    "data.train": "data.eval",
    "rollout.temperature": "eval.temperature",
    "rollout.top_p": "eval.top_p",
    "rollout.max_completion_tokens": "eval.max_completion_tokens",
    "rollout.group_size": "eval.samples",
}
"""Settings of training whose fields mean another one among the objects of evaluation."""
NOT_OF_EVALUATION = ("train.micro_batch_tokens", "data.shuffle", "rollout.top_k")


@dataclass(frozen=True, slots=True)
class Part:
    """An object and where it is in the program."""

    names: Names
    place: str


def read_worker(found: Translation, worker: WorkerConfig, *, place: str) -> None:
    """What of the training worker is more than one field after the other."""
    _read_kl(found, worker.loss_cfg, f"{place}.loss_cfg")
    _read_chunks(found, worker, f"{place}.loss_cfg")
    _read_lowest_rate(found, worker.lr_cfg, worker.optim_cfg.lr, f"{place}.lr_cfg")


def _read_kl(found: Translation, loss: GRPOLossConfig, place: str) -> None:
    if not loss.use_kl_loss:
        for name in ("kl_loss_coef", "kl_loss_type"):
            if name in loss.model_fields_set:
                found.note(f"{place}.{name}", "there is no KL, as use_kl_loss is off")
        found.put("algorithm.kl.coef", 0.0, f"{place}.use_kl_loss")
        return
    estimator = KL_ESTIMATORS.get(loss.kl_loss_type or "")
    if estimator is None:
        known = ", ".join(KL_ESTIMATORS)
        found.problems.append(f"{place}.kl_loss_type = {loss.kl_loss_type!r}: expected one of {known}")
        return
    found.put("algorithm.kl.coef", loss.kl_loss_coef, f"{place}.kl_loss_coef")
    found.put("algorithm.kl.estimator", estimator, f"{place}.kl_loss_type")


def _read_chunks(found: Translation, worker: WorkerConfig, place: str) -> None:
    loss = worker.loss_cfg
    if loss.mode == "eager":  # the logits of a whole pack exist at one time
        found.put("train.logprob_chunk_tokens", max(8, worker.pack_max_length), f"{place}.mode")
        if "chunk_size" in loss.model_fields_set:
            found.note(f"{place}.chunk_size", "mode is 'eager', which has no chunks")
    elif loss.chunk_size is None:
        found.problems.append(f"{place}.chunk_size = None: mode is 'chunk'; give a number of tokens, such as 1024")
    else:
        found.put("train.logprob_chunk_tokens", loss.chunk_size, f"{place}.chunk_size")


def _read_lowest_rate(found: Translation, lr_cfg: LRConfig, lr: float, place: str) -> None:
    if lr_cfg.lr_type != "constant" and lr > 0:
        found.put("optim.min_lr_ratio", min(1.0, lr_cfg.lr_min / lr), f"{place}.lr_min")
    elif "lr_min" in lr_cfg.model_fields_set:
        found.note(f"{place}.lr_min", "a constant rate has no lowest one")


def read_evaluation(found: Translation, parts: Sequence[Part]) -> None:
    """How to evaluate, from the objects that say so; without any, not at all."""
    if not parts:
        found.values["eval.every"], found.origins["eval.every"] = 0, "enable_evaluate"
        return
    apart = Translation(problems=found.problems, inert=found.inert)
    for part in parts:
        apart.take(part.names, part.place)
    for setting, value in apart.values.items():
        where, given = apart.origins[setting], apart.was_given(setting)
        if setting in OF_EVALUATION or setting.startswith("eval."):
            found.put(OF_EVALUATION.get(setting, setting), value, where, given=given)
        elif given and setting not in NOT_OF_EVALUATION and found.values.get(setting) != value:
            found.problems.append(
                f"{where} = {value!r}: evaluation shares {setting} with training, which has "
                f"{found.values.get(setting)!r}"
            )
    top_k = apart.values.get("rollout.top_k", 0)
    if top_k == 1:  # the likeliest token, whatever the temperature
        found.values["eval.temperature"], found.origins["eval.temperature"] = 0.0, apart.origins["rollout.top_k"]
    elif top_k:
        where = apart.origins["rollout.top_k"]
        found.problems.append(f"{where} = {top_k}: evaluation has temperature and top_p, and top_k = 1 for greedy")


def check_context(found: Translation, rollout: RolloutConfig, *, place: str) -> None:
    """XTuner cuts what does not fit into the context; nothing is cut here, so it has to fit."""
    prompt, answer = found.values.get("data.max_prompt_tokens", 0), found.values["rollout.max_completion_tokens"]
    needed = answer + (0 if prompt == NO_LIMIT else prompt)
    if rollout.context_length is not None and rollout.context_length < needed:
        found.problems.append(
            f"{place}.context_length = {rollout.context_length}: prompts of {prompt} tokens and answers of {answer} "
            "do not fit; raise it, or lower max_length or max_tokens"
        )


def preset_warning(preset: ModelPreset | None, folder: str) -> str | None:
    """What a preset says that the model folder does not; the folder decides."""
    wrong = preset.disagreements(folder) if preset is not None else []
    if preset is None or not wrong:
        return None
    return f"model_cfg = {type(preset).__name__}: {'; '.join(wrong)}: {folder}/config.json decides"


def build_config(found: Translation, rewards: Rewards) -> LoadedConfig:
    """The config, with the field that each value came from.

    Raises:
        ConfigError: lists everything that has no equal here or is no valid value.
    """
    values: dict[str, Any] = {"reward": list(rewards.settings)}
    values |= tree_of(found.values)
    origins = found.origins | {f"reward.{number}.name": place for number, place in enumerate(rewards.places)}
    problems = list(found.problems)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += map(str, problems_of(error, values, lambda dotted: origins.get(dotted, "the program")))
    else:
        problems += map(str, problems_of(None, values, lambda dotted: origins.get(dotted, "the program")))
        if not problems:
            return LoadedConfig(config, origins)
    listing = "\n".join(f"  {problem}" for problem in problems)
    raise ConfigError(f"the program has {len(problems)} setting(s) that cannot act here:\n{listing}")
