"""Samples and scores the groups that the policy's version allows, all of them at once."""

from __future__ import annotations

import asyncio
from typing import Any

from groupwise.data.sampler import PromptSampler
from groupwise.environments import Environments
from groupwise.inputs import SampleKey
from groupwise.rollout.buffer import Buffer
from groupwise.rollout.episode import Sample, Scorer, run_group
from groupwise.types import Prompt, SamplingParams


class Producer:
    """Keeps the engine busy with every group whose version exists, and puts finished groups into the buffer.

    Args:
        total_steps: steps of the whole run; no group beyond is sampled.
    """

    def __init__(
        self,
        sample: Sample,
        scorer: Scorer,
        environments: Environments,
        sampler: PromptSampler,
        buffer: Buffer,
        *,
        sampling: SamplingParams,
        group_size: int,
        total_steps: int,
    ) -> None:
        self._sample = sample
        self._scorer = scorer
        self._environments = environments
        self._sampler = sampler
        self._buffer = buffer
        self._sampling = sampling
        self._group_size = group_size
        self._total_steps = total_steps
        self._tasks: set[asyncio.Task[None]] = set()

    def admit(self, version: int) -> None:
        """Start every group that `version` (the newest) allows and that is not started yet."""
        while self._is_due(self._sampler.position, version):
            item = self._sampler.take(1)[0]
            task = asyncio.get_running_loop().create_task(self._produce(item.index, item.prompt, version))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _is_due(self, index: int, version: int) -> bool:
        return self._buffer.step_of(index) < self._total_steps and self._buffer.pin(index) <= version

    async def _produce(self, index: int, prompt: Prompt, version: int) -> None:
        # A draw is a function of seed and key; a prompt that comes again must not draw the same.
        draw = index // self._sampler.num_prompts
        keys = [SampleKey(prompt.uid, draw, i) for i in range(self._group_size)]
        try:
            group = await run_group(
                self._sample,
                self._scorer,
                self._environments,
                prompt,
                keys=keys,
                sampling=self._sampling,
                version=version,
                index=index,
            )
            self._buffer.put(group)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - whoever takes the group raises it
            self._buffer.fail(error)

    async def close(self) -> None:
        """End what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def rewind(self, index: int) -> None:
        """Go back to group `index`, as after a resume."""
        self._sampler.load_state_dict(self._sampler.state_dict() | {"position": index})

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, which knows the data by its fingerprint: a resume with other prompts is refused."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state)
