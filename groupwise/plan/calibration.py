"""The device at hand, measured for some seconds: products and copies on a GPU; on a CPU, where much else counts, a
model of the run's own widths with few layers and a part of its vocabulary, trained and sampled from as in the run.
"""

from __future__ import annotations

import asyncio
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from groupwise.batches import TrainingRow
from groupwise.config import LoraConfig, ModelConfig, RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.engines.native.sampling import RowParams, choose
from groupwise.inputs import ModelInput
from groupwise.model.fast_cpu.linear import ordered_weights
from groupwise.model.forward.attention import ATTENTION_NAME
from groupwise.model.forward.head import token_scores
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import Packed, pack
from groupwise.model.loading import LoadedModel, load_tokenizer, resolve_device, resolve_dtype, with_adapter, wrap_model
from groupwise.model.outline import whole_model
from groupwise.plan.devices import Device
from groupwise.plan.facts import SMALL_BYTES, Load, ModelFacts, Setup
from groupwise.plan.outline import facts_of
from groupwise.plan.seconds import Rates, attention_pairs, head_operations, layer_operations
from groupwise.policy.streams import Streams
from groupwise.types import Prompt, SampleRequest, SamplingParams

_SIZE = 1 << 26  # bytes that are copied: more than a processor's cache
_VOCABULARY = 8_192
_OPERATIONS = 3e10  # of one pass that is timed
_STEP_SECONDS = 0.5
_FIRST_STEPS, _FEWEST_STEPS, _MOST_STEPS = 12, 6, 48
_PROMPT = 16
_WIDE_LAYER = 16_000_000  # weights, from which on two layers are compared with one, instead of three


def device_at_hand(config: ModelConfig, *, measures: bool = True) -> Device:
    """The device that `model.device` names, with what is free there, and a GPU's measured ceilings.

    Args:
        measures: False leaves a GPU's ceilings at 0.

    Raises:
        ConfigError: there is no such device.
    """
    device = resolve_device(config.device)
    if device.type == "cpu":
        name = f"this CPU, {torch.get_num_threads()} threads"
        return Device(name, _free_memory(), 0.0, 0.0, 0.0, on_gpu=False, source="measured here")
    free, _ = torch.cuda.mem_get_info(device)
    if not measures:
        return Device(torch.cuda.get_device_name(device), free, 0.0, 0.0, 0.0, source="not measured")
    half, single = (_operations(device, dtype) for dtype in (torch.bfloat16, torch.float32))
    return Device(torch.cuda.get_device_name(device), free, half, single, bandwidth(device), source="measured here")


