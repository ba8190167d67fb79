"""From a model folder (or Hub name) to a module and a tokenizer, ready for sampling and training alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from groupwise.config import LoraConfig, ModelConfig
from groupwise.config.checks import require_batch_invariance, require_bitsandbytes
from groupwise.config.lora import AdapterFile, read_adapter_file
from groupwise.config.model_name import named_checkpoint, settled_model
from groupwise.errors import ConfigError
from groupwise.installed import require_adapters, require_versions
from groupwise.model.adapters import adapter_of, add_adapter, continue_adapter, load_adapter
from groupwise.model.exact.experts import make_experts_even
from groupwise.model.fast_cpu.evenly import make_activations_even
from groupwise.model.fast_cpu.host_memory import keep_freed_memory
from groupwise.model.fast_cpu.lean_layers import join_products, make_layers_lean
from groupwise.model.fast_cpu.linear import use_dnn_linear
from groupwise.model.fast_cpu.norms import make_norms_lean
from groupwise.model.fast_cpu.processor import check_rows_are_exact, limit_units
from groupwise.model.folder import check_sizes, told_of_folder
from groupwise.model.forward.attention import ATTENTION_NAME
from groupwise.model.forward.head import LanguageHead
from groupwise.model.forward.scoring import ScoringModel
from groupwise.model.invariant.use import is_batch_invariant, make_batch_invariant, require_gpu
from groupwise.model.quantized import is_packed, nf4_settings, unpack_before_products
from groupwise.protocols import Tokenizer

if TYPE_CHECKING:
    import peft

limit_units()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        scoring: the model as one module from packed rows to scores.
        stop_token_ids: the model's own end-of-sequence tokens (generation config and tokenizer).
    """

    scoring: ScoringModel
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]

    @property
    def model(self) -> PreTrainedModel:
        return self.scoring.model

    @property
    def text_config(self) -> Any:
        """The language model's own config; of one that also sees, a part of the whole."""
        return self.model.config.get_text_config()

    @property
    def head(self) -> LanguageHead:
        return self.scoring.head

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def batch_invariant(self) -> bool:
        """Whether its kernels are those of `model.batch_invariant`."""
        return is_batch_invariant(self.model)

    @property
    def adapter(self) -> peft.LoraConfig | None:
        """Of the LoRA adapter inside the module, if there is one."""
        return adapter_of(self.model)


