"""The files as the gguf package reads them; that llama.cpp reads them as the model is in another file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models
from transformers import AutoConfig, GPT2Config, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from groupwise.errors import ConfigError, ExportError
from groupwise.export.gguf_file import TYPES, export_gguf, export_gguf_adapter
from groupwise.export.gguf_models import GgufModel, interleave, llama3_divisors
from groupwise.export.gguf_vocab import PRE_TOKENIZERS, fitting_pre, gguf_vocab
from groupwise.export.llama_quantize import find_llama_quantize, run_llama_quantize
from groupwise.export.source import find_source

KINDS = ("qwen3", "qwen2", "llama", "gemma3")


def read(file: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(file)


def value(file: Path, key: str) -> Any:
    field = read(file).get_field(key)
    return None if field is None else field.contents()


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in read(file).tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_there(kind: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model_folder(kind)
    export_gguf(find_source(folder), tmp_path / "x.gguf", kind="f32")
    model = GgufModel.of(AutoConfig.from_pretrained(folder))
    found = tensors(tmp_path / "x.gguf")
    for name, tensor in load_file(folder / "model.safetensors").items():
        expected = model.transform(name, tensor).numpy()
        np.testing.assert_array_equal(found.pop(model.tensor_name(name)), expected)
    assert set(found) == ({"rope_freqs.weight"} if kind == "llama" else set())
    assert value(tmp_path / "x.gguf", "general.architecture") == kind
    assert value(tmp_path / "x.gguf", f"{kind}.block_count") == (7 if kind == "gemma3" else 2)


@pytest.mark.parametrize("kind", TYPES)
def test_types_keep_what_their_bits_hold(kind: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = find_source(model_folder("qwen3"))
    export_gguf(source, tmp_path / "exact.gguf", kind="f32")
    export_gguf(source, tmp_path / "x.gguf", kind=kind)
    exact, found = tensors(tmp_path / "exact.gguf"), tensors(tmp_path / "x.gguf")
    worst = max(float(np.abs(found[name] - exact[name]).max() / np.abs(exact[name]).max()) for name in exact)
    limit = {"f32": 0, "f16": 2**-10, "bf16": 2**-7, "q8_0": 0.005, "q5_0": 0.07, "q4_0": 0.14}[kind]
    assert worst <= limit
    assert kind == "f32" or worst > 0
    stored = {t.name: t.tensor_type.name for t in read(tmp_path / "x.gguf").tensors}
    assert stored["blk.0.ffn_up.weight"] == kind.upper()
    assert stored["token_embd.weight"] == ("Q8_0" if kind in ("q4_0", "q5_0") else kind.upper())
    assert stored["blk.0.attn_norm.weight"] == "F32"
    assert value(tmp_path / "x.gguf", "general.file_type") == int(TYPES[kind].file_type)


def test_rows_that_do_not_fill_blocks_stay_at_16_bit(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=720, hidden_size=40, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, eos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_gguf(find_source(tmp_path / "model"), tmp_path / "x.gguf", kind="q8_0")
    stored = {t.name: t.tensor_type.name for t in read(tmp_path / "x.gguf").tensors}
    assert (stored["blk.0.ffn_up.weight"], stored["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")


def test_values_that_f16_cannot_hold_are_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(model_folder("qwen3"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"blk\.0\.ffn_up\.weight has values over 65504"):
        export_gguf(find_source(tmp_path / "model"), tmp_path / "x.gguf", kind="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no half-written file"
    export_gguf(find_source(tmp_path / "model"), tmp_path / "x.gguf", kind="bf16")


def test_tokenizer_and_template_are_in_the_file(
    model_folder: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    export_gguf(find_source(model_folder("qwen3")), tmp_path / "x.gguf")
    file = tmp_path / "x.gguf"
    assert value(file, "tokenizer.ggml.model") == "gpt2"
    assert value(file, "tokenizer.ggml.pre") == "smollm"
    assert value(file, "tokenizer.chat_template") == tokenizer.chat_template
    assert value(file, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert value(file, "tokenizer.ggml.add_bos_token") is False
    tokens, types = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 720, "as many as the embedding has rows"
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert types[:4] == [3, 3, 3, 1]
    assert tokens[719] == "[UNUSED719]"
    assert types[719] == 5


def test_an_adapter(adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = find_source(adapter_folder("llama"))
    export_gguf_adapter(source, tmp_path / "x.gguf", kind="f32")
    file = tmp_path / "x.gguf"
    assert (value(file, "general.type"), value(file, "adapter.type")) == ("adapter", "lora")
    assert value(file, "adapter.lora.alpha") == 16
    found, weights = tensors(file), load_file(source.folder / "adapter_model.safetensors")
    assert len(found) == len(weights) == 28
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_a"], weights[f"{prefix}A.weight"].numpy())
    expected = interleave(weights[f"{prefix}B.weight"], 4).numpy()
    np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_b"], expected)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("f16", {"use_dora": True}, "more than LoRA's two matrices"),
        ("q8_0", {}, "written as f32, f16 or bf16"),
    ],
)
def test_adapters_that_gguf_cannot_hold(
    kind: str, settings: dict[str, Any], message: str, adapter_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_gguf_adapter(find_source(adapter_folder("qwen3", **settings)), tmp_path / "x.gguf", kind=kind)


def test_a_whole_model_is_no_adapter(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this is a whole model"):
        export_gguf_adapter(find_source(model_folder("qwen3")), tmp_path / "x.gguf")


class TestModels:
    def test_other_kinds_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="'gpt2' cannot be written as GGUF"):
            GgufModel.of(GPT2Config())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (Qwen2Config(num_hidden_layers=2, use_sliding_window=True, max_window_layers=1), "has sliding attention"),
            (
                Qwen3Config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
                "scales its rotation by 'dynamic'",
            ),
        ],
    )
    def test_parts_that_llama_cpp_computes_otherwise(self, config: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            GgufModel.of(config)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"query_pre_attn_scalar": 99}, "scales attention by 99"),
            ({"final_logit_softcapping": 30.0}, "caps its logits"),
            ({"layer_types": ["full_attention"] * 7}, "other layers than every 6th"),
        ],
    )
    def test_unusual_gemmas(self, change: dict[str, Any], message: str, model_folder: Callable[[str], Path]) -> None:
        config = AutoConfig.from_pretrained(model_folder("gemma3"))
        for name, changed in change.items():
            setattr(config, name, changed)
        with pytest.raises(ConfigError, match=message):
            GgufModel.of(config)

    def test_the_rotation_of_pairs_is_that_of_halves(self) -> None:
        """Rotating element i with i + d/2, then reordering, is reordering, then rotating 2i with 2i + 1."""
        heads, width = 3, 8
        rows = torch.arange(heads * width * 5, dtype=torch.float32).reshape(heads * width, 5)
        moved = interleave(rows, heads).reshape(heads, width, 5)
        for head in range(heads):
            for pair in range(width // 2):
                own = rows.reshape(heads, width, 5)[head]
                assert torch.equal(moved[head, 2 * pair], own[pair])
                assert torch.equal(moved[head, 2 * pair + 1], own[pair + width // 2])

    def test_llama3_divisors_are_transformers_own(self, model_folder: Callable[[str], Path]) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = AutoConfig.from_pretrained(model_folder("llama"))
        theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 1 / 10000 ** (torch.arange(0, 32, 2) / 32)
        torch.testing.assert_close(plain / llama3_divisors(config.rope_parameters, 32), theirs)

    @pytest.mark.parametrize("kind", ["linear", "yarn"])
    def test_scaled_rotation(self, kind: str, tmp_path: Path) -> None:
        config = Qwen3Config(
            rope_parameters={
                "rope_type": kind,
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        )
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
        GgufModel.of(config).add_parameters(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert value(tmp_path / "x.gguf", "qwen3.rope.scaling.type") == kind
        assert value(tmp_path / "x.gguf", "qwen3.rope.scaling.factor") == 4.0


class TestVocab:
    def test_a_pattern_of_ones_own_is_found_out(self, tokenizer: Any) -> None:
        """Word-wise without contractions: llama.cpp has no such pattern."""
        from tokenizers import Regex, pre_tokenizers

        raw = RawTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        assert fitting_pre(raw) == "smollm"
        own: list[Any] = [
            pre_tokenizers.Split(Regex(r"\S\S?|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        raw.pre_tokenizer = pre_tokenizers.Sequence(own)  # type: ignore[assignment]
        with pytest.raises(ConfigError, match="--pre NAME takes one all the same"):
            fitting_pre(raw)
        assert fitting_pre(raw, "gpt-2") == "gpt-2"
        with pytest.raises(ConfigError, match="--pre gpt2: unknown"):
            fitting_pre(raw, "gpt2")

    @pytest.mark.parametrize("name", PRE_TOKENIZERS)
    def test_each_pattern_is_told_from_the_others(self, name: str) -> None:
        """A tokenizer trained with a pattern is recognised by it, so the texts tell the patterns apart."""
        from tokenizers import Regex, pre_tokenizers, trainers

        from groupwise.export.gguf_vocab import TELLING_TEXTS

        pre = PRE_TOKENIZERS[name]
        raw = RawTokenizer(models.BPE(ignore_merges=pre.whole_words))
        steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        last: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])  # type: ignore[assignment]
        raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        )
        raw.train_from_iterator(TELLING_TEXTS, trainer)
        found = fitting_pre(raw)
        # Where no token is longer than its merges, whole words make no difference.
        assert found == name or {found, name} == {"llama-bpe", "smaug-bpe"}

    def test_sentencepiece_tokens_scores_and_types(self, sentencepiece_like: Any) -> None:
        tokenizer = sentencepiece_like
        vocab = gguf_vocab(tokenizer, size=len(tokenizer) + 2)
        assert (vocab.model, vocab.pre, vocab.merges, vocab.add_space_prefix) == ("llama", None, (), False)
        kinds = dict(zip(vocab.tokens, vocab.types, strict=True))
        assert (kinds["<unk>"], kinds["<bos>"], kinds["<0x41>"], kinds["▁a"], kinds["\n\n"]) == (2, 3, 6, 1, 4)
        scores = dict(zip(vocab.tokens, vocab.scores, strict=True))
        assert scores["ab"] > scores["▁ab"] > scores["▁"]

    def test_a_vocabulary_larger_than_the_embedding(self, tokenizer: Any) -> None:
        with pytest.raises(ConfigError, match="embedding only 10 rows"):
            gguf_vocab(tokenizer, size=10)

    def test_a_model_that_is_not_bpe(self) -> None:
        raw = RawTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        with pytest.raises(ConfigError, match="model is WordLevel"):
            gguf_vocab(PreTrainedTokenizerFast(tokenizer_object=raw), size=1)


class TestLlamaQuantize:
    def test_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match=r"--type q4_k_m needs llama-quantize.*https://github\.com/ggml-org"):
            export_gguf(find_source(model_folder("qwen3")), tmp_path / "x.gguf", kind="q4_k_m")
        with pytest.raises(ConfigError, match="got no program"):
            find_llama_quantize("q4_k_m", str(tmp_path / "none"))

    def test_a_program_that_fails(self, tmp_path: Path) -> None:
        program = tmp_path / "llama-quantize"
        program.write_text("#!/bin/sh\necho no such tensor >&2\nexit 3\n")
        program.chmod(0o755)
        with pytest.raises(ExportError, match="exit code 3:\nno such tensor"):
            run_llama_quantize(program, tmp_path / "a", tmp_path / "b", kind="q4_k_m")
        assert not (tmp_path / "b").exists()


def test_unknown_type(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--type q3_k: unknown; expected one of f32"):
        export_gguf(find_source(model_folder("qwen3")), tmp_path / "x.gguf", kind="q3_k")


def test_the_record_lies_beside_the_file(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    export_gguf(find_source(model_folder("qwen3")), tmp_path / "deep" / "x.gguf", kind="q8_0")
    record = json.loads((tmp_path / "deep" / "x.gguf.export.json").read_text())
    assert (record["form"], record["precision"]) == ("gguf", "q8_0")
