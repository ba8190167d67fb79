"""`trainer.accelerator`: what programs ask of accelerate's object, answered for one process on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch

_NOT_HERE = "training steps are Groupwise's own; it is not here"


class ProcessState:
    """What is so of one process: attributes of accelerate's `Accelerator`, and of its `state`."""

    is_main_process = True
    is_local_main_process = True
    is_last_process = True
    process_index = 0
    local_process_index = 0
    num_processes = 1
    use_distributed = False
    distributed_type = "NO"
    """Equal to accelerate's `DistributedType.NO`, which is a text."""
    mixed_precision = "no"
    deepspeed_plugin = None
    fsdp_plugin = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"accelerator.{name}: {_NOT_HERE}; there are {', '.join(_names(type(self)))}")


class Accelerator(ProcessState):
    """The answers of accelerate's `Accelerator` where there is one process; nothing of it moves or shares tensors."""

    gradient_accumulation_steps: ClassVar[int] = 1
    sync_gradients: ClassVar[bool] = True
    is_fsdp2: ClassVar[bool] = False

    @property
    def state(self) -> ProcessState:
        return ProcessState(self.device)

    def print(self, *values: Any, **options: Any) -> None:
        print(*values, **options)  # noqa: T201 - a program's own words, where it wants them

    def wait_for_everyone(self) -> None:
        """Nobody else is there."""

    def unwrap_model(self, model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The model, which nothing wraps."""
        return model

    def get_state_dict(self, model: Any, unwrap: bool = True) -> dict[str, Any]:
        return model.state_dict()

    def gather(self, tensor: Any) -> Any:
        return tensor

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        return input_data

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return tensor

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        yield

    def autocast(self) -> AbstractContextManager[None]:
        """The model computes in its own dtype."""
        return nullcontext()

    def free_memory(self, *objects: Any) -> tuple[Any, ...]:
        return objects

    def end_training(self) -> None:
        """Trackers are closed when `train` ends."""


def _names(kind: type) -> list[str]:
    return sorted(name for name in dir(kind) if not name.startswith("_"))