def resolve_device(name: str) -> torch.device:
    """The device that `model.device` names; `auto` takes the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model.device = {name!r} is no device; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {name!r}, but torch sees no GPU; use auto or cpu")
    return device


def prepare_device(name: str) -> None:
    """Refuse a device that is not there, before anything else is done. On a CPU, ask for memory that stays; threads
    that have begun before that keep their own ways."""
    if resolve_device(name).type == "cpu":
        keep_freed_memory()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `model.dtype` names; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


@told_of_folder
def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer of `config.path`, with `config.chat_template` put in."""
    from groupwise.data.chat import set_chat_template

    config = config.model_copy(update={"path": settled_model(config.path)})
    if checkpoint := named_checkpoint(config.path):
        from groupwise.model.checkpoints import base_config

        return load_tokenizer(base_config(config, checkpoint))
    _check_path(config.path)
    adapter = read_adapter_file(Path(config.path))
    if adapter is not None and not (adapter.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(config.model_copy(update={"path": adapter.base}))
    try:
        loaded = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises a bare one over a file that it cannot read
        if "trust_remote_code" in str(error):
            raise
        raise ConfigError(f"model.path = {config.path!r} has no tokenizer that loads: {_first_line(error)}") from error
    tokenizer = cast(Tokenizer, loaded)
    # Without its files, transformers makes a tokenizer of special tokens alone, and says nothing.
    if not tokenizer.encode("a", add_special_tokens=False):
        raise ConfigError(
            f"model.path = {config.path!r} has no tokenizer: got one without a vocabulary; "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        )
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    return tokenizer


@told_of_folder
def load_model(config: ModelConfig, *, tokenizer: Tokenizer | None = None) -> LoadedModel:
    """Load weights and tokenizer; from an adapter's folder, its base and the adapter in it. `config.path` may also be a
    run, or a checkpoint of one (`groupwise.config.model_name`).

    Raises:
        ConfigError: the folder holds no causal language model, or its architecture cannot run packed.
    """
    config = config.model_copy(update={"path": settled_model(config.path)})
    if checkpoint := named_checkpoint(config.path):
        from groupwise.model.checkpoints import load_checkpoint_model

        return load_checkpoint_model(config, checkpoint, tokenizer=tokenizer)
    _check_path(config.path)
    if config.quantization != "none":
        require_bitsandbytes(f"model.quantization = {config.quantization!r}")
    if config.batch_invariant:
        require_batch_invariance(config)
        require_gpu(resolve_device(config.device))
    adapter = read_adapter_file(Path(config.path))
    require_versions()
    if adapter is None:
        model, put_adapter = _load_weights(config), None
    else:
        require_adapters()
        _check_base(adapter)
        model = _load_weights(config.model_copy(update={"path": adapter.base}))
        put_adapter = partial(load_adapter, file=adapter)
    tokenizer = tokenizer or load_tokenizer(config)
    return wrap_model(model, tokenizer, adapter=put_adapter, batch_invariant=config.batch_invariant)


def given_or_loaded(given: LoadedModel | None, config: ModelConfig) -> LoadedModel:
    """The model that a program gave, or that `config` names.

    Raises:
        ConfigError: as `load_model`, or the given model was made ready without `model.batch_invariant`, which is asked
            for.
    """
    if given is None:
        return load_model(config)
    if config.batch_invariant and not given.batch_invariant:
        raise ConfigError(
            "model.batch_invariant = true, but the model was given as an object that was made ready without it; give "
            "model.path instead, or an object of wrap_model(…, batch_invariant=True)"
        )
    return given


def with_adapter(loaded: LoadedModel, lora: LoraConfig, *, seed: int = 0) -> LoadedModel:
    """The model with the adapter that `lora` asks for; as it is when `lora.rank` is 0.

    A model that was loaded with an adapter goes on with that one, and `lora` must describe it.

    Args:
        seed: of a new adapter's weights.

    Raises:
        ConfigError: `lora` describes another adapter than the model has, or names layers that the model lacks.
    """
    if loaded.adapter is not None:
        put_adapter = partial(continue_adapter, lora=lora)
    elif lora.rank:
        put_adapter = partial(add_adapter, lora=lora, seed=seed)
    else:
        return loaded
    return wrap_model(loaded.model, loaded.tokenizer, adapter=put_adapter)


def _load_weights(config: ModelConfig) -> PreTrainedModel:
    disable_progress_bar()  # its bars would tear the run's own
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    quantized = {} if config.quantization == "none" else {"quantization_config": nf4_settings(dtype)}
    try:
        hf_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        check_sizes(config.path, hf_config, trust_remote_code=config.trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=hf_config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            device_map={"": device} if quantized else None,
            **quantized,
        )
        model, report = loaded
    except SafetensorError as error:
        raise ConfigError(f"model.path = {config.path!r} could not be loaded: {_first_line(error)}") from error
    _check_complete(config.path, set(report["missing_keys"]) | {key[0] for key in report["mismatched_keys"]})
    return model if quantized else model.to(device)


def wrap_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    adapter: Callable[[PreTrainedModel], None] | None = None,
    batch_invariant: bool = False,
    shard: Callable[[ScoringModel], None] | None = None,
) -> LoadedModel:
    """A module that is in memory already, made ready, in the one order that works; without dropout. What is ready
    already stays as it is, so that a model can be wrapped again with an adapter.

    1. attention: the packed function, which every other step relies on;
    2. 4 bits: layers unpack their weights before each product, and are of bitsandbytes' class still, which LoRA asks
       for;
    3. even: activations and experts whose rows have the same bits in any company: they replace functions of
       transformers' own modules, and find these by class;
    4. lean: norms and decoder layers as fused functions, which call what is even;
    5. adapter: LoRA puts linear layers beside the model's, whose places and names no step before has changed;
    6. products: kernels of plain linear layers, the adapter's own among them, which is why it is there by now; on a
       GPU, weights with one input side by side;
    7. shard: last, because it changes the class of every module that it wraps, and the steps above ask for classes.

    Args:
        adapter: puts one into the module, or changes the one that is there.
        batch_invariant: compute every row with the same bits in any company on a GPU, too; it stays with the module.
        shard: gets the root, as torch's `fully_shard` does.
    """
    check_attention(model)
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    if is_packed(model):
        unpack_before_products(model)
    make_activations_even(model)
    make_experts_even(model)
    make_norms_lean(model)
    make_layers_lean(model)
    if adapter is not None:
        adapter(model)
    if batch_invariant or is_batch_invariant(model):
        make_batch_invariant(model)
    elif model.device.type == "cpu":
        if model.dtype == torch.bfloat16:
            check_rows_are_exact()
        use_dnn_linear(model)
        keep_freed_memory(model.config.get_text_config().hidden_size)
    else:
        join_products(model)
    scoring = ScoringModel(model, LanguageHead(model)).eval()
    if shard is not None:
        shard(scoring)
    return LoadedModel(scoring, tokenizer, _declared_stops(model.generation_config, tokenizer))