def _free_memory() -> int:
    """Bytes that programs can still have: what Linux says, or the group of processes may have."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    for bound in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = bound.read_text(encoding="utf-8").strip() if bound.is_file() else ""
        if text.isdigit():
            found.append(int(text))
    return min(found)


Clock = Callable[[], float]


def typical_seconds(
    work: Callable[[], object], device: torch.device, *, repeats: int = 3, clock: Clock = time.perf_counter
) -> float:
    """The median of some calls, after one that is not counted."""
    found: list[float] = []
    for _ in range(repeats + 1):
        _wait(device)
        started = clock()
        work()
        _wait(device)
        found.append(clock() - started)
    return statistics.median(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _operations(device: torch.device, dtype: torch.dtype, size: int = 8_192) -> float:
    x = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / typical_seconds(lambda: torch.mm(x, x), device, repeats=5)


def bandwidth(device: torch.device, *, clock: Clock = time.perf_counter) -> float:
    """Bytes per second of a copy, those read and those written."""
    size = _SIZE if device.type == "cpu" else 16 * _SIZE
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / typical_seconds(lambda: target.copy_(source), device, repeats=5, clock=clock)


def calibrate(
    config: ModelConfig,
    lora: LoraConfig,
    facts: ModelFacts,
    setup: Setup,
    load: Load,
    *,
    lanes: int,
    clock: Clock = time.perf_counter,
) -> Rates:
    """What the CPU at hand reaches with models of these widths.

    Args:
        lanes: samples decoded together.
        clock: seconds; those of the processor leave other work on the machine out, where there is one thread.
    """
    few, many = (_Replica.of(config, lora, clock, layers=layers) for layers in (1, 2 if _is_wide(facts) else 3))
    lanes = min(lanes, load.samples)
    small = facts.weight_bytes(setup.each, packed=setup.packed) <= SMALL_BYTES
    short, long = (_TimedEngine(each, lanes, tries_threads=small) for each in (few, many))
    seconds = [engine.step_seconds(load) for engine in (short, long)]
    draw = _draw_seconds(many, lanes, threads=long.threads)
    layer = max(0.0, seconds[1] - seconds[0]) / (many.facts.layers - few.facts.layers)
    # As in a run, learning has a thread of its own: torch's threads are each thread's own, and those that one leaves
    # behind would be in the way of the other's.
    with ThreadPoolExecutor(1) as pool:
        train, forward = pool.submit(_layer_rates, many, setup, load).result()
        head_train, head_forward = pool.submit(_head_rates, many, setup, load).result()
    return Rates(
        train=train,
        forward=forward,
        head_train=head_train,
        head_forward=head_forward,
        bandwidth=bandwidth(torch.device("cpu"), clock=clock),
        note=f"measured here with {many.facts.layers} layers of the model's widths",
        step=max(0.0, seconds[0] - layer - draw),
        layer=layer,
        draw=draw / many.facts.vocabulary,
    )


def _is_wide(facts: ModelFacts) -> bool:
    return facts.in_layers // facts.layers > _WIDE_LAYER


@dataclass(frozen=True, slots=True)
class _Replica:
    """A model of the run's widths with random weights, and what it is timed by."""

    loaded: LoadedModel
    facts: ModelFacts
    clock: Clock

    @staticmethod
    def of(config: ModelConfig, lora: LoraConfig, clock: Clock, *, layers: int) -> _Replica:
        base = whole_model(config)
        whole = AutoConfig.from_pretrained(base.path, trust_remote_code=base.trust_remote_code)
        settings = _shortened(whole, layers)
        dtype = resolve_dtype(config.dtype, torch.device("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(
                settings, dtype=dtype, attn_implementation=ATTENTION_NAME, trust_remote_code=base.trust_remote_code
            )
        loaded = with_adapter(wrap_model(model, load_tokenizer(config)), lora)
        return _Replica(loaded, facts_of(loaded.model), clock)

    @property
    def trained(self) -> list[Tensor]:
        return [weight for weight in self.loaded.model.parameters() if weight.requires_grad]

    def timed(self, setup: Setup, work: Callable[[Packed], object], packs: Sequence[Packed]) -> float:
        """Seconds of `work` on all of them, side by side as in the run."""
        if setup.passes == 1:
            return self.seconds(lambda: [work(one) for one in packs])
        streams = Streams(self.loaded.model)
        return self.seconds(lambda: list(streams.map(work, packs)))

    def seconds(self, work: Callable[[], object], *, repeats: int = 3) -> float:
        return typical_seconds(work, self.loaded.device, repeats=repeats, clock=self.clock)


def _shortened(whole: Any, layers: int) -> Any:
    settings = copy.deepcopy(whole)
    text = settings.get_text_config()
    text.num_hidden_layers = layers
    text.vocab_size = min(text.vocab_size, _VOCABULARY)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, None)
    if getattr(text, "layer_types", None):
        text.layer_types = (list(text.layer_types) * layers)[:layers]
    return settings


def _layer_rates(replica: _Replica, setup: Setup, load: Load) -> tuple[float, float]:
    """Operations per second in layers: with a backward pass, and without."""
    facts = replica.facts
    sample = Load(1, 1, min(load.prompt, 128), load.prompt, min(load.answer, 256), load.answer)
    alone = 6 * facts.products * sample.packed
    sample = Load(1, min(load.group, max(1, round(_OPERATIONS / alone))), *_lengths(sample))
    packed, pairs = pack(_rows(sample, facts.vocabulary)), attention_pairs(sample)
    weights = replica.trained

    def learn(one: Packed) -> None:
        hidden = packed_hidden_states(replica.loaded.model, one)
        torch.autograd.grad(hidden, weights, torch.ones_like(hidden), allow_unused=True)

    def score(one: Packed) -> None:
        with torch.no_grad():
            packed_hidden_states(replica.loaded.model, one)

    packs = [packed] * setup.passes
    done = [setup.passes * layer_operations(facts, sample.packed, pairs, backward=kind) for kind in (True, False)]
    return done[0] / replica.timed(setup, learn, packs), done[1] / replica.timed(setup, score, packs)


