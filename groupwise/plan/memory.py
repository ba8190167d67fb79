"""Memory by part, and its peak.

Derived from what is allocated: `model/loading.py` (weights), `policy/optimizer.py` (masters, gradients, moments),
`model/fast_cpu` and `model/fast_gpu` (what a layer keeps for its gradient), `model/forward/head.py` (chunks of logits),
`engines/native/budget.py` (caches). Three moments can be the peak: sampling, a backward pass, an update.
"""

from __future__ import annotations

from dataclasses import dataclass

from groupwise.plan.facts import SMALL_BYTES, ModelFacts, Pass, Setup

MIB = 2**20

KEPT_BYTES = 1 << 28
"""Weights of the head's softmax that one pass keeps rather than computes again (`model/forward/head.py`)."""

NARROW = 4
"""Rows of a GPU's kernels in the memory of one (`model/forward/head.py`)."""

PREFILL_TOKENS = 16_384
"""Tokens of prompts that the engine computes together (`engines/native/steps.py`)."""

IMPORTS = {False: 356 * MIB, True: 0}
"""A process that has imported everything, on a CPU (measured)."""

LIBRARIES = {False: 80 * MIB, True: 768 * MIB}
"""What libraries take once they compute, on a CPU (measured) and on a GPU (its context; an estimate)."""

ADAPTERS = 28 * MIB
"""What peft takes, which is imported where there is an adapter (measured)."""

HOLES = {("full", 4): (0.33, 0.25), ("full", 2): (0.60, 0.30), ("LoRA", 4): (0.65, 0.48), ("LoRA", 2): (0.78, 0.58)}
"""Of what comes and goes in two passes, memory that is free and of no use, because blocks of other sizes lie around it;
of narrow models, and of wide ones, whose freed memory is given back (`model/fast_cpu/host_memory.py`). By bytes of a
weight. Measured on a CPU after six steps, when it has about levelled off; two passes leave the same, one after the
other or side by side."""

GPU_HOLES = 0.10
"""The same of one pass on a GPU, an estimate."""

WIDE = 512
"""Hidden size from which freed memory is given back (`model/fast_cpu/host_memory.py`)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the sampler holds.

    Attributes:
        lanes: samples decoded together.
        caches: bytes of keys and values, of prompts and samples.
        prefill: tokens of prompts computed together.
    """

    lanes: int
    caches: int
    prefill: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes.

    Attributes:
        held: what is there all the time, by part, in the order to show.
        sampling, learning, updating: what is there beside that at each of the three moments, by part.
    """

    held: dict[str, int]
    sampling: dict[str, int]
    learning: dict[str, int]
    updating: dict[str, int]

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        return {"sampling": self.sampling, "backward pass": self.learning, "update": self.updating}

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + sum(self.moments[self.peak_moment].values())


def find_memory(facts: ModelFacts, setup: Setup, work: Pass, sampling: Sampling) -> Memory:
    """Of a run whose largest micro-batch is `work`, once every optimiser state is there."""
    learning, updating = _learning(facts, setup, work), {"gradients": 4 * facts.trained}
    return Memory(_held(facts, setup, sampling), _sampling(facts, setup, sampling), learning, updating)


def _held(facts: ModelFacts, setup: Setup, sampling: Sampling) -> dict[str, int]:
    whole = setup.each * facts.parameters
    reference = {"none": 0, "copy": whole, "moving": whole + (4 * facts.parameters if setup.has_masters else 0)}
    return {
        "weights": facts.weight_bytes(setup.each, packed=setup.packed),
        "LoRA": setup.each * facts.adapter,
        "master weights": 4 * facts.trained if setup.has_masters else 0,
        "Adam moments": _moments(facts, setup),
        "reference model": reference[setup.reference],
        "teacher": setup.each * setup.teacher,
        "KV caches": sampling.caches,
        "imports": IMPORTS[setup.on_gpu],
        "libraries": LIBRARIES[setup.on_gpu] + (ADAPTERS if facts.adapter and not setup.on_gpu else 0),
    }


def _moments(facts: ModelFacts, setup: Setup) -> int:
    if setup.optimizer == "adamw_8bit":
        return 2 * facts.trained
    if setup.optimizer == "muon":
        # One momentum for the matrices between embedding and head, AdamW's two for the rest.
        matrices = facts.adapter or facts.in_layers
        return 4 * matrices + 8 * (facts.trained - matrices)
    return 8 * facts.trained


def _sampling(facts: ModelFacts, setup: Setup, sampling: Sampling) -> dict[str, int]:
    """The larger of a prefill and a decode step, which has logits of every lane, and weighs them."""
    prefill = sampling.prefill * setup.each * (2 * facts.width + 3 * max(facts.mlp, facts.queries))
    logits = sampling.lanes * facts.vocabulary * (setup.each if setup.on_gpu else 2 * 4 + setup.each % 4)
    ordered = 0
    if not setup.on_gpu and setup.each == 4 and 4 * (facts.in_layers + facts.head) <= SMALL_BYTES:
        ordered = 4 * (facts.in_layers + facts.head + facts.adapter)
    return {"ordered weights": ordered, "prompts and logits": max(prefill, logits)}


def kept_per_token(facts: ModelFacts, each: int) -> int:
    """Bytes that one layer keeps of a token until its gradient: inputs of the two norms and of the products (four of
    the width), queries, keys and values as attention saw them with its result, the same before their norms where there
    are some, gate, up and their product, and what an adapter has between its matrices; in float32 a norm's scale, and
    the log of each row's mass."""
    heads = facts.queries + 2 * facts.keys + facts.queries
    if facts.norms_heads:
        heads += facts.queries + facts.keys
    scales = 2 + facts.heads + (facts.heads + facts.key_heads if facts.norms_heads else 0)
    kept = each * (4 * facts.width + heads + 3 * facts.mlp + facts.ranks) + 4 * scales
    return kept if facts.known else int(kept * OTHERS[each])


