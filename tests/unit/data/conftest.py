"""A real tokenizer, trained in a moment: byte-level BPE with special tokens and small chat templates."""

from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if no_think %}(no thoughts){% endif %}{% endif %}"
)
"""Every prefix of a conversation is a prefix of its rendering."""

THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if loop.index0 > ns.last %}<think>\n"
    "{{ parts[0].replace('<think>', '').strip() if parts | length > 1 else '' }}\n"
    "</think>\n\n{% endif %}{{ parts[-1].strip() }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Qwen3's: thoughts stay in turns after the last question and are dropped from earlier ones."""


@pytest.fixture(scope="session")
def _trained() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["what is the sum of two and three? the answer is five.\n\n"] * 20, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|im_end|>")


@pytest.fixture
def bare(_trained: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Adds a beginning-of-sequence token to text; has no chat template."""
    return copy.deepcopy(_trained)


@pytest.fixture
def tokenizer(bare: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bare.chat_template = PLAIN
    return bare


@pytest.fixture
def thinking(bare: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bare.chat_template = THINKING
    return bare
