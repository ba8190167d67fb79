"""What the plan takes from the code that allocates: activations, parameters, caches, cuts, bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from groupwise.batches import TrainingRow
from groupwise.config import LoraConfig, RolloutConfig
from groupwise.engines.native import steps
from groupwise.engines.native.engine import CPU_CACHES, _cache_bytes, _cache_shape
from groupwise.errors import ConfigError
from groupwise.inputs import ModelInput
from groupwise.model.fast_cpu import host_memory
from groupwise.model.forward import head
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import pack
from groupwise.model.loading import with_adapter, wrap_model
from groupwise.plan import memory
from groupwise.plan.facts import SMALL_BYTES, Load, Setup, largest_pass
from groupwise.plan.outline import facts_of, passes_side_by_side
from groupwise.plan.sampler import cache_shape, find_sampling, most_lanes
from groupwise.policy import streams
from groupwise.policy.microbatches import split_rows
from groupwise.quickstart.tiny_model import build_tokenizer

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 160,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(["one two three"], 300)


def make(name: str, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**SHAPE, num_hidden_layers=layers))
    return model.to(dtype)


def rows(groups: int, size: int, prompt: int, answer: int) -> list[TrainingRow]:
    def tokens(count: int, first: int) -> ModelInput:
        return ModelInput.of([3 + (first + place) % 200 for place in range(count)])

    zeros = (0.0,) * answer
    return [
        TrainingRow(group, tokens(prompt, group), tokens(answer, 7 * i), (1,) * answer, zeros, zeros)
        for group in range(groups)
        for i in range(size)
    ]


def kept_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """What autograd keeps of a pass, parameters left out, and the tokens of the pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    packed = pack(rows(1, 4, 32, 33))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _hidden = packed_hidden_states(model, packed)
    return sum(size for size, _ in seen.values()), len(packed.token_ids)


def kept_in_a_layer(name: str, dtype: torch.dtype, tokenizer: Any, lora: LoraConfig) -> tuple[float, PreTrainedModel]:
    """Bytes of one token: two layers are the difference between a model of three and one of one."""
    some: list[int] = []
    for layers in (1, 3):
        loaded = with_adapter(wrap_model(make(name, layers, dtype), tokenizer), lora)
        kept, tokens = kept_bytes(loaded.model)
        some.append(kept)
    return (some[1] - some[0]) / 2 / tokens, loaded.model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Qwen2", "Mistral"])
def test_a_layer_keeps_what_the_plan_says(name: str, rank: int, dtype: torch.dtype, tokenizer: Any) -> None:
    kept, model = kept_in_a_layer(name, dtype, tokenizer, LoraConfig.model_validate({"rank": rank}))
    facts = facts_of(model)
    assert facts.known
    assert kept == memory.kept_per_token(facts, dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_other_kinds_are_an_estimate(dtype: torch.dtype, tokenizer: Any) -> None:
    kept, model = kept_in_a_layer("Gemma3", dtype, tokenizer, LoraConfig.model_validate({}))
    facts = facts_of(model)
    assert not facts.known
    assert memory.kept_per_token(facts, dtype.itemsize) == pytest.approx(kept, rel=0.05)


def test_numbers_of_a_model_and_its_adapter(tokenizer: Any) -> None:
    plain = make("Qwen3", 2, torch.float32)
    facts = facts_of(plain)
    assert facts.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert facts.in_layers == facts.products == 2 * (64 * 32 * (4 + 2 + 2) + 128 * 64 + 3 * 64 * 160)
    assert (facts.trained, facts.head, facts.tied) == (facts.parameters, 300 * 64, False)
    loaded = with_adapter(wrap_model(plain, tokenizer), LoraConfig.model_validate({"rank": 4}))
    with_lora = facts_of(loaded.model)
    trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    assert (with_lora.adapter, with_lora.trained, with_lora.ranks) == (trained, trained, 7 * 4)
    assert with_lora.parameters == facts.parameters


def test_of_a_mixture_a_token_meets_some_experts(make_mixture: Callable[..., PreTrainedModel]) -> None:
    facts = facts_of(make_mixture("qwen3_moe"))
    attention = 64 * 16 * (4 + 2 + 2) + 4 * 16 * 64
    experts, router = 16 * 3 * 64 * 36, 16 * 64
    assert facts.in_layers == 3 * (attention + experts + router)
    assert facts.products == 3 * (attention + experts // 4 + router)
    assert facts.mlp == 4 * 36


def test_a_config_without_the_shape_of_a_decoder_is_refused() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 8,
        "patch_size": 4,
    }
    sees = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"clip_vision_model: config\.json has not the shape of a decoder"):
        facts_of(sees)


