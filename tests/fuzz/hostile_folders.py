"""Model, adapter and run directories with damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from cases import SMALL, SMALL_SFT, Case, as_json
from hypothesis import strategies as st
from values import damaged_bytes, damaged_json, values

COUNTS = (
    *(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    ),
    *(
        "head_dim",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "layer_types",
        "rms_norm_eps",
    ),
    *(
        "tie_word_embeddings",
        "model_type",
        "architectures",
        "dtype",
        "torch_dtype",
        "hidden_act",
        "sliding_window",
        "auto_map",
    ),
    *("quantization_config", "pad_token_id", "eos_token_id", "bos_token_id", "use_sliding_window", "attention_dropout"),
)
SIZES = (0, -1, 1, 3, 10**6, 10**9, 10**12, 2**64, 1.5, "12", None, [], {}, True, float("inf"))
ROPES: tuple[Any, ...] = (
    *(
        {},
        [],
        "yarn",
        {"rope_type": "nope"},
        {"rope_type": "yarn"},
        {"rope_type": "yarn", "factor": 0},
        {"type": "linear"},
    ),
    *(
        {"rope_type": "linear", "factor": -1},
        {"rope_type": "llama3"},
        {"rope_type": "longrope", "short_factor": [1], "long_factor": []},
    ),
    *(
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "dynamic", "factor": 1e308},
    ),
)


@st.composite
def changed_config(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_json(content))
    changed = dict(content)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(COUNTS))
        if name.startswith("rope_") and draw(st.booleans()):
            changed[name] = draw(st.sampled_from(ROPES))
        elif name == "auto_map":
            changed[name] = {
                "AutoConfig": "evil.Config",
                "AutoModelForCausalLM": "evil.Model",
                "AutoTokenizer": ["evil.T", None],
            }
        elif name == "model_type" and draw(st.booleans()):
            changed[name] = draw(
                st.sampled_from(
                    ["llama", "gpt2", "bert", "t5", "mamba", "gemma3_text", "qwen3_moe", "whisper", "gpt_oss"]
                )
            )
        else:
            changed[name] = draw(st.one_of(st.sampled_from(SIZES), values))
    return changed


@st.composite
def damaged_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    way = draw(st.sampled_from(["bytes", "header", "header", "length", "nan"]))
    if way == "bytes":
        return draw(damaged_bytes(content))
    (size,) = struct.unpack("<Q", content[:8])
    if way == "length":
        return (
            struct.pack("<Q", draw(st.sampled_from([0, 1, size - 1, size + 1, 10**9, 2**63, 2**64 - 1]))) + content[8:]
        )
    if way == "nan":
        return content[: 8 + size] + b"\xff" * (len(content) - 8 - size)
    header = draw(damaged_json(json.loads(content[8 : 8 + size])))
    written = as_json(header)
    return struct.pack("<Q", len(written)) + written + content[8 + size :]


@st.composite
def damaged_file(draw: st.DrawFn, folder: Path, name: str) -> bytes | None:
    content = (folder / name).read_bytes()
    way = draw(st.integers(0, 9))
    if way == 0:
        return None
    if name.endswith(".safetensors"):
        return draw(damaged_safetensors(content))
    if name.endswith(".json") and way < 8:
        loaded = json.loads(content)
        if (
            name.endswith("config.json")
            and "adapter" not in name
            and "tokenizer" not in name
            and "model_type" in loaded
        ):
            return as_json(draw(changed_config(loaded)))
        return as_json(draw(damaged_json(loaded)))
    if name.endswith(".jsonl") and way < 8:
        lines = content.splitlines(keepends=True)
        place = draw(st.integers(0, len(lines) - 1))
        try:
            lines[place] = as_json(draw(damaged_json(json.loads(lines[place])))) + b"\n"
        except ValueError:
            lines.pop(place)
        return b"".join(lines)
    return draw(damaged_bytes(content))


def _names(folder: Path) -> list[str]:
    return sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and "trajector" not in str(file)
    )


def folders(world: Path) -> st.SearchStrategy[Case]:
    model, adapter = _names(world / "model"), _names(world / "lora/final")
    weights = (
        "config.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    )
    copies = {"rows.jsonl": "rows.jsonl", "talks.jsonl": "talks.jsonl", "reward.py": "reward.py"}

    @st.composite
    def one(draw: st.DrawFn) -> Case:
        place, source, names = ("m", "model", model)
        held = dict(copies)
        if draw(st.integers(0, 3)) == 0:
            place, source, names = ("a", "lora/final", adapter)
            config = json.loads((world / "lora/final/adapter_config.json").read_bytes()) | {
                "base_model_name_or_path": "m"
            }
            files: dict[str, bytes | None] = {"a/adapter_config.json": as_json(config)}
            held["m"] = "model"
        else:
            files = {}
        held[place] = source
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from(names + [name for name in weights if name in names]))
            if name == "adapter_config.json":
                base = json.loads(files["a/adapter_config.json"] or b"{}")
                files[f"{place}/{name}"] = as_json(draw(damaged_json(base)))
            else:
                files[f"{place}/{name}"] = draw(damaged_file(world / source, name))
        if source == "model" and draw(st.integers(0, 9)) == 0:
            index = {
                "metadata": {"total_size": 1},
                "weight_map": {
                    "model.norm.weight": draw(
                        st.sampled_from(["model-00001.safetensors", "../x", "/etc/passwd", "model.safetensors", 7])
                    )
                },
            }
            files |= {
                f"{place}/model.safetensors": None,
                f"{place}/model.safetensors.index.json": as_json(draw(st.one_of(st.just(index), damaged_json(index)))),
            }
        command = draw(
            st.sampled_from(
                [
                    ("generate", place, "--prompt", "hi", "--max-tokens", "3"),
                    ("generate", place, "--prompt", "hi", "--max-tokens", "3", "--raw"),
                    (
                        "train",
                        "--model",
                        place,
                        "--data",
                        "rows.jsonl",
                        "--reward",
                        "reward.py:low",
                        "--output",
                        "out",
                        *SMALL,
                    ),
                    ("sft", "--model", place, "--data", "talks.jsonl", "--output", "out", *SMALL_SFT),
                    (
                        "eval",
                        place,
                        "--data",
                        "rows.jsonl",
                        "--reward",
                        "reward.py:low",
                        "--max-completion-tokens",
                        "3",
                    ),
                    ("export", "hf", place, "--out", "exported"),
                    ("export", "push", place, "--repo", "a/b", "--dry-run"),
                    ("data", "stats", "rows.jsonl", "--model", place),
                ]
            )
        )
        return Case("folders", command, held, files, frozenset({0, 1, 2}))

    return one()


def runs(world: Path) -> st.SearchStrategy[Case]:
    names = {
        run: [name for name in _names(world / run) if not name.startswith("final/tok")]
        for run in ("run", "lora", "sft")
    }
    copies = {"rows.jsonl": "rows.jsonl", "worked.jsonl": "worked.jsonl", "reward.py": "reward.py", "model": "model"}

    @st.composite
    def one(draw: st.DrawFn) -> Case:
        run = draw(st.sampled_from(["run", "run", "lora", "sft"]))
        files: dict[str, bytes | None] = {}
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from(names[run]))
            files[f"{run}/{name}"] = draw(damaged_file(world / run, name))
        if draw(st.integers(0, 9)) == 0:
            files[
                f"{run}/{draw(st.sampled_from(['checkpoints', 'final', 'metrics.jsonl', 'ledger.jsonl', 'trajectories']))}"
            ] = None
        command = "sft" if run == "sft" else "train"
        small = SMALL_SFT if run == "sft" else SMALL
        flags = ("--output", run, *small, "--train.steps", "3", "--train.save_every", "1")
        reward = () if run == "sft" else ("--reward", "reward.py:low")
        again = (
            command,
            "--model",
            "model",
            "--data",
            "worked.jsonl" if run == "sft" else "rows.jsonl",
            *reward,
            *flags,
        )
        argv = draw(
            st.sampled_from(
                [
                    (command, "--output", run, "--resume", "--train.steps", "3"),
                    (command, "--output", run, "--resume"),
                    (*again, "--resume"),
                    (*again, "--overwrite"),
                    again,
                    ("eval", run, "--data", "rows.jsonl", "--reward", "reward.py:low", "--max-completion-tokens", "3"),
                    ("eval", run),
                    ("generate", run, "--prompt", "hi", "--max-tokens", "3"),
                    ("export", "card", run, "--out", "card.md"),
                    ("export", "hf", run, "--out", "exported"),
                ]
            )
        )
        return Case("runs", argv, {**copies, run: run}, files, frozenset({0, 1, 2}))

    return one()
