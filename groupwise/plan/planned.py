"""A run to be planned: its numbers, and the questions that are answered by trying sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from groupwise.config import Config
from groupwise.engines.native.engine import CPU_CACHES, GPU_SHARE
from groupwise.plan.devices import GIB, Device
from groupwise.plan.facts import Load, ModelFacts, Setup, largest_pass
from groupwise.plan.memory import Memory, Sampling, find_memory
from groupwise.plan.sampler import find_sampling

_MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Planned:
    """What decides memory.

    Attributes:
        load: a training step whose answers are as long as they may be; `evaluation` what one evaluation samples.
        samples_elsewhere: the engine is another process.
    """

    config: Config
    facts: ModelFacts
    setup: Setup
    device: Device
    load: Load
    evaluation: Load | None
    samples_elsewhere: bool = False

    def memory(self, *, micro_batch: int | None = None, sampling: Sampling | None = None) -> Memory:
        """As the config says, or with these."""
        budget = self.config.train.micro_batch_tokens if micro_batch is None else micro_batch
        work = largest_pass(self.load, budget, self.setup.passes)
        return find_memory(self.facts, self.setup, work, self.sampling() if sampling is None else sampling)

    def sampling(self, *, at_most: int | None = None, budget: int | None = None) -> Sampling:
        """What the engine holds.

        Args:
            at_most: samples, instead of `rollout.max_concurrent_samples`.
            budget: bytes of caches, instead of `rollout.kv_cache_gib`.
        """
        if self.samples_elsewhere:
            return Sampling(min(self.config.rollout.max_concurrent_samples, self.load.samples), 0, 0)
        loads = [load for load in (self.load, self.evaluation) if load is not None]
        most = self.config.rollout.max_concurrent_samples if at_most is None else at_most
        return find_sampling(
            self.facts, self.setup, loads, self.cache_budget if budget is None else budget, at_most=most
        )

    @property
    def cache_budget(self) -> int:
        """Bytes that the engine gives its caches, as `NativeEngine` finds them."""
        given = self.config.rollout.kv_cache_gib
        if given is not None:
            return int(given * GIB)
        if not self.setup.on_gpu:
            return CPU_CACHES
        bare = find_memory(self.facts, self.setup, largest_pass(self.load, 1, 1), Sampling(0, 0, 0))
        to_come = bare.updating["gradients"]  # moments are held, as they will be
        return int(GPU_SHARE * max(0, self.device.memory - sum(bare.held.values()) - to_come))

    def largest_micro_batch(self) -> tuple[int, bool]:
        """The largest `train.micro_batch_tokens` whose peak the device holds, 0 where none does; and whether a larger
        one would change nothing."""
        sampling = self.sampling()

        def fits(tokens: int) -> bool:
            return self.memory(micro_batch=tokens, sampling=sampling).peak <= self.device.memory

        groups = -(-self.load.prompts // self.load.updates)
        whole = groups * (self.load.prompt + self.load.group * self.load.answer)
        most = min(_MOST_TOKENS, -(-whole // self.setup.passes) + self.load.prompt)
        found = largest(fits, most)
        return found, found == most

    def most_samples(self) -> int:
        """Samples of a step that could be decoded together, were the caches given all that is free."""
        if self.samples_elsewhere:
            return 0
        # With all of them, and no bound but the device's.
        return largest(
            lambda count: (
                self.memory(sampling=self.sampling(at_most=count, budget=self.device.memory)).peak <= self.device.memory
                and self.sampling(at_most=count, budget=self.device.memory).lanes == count
            ),
            self.load.samples,
        )


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which it holds, if it holds for all smaller ones; 0 where for none."""
    few, many = 0, most
    while few < many:
        middle = (few + many + 1) // 2
        if holds(middle):
            few = middle
        else:
            many = middle - 1
    return few


def with_answer(load: Load, answer: int | None) -> Load:
    """With answers of this length on average, where that is known."""
    return load if answer is None else replace(load, answer=min(answer, load.longest_answer))
