"""A model's numbers from its config alone: its modules without weights (torch's meta device), which are counted."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from groupwise.errors import ConfigError
from groupwise.model.exact.experts import experts_of
from groupwise.model.fast_cpu.lean_layers import LLAMA_LAYERS
from groupwise.model.heads import Heads
from groupwise.plan.facts import ModelFacts
from groupwise.policy.streams import most_at_once


def facts_of(model: PreTrainedModel) -> ModelFacts:
    """Count a model's numbers; where the weights are, and whether there are any, makes no difference.

    Raises:
        ConfigError: its config does not have the shape of a decoder.
    """
    try:
        return _count(model)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{model.config.model_type}: config.json has not the shape of a decoder with attention in every layer "
            f"({type(error).__name__}: {error}); give a model that is one"
        ) from error


def _count(model: PreTrainedModel) -> ModelFacts:
    config = model.config.get_text_config()
    settings: dict[str, Any] = config.to_dict()
    heads = Heads.of(config)
    names = dict(model.named_parameters())
    adapter = sum(p.numel() for name, p in names.items() if ".lora_" in name)
    ends = {id(p) for p in _ends(model)}
    inside = {name: p for name, p in names.items() if ".lora_" not in name and id(p) not in ends and p.dim() > 1}
    in_layers = sum(p.numel() for p in inside.values())
    active = _active_share(model, settings)
    experts = {id(p) for module in experts_of(model) for p in module.parameters()}
    products = sum(int(p.numel() * (active if id(p) in experts else 1)) for p in inside.values())
    return ModelFacts(
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        heads=heads.queries,
        key_heads=heads.keys,
        head_size=heads.size,
        mlp=_mlp(model, settings),
        vocabulary=int(config.vocab_size),
        parameters=sum(p.numel() for name, p in names.items() if ".lora_" not in name),
        products=products,
        in_layers=in_layers,
        tied=_is_tied(model),
        norms_heads=any(name.endswith(".q_norm.weight") for name in names),
        known=_is_known(model),
        adapter=adapter,
        ranks=sum(p.shape[0] for name, p in names.items() if ".lora_A." in name) // int(config.num_hidden_layers),
    )


def passes_side_by_side(model: PreTrainedModel, facts: ModelFacts, each: int, *, on_gpu: bool, packed: bool) -> int:
    """As `groupwise.policy.streams.Streams` decides it, for a model that has its weights yet to come."""
    weights = facts.weight_bytes(each, packed=packed) + each * facts.adapter
    return min(most_at_once(model, weights, on_cpu=not on_gpu), torch.get_num_threads())


def _ends(model: PreTrainedModel) -> list[Any]:
    """The weights of embedding and head."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [weight for layer in layers if layer is not None for weight in layer.parameters()]


def _active_share(model: PreTrainedModel, settings: dict[str, Any]) -> float:
    """Of all experts' weights, those that one token meets."""
    if not experts_of(model):
        return 1.0
    count = settings.get("num_experts") or settings.get("num_local_experts") or settings.get("n_routed_experts") or 1
    return int(settings.get("num_experts_per_tok") or 1) / int(count)


def _mlp(model: PreTrainedModel, settings: dict[str, Any]) -> int:
    if not experts_of(model):
        return int(
            settings.get("intermediate_size")
            or settings.get("n_inner")
            or 4 * int(model.config.get_text_config().hidden_size)
        )
    each = int(settings.get("moe_intermediate_size") or settings.get("intermediate_size") or 0)
    shared = int(settings.get("shared_expert_intermediate_size") or 0)
    return each * int(settings.get("num_experts_per_tok") or 1) + shared


def _is_tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return bool(model.config.get_text_config().tie_word_embeddings) and embedding is not None and head is not None


def _is_known(model: PreTrainedModel) -> bool:
    layers = [type(module) for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    # Those that are made ready already have their own class among their bases.
    kinds = {frozenset(LLAMA_LAYERS.intersection(base.__name__ for base in layer.__mro__)) for layer in layers}
    return len(kinds) == 1 and all(kinds)
