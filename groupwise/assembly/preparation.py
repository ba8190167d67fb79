"""Everything that a run checks, and makes, before it loads weights; `--dry-run` ends after it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise.algorithms import Algorithm, build_algorithm
from groupwise.config import Config, ModelConfig
from groupwise.config.algorithm import Teacher
from groupwise.config.checks import check_model_path, check_trainable
from groupwise.config.limits import check_lengths
from groupwise.config.model_name import settled_model, short_name
from groupwise.data import PromptSet, check_rows, load_prompts
from groupwise.data.files import Source, read_for_training
from groupwise.doctor import check_rules
from groupwise.engines import check_engine, check_logprobs, check_told, check_weights, has_logprobs, is_exact
from groupwise.environments import Environments, load_environments
from groupwise.errors import ConfigError
from groupwise.fingerprint import code_facts, machine_facts, model_facts, prompt_facts, teacher_facts
from groupwise.model.checkpoints import settle_model
from groupwise.model.limits import check_run, find_limits
from groupwise.model.loading import LoadedModel, load_tokenizer, prepare_device, resolve_device, resolve_dtype
from groupwise.model.outline import check_model
from groupwise.protocols import Tokenizer
from groupwise.resume import Identity
from groupwise.rewards import RewardScorer
from groupwise.rundir import check_place, describe_place
from groupwise.tracking import check_backends, missing_packages
from groupwise.watching import Watcher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Given:
    """What a Python program hands over as objects instead of naming it in the config.

    Attributes:
        loaded: instead of `model.path`.
        train_data, eval_data: instead of `data.train` and `data.eval`: a `datasets.Dataset`, or rows.
        rewards: functions beside those in the config, with `reward_weights` (all 1 when empty) and `reward_extras`,
            objects of the program's own for those that name them.
        watcher: follows the run, and may end it.
    """

    loaded: LoadedModel | None = None
    train_data: Source | None = None
    eval_data: Source | None = None
    rewards: Sequence[Callable[..., Any]] = ()
    reward_weights: Sequence[float] = ()
    reward_extras: Mapping[str, Any] = field(default_factory=dict)
    watcher: Watcher | None = None

    @property
    def names(self) -> tuple[str, ...]:
        present = {
            "model.path": self.loaded,
            "data.train": self.train_data,
            "data.eval": self.eval_data,
            "reward": self.rewards or None,
        }
        return tuple(name for name, value in present.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that passed every check that needs no weights.

    Attributes:
        config: the model in it by a name that stays.
        model: what to load; in a resumed run, the copy that it keeps of its base, if it does.
        eval: None when the run evaluates nothing.
        teacher: what to load for `algorithm.teacher`; None without one.
        steps: of the whole run, those before a resume included.
        output: the run directory; nothing has been made there.
        identity: what makes it this run, to be compared with where it is resumed from.
    """

    config: Config
    model: ModelConfig
    algorithm: Algorithm
    scorer: RewardScorer
    environments: Environments
    train: PromptSet
    eval: PromptSet | None
    teacher: ModelConfig | None
    steps: int
    output: Path
    identity: Identity

    def describe(self, *, resume: bool) -> str:
        """What `--dry-run` says of it."""
        config = self.config
        lines = [f"# {config.data.train}: {self.train.describe()}"]
        if self.eval is not None:
            lines.append(f"# {config.data.eval}: {self.eval.describe()}")
        lines.append(f"# {self.steps:,} steps of {config.rollout.prompts_per_step} prompts")
        if absent := missing_packages(config.tracking):
            lines.append(f"# {', '.join(absent)}: not installed, and will be off: pip install 'groupwise[trackers]'")
        lines.append(f"# {describe_place(self.output, resume=resume)}")
        return "\n".join(lines)


def prepare(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    given: Given | None = None,
    begins: bool = True,
) -> Prepared:
    """Check all that a run of this config needs and that can be known without weights. Nothing is written.

    Args:
        begins: False for a run that is only planned: its folder may be taken, and its weights may be elsewhere.

    Raises:
        ConfigError, DataError: what the run would be refused for.
    """
    given = given or Given()
    begun = settle_model(config, run_folder(config), resume=resume, given=given.loaded)
    config, model = begun.config, begun.model
    check_trainable(config, provided=(*given.names, *begun.provided))
    check_engine(config.rollout)
    check_logprobs(config)
    check_weights(config)
    check_told(config)
    config = _corrected(config)
    check_backends(config.tracking)
    check_rules(config)
    prepare_device(config.model.device)
    algorithm = build_algorithm(config.algorithm)
    scorer = make_scorer(config, given)
    _check_keep_best(config, scorer)
    data = _load_data(config, given, scorer, model=model)
    output = run_folder(config)
    if begins:
        check_place(output, resume=resume, overwrite=overwrite)
        if given.loaded is None:
            check_model(model, config.lora)
    return Prepared(
        config,
        model,
        algorithm,
        scorer,
        load_environments(config.environment, data.tokenizer, template_kwargs=config.data.chat_template_kwargs),
        train=data.train,
        eval=data.eval,
        teacher=_teacher(config, data),
        steps=_num_steps(config, len(data.train.prompts)),
        output=output,
        identity=_identity(config, given, data, algorithm),
    )


