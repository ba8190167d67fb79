"""The numbers of a model and of a run that decide memory and time; nothing here computes with tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SMALL_BYTES = 1 << 28
"""Weights of a model that a CPU trains in two passes side by side, and samples from in oneDNN's own order."""

Reference = Literal["none", "copy", "moving"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A decoder's shape, and how many numbers it holds.

    Attributes:
        heads, key_heads, head_size: of attention.
        mlp: width between gate and down, of the experts that a token goes through.
        parameters: all, a tied head counted once.
        products: weights that one token of a layer's products meets, all layers together; head and embedding not.
        in_layers: those that the layers hold: more than `products` where experts are.
        norms_heads: queries and keys are normed.
        known: its layers are those that Groupwise computes with fused functions; others keep more activations.
        adapter: numbers of the LoRA adapter, 0 without; `ranks` of a layer's, added up.

    Example:
        Qwen3-0.6B: layers=28, width=1024, heads=16, key_heads=8, head_size=128, mlp=3072, vocabulary=151_936,
        parameters=596_049_920
    """

    layers: int
    width: int
    heads: int
    key_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    parameters: int
    products: int
    in_layers: int
    tied: bool = True
    norms_heads: bool = False
    known: bool = True
    adapter: int = 0
    ranks: int = 0

    @property
    def head(self) -> int:
        """Weights between hidden states and logits."""
        return self.vocabulary * self.width

    @property
    def queries(self) -> int:
        """Numbers of a token's queries in one layer."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Numbers of a token's keys in one layer; its values are as many."""
        return self.key_heads * self.head_size

    @property
    def cached(self) -> int:
        """Numbers that a token's keys and values are in all layers."""
        return 2 * self.layers * self.keys

    @property
    def trained(self) -> int:
        """Numbers that training changes."""
        return self.adapter or self.parameters

    def weight_bytes(self, each: int, *, packed: bool) -> int:
        """What the weights take, without an adapter.

        Args:
            each: bytes of one that computes.
            packed: those in the layers have 4 bits (nf4, its scales quantised again: 4.127 bits each).
        """
        if not packed:
            return each * self.parameters
        return int(self.in_layers * 4.127 / 8) + each * (self.parameters - self.in_layers)


@dataclass(frozen=True, slots=True)
class Setup:
    """How a run holds and trains its model.

    Attributes:
        each: bytes of a weight that computes, 2 or 4.
        packed: frozen weights have 4 bits.
        optimizer: `optim.name`.
        on_gpu: kernels and caches are a GPU's.
        passes: micro-batches that are computed side by side.
        recomputes: gradient checkpointing.
        chunk: `train.logprob_chunk_tokens`.
        entropy: the loss needs the entropy of each token.
        reference: a frozen copy, one that moves after the policy, or none (with LoRA the policy is its own).
        compares: the reference scores, whether it is a copy or not.
        teacher: parameters of the model to distil from.
        old: the policy computes its samples' log-probs again.
    """

    each: int
    packed: bool = False
    optimizer: str = "adamw"
    on_gpu: bool = False
    passes: int = 1
    recomputes: bool = False
    chunk: int = 1024
    entropy: bool = False
    reference: Reference = "none"
    compares: bool = False
    teacher: int = 0
    old: bool = False

    @property
    def has_masters(self) -> bool:
        return self.each < 4


@dataclass(frozen=True, slots=True)
class Load:
    """What one training step is made of.

    Attributes:
        prompts, group: prompts of a step, and samples of each.
        prompt, longest_prompt: mean and most tokens of a prompt.
        answer, longest_answer: tokens of a completion, as planned for, and at most.
        updates: optimiser steps made of one batch, each on its share of the prompts.
        repeats: times that one batch is learned.
    """

    prompts: int
    group: int
    prompt: int
    longest_prompt: int
    answer: int
    longest_answer: int
    updates: int = 1
    repeats: int = 1

    @property
    def samples(self) -> int:
        return self.prompts * self.group

    @property
    def packed(self) -> int:
        """Tokens that training computes in one pass over the step: a prompt once, of a completion all but the last."""
        return self.prompts * (self.prompt + self.group * max(0, self.answer - 1))

    @property
    def drawn(self) -> int:
        """Tokens of all completions."""
        return self.samples * self.answer


def largest_pass(load: Load, budget: int, passes: int) -> Pass:
    """The largest micro-batch of one update, as `groupwise.policy.microbatches.split_rows` cuts groups of equal size.

    Args:
        budget: `train.micro_batch_tokens`.
    """
    groups = -(-load.prompts // load.updates)
    whole = load.prompt + load.group * load.answer
    share = -(-groups * whole // passes) + load.prompt
    cap = min(budget, share)
    rows = load.group if whole <= cap else max(1, (cap - load.prompt) // load.answer)
    piece = load.prompt + rows * load.answer
    pieces = groups * -(-load.group // rows)
    if piece > budget:
        return Pass.of(load, 1, rows, count=pieces)
    total = groups * (-(-load.group // rows) * load.prompt + load.group * load.answer)
    count = -(-total // (budget * passes)) * passes
    while -(-pieces // count) * piece > budget and count < pieces:
        count += passes
    return Pass.of(load, -(-pieces // count), rows, count=min(count, pieces))


@dataclass(frozen=True, slots=True)
class Pass:
    """A micro-batch.

    Attributes:
        tokens: that are computed, packed: the last of each completion left out, rounded up to 16.
        scored: whose log-probs are computed.
        count: micro-batches of an update.
    """

    tokens: int
    scored: int
    count: int

    @staticmethod
    def of(load: Load, pieces: int, rows: int, *, count: int) -> Pass:
        tokens = pieces * (load.prompt + rows * max(0, load.answer - 1))
        return Pass(-(-tokens // 16) * 16, pieces * rows * load.answer, count)