def test_constants_are_the_codes_own() -> None:
    assert head._KEPT_BYTES == memory.KEPT_BYTES
    assert host_memory._WIDE == memory.WIDE
    assert head._NARROW == memory.NARROW
    assert steps.PREFILL_TOKENS == memory.PREFILL_TOKENS
    assert streams._SMALL_BYTES == SMALL_BYTES
    assert _cache_bytes(RolloutConfig.model_validate({}), torch.device("cpu"), 0) == CPU_CACHES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_is_the_engines(dtype: torch.dtype, tokenizer: Any) -> None:
    loaded = wrap_model(make("Llama", 2, dtype), tokenizer)
    shape = _cache_shape(loaded)
    planned = cache_shape(facts_of(loaded.model), Setup(each=dtype.itemsize))
    assert (planned.bytes_per_token, planned.capacity(65), planned.lanes_for(33)) == (
        shape.bytes_per_token,
        shape.capacity(65),
        shape.lanes_for(33),
    )


def test_caches_of_a_step_and_of_an_evaluation() -> None:
    facts, setup = facts_of(make("Llama", 2, torch.float32)), Setup(each=4)
    step = Load(prompts=4, group=8, prompt=30, longest_prompt=70, answer=100, longest_answer=100)
    each = 2 * 2 * 2 * 32 * 4
    found = find_sampling(facts, setup, [step], 2**30, at_most=256)
    assert (found.lanes, found.prefill) == (32, 4 * 30)
    assert found.caches == each * (4 * 128 + 32 * 128)
    evaluation = Load(prompts=40, group=1, prompt=30, longest_prompt=70, answer=100, longest_answer=100)
    both = find_sampling(facts, setup, [step, evaluation], 2**30, at_most=256)
    assert both.caches == each * (40 * 128 + 40 * 128)
    # Eight lanes of one prompt: the next prompt may have begun.
    few = find_sampling(facts, setup, [step], 2**30, at_most=8)
    assert few.caches == each * (2 * 128 + 8 * 128)
    assert most_lanes(cache_shape(facts, setup), step, each * (2 * 128 + 8 * 128), at_most=256) == 8
    assert most_lanes(cache_shape(facts, setup), step, each * 200, at_most=256) == 0


@pytest.mark.parametrize("budget", [50, 150, 600, 1000, 2500, 10**6])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("groups", "size", "prompt", "answer"), [(8, 8, 40, 64), (3, 4, 100, 20), (5, 2, 7, 90)])
def test_passes_are_those_that_the_policy_cuts(
    groups: int, size: int, prompt: int, answer: int, passes: int, budget: int
) -> None:
    cut = split_rows(rows(groups, size, prompt, answer), budget, streams=passes)
    packs = [pack(each.rows) for each in cut]
    load = Load(groups, size, prompt, prompt, answer, answer)
    found = largest_pass(load, budget, passes)
    largest = max(len(packed.token_ids) for packed in packs)
    # Parts of a group that are not whole are counted as whole ones, so the plan may be a little larger.
    assert largest <= found.tokens <= max(1.3 * largest, largest + prompt + answer)


def test_passes_side_by_side_as_the_policy_decides(threads: Callable[[int], None]) -> None:
    model = make("Llama", 1, torch.float32)
    facts = facts_of(model)
    for count in (1, 2):
        threads(count)
        planned = passes_side_by_side(model, facts, 4, on_gpu=False, packed=False)
        assert planned == streams.Streams(model).count == count
    assert passes_side_by_side(model, facts, 4, on_gpu=True, packed=False) == 1
