"""llama.cpp reads what was written as the model that it is. Needs llama-cpp-python, which is compiled for minutes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.errors import ConfigError, ExportError
from groupwise.export.gguf_file import export_gguf, export_gguf_adapter
from groupwise.export.gguf_vocab import TELLING_TEXTS
from groupwise.export.llama_cpp import GgufAnswers
from groupwise.export.source import find_source
from groupwise.export.verify import PROMPTS, verify

pytestmark = [pytest.mark.slow, pytest.mark.extras(package="llama_cpp")]

KINDS = ("qwen3", "qwen2", "llama", "gemma3")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_the_models(kind: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """f32 and f16: the same tokens for all 20 prompts; q8_0: at least 95 % of the tokens are the likeliest ones too."""
    source = find_source(model_folder(kind))
    for precision in ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"):
        out = tmp_path / f"{precision}.gguf"
        export_gguf(source, out, kind=precision)
        verdict = verify(out)
        assert verdict.prompts == len(PROMPTS) == 20
        if precision in ("f32", "f16"):
            assert (verdict.same, verdict.agreement) == (20, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models(kind: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """To rounding, in float32; Gemma's GELU is a table of 16 bit values in llama.cpp."""
    folder = model_folder(kind)
    export_gguf(find_source(folder), tmp_path / "x.gguf", kind="f32")
    answers = GgufAnswers(tmp_path / "x.gguf", base=None, stop_ids=())
    tokens = AutoTokenizer.from_pretrained(folder).encode(TELLING_TEXTS[0] + TELLING_TEXTS[5])[:200]
    answers.likeliest(tokens)
    theirs = torch.tensor(answers._model.scores[: len(tokens)])
    with torch.inference_mode():
        ours = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([tokens])).logits[0]
    assert float((ours - theirs).abs().max() / ours.abs().max()) < (1e-3 if kind == "gemma3" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_text_becomes_the_same_tokens(kind: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from llama_cpp import Llama

    folder, out = model_folder(kind), tmp_path / "x.gguf"
    export_gguf(find_source(folder), out)
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = Llama(str(out), vocab_only=True, verbose=False)
    texts = [*TELLING_TEXTS, *PROMPTS, "<|im_start|>user\nx<|im_end|>\n", "9" * 40, "\n\n\n  \t\n", "½² ª'll"]
    for text in texts:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ours.encode(text), text
    assert theirs.metadata["tokenizer.chat_template"] == ours.chat_template


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"alpha_pattern": {"q_proj": 2, "down_proj": 64}, "rank_pattern": {"k_proj": 2}}),
    ],
)
def test_an_adapter_on_its_bases_gguf(
    kind: str, settings: dict[str, Any], adapter_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = find_source(adapter_folder(kind, **settings))
    assert source.base is not None
    export_gguf(find_source(source.base), tmp_path / "base.gguf", kind="f32")
    export_gguf_adapter(source, tmp_path / "adapter.gguf", kind="f32")
    verdict = verify(tmp_path / "adapter.gguf", base_gguf=tmp_path / "base.gguf")
    assert (verdict.same, verdict.agreement) == (20, 1.0)
    with pytest.raises(ConfigError, match="--base-gguf"):
        verify(tmp_path / "adapter.gguf")
    with pytest.raises(ExportError, match="is not the model that it came from"):
        verify(tmp_path / "base.gguf", source=source)


def test_sentencepiece_text_becomes_the_same_tokens(
    sentencepiece_like: Any, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from llama_cpp import Llama

    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen3"), folder, ignore=lambda _, names: [n for n in names if "token" in n])
    sentencepiece_like.save_pretrained(folder)
    export_gguf(find_source(folder), tmp_path / "x.gguf")
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    texts = ["abc ab a b", "  ab  abc", "1 abcabab\n\nab\n", "日本 é 🙂 abc", "<eos>ab<bos>", "", " ", *TELLING_TEXTS]
    for text in texts:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ours.encode(text), text


def test_a_merged_adapter(adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    export_gguf(find_source(adapter_folder("llama")), tmp_path / "x.gguf", kind="f16")
    assert verify(tmp_path / "x.gguf").same == 20


def test_k_quants_by_the_real_quantiser(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The program is made of llama.cpp's own quantiser, which the Python package carries as a library."""
    program = tmp_path / "llama-quantize"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nimport llama_cpp\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "params = llama_cpp.llama_model_quantize_default_params()\n"
        "params.ftype = {'Q4_K_M': llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, "
        "'Q5_K_M': llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M}[sys.argv[3]]\n"
        "import ctypes\n"
        "sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))\n"
    )
    program.chmod(0o755)
    source = find_source(model_folder("qwen3"))
    for kind in ("q4_k_m", "q5_k_m"):
        out = tmp_path / f"{kind}.gguf"
        export_gguf(source, out, kind=kind, llama_quantize=str(program))
        assert verify(out).precision == kind
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_file_of_noise_is_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = find_source(model_folder("qwen3"))
    export_gguf(source, tmp_path / "x.gguf", kind="f32")
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ExportError, match="is not the model that it came from"):
        verify(tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ConfigError, match="got no GGUF file"):
        verify(tmp_path / "y.gguf", source=source)


def test_a_model_of_short_context_and_long_answers(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    export_gguf(find_source(folder), tmp_path / "x.gguf", kind="f32")
    assert verify(tmp_path / "x.gguf").same == 20


@pytest.mark.parametrize("precision", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_k.weight", "token_embd.weight"])
def test_one_damaged_matrix_is_found(
    name: str, precision: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    import gguf

    export_gguf(find_source(model_folder("qwen3")), tmp_path / "x.gguf", kind=precision)
    [tensor] = [tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors if tensor.name == name]
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    start, size = int(tensor.data_offset), int(tensor.n_bytes)
    content[start : start + size] = content[start + size // 2 : start + size] + content[start : start + size // 2]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ExportError, match="is not the model that it came from"):
        verify(tmp_path / "x.gguf")
