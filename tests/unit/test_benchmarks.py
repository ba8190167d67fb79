"""The benchmarks run, do the work that they say they time, and refuse to time anything else."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a script as a module; those beside it can be imported, too, as when it runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load_script(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_script


@pytest.mark.parametrize(("script", "option"), [("vs_trl", "--kl-coef"), ("gpu", "--model-shape")])
def test_help_lists_the_options(load, capsys: pytest.CaptureFixture[str], script: str, option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load(script).main(["--help"])
    assert ended.value.code == 0
    assert option in capsys.readouterr().out


def test_gpu_benchmark_on_a_cpu(load, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["--model-shape", "tiny", "--device", "cpu", "--samples", "8", "16", "--tokens", "6"]
    load("gpu").main([*arguments, "--prompt-tokens", "9", "--matmul-size", "64", "--json", str(out)])

    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["section"] for row in rows] == ["ceiling", "model", "decode", "decode", "mismatch", "training"]
    assert not [row for row in rows for value in row.values() if isinstance(value, float) and not math.isfinite(value)]
    ceiling, model, first, second, mismatch, training = rows
    assert model["entropy_nats"] == pytest.approx(1.0, abs=0.1)
    assert (first["tokens"], second["tokens"]) == (8 * 6, 16 * 6)
    assert not first["capped"]
    assert (mismatch["compared"], mismatch["unequal"], mismatch["max"]) == (16 * 6, 0, 0.0)
    assert training["tokens"] == 16 * (9 + 6)
    assert training["packed_tokens"] == -(-(2 * 9 + 16 * 5) // 16) * 16
    # Not below 100: a ceiling of 64 x 64 products, taken in microseconds, says nothing of the machine.
    share = 100 * training["tflops"] / ceiling["tflops"]
    assert training["mfu_percent"] == pytest.approx(share, rel=1e-3)


def test_gpu_sampling_ends_at_its_cap(load) -> None:
    import asyncio

    import torch

    gpu = load("gpu")
    shape = gpu.SHAPES["tiny"]
    loaded = gpu.build_model(shape, torch.device("cpu"), torch.float32)
    engine = gpu.NativeEngine(loaded, gpu.RolloutConfig())
    found = asyncio.run(gpu.sample(engine, gpu.make_prompts(shape, 1, 4), 4000, cap=0.2))
    assert found.capped
    assert 0 < found.tokens < 8 * 4000
    assert found.seconds < 20


def test_training_flops_of_a_model_worked_by_hand(load) -> None:
    gpu = load("gpu")
    shape = gpu.ModelShape(hidden=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=8, vocab=10)
    row = gpu.TrainingRow(0, (1, 2, 3), (4, 5), (1, 1), (1.0, 1.0), (0.0, 0.0))
    weights = 4 * 2 * (2 + 1 + 1 + 2) + 3 * 4 * 8
    pairs = (1 + 2 + 3) + 4
    expected = 6 * (weights * 4 + 4 * 10 * 2) + 12 * 2 * 2 * pairs
    assert gpu.training_flops(shape, gpu.pack([row])) == expected


def test_stopwatch_measures_whole_steps_whatever_the_order_of_calls(load) -> None:
    sides = load("vs_trl_sides")
    watch = sides.Stopwatch()
    watch._marks = [(7.0, 70.0), (0.0, 0.0), (0.1, 1.0), (2.0, 20.0), (2.1, 21.0), (7.2, 72.0)]
    assert watch.spans(every=2) == [sides.Figure(2.0, 20.0), sides.Figure(5.0, 50.0)]


def test_other_work_than_asked_is_refused(load) -> None:
    sides = load("vs_trl_sides")
    with pytest.raises(SystemExit, match="got 127, expected 128"):
        sides._expect(127, 128)
    with pytest.raises(SystemExit):
        sides._expect(math.nan, 128)


def test_reward_reads_texts_and_conversations(load) -> None:
    sides = load("vs_trl_sides")
    reward = sides.make_reward(sides.Stopwatch())
    assert reward(completions=["aab", [{"role": "assistant", "content": "ü"}], ""]) == [0.02, 0.01, 0.0]


@pytest.mark.slow
def test_engine_part_runs_to_its_report(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--size", "0.1m", "--prompts", "2", "--samples", "4", "--tokens", "8", "--rounds", "1", "--threads", "1"]
    command = [sys.executable, str(BENCHMARKS / "vs_trl.py"), "--part", "engine", *sizes, "--json", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert ended.returncode == 0, ended.stderr
    (result,) = json.loads(out.read_text("utf-8"))["results"]
    figures = result["wall"]["figures"]
    assert {name: len(found) for name, found in figures.items()} == {"generate": 1, "native": 1}
    assert result["wall"]["ratio"] == pytest.approx(figures["native"][0] / figures["generate"][0])
    assert "native / generate" in ended.stdout
