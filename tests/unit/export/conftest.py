"""Tiny models of four kinds that have learned a few answers by heart, so that their greedy choices are clear ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from groupwise.export.gguf_vocab import TELLING_TEXTS
from groupwise.export.verify import PROMPTS
from groupwise.quickstart.tiny_model import build_tokenizer

KINDS = ("qwen3", "qwen2", "llama", "gemma3")
ANSWERS = ("It is 42, I think.", "No; 7 apples,\nnot 8.", "日本の東京です。", "def f(x):\n    return x", "1 + 2 = 3 🙂")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def fresh(kind: str, tokenizer: Any) -> Any:
    sizes = {
        "vocab_size": 720,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 7 if kind == "gemma3" else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "initializer_range": 0.08,
    }
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False))
    sizes["head_dim"] = 32
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=LLAMA3_ROPE))
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=16, query_pre_attn_scalar=32))


def learn(model: Any, tokenizer: Any, *, steps: int, shift: int) -> None:
    """Learn answers to the prompts that `verify` asks, by heart; `shift` says which answer belongs to which."""
    rows = []
    for place, prompt in enumerate(PROMPTS):
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        rows.append(tokenizer.encode(head + ANSWERS[(place + shift) % len(ANSWERS)] + tokenizer.eos_token))
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer([*TELLING_TEXTS, *PROMPTS, *ANSWERS] * 2, vocab_size=700)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.is_dir():
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = fresh(kind, tokenizer)
                for name, parameter in model.named_parameters():
                    if "norm" in name or name.endswith("bias"):
                        parameter.data.add_(torch.randn_like(parameter) * 0.1)
                learn(model, tokenizer, steps=40 if kind == "gemma3" else 80, shift=0)
            model.generation_config.eos_token_id = tokenizer.eos_token_id
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def adapter_folder(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("adapters")

    def make(kind: str, **settings: Any) -> Path:
        folder = root / f"{kind}-{len(list(root.iterdir()))}" if settings else root / kind
        if not folder.is_dir():
            base = model_folder(kind)
            loaded = AutoTokenizer.from_pretrained(base)
            config = LoraConfig(
                r=4,
                lora_alpha=16,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                task_type="CAUSAL_LM",
                **settings,
            )
            with torch.random.fork_rng():
                torch.manual_seed(2)
                model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
                learn(model, loaded, steps=40, shift=1)
            model.save_pretrained(folder)
            loaded.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def run_directory(tmp_path: Path, model_folder: Callable[[str], Path]) -> Path:
    """What a run leaves, as far as an export looks at it."""
    run = tmp_path / "sums"
    (run / "final").parent.mkdir(parents=True)
    (run / "final").symlink_to(model_folder("qwen3"), target_is_directory=True)
    config = {
        "model": {"path": "Qwen/Qwen3-0.6B", "dtype": "float32"},
        "data": {"train": "sums.jsonl"},
        "reward": [{"name": "gsm8k", "weight": 1.0}, {"name": "a|b", "weight": 0.5}],
        "rollout": {"group_size": 8, "prompts_per_step": 32, "temperature": 1.0, "max_completion_tokens": 64},
        "algorithm": {"name": "grpo", "kl": {"coef": 0.0}},
        "optim": {"lr": 1e-6, "schedule": "constant", "steps_per_batch": 1},
        "train": {"steps": 30, "seed": 7, "epochs": 1},
        "sft": {"rows_per_step": 32},
    }
    (run / "config.json").write_text(json.dumps(config))
    (run / "summary.json").write_text(json.dumps({"steps": 30, "seconds": 12.5, "seed": 7}))
    (run / "versions.json").write_text(json.dumps({"groupwise": "0.9", "torch": "2.13", "python": "3.12"}))
    rows = [{"step": 0, "eval/accuracy": 0.1}]
    rows += [{"step": k, "reward": k / 30, "kl": None if k == 3 else 0.01} for k in range(1, 31)]
    rows += [{"step": 30, "eval/accuracy": 0.6}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "rew'
    (run / "metrics.jsonl").write_text(text)
    return run


@pytest.fixture
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Gemma's: BPE over characters with ▁ for a space, bytes for what is unknown, merges by score."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = ["▁", "a", "b", "c", "1", "\n", "ab", "▁ab", "▁a", "abc", "▁abc", "▁1"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "ab"), ("▁", "a"), ("▁a", "b"), ("ab", "c"), ("▁ab", "c"), ("▁", "1")]
    raw = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence(parts)  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])  # pyright: ignore[reportArgumentType]
    return tokenizer
