"""What Unsloth's models can do beside transformers' and peft's: `FastModel` is mixed into transformers' class of the
architecture, `FastPeftModel` is peft's model around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from groupwise.compat.keeping import place_of
from groupwise.compat.unsloth import saving
from groupwise.compat.unsloth.generation import Limits, answer
from groupwise.compat.unsloth.sampling import LoRARequest, RequestOutput, adapter_path
from groupwise.config.lora import AdapterFile, read_adapter_file
from groupwise.errors import ConfigError
from groupwise.model.adapters import settle_adapters
from groupwise.model.borrowing import borrow
from groupwise.model.saving import check_savable, complete_adapter
from groupwise.protocols import Tokenizer

_REQUESTED = "requested"


@dataclass(slots=True)
class FastSettings:
    """What `from_pretrained` was told and is needed later.

    Attributes:
        max_seq_length: tokens of prompt and answer together, in `fast_generate`.
        max_lora_rank: None where `fast_inference` is off, and nothing bounds it.
        checkpointing: whether training recomputes each layer.
        calls: of `fast_generate`, so that each draws anew.
    """

    tokenizer: Tokenizer
    max_seq_length: int
    gpu_memory_utilization: float
    random_state: int
    max_lora_rank: int | None
    full_finetuning: bool
    checkpointing: bool = False
    calls: int = 0


class FastMethods:
    """Unsloth's methods, on whole models and on those with an adapter alike.

    Not an ABC: its metaclass would change the layout of a module that becomes a `FastModel`, which Python refuses.
    """

    @property
    def base(self) -> PreTrainedModel:
        """The module of transformers', which has the settings in `fast`."""
        raise NotImplementedError

    @property
    def settings(self) -> FastSettings:
        return cast(Any, self.base).fast

    @contextmanager
    def _adapted(self, lora_request: Any) -> Iterator[None]:
        raise NotImplementedError
        yield

    def fast_generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        use_tqdm: bool = True,
        *,
        lora_request: Any = None,
    ) -> list[RequestOutput]:
        """Answers to texts, under vLLM's names: `model.fast_generate([text], params)[0].outputs[0].text`.

        Args:
            prompts: a text, `{"prompt_token_ids": ids}`, or a list of these.
            sampling_params: `SamplingParams`, vLLM's own, or a list with one for each prompt.
            use_tqdm: accepted; there is no bar.
            lora_request: what `load_lora` returns; None is the base model, without its adapter.

        Raises:
            ConfigError: says which prompt or argument is wrong.
        """
        settings = self.settings
        settings.calls += 1
        limits = Limits(
            max_tokens=settings.max_seq_length,
            gpu_share=settings.gpu_memory_utilization,
            seed=settings.random_state,
            call=settings.calls,
        )
        with borrow(self.base, settings.tokenizer) as loaded, self._adapted(lora_request):
            return answer(loaded, prompts, sampling_params, limits=limits)

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """transformers' `generate`, in which `temperature=0` is greedy."""
        if options.get("temperature") == 0:
            options = {**options, "temperature": None, "do_sample": False}
        return cast(Any, super()).generate(*inputs, **options)

    def save_pretrained_merged(
        self, save_directory: str | Path, tokenizer: Any = None, save_method: str = "merged_16bit", **options: Any
    ) -> Path:
        """Write a model folder; see `saving.save_merged`."""
        return saving.save_merged(self._saved(tokenizer), save_directory, method=save_method, options=options)

    def push_to_hub_merged(
        self, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **options: Any
    ) -> str:
        """Send a model folder to the Hub; see `saving.push_merged`."""
        return saving.push_merged(self._saved(tokenizer), repo_id, method=save_method, options=options)

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "fast_quantized",
        **options: Any,
    ) -> list[Path]:
        """Write one GGUF file for each method; see `saving.save_gguf`."""
        return saving.save_gguf(self._saved(tokenizer), save_directory, methods=quantization_method, options=options)

    def push_to_hub_gguf(
        self,
        repo_id: str,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "fast_quantized",
        **options: Any,
    ) -> str:
        """Send one GGUF file for each method to the Hub; see `saving.push_gguf`."""
        return saving.push_gguf(self._saved(tokenizer), repo_id, methods=quantization_method, options=options)

    def _saved(self, tokenizer: Any) -> saving.Saved:
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(f"tokenizer: got a {type(tokenizer).__name__}; expected the model's tokenizer, or None")
        return saving.Saved(cast(Any, self), self.settings.tokenizer if tokenizer is None else cast(Any, tokenizer))