OTHERS = {4: 1.6, 2: 2.3}
"""What transformers' own layers keep, in terms of ours, by bytes of a weight: each small operation of a norm, a
rotation or a gate keeps its inputs, and a norm's are float32 (counted for Gemma 3: 1.56 and 2.23; an estimate for
others)."""


def activations(facts: ModelFacts, setup: Setup, tokens: int) -> int:
    """Of one pass, when its backward begins; and what that needs in its first layer."""
    layer = kept_per_token(facts, setup.each)
    turning = setup.each * (3 * facts.width + 3 * max(facts.mlp, facts.queries))
    ends = 2 * setup.each * facts.width
    if setup.recomputes:
        return tokens * (facts.layers * setup.each * facts.width + layer + turning + ends)
    return tokens * (facts.layers * layer + turning + ends)


def head_bytes(facts: ModelFacts, setup: Setup, scored: int) -> int:
    """Of the head's backward pass: a chunk of logits, or the softmax's weights of all tokens where these are small; and
    the head's gradient, twice while chunks add up."""
    kept = 4 * scored * facts.vocabulary <= KEPT_BYTES and not setup.entropy
    size = setup.chunk * (NARROW if setup.on_gpu and not setup.entropy else 1)
    once = 0 if facts.adapter else setup.each * facts.head
    gradient = once * (2 if scored > size else 1)
    hidden = setup.each * scored * facts.width
    if kept:
        return 4 * scored * facts.vocabulary + gradient + hidden
    if setup.on_gpu and not setup.entropy:
        return setup.each * min(size, scored) * facts.vocabulary + gradient + hidden
    chunk = min(size, scored) * facts.vocabulary
    if setup.entropy:
        return 16 * chunk + gradient + hidden
    wide = chunk * (4 if setup.each == 4 else 6)
    narrow = chunk * setup.each
    return (max(wide + once, narrow + gradient) if setup.each < 4 else wide + gradient) + hidden


def _learning(facts: ModelFacts, setup: Setup, work: Pass) -> dict[str, int]:
    """The larger of a pass whose backward begins, and one whose backward ends: activations give way to gradients."""
    own = facts.trained * setup.each
    added = 4 * facts.trained if work.count > setup.passes else 0
    acts = setup.passes * activations(facts, setup, work.tokens)
    head = setup.passes * head_bytes(facts, setup, work.scored)
    holes = _holes(facts, setup, work, acts + head)
    begins = {"gradients": added, "activations": acts, "logits": head, "holes": holes}
    if setup.passes > 1:
        grads = setup.passes * own + max(added, 4 * facts.trained if setup.has_masters else 0)
    else:
        grads = 4 * facts.trained + 2 * setup.each * (0 if facts.adapter else facts.head)
    one = setup.passes * work.tokens * kept_per_token(facts, setup.each)
    # What the first moment took, and the second does not need, is kept by the process, and of use for all but holes.
    ends = {"gradients": grads, "activations": one, "logits": 0, "holes": holes}
    return max(begins, ends, key=lambda parts: sum(parts.values()))


def _holes(facts: ModelFacts, setup: Setup, work: Pass, moving: int) -> int:
    """
    Args:
        moving: bytes of activations and logits of the passes that go side by side.
    """
    if setup.on_gpu:
        return int(GPU_HOLES * moving)
    narrow, wide = HOLES["LoRA" if facts.adapter else "full", setup.each]
    two = max(1.0, min(2, work.count) / setup.passes)
    return int((wide if facts.width >= WIDE else narrow) * two * moving)
