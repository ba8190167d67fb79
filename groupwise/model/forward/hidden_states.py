"""The one forward: a packed sequence through the Hugging Face module, to hidden states."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from groupwise.model.forward.attention import Layout
from groupwise.model.forward.packed_attention import PackedLayout
from groupwise.model.forward.packing import Packed
from groupwise.model.invariant.checked_product import padded_count
from groupwise.model.invariant.packed import InvariantPackedLayout
from groupwise.model.invariant.use import is_batch_invariant


def hidden_states(model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """`[N, H]` last hidden states of `token_ids [N]` at `position_ids [N]`; `layout` decides who sees whom."""
    decoder = model.get_decoder()
    output = decoder(
        input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False, return_dict=True, layout=layout
    )
    return output.last_hidden_state[0]


def depends_on_length(module: nn.Module) -> bool:
    """Whether a module's forward asks for the longest sequence so far, and keeps it: some rotary angles do."""
    kind = str(getattr(module, "rope_type", ""))
    return "dynamic" in kind or "longrope" in kind


def packed_hidden_states(
    model: PreTrainedModel, packed: Packed, *, on_keys: Callable[[int, Tensor, Tensor], None] | None = None
) -> Tensor:
    """`[N, H]` last hidden states of a packed sequence on the model's device; of a batch-invariant one, and padding."""
    heads = model.config.get_text_config().num_attention_heads
    if not is_batch_invariant(model):
        layout = PackedLayout(packed, heads, on_keys=on_keys)
        return hidden_states(model, packed.token_ids, packed.position_ids, layout)
    # Once for all products, which would each pad their rows.
    missing = padded_count(len(packed.token_ids)) - len(packed.token_ids)
    token_ids, position_ids = (pad(x, (0, missing)) for x in (packed.token_ids, packed.position_ids))
    return hidden_states(model, token_ids, position_ids, InvariantPackedLayout(packed, heads, on_keys=on_keys))
