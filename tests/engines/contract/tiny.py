"""Two versions of a tiny tied model, an untied one, an adapter; and what Hugging Face says of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB, EOS = 300, 2
PROMPT = [(7 * each + 11) % 290 + 5 for each in range(40)]


def tiny(seed: int, *, tied: bool = True) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)


class Folders:
    """Where the models are, and what Hugging Face says of them."""

    def __init__(self, root: Path) -> None:
        self.old, self.new, self.untied = root / "old", root / "new", root / "untied"
        tiny(0).save_pretrained(self.old)
        tiny(1).save_pretrained(self.new)
        tiny(2, tied=False).save_pretrained(self.untied)
        self.adapter = root / "adapter"
        self._save_adapter()
        self._models: dict[Path, Any] = {}

    def _save_adapter(self) -> None:
        self.adapter.mkdir()
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
        settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.old)}
        (self.adapter / "adapter_config.json").write_text(json.dumps(settings))
        torch.manual_seed(3)
        shapes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (64, 32)}
        tensors = {}
        for layer in range(2):
            for name, (width, height) in shapes.items():
                stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
                tensors[stem + "A.weight"] = torch.randn(4, width) * 0.3
                tensors[stem + "B.weight"] = torch.randn(height, 4) * 0.3
        save_file(tensors, self.adapter / "adapter_model.safetensors")

    def model(self, folder: Path) -> Any:
        if folder not in self._models:
            self._models[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return self._models[folder]

    def logprobs(self, folder: Path, ids: list[int], temperature: float = 1.0) -> list[float]:
        """Of each token after the first, by Hugging Face."""
        return logprobs(self.model(folder), ids, temperature)

    def mixed(self, folder: Path, others: dict[str, tuple[Path, str]]) -> Callable[[list[int]], list[float]]:
        """Log-probs of a folder's model in which some weights are another's: by name, from which folder and name."""
        model = copy.deepcopy(self.model(folder))
        if "lm_head.weight" in others:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, (other, its_name) in others.items():
                parameters[name].copy_(dict(self.model(other).named_parameters())[its_name])
        return lambda ids: logprobs(model, ids)

    def merged(self) -> Callable[[list[int]], list[float]]:
        """Log-probs of the old model with the adapter, by peft."""
        model = PeftModel.from_pretrained(copy.deepcopy(self.model(self.old)), self.adapter).merge_and_unload()
        return lambda ids: logprobs(model, ids)


def logprobs(model: Any, ids: list[int], temperature: float = 1.0) -> list[float]:
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
