"""A run from its beginning to its summary: hold the place, load, assemble, train, write the model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from groupwise.assembly.parts import Opened, assemble_rl, assemble_sft
from groupwise.assembly.preparation import Given, Prepared, make_scorer, prepare
from groupwise.assembly.record import Reports, restore, summarize
from groupwise.assembly.supervised import PreparedSft, prepare_sft
from groupwise.config import Config
from groupwise.config.checks import sampling_remark
from groupwise.config.secrets import public_values
from groupwise.data.files import Source
from groupwise.files import write_json_atomic
from groupwise.interrupt import catch_interrupts
from groupwise.model.checkpoints import keep_base
from groupwise.model.exact.experts import check_balance_loss
from groupwise.model.forward.mixture import required_mixture
from groupwise.model.loading import LoadedModel, given_or_loaded, with_adapter
from groupwise.placement import InProcess
from groupwise.resume import describe_start, find_start, hold_place, open_run
from groupwise.train import TrainParts, train
from groupwise.trust import prove
from groupwise.watching import GuardedWatcher, Unwatched, Watcher

logger = logging.getLogger(__name__)
T = TypeVar("T")


def run_training(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    given: Given | None = None,
    origins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train as `config` says, from data to `final/`; returns what `summary.json` holds.

    Args:
        accept_changes: resume also where something that decides the result has changed; it is recorded.
        origins: where settings came from, as `LoadedConfig.origins`; the run directory keeps it.

    Raises:
        ConfigError, DataError: before a model is loaded, wherever that is possible.
        Interrupted: the user stopped the run, and a checkpoint was saved.
    """
    given = given or Given()
    started = time.perf_counter()
    ready = prepare(config, resume=resume, overwrite=overwrite, given=given)
    place = _place(
        ready,
        given.loaded,
        given.watcher,
        resume=resume,
        overwrite=overwrite,
        accept_changes=accept_changes,
    )
    with place as (opened, loaded), closing(ready.scorer), closing(make_scorer(ready.config, given)) as judge:
        opened.run.record_origins(origins or {})
        _describe(ready)
        reports = Reports(opened.run)
        placement = InProcess(ready.config, loaded, opened.run)
        parts = assemble_rl(ready, opened, placement, judge=judge, reports=reports)
        done = _carry_out(parts, opened)
        found: dict[str, Any] = {"eval": reports.summaries} if reports.summaries else {}
        found["findings"] = parts.doctor.findings
        return _finish(opened, ready.config, done, started=started, found=found)


def run_sft(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    loaded: LoadedModel | None = None,
    train_data: Source | None = None,
    watcher: Watcher | None = None,
    origins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train on worked answers as `config` says; returns what `summary.json` holds.

    Args:
        accept_changes: resume also where something that decides the result has changed; it is recorded.
        loaded, train_data: instead of `model.path` and `data.train`.
        watcher: follows the run, and may end it.
        origins: as in `run_training`.

    Raises:
        ConfigError, DataError: before a model is loaded, wherever that is possible.
        Interrupted: the user stopped the run, and a checkpoint was saved.
    """
    started = time.perf_counter()
    ready = prepare_sft(config, resume=resume, overwrite=overwrite, loaded=loaded, train_data=train_data)
    place = _place(ready, loaded, watcher, resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    with place as (opened, model):
        opened.run.record_origins(origins or {})
        level = logging.WARNING if ready.data.num_too_long else logging.INFO
        logger.log(level, "supervised data: %s", ready.data.describe())
        parts, source = assemble_sft(ready, opened, InProcess(ready.config, model, opened.run))
        done = _carry_out(parts, opened)
        found = {"loss": source.loss, "findings": parts.doctor.findings}
        return _finish(opened, ready.config, done, started=started, found=found)


@contextmanager
def _place(
    ready: Prepared | PreparedSft,
    loaded: LoadedModel | None,
    watcher: Watcher | None,
    *,
    resume: bool,
    overwrite: bool,
    accept_changes: bool,
) -> Iterator[tuple[Opened, LoadedModel]]:
    """The run directory, held and open, and the model, loaded and with its adapter."""
    config, identity = ready.config, ready.identity
    place = ready.output.absolute()  # wherever user code takes the working directory
    with hold_place(place, resume=resume, overwrite=overwrite) as lock, catch_interrupts() as stop:
        start = find_start(place, identity, resume=resume, accept=accept_changes)
        loaded = given_or_loaded(loaded, ready.model)
        check_balance_loss(loaded.model, config.algorithm.router_aux_loss_coef)
        if config.rollout.replay_routes is True:
            required_mixture(loaded.model)
        run = open_run(config, identity, place, resume=resume, overwrite=overwrite)
        prove(run.path)
        keep_base(loaded, ready.model, run.path)  # after the config, which says whose folder this is
        loaded = with_adapter(loaded, config.lora, seed=config.train.seed)
        with run.logging():
            describe_start(run, start, identity, resume=resume)
            yield Opened(run, start, identity, lock, stop, GuardedWatcher(watcher or Unwatched())), loaded


def _carry_out(parts: TrainParts, opened: Opened) -> int:
    """Train, write `final/`; returns the last step."""
    return run_async(_train(parts, opened))


async def _train(parts: TrainParts, opened: Opened) -> int:
    try:
        first = restore(parts, opened.start)
        parts.trackers.start(public_values(parts.config), parts.run.path)
        try:
            done = await train(parts, start=first)
        finally:
            parts.trackers.close()
            await parts.source.close()
            await parts.weight_sync.close()
        await parts.policy.export(parts.run.final)
        return done
    finally:
        await parts.policy.close()


def _finish(opened: Opened, config: Config, done: int, *, started: float, found: dict[str, Any]) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    summary = summarize(config, opened.identity, steps=done, seconds=seconds, found=found)
    write_json_atomic(opened.run.summary_file, summary)
    return summary


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end; in a notebook, whose own event loop is running, in another thread."""
    if not _is_in_loop():
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _describe(ready: Prepared) -> None:
    """What there is to learn from and to evaluate on; with warnings where some of it does not act."""
    for name, found in (("training", ready.train), ("evaluation", ready.eval)):
        if found is not None and found.prompts:
            level = logging.WARNING if found.num_too_long else logging.INFO
            logger.log(level, "%s data: %s", name, found.describe())
    if remark := sampling_remark(ready.config):
        logger.warning(remark)
