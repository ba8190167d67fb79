"""`groupwise reward check`: rewards alone, over answers that are there already."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

from groupwise.cli.models import ROW_SETTINGS, add_trust_flag
from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, set_key, set_rewards, whole_number
from groupwise.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from groupwise.config import Config
    from groupwise.reward_check import Answers, RewardCheck

_FAIL_ON = "failed,silent"


def _arguments(parser: Parser) -> None:
    parser.add_argument("--data", metavar="FILE", help="rows with the columns that rewards read; default: the run's")
    parser.add_argument("--reward", action="append", metavar="NAME", help="default: the run's rewards; may repeat")
    parser.add_argument("--run", metavar="RUN", help="answers that a run kept, in trajectories/")
    parser.add_argument("--completions", metavar="FILE.jsonl", help='answers by "uid" or "row", as eval --save writes')
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="prompts that are taken, spread evenly")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="write a page with examples as well")
    parser.add_argument(
        "--fail-on", default=_FAIL_ON, metavar="A,B", help=f"findings that end it with 1 (default {_FAIL_ON}; or none)"
    )
    add_trust_flag(parser)


def _check(args: argparse.Namespace) -> None:
    from groupwise.reward_check import NAMES, findings_of
    from groupwise.reward_check.show import lines, page, record

    wanted = [name for name in args.fail_on.split(",") if name and name != "none"]
    if unknown := sorted(set(wanted) - set(NAMES)):
        raise ConfigError(f"--fail-on {unknown[0]}: no finding is called so; there are {', '.join(NAMES)}, or none")
    if args.run is not None and args.completions is not None:
        raise ConfigError("--run and --completions both say where the answers are; give one of them")
    check = _checked(args)
    findings = findings_of(check)
    if args.html is not None:
        from groupwise.files import write_text_atomic

        write_text_atomic(Path(args.html), page(check, findings))
    if args.json:
        say(json.dumps(record(check, findings), indent=2, ensure_ascii=False))
    else:
        for line in lines(check, findings):
            say(line)
        if args.html is not None:
            say(f"examples: {args.html}")
    if bad := [one for one in findings if one.rule in wanted]:
        raise RewardError(f"{len(bad)} findings of --fail-on {args.fail_on}: {bad[0].reward} {bad[0].text}")


def _checked(args: argparse.Namespace) -> RewardCheck:
    from groupwise.reward_check import check_rewards
    from groupwise.rewards.scorer import RewardScorer

    config = _config(args)
    if not config.data.train:
        raise ConfigError("--data is missing: a file whose rows have the columns that the rewards read")
    answers = _answers(args, config)
    # What a run passes over is what is looked for here.
    scorer = RewardScorer([reward.model_copy(update={"on_error": "fail"}) for reward in config.reward])
    try:
        if not answers.has_tokens and (reads := scorer.readers_of("completion_ids")):
            raise ConfigError(
                f"reward {reads[0]!r} reads completion_ids, and these answers have none; give --run, or token_ids in "
                "--completions"
            )
        return asyncio.run(check_rewards(scorer, answers))
    finally:
        scorer.close()


def _config(args: argparse.Namespace) -> Config:
    """A run's config with what was given over it, or what was given alone."""
    from groupwise.config.loading import load_config
    from groupwise.trust import require_yes

    given = [*set_key("data.train", args.data), *set_rewards(args.reward), *args.overrides]
    if args.run is None:
        return load_config(None, given).config
    loaded = load_config(str(Path(args.run) / "config.json"), given)
    require_yes(loaded, Path(args.run), rewards_trusted=args.trust_rewards)
    return loaded.config


def _answers(args: argparse.Namespace, config: Config) -> Answers:
    from groupwise.reward_check import answers_of_data, answers_of_file, answers_of_run

    data = Path(config.data.train)
    if args.run is not None:
        return answers_of_run(Path(args.run), data, config.data, limit=args.limit)
    if args.completions is not None:
        return answers_of_file(Path(args.completions), data, config.data, limit=args.limit)
    return answers_of_data(data, config.data, limit=args.limit)


REWARD_CHECK = Command(
    name="reward check",
    summary="show what rewards give to answers that are there already, and what is wrong with them",
    add_arguments=_arguments,
    run=_check,
    settings=(*ROW_SETTINGS, "reward."),
)
