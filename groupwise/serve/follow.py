"""`groupwise serve RUN --follow`: the newest checkpoint of a run, as it appears."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import Parameter

from groupwise.checkpoint import read_part
from groupwise.config import Config, ModelConfig
from groupwise.config.model_name import RunCheckpoint, checkpoints_of, is_run, named_checkpoint
from groupwise.errors import ConfigError, DataError
from groupwise.model.checkpoints import load_checkpoint_model, settle_model, trained_dtype
from groupwise.model.loading import LoadedModel, load_model, with_adapter
from groupwise.rundir import read_run_config
from groupwise.serve.served import Served

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0


@dataclass(slots=True)
class Followed:
    """A run whose weights are served.

    Attributes:
        step: of the weights that are served; 0 is the model that the run began with.
    """

    run: Path
    step: int = 0

    @staticmethod
    def of(run: Path) -> Followed:
        """Raises:
        ConfigError: it is no run directory.
        """
        if not is_run(run):
            raise ConfigError(f"--follow: {run} is no run directory; give the folder that `groupwise train` writes")
        return Followed(run)

    def load(self, config: ModelConfig) -> LoadedModel:
        """The newest checkpoint; before there is one, what the run began with.

        Raises:
            ConfigError, CheckpointError: it cannot be loaded.
        """
        newest = self._newest()
        if newest is not None:
            loaded = load_checkpoint_model(config, newest)
            self.step = newest.step
            return loaded
        began: Config = read_run_config(self.run)
        settled = settle_model(began, self.run, resume=True, given=None).model
        path = {"path": settled.path, "chat_template": config.chat_template or settled.chat_template}
        return with_adapter(load_model(config.model_copy(update=path)), began.lora, seed=began.train.seed)

    def _newest(self) -> RunCheckpoint | None:
        steps = checkpoints_of(self.run)
        return named_checkpoint(f"{self.run}@{max(steps)}") if steps else None

    async def follow(self, served: Served) -> None:
        """Load what is newer, for ever; a checkpoint that goes away meanwhile is one of many."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                newest = await asyncio.to_thread(self._newest)
                if newest is None or newest.step <= self.step:
                    continue
                await served.update(newest.step, lambda wanted, it=newest: _weights(it, wanted))
                self.step = newest.step
                logger.info("serving step %d of %s", self.step, self.run)
            except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on, and looks again
                logger.warning("step %d goes on: %s", self.step, str(error) or type(error).__name__)


def _weights(checkpoint: RunCheckpoint, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Of the checkpoint, for every parameter that training changes.

    Raises:
        DataError: they are another model's; none was touched.
    """
    masters: dict[str, Tensor] = read_part(checkpoint.folder, "policy", "optimizer", "masters")
    dtype = trained_dtype(checkpoint, read_run_config(checkpoint.run))
    shapes = {name: tensor.shape for name, tensor in wanted.items() if isinstance(tensor, Parameter)}
    found = {name: master.shape for name, master in masters.items()}
    if wrong := [name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)]:
        raise DataError(f"{checkpoint.name} has weights of another model than is served, {min(wrong)} for one")
    return {name: master.to(dtype) for name, master in masters.items()}