def check_attention(model: PreTrainedModel) -> None:
    """Refuse what would run, and be wrong."""
    settings = model.config.get_text_config().to_dict()
    kinds = set(settings.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    cause = ""
    if kinds:
        cause = f"has layers of kind {sorted(kinds)}"
    elif not model._supports_attention_backend:
        cause = "computes attention by itself"
    elif settings.get("attn_logit_softcapping") is not None:
        cause = "caps its attention scores (attn_logit_softcapping)"
    elif any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        cause = "has attention sinks"
    if cause:
        raise ConfigError(
            f"{model.config.model_type} {cause}, which cannot run packed; "
            "use a model whose layers are full or sliding attention (Qwen, Llama, Gemma 3, Mistral, …)"
        )


def _check_path(path: str) -> None:
    """Say that a folder is missing before the Hub is asked for it by that name."""
    if not path:
        raise ConfigError("model.path is empty; give a folder with config.json and weights, or a Hugging Face Hub name")
    folder = Path(path)
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or path.startswith((".", "~"))):
        raise ConfigError(
            f"model.path = {path!r} is no folder; give one with config.json and weights, or a Hugging Face Hub name"
        )


def _check_base(adapter: AdapterFile) -> None:
    try:
        _check_path(adapter.base)
    except ConfigError as error:
        raise ConfigError(
            f"model.path = {str(adapter.folder)!r} is a LoRA adapter, and its base is not there: {error}"
        ) from error


def _check_complete(path: str, absent: set[str]) -> None:
    """Weights that a folder lacks would be random numbers."""
    if absent:
        first = min(absent)
        raise ConfigError(
            f"model.path = {path!r} lacks {len(absent)} weights that its config.json asks for, or has them in another "
            f"shape, {first} for one; give the config.json that belongs to these weights"
        )


def named_stop_tokens(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end-of-sequence tokens of a model that is not loaded."""
    adapter = read_adapter_file(Path(config.path))
    try:
        generation = GenerationConfig.from_pretrained(config.path if adapter is None else adapter.base)
    except (OSError, ValueError):
        generation = None
    return _declared_stops(generation, tokenizer)


def _declared_stops(generation: GenerationConfig | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    declared: list[int] = []
    for source in (generation and generation.eos_token_id, tokenizer.eos_token_id):
        declared.extend(cast(list[int], source) if isinstance(source, list) else [] if source is None else [source])
    return tuple(dict.fromkeys(int(token) for token in declared))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
