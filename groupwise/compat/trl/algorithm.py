"""TRL's loss, advantage and reference arguments as settings of `algorithm`."""

from __future__ import annotations

from typing import Any

from groupwise.compat.trl.arguments import GRPOConfig
from groupwise.errors import ConfigError

Values = dict[str, Any]


def algorithm_values(args: GRPOConfig) -> Values:
    """Settings of `algorithm`.

    Raises:
        ConfigError: a part that is not there, or an argument that its parts do not use.
    """
    values: Values = {f"algorithm.{name}": value for name, value in {**_policy_loss(args), **_advantage(args)}.items()}
    if args.mask_truncated_completions:
        values["algorithm.overlong"] = "mask"
    if args.sync_ref_model:
        values["algorithm.reference.sync_every"] = args.ref_model_sync_steps
        values["algorithm.reference.mixup"] = args.ref_model_mixup_alpha
    if args.use_adaptive_entropy:
        values |= {
            "algorithm.entropy.target": args.entropy_target,
            "algorithm.entropy.coef_min": args.entropy_coef_min,
            "algorithm.entropy.coef_max": args.entropy_coef_max,
            "algorithm.entropy.coef_step": args.entropy_coef_delta,
        }
    _refuse_idle(args, "sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")
    _refuse_idle(
        args, "use_adaptive_entropy", "entropy_target", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"
    )
    return values


def _policy_loss(args: GRPOConfig) -> Values:
    _check_loss(args)
    kind, level = args.loss_type, args.importance_sampling_level
    normaliser = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant"}.get(kind, "token")
    low, high = args.epsilon, _upper(args)
    loss: Values = {"name": "gspo" if level == "sequence" else "grpo", "loss.clip_low": low, "loss.clip_high": high}
    if kind == "cispo":
        loss = {"name": "cispo"} if args.epsilon_high is None else {"name": "cispo", "loss.clip_high": high - 1}
    elif kind == "sapo":
        temperatures = (args.sapo_temperature_neg, args.sapo_temperature_pos)
        names = ("loss.temperature_negative", "loss.temperature_positive")
        loss = {"name": "sapo", **dict(zip(names, temperatures, strict=True))}
    elif args.delta is not None:
        loss["loss.dual_clip"] = args.delta
    return {**loss, "normaliser": normaliser}


def _upper(args: GRPOConfig) -> float:
    return args.epsilon if args.epsilon_high is None else args.epsilon_high


def _check_loss(args: GRPOConfig) -> None:
    kind, level = args.loss_type, args.importance_sampling_level
    if kind not in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"):
        raise ConfigError(
            f"GRPOConfig.loss_type = {kind!r} is not there; expected grpo, bnpo, dr_grpo, dapo, cispo or sapo, or "
            "another of `groupwise algorithms` by groupwise={'algorithm.name': …}"
        )
    if level not in ("token", "sequence") or (level == "sequence" and kind in ("cispo", "sapo")):
        raise ConfigError(
            f"GRPOConfig.importance_sampling_level = {level!r} does not go with loss_type = {kind!r}; expected token, "
            "or sequence with grpo"
        )
    _refuse_unused(args)
    if args.delta is not None and args.delta <= 1 + _upper(args):
        raise ConfigError(
            f"GRPOConfig.delta = {args.delta}: expected more than 1 + epsilon_high = {1 + _upper(args)}; it bounds the "
            "ratio where the advantage is negative"
        )


def _refuse_unused(args: GRPOConfig) -> None:
    """Bounds and temperatures of another loss than the one that is asked for."""
    kind, level = args.loss_type, args.importance_sampling_level
    own = {"cispo": {"epsilon_high"}, "sapo": {"sapo_temperature_neg", "sapo_temperature_pos"}}
    clipped = {"epsilon", "epsilon_high"} if level == "sequence" else {"epsilon", "epsilon_high", "delta"}
    for name in sorted(_BOUNDS - own.get(kind, clipped)):
        if _is_changed(args, name):
            raise ConfigError(
                f"GRPOConfig.{name} has no effect with loss_type = {kind!r} and importance_sampling_level = {level!r}; "
                "leave it out"
            )


_BOUNDS = {"epsilon", "epsilon_high", "delta", "sapo_temperature_neg", "sapo_temperature_pos"}


def _advantage(args: GRPOConfig) -> Values:
    scale = {True: "group", False: "none"}.get(args.scale_rewards, args.scale_rewards)
    kind = args.multi_objective_aggregation
    if kind == "sum_then_normalize":
        return {"advantage.name": "grpo", "advantage.scale": scale}
    if kind == "normalize_then_sum" and scale == "group":
        return {"advantage.name": "gdpo"}
    raise ConfigError(
        f"GRPOConfig: multi_objective_aggregation = {kind!r} with scale_rewards = {scale!r}; expected "
        "sum_then_normalize, or normalize_then_sum with group"
    )


def _refuse_idle(args: GRPOConfig, switch: str, *names: str) -> None:
    idle = [name for name in names if _is_changed(args, name)]
    if idle and not vars(args)[switch]:
        raise ConfigError(f"GRPOConfig.{idle[0]} has no effect without {switch} = True; set it, or leave {idle[0]} out")


def _is_changed(args: GRPOConfig, name: str) -> bool:
    return name in args.given and vars(args)[name] != args.SETTINGS[name].default