def _corrected(config: Config) -> Config:
    """With what an engine needs whose log-probs are close to the policy's, and not the same."""
    exact = is_exact(config.rollout)
    if config.rollout.urls:
        from groupwise.engines.external import reach

        exact = all(facts.exact for facts in reach(config.rollout))
    corrected = config.corrected(exact=exact, logprobs=has_logprobs(config.rollout))
    if corrected is not config:
        logger.info(
            "rollout.engine = %r: its log-probs are close to the policy's, not the same; "
            "algorithm.correction.name = 'truncate' weighs each by the ratio",
            config.rollout.engine,
        )
    return corrected


def _identity(config: Config, given: Given, data: _Data, algorithm: Algorithm) -> Identity:
    device = resolve_device(config.model.device)
    module = None if given.loaded is None else given.loaded.model
    return Identity.of(
        config,
        prompt_facts(data.train.prompts, num_rows=data.train.num_rows)
        | model_facts(config, data.tokenizer, module, compared=algorithm.needs_reference)
        | teacher_facts(config)
        | code_facts(config, given.rewards)
        | machine_facts(str(device), str(resolve_dtype(config.model.dtype, device))),
    )


def _teacher(config: Config, data: _Data) -> ModelConfig | None:
    """The model to distil from, whose tokens are the policy's and which has room for what it is to score."""
    teacher = config.algorithm.teacher
    if not isinstance(teacher, Teacher):
        return None
    model = config.model.model_copy(update={"path": settled_model(teacher.path), "chat_template": None})
    check_model_path(model.path)
    if load_tokenizer(model).get_vocab() != data.tokenizer.get_vocab():
        raise ConfigError(
            f"algorithm.teacher.path = {teacher.path!r} has another vocabulary than {config.model.path!r}, so its "
            "log-probs are those of other tokens; use a teacher with the policy's tokenizer"
        )
    most = config.rollout.max_completion_tokens
    check_lengths(
        [prompt.token_ids for prompt in data.train.prompts],
        find_limits(None, model),
        most=most,
        setting="rollout.max_completion_tokens",
    )
    return model


def _check_keep_best(config: Config, scorer: RewardScorer) -> None:
    """Refuse a metric that no evaluation gives, or of which more is not better."""
    metric, powers = config.train.keep_best, range(1, config.eval.samples.bit_length())
    names = ["eval/accuracy", "eval/reward", *(f"eval/pass@{2**power}" for power in powers)]
    names += [f"eval/rewards/{name}/mean" for name in scorer.names]
    if metric is not None and metric not in names:
        raise ConfigError(f"train.keep_best = {metric!r}: got no such score; expected one of {', '.join(names)}")


def make_scorer(config: Config, given: Given) -> RewardScorer:
    return RewardScorer(
        config.reward,
        functions=given.rewards,
        function_weights=given.reward_weights,
        extras=given.reward_extras,
        required=False,  # checked with the config
    )


@dataclass(frozen=True, slots=True)
class _Data:
    train: PromptSet
    eval: PromptSet | None
    tokenizer: Tokenizer


def _load_data(config: Config, given: Given, scorer: RewardScorer, *, model: ModelConfig) -> _Data:
    """Check the rows' shape first: that needs no tokenizer. Then tokenize, and check that rewards can score them."""
    train_source = config.data.train if given.train_data is None else given.train_data
    eval_source = config.data.eval if given.eval_data is None else given.eval_data
    train_rows = read_for_training(train_source, needed=_rows_needed(config), setting="train.steps")
    check_rows(train_rows, config.data)
    # A program's own data is there for evaluations that its watcher asks for.
    eval_rows = None
    if config.eval.every or given.eval_data is not None:
        eval_rows = read_for_training(eval_source, needed=config.eval.limit, setting="eval.limit")
    if eval_rows is not None:
        check_rows(eval_rows, config.data)
    tokenizer = given.loaded.tokenizer if given.loaded is not None else load_tokenizer(model)
    train = load_prompts(train_rows, config.data, tokenizer)
    held_out = None if eval_rows is None else load_prompts(eval_rows, config.data, tokenizer, limit=config.eval.limit)
    prompts = (*train.prompts, *(() if held_out is None else held_out.prompts))
    stop = () if config.rollout.min_completion_tokens else config.rollout.stop  # before those, none ends an answer
    scorer.check_prompts(prompts, stop=stop, tokenizer=tokenizer)
    _check_routes(config, {prompt.data_source for prompt in prompts})
    limits = find_limits(given.loaded, model)
    check_run(config, limits, prompts=train.prompts, eval_prompts=() if held_out is None else held_out.prompts)
    return _Data(train, held_out, tokenizer)


def _rows_needed(config: Config) -> int | None:
    """Prompts that all steps ask for, with those that may come in place of others."""
    if config.train.steps is None:
        return None
    return config.train.steps * config.rollout.prompts_per_step * max(1, config.rollout.dynamic_sampling_cap)


def _check_routes(config: Config, sources: Collection[str]) -> None:
    """Refuse a reward that would score nothing."""
    for number, reward in enumerate(config.reward):
        if reward.data_source and not set(reward.data_source) & set(sources):
            raise ConfigError(
                f"reward.{number}.data_source = {list(reward.data_source)}: no row has such a data source, so "
                f"{reward.name!r} would score nothing; the rows have {', '.join(map(repr, sorted(sources)))}"
            )


def _num_steps(config: Config, num_prompts: int) -> int:
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * num_prompts / config.rollout.prompts_per_step))


def run_folder(config: Config) -> Path:
    """`train.output`, or what stands for it when it is empty."""
    if config.train.output:
        return Path(config.train.output)
    return Path("runs") / f"{short_name(config.model.path)}-{Path(config.data.train).stem or 'data'}"
