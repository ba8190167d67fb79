"""How the config says that samples are drawn: those that are learned from, and those that are counted."""

from __future__ import annotations

from groupwise.config import Config
from groupwise.types import SamplingParams


def training_sampling(config: Config) -> SamplingParams:
    """As `rollout` says."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        max_tokens=rollout.max_completion_tokens,
        min_tokens=rollout.min_completion_tokens,
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
        seed=config.train.seed,
    )


def eval_sampling(config: Config) -> SamplingParams:
    """`eval`'s own temperature and top-p; what ends a completion is as in training.

    `top_k` and `min_p` are shapes of the training distribution and do not apply here.
    """
    rollout, max_tokens = config.rollout, config.eval.max_completion_tokens or config.rollout.max_completion_tokens
    return SamplingParams(
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        repetition_penalty=rollout.repetition_penalty,
        max_tokens=max_tokens,
        min_tokens=min(rollout.min_completion_tokens, max_tokens),
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
        seed=config.train.seed,
    )
