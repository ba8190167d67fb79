"""`groupwise train` and `groupwise sft`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupwise.cli.models import add_trust_flag, quiet_loading
from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, set_key, set_rewards
from groupwise.errors import ConfigError

if TYPE_CHECKING:
    from groupwise.config.loading import LoadedConfig

_SHARED_SETTINGS = ("model.", "lora.", "data.", "optim.", "train.")
TRAIN_SETTINGS = (*_SHARED_SETTINGS, "reward.", "rollout.", "environment.", "algorithm.", "eval.", "tracking.")
# Supervised training samples nothing, so it has no tables of samples.
_SFT_SETTINGS = (
    *_SHARED_SETTINGS,
    "sft.",
    "algorithm.router_aux_loss_coef",
    *(f"tracking.{name}" for name in ("backends", "project", "run_name", "mode", "folder")),
)
# It evaluates nothing, routes no rewards, and makes one update of each batch; few of the doctor's rules look at
# anything that it has, and none of those has a bound.
_SFT_IDLE = (
    *("data.eval", "data.data_source", "optim.steps_per_batch", "optim.passes_per_batch"),
    *("train.keep_best", "train.trajectories"),
    *(f"train.doctor.{name}" for name in ("flat_steps", "equal_share", "max_kl", "min_entropy", "max_mismatch")),
)
_EPILOG = (
    "Any setting can be given as --section.key VALUE, e.g. --optim.lr 1e-6; it wins over the recipe.\n"
    "`groupwise config` lists them all; --dry-run shows what this run would use and where each value comes from."
)


def _add_arguments(parser: Parser) -> None:
    add_train_arguments(parser)
    _add_dry_run(parser)


def add_train_arguments(parser: Parser) -> None:
    """What decides a run, for those who train it and those who plan it."""
    _add_shared(parser)
    parser.add_argument("--eval-data", metavar="FILE", help="held-out rows (data.eval)")
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="replaces the recipe's rewards; may repeat (reward.N.name); GSM8K's rows need none",
    )
    add_trust_flag(parser)


def _add_shared(parser: Parser) -> None:
    """What supervised training takes as well: it scores and evaluates nothing."""
    parser.set_defaults(eval_data=None, reward=None, trust_rewards=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="a file with settings")
    parser.add_argument(
        "--model", "--model-path", metavar="PATH", help="folder, run, RUN@STEP or Hub name (model.path)"
    )
    parser.add_argument("--data", "--data-path", metavar="FILE", help="rows to train on (data.train)")
    parser.add_argument("--output", metavar="DIR", help="run directory (train.output)")
    parser.add_argument("--seed", metavar="N", help="of everything random (train.seed)")
    start = parser.add_mutually_exclusive_group()
    parser.flags += ["--resume", "--overwrite", "--accept-changes"]
    start.add_argument(
        "--resume", action="store_true", help="go on from the run directory's newest checkpoint; needs no recipe then"
    )
    start.add_argument("--overwrite", action="store_true", help="begin anew in a run directory that holds a run")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on although what decides the result has changed; what was accepted is recorded",
    )


def _add_dry_run(parser: Parser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that needs no weights, show the settings that were given"
    )
    parser.add_argument("--all", action="store_true", help="with --dry-run: the settings at their defaults, too")


def _add_sft_arguments(parser: Parser) -> None:
    _add_shared(parser)
    _add_dry_run(parser)


def _load(args: argparse.Namespace) -> LoadedConfig:
    """The recipe, or when a run is resumed without one, the run's own config; under the flags."""
    from groupwise.config.loading import LoadedConfig, load_config
    from groupwise.config.model_name import MODEL_FILE, is_run, settled
    from groupwise.trust import require_yes

    recipe: str | None = args.recipe
    if recipe is None and args.resume and args.output is not None:
        own = Path(args.output, "config.json")
        if not own.is_file() and args.model is None:
            raise ConfigError(
                f"{args.output}: got no config.json of a run there, so --resume knows no settings; give the recipe or "
                "the flags that the run is started with"
            )
        recipe = str(own) if own.is_file() else None
    loaded = load_config(recipe, _overrides(args))
    if recipe is not None and is_run(Path(recipe).parent) and Path(recipe).name == MODEL_FILE:
        require_yes(loaded, Path(recipe).parent, rewards_trusted=args.trust_rewards)
    # A resumed run may have a copy of its model, which the launcher finds.
    return loaded if args.resume else LoadedConfig(settled(loaded.config), loaded.origins)


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


def load_for_training(args: argparse.Namespace) -> LoadedConfig:
    """The config that these arguments are of, with the reward that its rows are known by."""
    return _with_known_reward(_load(args))


def _train(args: argparse.Namespace) -> None:
    from groupwise.config.checks import check_trainable

    loaded = load_for_training(args)
    _show(loaded, args)
    if not args.resume:  # what needs no libraries is refused before they are loaded
        check_trainable(loaded.config)
    from groupwise.launch import ending, prepare, run_folder, run_training
    from groupwise.resume import find_start

    if args.dry_run:
        quiet_loading()
        from groupwise.plan import make_plan, summary

        ready = prepare(loaded.config, resume=args.resume, overwrite=args.overwrite)
        find_start(ready.output, ready.identity, resume=args.resume, accept=args.accept_changes)
        plan = make_plan(loaded.config, resume=args.resume, ready=ready, clock=None)
        say("\n".join([*summary(plan), ready.describe(resume=args.resume)]))
        return
    config = loaded.config
    done = run_training(config, **_beginning(loaded, args))
    say("\n".join(ending(done, str(run_folder(config)))))


def _sft(args: argparse.Namespace) -> None:
    from groupwise.config.checks import check_supervised

    loaded = _load(args)
    _show(loaded, args)
    if not args.resume:
        check_supervised(loaded.config)
    from groupwise.launch import ending, prepare_sft, run_sft, supervised_folder
    from groupwise.resume import find_start

    if args.dry_run:
        quiet_loading()
        ready = prepare_sft(loaded.config, resume=args.resume, overwrite=args.overwrite)
        find_start(ready.output, ready.identity, resume=args.resume, accept=args.accept_changes)
        say(ready.describe(resume=args.resume))
        return
    config = loaded.config
    done = run_sft(config, **_beginning(loaded, args))
    say("\n".join(ending(done, str(supervised_folder(config)))))


def _beginning(loaded: LoadedConfig, args: argparse.Namespace) -> dict[str, Any]:
    """How a run begins, beside its config."""
    return {
        "resume": args.resume,
        "overwrite": args.overwrite,
        "accept_changes": args.accept_changes,
        "origins": loaded.origins,
    }


def _show(loaded: LoadedConfig, args: argparse.Namespace) -> None:
    from groupwise.config.loading import render_resolved

    if args.dry_run:
        print(render_resolved(loaded, defaults=args.all), end="", flush=True)
    elif args.all:
        raise ConfigError("--all shows settings, and goes with --dry-run; leave it out, or add --dry-run")


TRAIN = Command(
    name="train",
    summary="train a model by group-relative reinforcement learning",
    add_arguments=_add_arguments,
    run=_train,
    settings=TRAIN_SETTINGS,
    epilog=_EPILOG,
)
SFT = Command(
    name="sft",
    summary="warm a model up on worked answers (supervised)",
    add_arguments=_add_sft_arguments,
    run=_sft,
    settings=_SFT_SETTINGS,
    idle=_SFT_IDLE,
    epilog=_EPILOG,
)