def _lengths(load: Load) -> tuple[int, int, int, int]:
    return load.prompt, load.longest_prompt, load.answer, load.longest_answer


def _rows(load: Load, vocabulary: int) -> list[TrainingRow]:
    def tokens(count: int, first: int) -> ModelInput:
        return ModelInput.of([(first + 7 * place) % vocabulary for place in range(count)])

    zeros, prompt = (0.0,) * load.answer, tokens(load.prompt, 3)
    return [
        TrainingRow(0, prompt, tokens(load.answer, 11 + i), (1,) * load.answer, zeros, zeros) for i in range(load.group)
    ]


def _head_rates(replica: _Replica, setup: Setup, load: Load) -> tuple[float, float]:
    """The same of the head, on tokens whose weights are kept as those of a step's are, or are not."""
    facts, loaded = replica.facts, replica.loaded
    count = max(64, min(load.drawn, setup.chunk, int(_OPERATIONS / (6 * facts.head))))
    hidden = torch.randn(count, facts.width, dtype=loaded.model.dtype, requires_grad=True)
    targets = torch.arange(count) % facts.vocabulary
    head: Any = loaded.model.get_output_embeddings()
    weights = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]

    def learn() -> None:
        found = token_scores(loaded.head, hidden, targets, chunk_tokens=setup.chunk, with_entropy=setup.entropy)
        total = found.logprobs.sum() if found.entropy is None else found.logprobs.sum() + found.entropy.sum()
        torch.autograd.grad(total, weights)

    def score() -> None:
        with torch.no_grad():
            token_scores(loaded.head, hidden, targets, chunk_tokens=setup.chunk)

    done = [head_operations(facts, count, backward=kind, at_once=count) for kind in (True, False)]
    return done[0] / replica.seconds(learn), done[1] / replica.seconds(score)


def _draw_seconds(replica: _Replica, lanes: int, *, threads: int) -> float:
    """Logits and a draw for each of the samples, on so many threads."""
    loaded = replica.loaded
    hidden = torch.randn(lanes, replica.facts.width, dtype=loaded.model.dtype)
    params = RowParams.of([SamplingParams(max_tokens=1)] * lanes, loaded.device)
    uniform = torch.full((lanes,), 0.5, dtype=torch.float64)

    def draw() -> None:
        choose(loaded.head.logits(hidden), uniform, params, sums=loaded.head.row_sums)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), ordered_weights(loaded.model):
            return replica.seconds(draw, repeats=5)
    finally:
        torch.set_num_threads(before)


class _TimedEngine(NativeEngine):
    """Samples from a replica, and notes the seconds of each step.

    Args:
        tries_threads: as an engine over the run's own model, of which a replica is a small part.
    """

    def __init__(self, replica: _Replica, lanes: int, *, tries_threads: bool) -> None:
        super().__init__(replica.loaded, RolloutConfig.model_validate({"max_concurrent_samples": lanes}))
        self._tries_threads = tries_threads
        self._vocabulary, self._lanes = replica.facts.vocabulary, lanes
        self._clock, self._seconds = replica.clock, list[float]()

    def _step(self) -> None:
        started = self._clock()
        super()._step()
        self._seconds.append(self._clock() - started)

    @property
    def threads(self) -> int:
        """Of a decode step."""
        return self._threads.count if self._tries_threads else torch.get_num_threads()

    def step_seconds(self, load: Load) -> float:
        """A decode step of all lanes, at the beginning of their answers."""
        return asyncio.run(self._measure(min(load.group, self._lanes)))

    async def _measure(self, group: int) -> float:
        first = await self._sample(group, _FIRST_STEPS)  # until the number of threads is found
        return await self._sample(group, max(_FEWEST_STEPS, min(_MOST_STEPS, int(_STEP_SECONDS / first))))

    async def _sample(self, group: int, tokens: int) -> float:
        """The median of the steps that draw so many tokens."""
        prompts = [
            Prompt(f"p{i}", (), "", ModelInput.of([(i + place) % self._vocabulary for place in range(_PROMPT)]))
            for i in range(-(-self._lanes // group))
        ]
        sampling = SamplingParams(max_tokens=tokens)
        self._seconds.clear()
        asked = [SampleRequest.of(prompts[i // group], i % group, sampling) for i in range(self._lanes)]
        async for _ in self.generate(asked):
            pass
        return statistics.median(self._seconds[1:])  # the first computes prompts
