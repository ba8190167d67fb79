"""From a model folder (or Hub name) to a module and a tokenizer, ready for sampling and training alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from groupwise.config import ModelConfig
from groupwise.errors import ConfigError
from groupwise.model.attention import ATTENTION_NAME
from groupwise.model.evenly import make_activations_even
from groupwise.model.head import LanguageHead


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        stop_token_ids: the model's own end-of-sequence tokens (generation config and tokenizer).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: LanguageHead
    stop_token_ids: tuple[int, ...]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, special tokens left out."""
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def device(self) -> torch.device:
        return self.model.device


def resolve_device(name: str) -> torch.device:
    """The device that `model.device` names; `auto` takes the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device = {name!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {name!r}, but torch sees no GPU; use auto or cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `model.dtype` names; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.path`, with `config.chat_template` put in."""
    from groupwise.data.chat import set_chat_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {config.path!r} has no tokenizer that loads: {_first_line(error)}") from error
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    return tokenizer


def load_model(config: ModelConfig, *, tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedModel:
    """Load weights and tokenizer.

    Raises:
        ConfigError: the folder holds no causal language model, or its architecture cannot run packed.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    try:
        hf_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=hf_config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {config.path!r} could not be loaded: {_first_line(error)}") from error
    return wrap_model(model.to(device), tokenizer or load_tokenizer(config))


def wrap_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """A module that is in memory already, made ready: packed attention, no dropout."""
    text = model.config.get_text_config()
    kinds = set(text.to_dict().get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(
            f"{model.config.model_type} has layers of kind {sorted(kinds)}, which cannot run packed; "
            "use a model whose layers are full or sliding attention (Qwen, Llama, Gemma, Mistral, …)"
        )
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    make_activations_even(model)
    model.eval()
    return LoadedModel(model, tokenizer, LanguageHead(model), _stop_token_ids(model, tokenizer))


def _stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    declared: list[int] = []
    for source in (model.generation_config and model.generation_config.eos_token_id, tokenizer.eos_token_id):
        declared.extend(cast(list[int], source) if isinstance(source, list) else [] if source is None else [source])
    return tuple(dict.fromkeys(int(token) for token in declared))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
