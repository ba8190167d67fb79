"""Seconds of a step by phase, from operations and bytes over what a device reaches."""

from __future__ import annotations

from dataclasses import dataclass

from groupwise.plan.devices import COPY_SHARE, PRODUCTS_SHARE, PUBLISHED, TRAINING_SHARE, Device, decode_share
from groupwise.plan.facts import Load, ModelFacts, Setup
from groupwise.plan.memory import KEPT_BYTES


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches with this model.

    Attributes:
        train, forward: operations per second in layers, with and without a backward pass.
        head_train, head_forward: the same of the head.
        bandwidth: bytes per second.
        step: of a decode step, seconds beside its layers and its head; `layer` seconds of one layer, and `draw` of
            logits and draws for each token of the vocabulary; measured for the samples decoded together. None where a
            step is counted by `decode`, the part of its floor that is reached.
        note: how they were found.
    """

    train: float
    forward: float
    head_train: float
    head_forward: float
    bandwidth: float
    note: str
    step: float | None = None
    layer: float = 0.0
    draw: float = 0.0
    decode: float = 1.0
    products: float = 1.0


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one training step; `evaluation` is amortised over the steps between two."""

    rollout: float
    train: float
    update: float
    evaluation: float

    @property
    def step(self) -> float:
        return self.rollout + self.train + self.update + self.evaluation


def rates_of(device: Device, facts: ModelFacts, setup: Setup, *, samples: int) -> Rates:
    """Of a GPU, by its peaks and the shares of them that were seen on an H100."""
    peak = device.operations(setup.each)
    share = TRAINING_SHARE["adapter" if facts.adapter else "full"]
    published = device.source == PUBLISHED
    products = peak * (PRODUCTS_SHARE if published else 1.0)  # a measured peak is a product's already
    return Rates(
        train=products * share,
        forward=products * share,
        head_train=products * share,
        head_forward=products * share,
        bandwidth=device.bandwidth * (COPY_SHARE if published else 1.0),
        note=f"{device.source}; training at {share:.0%} of what products reach, decoding at "
        f"{decode_share(samples):.0%} of its floor",
        decode=decode_share(samples),
        products=products,
    )


def attention_pairs(load: Load) -> int:
    """Pairs of a query and a key that it sees, in one pass over a step's tokens: a prompt once for its group."""
    prompt = load.prompt * (load.prompt + 1) // 2
    answer = load.answer * (load.answer + 1) // 2 + load.answer * load.prompt
    return load.prompts * (prompt + load.group * answer)


def layer_operations(facts: ModelFacts, tokens: int, pairs: int, *, backward: bool) -> float:
    """Two for each weight and token, and for each of attention's two products; a backward pass takes twice as many of
    both, and where weights are frozen as many of the weights'."""
    weights = 2.0 * (facts.products + facts.adapter) * tokens
    attention = 4.0 * facts.layers * facts.queries * pairs
    if not backward:
        return weights + attention
    return weights * (2 if facts.adapter else 3) + attention * 3


def head_operations(facts: ModelFacts, scored: int, *, backward: bool, at_once: int = 0) -> float:
    """Of so many scored tokens, `at_once` of them in one pass: where that is many, the backward pass computes logits
    again."""
    once = 2.0 * facts.head * scored
    if not backward:
        return once
    again = 1 if 4 * at_once * facts.vocabulary > KEPT_BYTES else 0
    return once * ((2 if facts.adapter else 3) + again)


def train_seconds(facts: ModelFacts, setup: Setup, load: Load, rates: Rates, *, at_once: int = 0) -> float:
    """Forward and backward of a step, and the forwards of those that only score.

    Args:
        at_once: tokens that one pass scores; 0 is the whole step.
    """
    pairs, scored = attention_pairs(load), load.drawn
    layers = layer_operations(facts, load.packed, pairs, backward=True)
    again = layer_operations(facts, load.packed, pairs, backward=False)
    learned = layers / rates.train + again / rates.forward * int(setup.recomputes)
    learned += head_operations(facts, scored, backward=True, at_once=at_once or scored) / rates.head_train
    alone = again / rates.forward + head_operations(facts, scored, backward=False) / rates.head_forward
    teacher = alone * setup.teacher / facts.parameters
    return load.repeats * (learned + alone * int(setup.compares)) + alone * int(setup.old) + teacher


def update_seconds(facts: ModelFacts, setup: Setup, load: Load, rates: Rates) -> float:
    """Clipping reads and scales the gradient; AdamW reads gradient, master and moments, and writes the last three, and
    the weight."""
    each = 12 + 16 + 12 + (setup.each if setup.has_masters else 0)
    return load.updates * load.repeats * facts.trained * each / rates.bandwidth


def sampling_seconds(facts: ModelFacts, setup: Setup, load: Load, *, lanes: int, rates: Rates) -> float:
    """Prompts once, then one decode step for each token of the longest answers, over as many waves as samples need."""
    prompts = layer_operations(facts, load.prompts * load.prompt, load.prompts * load.prompt**2 // 2, backward=False)
    steps = max(load.answer, -(-load.samples * load.answer // lanes))
    return prompts / rates.forward + steps * step_seconds(
        facts, setup, load, lanes=min(lanes, load.samples), rates=rates
    )


def step_seconds(facts: ModelFacts, setup: Setup, load: Load, *, lanes: int, rates: Rates) -> float:
    """A decode step whose samples have half their answers behind them."""
    cached = setup.each * facts.cached * (lanes * load.answer / 2 + -(-lanes // load.group) * load.prompt)
    if rates.step is not None:
        layers = rates.step + facts.layers * rates.layer + facts.vocabulary * rates.draw
        return layers + cached / rates.bandwidth
    weights = facts.weight_bytes(setup.each, packed=setup.packed)
    products = 2.0 * lanes * (facts.products + facts.adapter + facts.head) / rates.products
    return max((weights + cached) / rates.bandwidth, products) / rates.decode


def find_seconds(
    facts: ModelFacts,
    setup: Setup,
    load: Load,
    *,
    lanes: int,
    rates: Rates,
    at_once: int = 0,
    evaluation: tuple[Load, int] | None = None,
) -> Seconds:
    """Of a step.

    Args:
        lanes: samples decoded together.
        at_once: as in `train_seconds`.
        evaluation: what one evaluation samples, and the steps between two.
    """
    held_out = 0.0
    if evaluation is not None:
        sampled, every = evaluation
        held_out = sampling_seconds(facts, setup, sampled, lanes=lanes, rates=rates) / every
    return Seconds(
        rollout=sampling_seconds(facts, setup, load, lanes=lanes, rates=rates),
        train=train_seconds(facts, setup, load, rates, at_once=at_once),
        update=update_seconds(facts, setup, load, rates),
        evaluation=held_out,
    )
