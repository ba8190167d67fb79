"""The tensors that a model's folder has, by their names there, without the folder."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def saved_weights(module: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """What `save_pretrained` of transformers writes, as views of the module's memory; what has another form on disk
    than in memory, such as experts that lie together, may be copied."""
    state: dict[str, Tensor] = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    inner = cast(Any, module)
    for name in inner._keys_to_ignore_on_save or ():
        state.pop(name, None)
    # Tied names come last, and are left out where another name has the same memory. transformers' own way of it copies
    # weights that lie side by side in one storage.
    tied = set(inner.all_tied_weights_keys)
    seen: set[tuple[object, ...]] = set()
    for name in sorted(state, key=lambda name: name in tied):
        tensor = state[name]
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            del state[name]
        seen.add(place)
    found = cast("dict[str, Tensor]", revert_weight_conversion(module, state))
    return list(found.items())
