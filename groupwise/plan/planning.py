"""A run's plan: everything that is known of it before its weights are loaded, for one process on one device."""

from __future__ import annotations

import time
from dataclasses import dataclass

from groupwise.assembly.preparation import Prepared, prepare
from groupwise.config import Config, LoraConfig, ModelConfig
from groupwise.config.algorithm import MovingReference
from groupwise.data import PromptSet
from groupwise.engines import is_exact
from groupwise.errors import ConfigError
from groupwise.model.outline import model_without_weights
from groupwise.plan.amount import Amount, find_amount
from groupwise.plan.calibration import Clock, calibrate, device_at_hand
from groupwise.plan.devices import Device
from groupwise.plan.facts import Load, ModelFacts, Reference, Setup, largest_pass
from groupwise.plan.memory import Memory, Sampling
from groupwise.plan.outline import facts_of, passes_side_by_side
from groupwise.plan.planned import Planned, with_answer
from groupwise.plan.seconds import Rates, Seconds, find_seconds, rates_of
from groupwise.rollout.sampling import eval_sampling, training_sampling

_FREE_CACHES = 1024.0  # GiB: what bounds them here is not this machine


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs and takes.

    Attributes:
        device: planned for; `at_hand` says whether it is this one.
        load: a training step; its answers have the planned length.
        memory: with answers of the greatest length.
        largest_micro_batch: the largest `train.micro_batch_tokens` that fits, 0 where none does; `whole_step` says
            that a larger one would change nothing.
        most_samples: of a step that could be decoded together, 0 where not one.
        rates, seconds: None where nothing is known of the device's speed.
        notes: what the plan takes for granted or leaves out.
    """

    config: Config
    device: Device
    at_hand: bool
    facts: ModelFacts
    setup: Setup
    load: Load
    amount: Amount
    memory: Memory
    sampling: Sampling
    largest_micro_batch: int
    whole_step: bool
    most_samples: int
    rates: Rates | None
    seconds: Seconds | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.device.memory


def make_plan(
    config: Config,
    *,
    device: Device | None = None,
    answer: int | None = None,
    resume: bool = False,
    ready: Prepared | None = None,
    clock: Clock | None = time.perf_counter,
) -> Plan:
    """Plan the run that `groupwise train` would make of `config`. No weight is loaded.

    Args:
        device: to plan for; None is the one at hand.
        answer: tokens of a completion, on average; None is the most that it may have.
        ready: that run, where it was prepared already.
        clock: by which the device at hand is measured, for some seconds; without one there are no seconds for it.

    Raises:
        ConfigError, DataError: what the run would be refused for, and an answer that is longer than any can be.
    """
    ready = ready or prepare(config if device is None else _elsewhere(config), resume=resume, begins=False)
    at_hand = device is None
    device = device or device_at_hand(config.model, measures=clock is not None)
    planned = _planned(config, ready, device)
    if answer is not None and answer > planned.load.longest_answer:
        raise ConfigError(
            f"--answer-tokens {answer}: an answer of this run has at most {planned.load.longest_answer:,} tokens; give "
            "fewer, or raise rollout.max_completion_tokens"
        )
    load, sampling = with_answer(planned.load, answer), planned.sampling()
    rates = None
    if sampling.lanes and not planned.samples_elsewhere:
        rates = _rates(planned, ready, load, at_hand=at_hand, clock=clock)
    largest, whole = planned.largest_micro_batch()
    return Plan(
        config=config,
        device=device,
        at_hand=at_hand,
        facts=planned.facts,
        setup=planned.setup,
        load=load,
        amount=_amount(config, ready, load),
        memory=planned.memory(),
        sampling=sampling,
        largest_micro_batch=largest,
        whole_step=whole,
        most_samples=planned.most_samples(),
        rates=rates,
        seconds=None if rates is None else _seconds(planned, load, answer, rates=rates, lanes=sampling.lanes),
        notes=_notes(planned, answer),
    )


def _planned(config: Config, ready: Prepared, device: Device) -> Planned:
    outline = model_without_weights(ready.model, config.lora)
    facts, each = facts_of(outline), _weight_bytes(config, device)
    packed = config.model.quantization != "none"
    passes = passes_side_by_side(outline, facts, each, on_gpu=device.on_gpu, packed=packed)
    return Planned(
        config,
        facts,
        _setup(config, ready, each, passes=passes, on_gpu=device.on_gpu),
        device,
        _load(config, ready.train),
        _evaluation(config, ready.eval),
        samples_elsewhere=config.rollout.engine != "native",
    )


def _rates(planned: Planned, ready: Prepared, load: Load, *, at_hand: bool, clock: Clock | None) -> Rates | None:
    facts, setup, device, lanes = planned.facts, planned.setup, planned.device, planned.sampling().lanes
    if at_hand and not device.on_gpu and clock is not None:
        return calibrate(ready.model, planned.config.lora, facts, setup, load, lanes=lanes, clock=clock)
    return rates_of(device, facts, setup, samples=lanes) if device.bandwidth else None


def _elsewhere(config: Config) -> Config:
    """For checks on this machine of a run on another: what depends on the machine is left out."""
    model = config.model.model_copy(
        update={"device": "cpu", "dtype": "float32", "quantization": "none", "batch_invariant": False}
    )
    rollout = config.rollout.model_copy(update={"kv_cache_gib": _FREE_CACHES})
    optim = config.optim.model_copy(update={"name": "adamw"})
    return config.model_copy(update={"model": model, "rollout": rollout, "optim": optim})


def _weight_bytes(config: Config, device: Device) -> int:
    named = {"bfloat16": 2, "float32": 4}
    return named.get(config.model.dtype, 2 if device.on_gpu else 4)


def _setup(config: Config, ready: Prepared, each: int, *, passes: int, on_gpu: bool) -> Setup:
    algorithm, teacher = ready.algorithm, ready.teacher
    reference: Reference = "none"
    if algorithm.needs_reference and not config.lora.rank:
        reference = "moving" if isinstance(config.algorithm.reference, MovingReference) else "copy"
    return Setup(
        each=each,
        packed=config.model.quantization != "none",
        optimizer=config.optim.name,
        on_gpu=on_gpu,
        passes=passes,
        recomputes=config.model.gradient_checkpointing,
        chunk=config.train.logprob_chunk_tokens,
        entropy=algorithm.needs_entropy,
        reference=reference,
        compares=algorithm.needs_reference,
        teacher=0 if teacher is None else _parameters(teacher),
        old=config.recomputes_logprobs(exact=is_exact(config.rollout)),
    )


def _parameters(model: ModelConfig) -> int:
    return sum(weight.numel() for weight in model_without_weights(model, LoraConfig()).parameters())  # type: ignore[call-arg]


def _load(config: Config, data: PromptSet) -> Load:
    lengths = [len(prompt.token_ids) for prompt in data.prompts]
    most = training_sampling(config).max_tokens
    return Load(
        prompts=config.rollout.prompts_per_step,
        group=config.rollout.group_size,
        prompt=round(sum(lengths) / len(lengths)),
        longest_prompt=max(lengths),
        answer=most,
        longest_answer=most,
        updates=config.optim.steps_per_batch,
        repeats=config.optim.passes_per_batch,
    )


def _evaluation(config: Config, data: PromptSet | None) -> Load | None:
    if data is None or not config.eval.every:
        return None
    lengths = [len(prompt.token_ids) for prompt in data.prompts]
    most = eval_sampling(config).max_tokens
    mean = round(sum(lengths) / len(lengths))
    return Load(len(lengths), config.eval.samples, mean, max(lengths), most, most)


def _amount(config: Config, ready: Prepared, load: Load) -> Amount:
    return find_amount(
        load,
        rows=len(ready.train.prompts),
        steps=ready.steps,
        every=config.eval.every,
        at_start=config.eval.at_start,
        eval_rows=0 if ready.eval is None else len(ready.eval.prompts),
        eval_samples=config.eval.samples,
    )


def _seconds(planned: Planned, load: Load, answer: int | None, *, rates: Rates, lanes: int) -> Seconds:
    config, evaluation = planned.config, None
    if planned.evaluation is not None:
        evaluation = with_answer(planned.evaluation, answer), config.eval.every
    at_once = largest_pass(load, config.train.micro_batch_tokens, planned.setup.passes).scored
    return find_seconds(
        planned.facts, planned.setup, load, lanes=lanes, rates=rates, at_once=at_once, evaluation=evaluation
    )


def _notes(planned: Planned, answer: int | None) -> tuple[str, ...]:
    config, rollout = planned.config, planned.config.rollout
    found: list[str] = []
    if planned.samples_elsewhere:
        found.append(
            f"rollout.engine = {rollout.engine!r} samples in a process of its own, whose memory and seconds are not in "
            "this plan; here is the trainer alone"
        )
    elif planned.sampling().lanes < min(rollout.max_concurrent_samples, planned.load.samples):
        found.append(
            f"{planned.cache_budget / 2**30:.1f} GiB of keys and values (rollout.kv_cache_gib) have room for "
            f"{planned.sampling().lanes} samples at a time"
        )
    if answer is None:
        found.append(
            "every answer is counted at its greatest length; --answer-tokens N counts seconds and tokens with N"
        )
    if config.environment.name is not None:
        found.append(
            "an environment's turns are not counted: its answers lengthen samples, and its seconds are its own"
        )
    if rollout.dynamic_sampling_cap:
        found.append("rollout.dynamic_sampling_cap may sample more prompts in a step than are counted")
    if not planned.facts.known:
        found.append("layers of this kind are transformers' own here: their activations are an estimate")
    return tuple(found)
