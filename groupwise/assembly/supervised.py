"""Everything that a supervised run checks, and makes, before it loads weights; `--dry-run` ends after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from groupwise.config import Config, ModelConfig
from groupwise.config.checks import check_supervised
from groupwise.config.limits import check_lengths, say_high_rate
from groupwise.config.model_name import short_name
from groupwise.data import SupervisedSet, check_supervised_rows, load_supervised
from groupwise.data.files import Source, read_for_training
from groupwise.doctor import check_rules
from groupwise.fingerprint import machine_facts, model_facts, supervised_facts
from groupwise.model.checkpoints import settle_model
from groupwise.model.limits import find_limits
from groupwise.model.loading import LoadedModel, load_tokenizer, prepare_device, resolve_device, resolve_dtype
from groupwise.model.outline import check_model
from groupwise.protocols import Tokenizer
from groupwise.resume import Identity
from groupwise.rundir import check_place, describe_place
from groupwise.tracking import check_backends


@dataclass(frozen=True, slots=True)
class PreparedSft:
    """A run that passed every check that needs no weights; `config` and `model` as in GRPO's."""

    config: Config
    model: ModelConfig
    data: SupervisedSet
    steps: int
    output: Path
    identity: Identity

    def describe(self, *, resume: bool) -> str:
        """What `--dry-run` says of it."""
        rows = self.config.sft.rows_per_step
        return (
            f"# {self.config.data.train}: {self.data.describe()}\n# {self.steps:,} steps of {rows} rows\n"
            f"# {describe_place(self.output, resume=resume)}"
        )


def prepare_sft(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    loaded: LoadedModel | None = None,
    train_data: Source | None = None,
) -> PreparedSft:
    """Check all that a run of this config needs and that can be known without weights. Nothing is written.

    Raises:
        ConfigError, DataError: what the run would be refused for.
    """
    provided = [name for name, value in (("model.path", loaded), ("data.train", train_data)) if value is not None]
    begun = settle_model(config, supervised_folder(config), resume=resume, given=loaded)
    config, model = begun.config, begun.model
    check_supervised(config, provided=[*provided, *begun.provided])
    check_backends(config.tracking)
    check_rules(config, supervised=True)
    prepare_device(config.model.device)
    needed = None if config.train.steps is None else config.train.steps * config.sft.rows_per_step
    given_rows = config.data.train if train_data is None else train_data
    source = read_for_training(given_rows, needed=needed, setting="train.steps")
    check_supervised_rows(source, config.data, text_column=config.sft.text_column)
    tokenizer = load_tokenizer(model) if loaded is None else loaded.tokenizer
    data = load_supervised(
        source, config.data, tokenizer, max_tokens=config.sft.max_tokens, text_column=config.sft.text_column
    )
    limits = find_limits(loaded, model)
    whole = [(*row.prompt_ids, *row.token_ids) for row in data.rows]
    check_lengths(whole, limits, most=0, setting="sft.max_tokens", prompts="conversations")
    say_high_rate(config.optim, limits, lora=config.lora.rank > 0)
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(data.rows) / config.sft.rows_per_step))
    output = supervised_folder(config)
    check_place(output, resume=resume, overwrite=overwrite)
    if loaded is None:
        check_model(model, config.lora)
    return PreparedSft(config, model, data, steps, output, _identity(config, loaded, data, tokenizer))


def _identity(config: Config, given: LoadedModel | None, data: SupervisedSet, tokenizer: Tokenizer) -> Identity:
    device = resolve_device(config.model.device)
    module = None if given is None else given.model
    return Identity.of(
        config,
        supervised_facts(data.rows, num_rows=data.num_rows)
        | model_facts(config, tokenizer, module, compared=False)
        | machine_facts(str(device), str(resolve_dtype(config.model.dtype, device))),
    )


def supervised_folder(config: Config) -> Path:
    """`train.output`, or what stands for it when it is empty."""
    name = f"{short_name(config.model.path)}-{Path(config.data.train).stem or 'data'}-sft"
    return Path(config.train.output) if config.train.output else Path("runs") / name
