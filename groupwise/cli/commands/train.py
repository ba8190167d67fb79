"""`groupwise train` and `groupwise sft`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from groupwise.cli.parsing import Command, Parser, set_key, set_rewards

if TYPE_CHECKING:
    from groupwise.config import Config
    from groupwise.config.loading import LoadedConfig

_SHARED_SETTINGS = ("model.", "lora.", "data.", "optim.", "train.")
_TRAIN_SETTINGS = (*_SHARED_SETTINGS, "reward.", "rollout.", "algorithm.", "eval.", "tracking.")
# Supervised training samples nothing, so it has no tables of samples.
_SFT_SETTINGS = (
    *_SHARED_SETTINGS,
    "sft.",
    "algorithm.router_aux_loss_coef",
    *(f"tracking.{name}" for name in ("backends", "project", "run_name", "mode", "folder")),
)
_EPILOG = (
    "Any setting can be given as --section.key VALUE, e.g. --optim.lr 1e-6; it wins over the recipe.\n"
    "`groupwise config` lists them all; --dry-run shows what this run would use and where each value comes from."
)


def _add_arguments(parser: Parser) -> None:
    _add_shared(parser)
    parser.add_argument("--eval-data", metavar="FILE", help="held-out rows (data.eval)")
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="replaces the recipe's rewards; may repeat (reward.N.name); GSM8K's rows need none",
    )


def _add_shared(parser: Parser) -> None:
    """What supervised training takes as well: it scores and evaluates nothing."""
    parser.set_defaults(eval_data=None, reward=None)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a file with settings")
    parser.add_argument("--model", "--model-path", metavar="PATH", help="folder or Hub name (model.path)")
    parser.add_argument("--data", "--data-path", metavar="FILE", help="rows to train on (data.train)")
    parser.add_argument("--output", metavar="DIR", help="run directory (train.output)")
    parser.add_argument("--seed", metavar="N", help="of everything random (train.seed)")
    start = parser.add_mutually_exclusive_group()
    parser.flags += ["--resume", "--overwrite"]
    start.add_argument(
        "--resume", action="store_true", help="go on from the run directory's newest checkpoint; needs no recipe then"
    )
    start.add_argument("--overwrite", action="store_true", help="begin anew in a run directory that holds a run")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the settings, do not train")


def _load(args: argparse.Namespace) -> LoadedConfig:
    """The recipe, or when a run is resumed without one, the run's own config; under the flags."""
    from groupwise.config.loading import load_config

    recipe: str | None = args.recipe
    if recipe is None and args.resume and args.output is not None:
        own = Path(args.output, "config.json")
        recipe = str(own) if own.is_file() else None
    return load_config(recipe, _overrides(args))


def _with_known_reward(loaded: LoadedConfig) -> LoadedConfig:
    """Rows of a data set that a built-in reward is made for need no `--reward`."""
    from groupwise.config import RewardConfig
    from groupwise.config.loading import LoadedConfig
    from groupwise.data import read_rows
    from groupwise.rewards import reward_for

    config = loaded.config
    if config.reward or not Path(config.data.train).is_file():
        return loaded
    source = read_rows(config.data.train, limit=1)[0].values.get("data_source")
    name = reward_for(source) if isinstance(source, str) else None
    if name is None:
        return loaded
    reward = RewardConfig.model_validate({"name": name, "data_source": (source,)})
    origins = {f"reward.0.{key}": f"data_source of {config.data.train}" for key in ("name", "data_source")}
    return LoadedConfig(config.model_copy(update={"reward": (reward,)}), {**loaded.origins, **origins})


def _overrides(args: argparse.Namespace) -> list[str]:
    return [
        *set_key("model.path", args.model),
        *set_key("data.train", args.data),
        *set_key("data.eval", args.eval_data),
        *set_rewards(args.reward),
        *set_key("train.output", args.output),
        *set_key("train.seed", args.seed),
        *args.overrides,
    ]


def _train(args: argparse.Namespace) -> None:
    from groupwise.config.checks import check_trainable
    from groupwise.config.loading import render_resolved

    loaded = _with_known_reward(_load(args))
    if args.dry_run:
        print(render_resolved(loaded), end="", flush=True)
    check_trainable(loaded.config)
    if args.dry_run:
        _check_parts(loaded.config)
        _check_files(loaded.config, supervised=False)
        return
    from groupwise.launch.local import run_training

    run_training(loaded.config, resume=args.resume, overwrite=args.overwrite)


def _sft(args: argparse.Namespace) -> None:
    from groupwise.config.checks import check_supervised
    from groupwise.config.loading import render_resolved

    loaded = _load(args)
    if args.dry_run:
        print(render_resolved(loaded), end="", flush=True)
    check_supervised(loaded.config)
    if args.dry_run:
        _check_files(loaded.config, supervised=True)
        return
    from groupwise.sft import run_sft

    run_sft(loaded.config, resume=args.resume, overwrite=args.overwrite)


def _check_parts(config: Config) -> None:
    """What training would refuse in the names that its parts go by."""
    from groupwise.config.algorithm_checks import check_algorithm
    from groupwise.engines import check_engine
    from groupwise.rewards import RewardScorer

    check_algorithm(config.algorithm)
    check_engine(config.rollout.engine)
    RewardScorer(config.reward)


def _check_files(config: Config, *, supervised: bool) -> None:
    """What training would refuse in the data's rows."""
    from groupwise.data import check_rows, check_supervised_rows, read_rows

    check_train = check_supervised_rows if supervised else check_rows
    rows = read_rows(config.data.train)
    check_train(rows, config.data)
    print(f"# {config.data.train}: {len(rows):,} rows, all usable")
    if config.data.eval:
        rows = read_rows(config.data.eval, limit=config.eval.limit)
        check_rows(rows, config.data)
        print(f"# {config.data.eval}: {len(rows):,} rows, all usable")


TRAIN = Command(
    name="train",
    summary="train a model by group-relative reinforcement learning",
    add_arguments=_add_arguments,
    run=_train,
    settings=_TRAIN_SETTINGS,
    epilog=_EPILOG,
)
SFT = Command(
    name="sft",
    summary="warm a model up on worked answers (supervised)",
    add_arguments=_add_shared,
    run=_sft,
    settings=_SFT_SETTINGS,
    epilog=_EPILOG,
)
