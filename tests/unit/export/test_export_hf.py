from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.errors import ConfigError, ExportError
from groupwise.export.hf import export_hf
from groupwise.export.loading import PROBE, load_merged
from groupwise.export.record import read_record
from groupwise.export.source import Source, find_source
from groupwise.export.verify import PROMPTS, verify


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(PROBE)])
    with torch.inference_mode():
        return model(input_ids=ids).logits[0].float()


def test_a_whole_model_is_the_same_weights(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = find_source(model_folder("qwen3"))
    export_hf(source, tmp_path / "out")
    before, after = load_file(source.folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    verdict = verify(tmp_path / "out")
    assert (verdict.same, verdict.agreement, verdict.least) == (len(PROMPTS), 1.0, 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "nothing half-written is left"


def test_merged_logits_are_those_of_base_plus_adapter(adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = find_source(adapter_folder("qwen3"))
    record = export_hf(source, tmp_path / "merged")
    assert source.base is not None
    base = AutoModelForCausalLM.from_pretrained(source.base)
    alone = logits(base, source.folder)
    both = logits(PeftModel.from_pretrained(base, source.folder), source.folder)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), source.folder)
    assert torch.allclose(both, merged, atol=1e-4 * float(both.abs().max()))
    assert not torch.allclose(alone, merged, atol=0.1), "the adapter does something"
    assert record.merge_difference is not None
    assert record.merge_difference < 1e-5
    assert verify(tmp_path / "merged").agreement == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str, adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = find_source(adapter_folder("qwen3"))
    record = export_hf(source, tmp_path / "out", dtype=dtype)  # pyright: ignore[reportArgumentType]
    assert record.precision == dtype
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    assert verify(tmp_path / "out").precision == dtype


def test_auto_is_the_bases_dtype(model_folder: Callable[[str], Path], adapter_folder: Callable[..., Path], tmp_path: Path) -> None:  # fmt: skip  # noqa: E501
    export_hf(find_source(model_folder("qwen3")), tmp_path / "half", dtype="bfloat16")
    source = find_source(adapter_folder("qwen3"), base=str(tmp_path / "half"))
    assert export_hf(source, tmp_path / "merged").precision == "bfloat16"


def test_the_adapter_alone(adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = find_source(adapter_folder("qwen3"))
    export_hf(source, tmp_path / "out", form="adapter")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "export.json"} <= names
    assert not any(name.startswith("model") for name in names)
    assert verify(tmp_path / "out").agreement == 1.0


def test_an_adapter_of_another_kind_merges_too(adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = find_source(adapter_folder("qwen3", use_dora=True))
    export_hf(source, tmp_path / "out")
    assert verify(tmp_path / "out").agreement == 1.0


@pytest.mark.slow
def test_four_bits(adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    export_hf(find_source(adapter_folder("qwen3")), tmp_path / "out", form="4bit")
    assert verify(tmp_path / "out").precision == "nf4"
    assert any(tensor.dtype == torch.uint8 for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_four_bits_without_the_package_are_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("the package is here")
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        export_hf(find_source(model_folder("qwen3")), tmp_path / "out", form="4bit")


def test_another_model_is_not_verified(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = find_source(model_folder("qwen3"))
    export_hf(source, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= -1
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="is not the model that it came from; float32: "):
        verify(tmp_path / "out")


def test_another_tokenizer_is_not_verified(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = find_source(model_folder("qwen3"))
    export_hf(source, tmp_path / "out")
    file = tmp_path / "out" / "tokenizer.json"
    content = json.loads(file.read_text())
    del content["model"]["merges"][20:]
    file.write_text(json.dumps(content))
    with pytest.raises(ExportError, match="20 prompts were tokenized otherwise"):
        verify(tmp_path / "out")


def test_a_merge_that_changes_the_answers_is_refused(
    adapter_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groupwise.export.loading.LOGIT_TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="merging changed the logits by"):
        load_merged(find_source(adapter_folder("qwen3")))


def test_the_records_find_what_was_exported(adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = find_source(adapter_folder("qwen3"))
    export_hf(source, tmp_path / "out", form="adapter")
    found = read_record(tmp_path / "out").find_source()
    assert (found.folder, found.base) == (source.folder.resolve(), str(Path(str(source.base)).resolve()))
    (tmp_path / "out" / "export.json").write_text('{"what": 1}')
    with pytest.raises(ConfigError, match="--source"):
        read_record(tmp_path / "out")


class TestSource:
    def test_a_run_stands_for_its_final(self, run_directory: Path) -> None:
        assert find_source(run_directory) == Source(run_directory / "final", run=run_directory)
        assert find_source(run_directory / "final").run == run_directory

    def test_what_is_no_model(self, tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
        with pytest.raises(ConfigError, match="no such folder"):
            find_source(tmp_path / "none")
        with pytest.raises(ConfigError, match=r"without config\.json and without adapter_config\.json"):
            find_source(tmp_path)
        with pytest.raises(ConfigError, match="leave --base out"):
            find_source(model_folder("qwen3"), base="x/y")

    def test_a_base_that_is_nowhere(self, adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
        folder = tmp_path / "adapter"
        shutil.copytree(adapter_folder("qwen3"), folder)
        with pytest.raises(ConfigError, match="give its place with --base FOLDER"):
            find_source(folder, base=str(tmp_path / "none"))
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ConfigError, match="names no base model"):
            find_source(folder)

    def test_damaged_weights(self, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(model_folder("qwen3"), folder)
        (folder / "model.safetensors").write_bytes(b"nonsense")
        with pytest.raises(ConfigError, match="does not load"):
            export_hf(find_source(folder), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        export_hf(find_source(model_folder("qwen3")), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "adapter"}, "needs an adapter"),
        ({"form": "4bit", "dtype": "float16"}, "has no effect on --form 4bit"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, str], message: str, model_folder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_hf(find_source(model_folder("qwen3")), tmp_path / "out", **settings)  # pyright: ignore[reportArgumentType]