class FastModel(FastMethods):
    """Mixed into a module of transformers', whose class keeps its name."""

    fast: FastSettings

    @property
    def base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self)

    @contextmanager
    def _adapted(self, lora_request: Any) -> Iterator[None]:
        if lora_request is not None:
            raise ConfigError(
                "fast_generate: got a lora_request, and the model has no adapter; load the adapter's folder by "
                "from_pretrained, or call get_peft_model first"
            )
        yield


class FastPeftModel(FastMethods, peft.PeftModelForCausalLM):
    """peft's model with Unsloth's methods."""

    @property
    def base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.get_base_model())

    @contextmanager
    def _adapted(self, lora_request: Any) -> Iterator[None]:
        if lora_request is None:
            with self.disable_adapter():
                yield
            return
        folder = self._adapter_file(adapter_path(lora_request)).folder
        try:
            with torch.random.fork_rng(devices=[]):  # peft draws weights before it reads them
                self.load_adapter(str(folder), _REQUESTED)
            self.set_adapter(_REQUESTED)
            settle_adapters(self.base)
            yield
        finally:
            self.set_adapter("default")
            if _REQUESTED in self.peft_config:
                self.delete_adapter(_REQUESTED)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the adapter as peft does; and its base beside it where what is in memory is not what it names.

        Args:
            options: peft's.
        """
        self._save_adapter(Path(save_directory), home=Path(save_directory), **options)

    def _save_adapter(self, folder: Path, *, home: Path, **options: Any) -> None:
        check_savable(self.base)
        super().save_pretrained(str(folder), **{"save_embedding_layers": False, **options})
        if not options.keys() & {"selected_adapters", "state_dict"}:
            complete_adapter(self.base, folder, tokenizer=self.settings.tokenizer, home=home)

    def save_lora(self, save_directory: str | Path) -> None:
        """Write the adapter: adapter_config.json and adapter_model.safetensors, and the base where that is needed.

        What another program left there is moved aside.
        """
        check_savable(self.base)
        home = Path(save_directory)
        place_of(home).save(lambda new: self._save_adapter(new, home=home))

    def load_lora(self, save_directory: str | Path, load_tensors: bool = True) -> LoRARequest:
        """A saved adapter, for `fast_generate`; the model keeps its own. Its file is read when it is used.

        Args:
            load_tensors: accepted.

        Raises:
            ConfigError: there is none in that folder, or its rank is above `max_lora_rank`.
        """
        folder = Path(str(save_directory))
        self._adapter_file(folder)
        return LoRARequest(folder.name, 1, str(folder.resolve()))

    def _adapter_file(self, folder: Path) -> AdapterFile:
        file = read_adapter_file(folder)
        if file is None:
            raise ConfigError(f"load_lora: {str(folder)!r} holds no adapter; expected what model.save_lora wrote")
        check_rank(file.shape.rank, self.settings)
        weights = folder / "adapter_model.safetensors"
        try:
            with safe_open(weights, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"load_lora: {weights} cannot be read: {error}; expected what model.save_lora wrote"
            ) from error
        return file


def make_fast(module: PreTrainedModel, settings: FastSettings) -> PreTrainedModel:
    """The module with Unsloth's methods, in place; its class keeps name and place, which files record."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (FastModel, kind), {"__module__": kind.__module__})
    cast(FastModel, module).fast = settings
    return module


class FastTokenizer:
    """Mixed into a tokenizer of transformers', whose class keeps its name."""

    def apply_chat_template(self, conversation: Any, *inputs: Any, **options: Any) -> Any:
        """transformers' own. Tokens are a list or a tensor unless `return_dict` asks for more, as they were before
        transformers 5, for which Unsloth's programs are written: `len(…)` of a dict is not that of the conversation.
        """
        masked = options.get("return_assistant_tokens_mask")
        return cast(Any, super()).apply_chat_template(conversation, *inputs, **{"return_dict": bool(masked), **options})

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self).__mro__[2],), vars(self)


def make_fast_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with `FastTokenizer`'s method, in place."""
    kind = type(tokenizer)
    tokenizer.__class__ = type(kind.__name__, (FastTokenizer, kind), {"__module__": kind.__module__})
    return tokenizer


def _unpickled(kind: type[Any]) -> Tokenizer:
    return make_fast_tokenizer(object.__new__(kind))


def check_rank(rank: int, settings: FastSettings) -> None:
    """Raises ConfigError above `max_lora_rank`, which counts with `fast_inference`, as in vLLM."""
    if settings.max_lora_rank is not None and rank > settings.max_lora_rank:
        raise ConfigError(
            f"an adapter of rank {rank} is above max_lora_rank = {settings.max_lora_rank}; raise it in from_pretrained"
        )
