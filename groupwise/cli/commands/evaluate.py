"""`groupwise eval`: how good a model is on a data file."""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from groupwise.cli.models import ENGINE_SETTINGS, MODEL_SETTINGS, add_trust_flag, model_path, open_session
from groupwise.cli.output import say, tell
from groupwise.cli.parsing import Command, Parser, set_key, set_rewards
from groupwise.empty_steps import commonest
from groupwise.errors import ConfigError, RewardError
from groupwise.files import json_line

if TYPE_CHECKING:
    from groupwise.config import Config
    from groupwise.evaluation import EvalReport

logger = logging.getLogger(__name__)


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="run (its final model), RUN@STEP, RUN@best, RUN@latest, model folder or Hub name",
    )
    parser.add_argument("--data", "--data-path", "--eval-data", metavar="FILE", help="default: a run's data.eval")
    parser.add_argument("--reward", action="append", metavar="NAME", help="default: a run's rewards; may repeat")
    add_trust_flag(parser)
    parser.add_argument("--samples", metavar="N", help="completions per row (eval.samples)")
    parser.add_argument("--limit", metavar="N", help="only the first rows (eval.limit)")
    parser.add_argument("--temperature", metavar="T", help="0 is greedy (eval.temperature)")
    parser.add_argument("--max-completion-tokens", metavar="N", help="eval.max_completion_tokens")
    parser.add_argument("--seed", metavar="N", help="train.seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", metavar="FILE.jsonl", help="write every completion with its rewards")


def _eval(args: argparse.Namespace) -> None:
    config = _config(args)
    if args.save is not None:
        _check_place(Path(args.save))
    started = time.perf_counter()
    report = _evaluate(config, quiet=args.json)
    seconds = time.perf_counter() - started
    if args.json:
        where = {"model": config.model.path, "data": config.data.eval, "settings": config.eval.model_dump(mode="json")}
        say(json_line(where | report.summary() | {"seconds": seconds}).rstrip())
    else:
        say(_describe(report, seconds=seconds))
    if args.save is not None:
        _save(report, Path(args.save))  # after the numbers, which a full disk must not take along
    if report.nothing_measured:
        raise RewardError(
            f"not one of {len(report.causes):,} samples could be judged, so nothing was measured; most frequent cause: "
            f"{commonest(report.causes)}. Mend the reward or the data"
        )


def _config(args: argparse.Namespace) -> Config:
    from groupwise.config.loading import load_config
    from groupwise.config.model_name import MODEL_FILE, run_of
    from groupwise.trust import require_yes

    overrides = [
        *set_key("model.path", model_path(args.model)),
        *set_key("data.eval", args.data),
        *set_rewards(args.reward),
        *set_key("eval.samples", args.samples),
        *set_key("eval.limit", args.limit),
        *set_key("eval.temperature", args.temperature),
        *set_key("eval.max_completion_tokens", args.max_completion_tokens),
        *set_key("train.seed", args.seed),
        *args.overrides,
    ]
    run = run_of(args.model)
    loaded = load_config(None if run is None else run / MODEL_FILE, overrides)
    if run is not None:
        require_yes(loaded, run, rewards_trusted=args.trust_rewards)
    config = loaded.config
    if not config.data.eval:
        raise ConfigError("no data to evaluate on; give --data FILE")
    if not config.reward and config.environment.name is None:
        raise ConfigError("no reward to judge answers by; give --reward NAME, such as --reward gsm8k")
    if config.eval.samples > 1 and config.eval.temperature == 0:
        raise ConfigError(
            f"eval.samples = {config.eval.samples} at temperature 0 draws the same answer each time; "
            "give --temperature above 0, or --samples 1"
        )
    return config


def _evaluate(config: Config, *, quiet: bool) -> EvalReport:
    # What is wrong with names, rewards and rows is refused before the model's libraries and weights are loaded.
    from groupwise.data import check_rows, read_rows
    from groupwise.engines import check_engine, refuse_launch
    from groupwise.evaluation.counted import counted_remarks
    from groupwise.rewards import RewardScorer

    check_engine(config.rollout, trains=False)
    refuse_launch(config.rollout)
    scorer = RewardScorer(config.reward, required=False)  # an environment may judge alone
    check_rows(read_rows(config.data.eval, limit=config.eval.limit), config.data)
    if not quiet:
        tell(f"evaluating {config.model.path} on {config.data.eval}")
    session = open_session(config)
    found = session.prompts(config.data.eval, scorer, evaluated=True)
    if found.num_too_long:
        logger.warning("%s", found.describe())
    for remark in counted_remarks(scorer, (prompt.data_source for prompt in found.prompts)):
        logger.warning("%s", remark)
    return asyncio.run(session.evaluate(found.prompts, scorer))


def _describe(report: EvalReport, *, seconds: float) -> str:
    interval = f"95 % interval {report.ci_low:.4f} to {report.ci_high:.4f}, counts {', '.join(report.accuracy_of)}"
    lines = [f"accuracy     {report.accuracy:.4f}  ({interval})"]
    if report.nothing_measured:
        lines = ["accuracy     not measured: every sample failed"]
    lines += [f"pass@{k:<7} {value:.4f}" for k, value in report.pass_at_k.items() if k > 1]
    if report.mean_reward is not None:
        lines.append(f"reward       {report.mean_reward:.4f}")
    lines.append(f"length       {report.mean_length:.1f} tokens, {report.clipped_ratio:.1%} cut off")
    lines.append(f"rows         {report.num_rows}, {report.num_failed} failed")
    lines.append(f"time         {seconds:.1f} s, loading included")
    if report.causes:
        lines.append(f"first failure: {report.causes[0]}")
    return "\n".join(lines)


def _check_place(path: Path) -> None:
    """Refuse a file that cannot be before anything is evaluated."""
    from groupwise.files import writing

    if path.is_dir():
        raise ConfigError(f"--save {path} is a folder; give a file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def _save(report: EvalReport, path: Path) -> None:
    from groupwise.files import write_text_atomic
    from groupwise.trajectories import eval_to_json

    write_text_atomic(path, "".join(json_line(eval_to_json(row)) for row in report.records()))


EVAL = Command(
    name="eval",
    summary="measure a model's accuracy and pass@k on a data file",
    add_arguments=_arguments,
    run=_eval,
    settings=(
        *MODEL_SETTINGS,
        *ENGINE_SETTINGS,
        "rollout.stop",
        "rollout.stop_token_ids",
        "rollout.repetition_penalty",
        "rollout.max_completion_tokens",
        "rollout.min_completion_tokens",
        "data.prompt_column",
        "data.question_column",
        "data.answer_column",
        "data.data_source",
        "data.system_prompt",
        "data.few_shot",
        "data.chat_template_kwargs",
        "data.chat_template_kwargs.",
        "data.max_prompt_tokens",
        "reward.",
        "eval.samples",
        "eval.temperature",
        "eval.top_p",
        "eval.max_completion_tokens",
        "eval.limit",
        "eval.threshold",
    ),
)
