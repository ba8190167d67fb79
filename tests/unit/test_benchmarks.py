"""The benchmarks run, do the work that they say they time, and refuse to time anything else."""

from __future__ import annotations

import dataclasses
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
        if (BENCHMARKS / name.split(".")[0]).is_dir():
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_script


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("vs_trl", "--kl-coef"),
        ("off_loop", "--threads"),
        ("engines", "--vllm"),
        ("weights", "--vocabulary"),
        ("serve", "--clients"),
        ("doctor", "--rounds"),
        ("algorithms", "--warm-up-steps"),
        ("head_memory", "--plain-tokens"),
        ("exactness", "--rounds"),
        ("chaos", "--kills"),
        ("plan", "--processor-time"),
    ],
)
def test_help_lists_the_options(load, capsys: pytest.CaptureFixture[str], script: str, option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load(script).main(["--help"])
    assert ended.value.code == 0
    assert option in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.alone
def test_the_doctor_costs_less_than_a_hundredth_of_a_step_and_rows_a_few(
    load, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load("doctor").main(["--rounds", "1", "--steps", "4", "--warm-up", "2"])
    assert 0 < found["doctor"] < 0.01
    assert 0 < found["rows"] < 0.02
    printed = capsys.readouterr().out
    assert "4 pairs of steps" in printed
    assert "inside rows" in printed


@pytest.mark.parametrize(
    ("part", "option"), [("all", "--seconds"), ("model", "--model-shape"), ("vllm", "--site"), ("learning", "--steps")]
)
def test_help_of_the_gpu_benchmarks_parts(load, capsys: pytest.CaptureFixture[str], part: str, option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load("gpu.__main__").main([part, "--help"])
    assert ended.value.code == 0
    assert option in capsys.readouterr().out


TINY = ("--model-shape", "tiny", "--device", "cpu")


def test_gpu_benchmark_on_a_cpu(load, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["model", *TINY, "--samples", "8", "16", "--tokens", "6", "--eager"]
    load("gpu.__main__").main([*arguments, "--prompt-tokens", "9", "--matmul-size", "64", "--json", str(out)])

    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    sections = ["ceiling", "model", "decode", "decode", "decode", "mismatch", "training"]
    assert [row["section"] for row in rows] == sections
    assert not [row for row in rows for value in row.values() if isinstance(value, float) and not math.isfinite(value)]
    ceiling, model, eager, first, second, mismatch, training = rows
    assert model["entropy_nats"] == pytest.approx(1.0, abs=0.1)
    assert (eager["tokens"], first["tokens"], second["tokens"]) == (8 * 6, 8 * 6, 16 * 6)
    assert not first["capped"]
    assert (mismatch["compared"], mismatch["unequal"], mismatch["max"]) == (16 * 6, 0, 0.0)
    assert training["tokens"] == 16 * (9 + 6)
    assert training["packed_tokens"] == -(-(2 * 9 + 16 * 5) // 16) * 16
    # Not below 100: a ceiling of 64 x 64 products, taken in microseconds, says nothing of the machine.
    share = 100 * training["tflops"] / ceiling["tflops"]
    assert training["mfu_percent"] == pytest.approx(share, rel=1e-3)


def test_gpu_benchmark_refuses_batch_invariance_on_a_cpu(load) -> None:
    from groupwise.errors import ConfigError

    with pytest.raises(ConfigError, match="leave it out"):
        load("gpu.__main__").main(["model", *TINY, "--batch-invariant"])


def test_price_of_batch_invariance_is_a_ratio_of_speeds(load, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, shapes = load("gpu.model"), load("gpu.shapes")
    bench = gpu.Bench(shapes.SHAPES["tiny"], None, prompt_tokens=1, tokens=1, micro_batch_tokens=1, cap=1.0, out=None)
    gpu.record_price(bench, gpu.Speed({8: 300.0, 16: 500.0}, 900.0), gpu.Speed({8: 100.0, 16: 250.0}, 600.0))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["part"], row.get("samples"), row["times_slower"]) for row in rows] == [
        ("decode", 8, 3.0),
        ("decode", 16, 2.0),
        ("training", None, 1.5),
    ]


def test_gpu_sampling_ends_at_its_cap(load) -> None:
    import asyncio

    import torch

    gpu, shapes = load("gpu.decode"), load("gpu.shapes")
    shape = shapes.SHAPES["tiny"]
    loaded = shapes.build_model(shape, torch.device("cpu"), torch.float32)
    engine = gpu.NativeEngine(loaded, gpu.RolloutConfig())
    found = asyncio.run(gpu.sample(engine, gpu.make_prompts(shape, 1, 4), 4000, cap=0.2))
    assert found.capped
    assert 0 < found.tokens < 8 * 4000
    assert found.seconds < 20


def test_training_flops_of_a_model_worked_by_hand(load) -> None:
    from groupwise.batches import TrainingRow
    from groupwise.inputs import ModelInput
    from groupwise.model.forward.packing import pack

    shape = load("gpu.shapes").ModelShape(hidden=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=8, vocab=10)
    row = TrainingRow(0, ModelInput.of((1, 2, 3)), ModelInput.of((4, 5)), (1, 1), (1.0, 1.0), (0.0, 0.0))
    weights = 4 * 2 * (2 + 1 + 1 + 2) + 3 * 4 * 8
    pairs = (1 + 2 + 3) + 4
    expected = 6 * (weights * 4 + 4 * 10 * 2) + 12 * 2 * 2 * pairs
    assert load("gpu.training").training_flops(shape, pack([row])) == expected


def test_a_part_that_hangs_is_cut_and_one_that_fails_is_named(load, tmp_path: Path) -> None:
    driver, out = load("gpu.driver"), tmp_path / "results.jsonl"
    assert driver._run_part("good", [sys.executable, "-c", ""], 30, out)
    assert not driver._run_part("bad", [sys.executable, "-c", "raise SystemExit(3)"], 30, out)
    assert not driver._run_part("slow", ["sleep", "60"], 0.3, out)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    found = [(row["part"], row["outcome"]) for row in rows]
    assert found == [("good", "ok"), ("bad", "ended with 3"), ("slow", "cut at its limit")]


def test_a_part_that_is_not_there_is_refused(load) -> None:
    with pytest.raises(SystemExit, match=r"no part is called 9b; there are tests, 0\.6b"):
        load("gpu.__main__").main(["--only", "9b", "--rehearse"])


@pytest.mark.slow
def test_the_gpu_benchmarks_rehearsal_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu"), "--rehearse", "--json", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(row["part"], row["outcome"]) for row in rows if row["section"] == "part"] == [
        ("0.6b", "ok"),
        ("learning", "ok"),
    ]
    resumed = next(row for row in rows if row["section"] == "killed_and_resumed")
    assert resumed["equal"] is True
    assert (resumed["steps"], resumed["mismatch_max"]) == (5, 0.0)


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
    assert result["wall"]["ratios"] == {"generate": pytest.approx(figures["native"][0] / figures["generate"][0])}
    assert "native / generate" in ended.stdout


def test_every_algorithm_has_a_row(load, tmp_path: Path) -> None:
    from groupwise.config.algorithm import RECIPES, advantages, losses
    from groupwise.quickstart.recipe import quickstart_recipe

    algorithms = load("algorithms")
    recipe = quickstart_recipe(tmp_path, seed=3)
    configs = {
        name: algorithms.config_of(row, recipe, output=tmp_path / name, steps=7)
        for name, row in algorithms.ROWS.items()
    }
    for config in configs.values():
        assert (config.train.steps, config.eval.every, config.train.seed) == (7, 7, 3)
    assert {config.algorithm.name for config in configs.values()} == set(RECIPES) - {"distill"}  # no teacher
    assert {type(config.algorithm.advantage) for config in configs.values()} == {
        *advantages.AdvantageSettings.__subclasses__()
    } - {advantages.NoOutcome}
    assert {type(config.algorithm.loss) for config in configs.values()} == {*losses.LossSettings.__subclasses__()}
    assert configs["gspo"].algorithm.loss.clip_low == 3e-4
    assert configs["grpo-lora"].lora.rank == 16
    assert configs["grpo-lora"].optim.betas == recipe.grpo.optim.betas


def _write_summary(folder: Path, *, before: float, after: float) -> None:
    folder.mkdir(parents=True)
    evaluations = [{"step": 0, "accuracy": before}, {"step": 50, "accuracy": after}]
    (folder / "summary.json").write_text(json.dumps({"eval": evaluations}), "utf-8")
    metrics = [{"step": 0}, {"step": 1, "sampling/sampling_logp_difference/max": after / 1000}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)), "utf-8")


def test_table_of_the_algorithms_that_are_finished(load, tmp_path: Path) -> None:
    algorithms = load("algorithms")
    _write_summary(tmp_path / "seed-0" / "grpo", before=0.25, after=0.75)
    _write_summary(tmp_path / "seed-1" / "grpo", before=0.5, after=0.875)
    _write_summary(tmp_path / "seed-1" / "gspo", before=0.5, after=0.375)
    table = algorithms.collect(tmp_path, ["grpo", "gspo", "sapo"], [0, 1, 2])
    assert table["before"] == {"0": 0.25, "1": 0.5}
    assert [(row["name"], row["mean_rise"], row["least_rise"]) for row in table["rows"]] == [
        ("grpo", 0.4375, 0.375),
        ("gspo", -0.125, -0.125),
    ]
    lines = algorithms.markdown(table).splitlines()
    assert lines[2] == "| *before* | | 25.0% | 50.0% | | |"
    assert lines[3] == '| `grpo` | `name = "grpo"` | 75.0% | 87.5% | +43.8 | 0.000875 |'
    assert lines[4] == '| `gspo` | `name = "gspo"`, `optim.steps_per_batch = 2` |  | 37.5% | -12.5 | 0.000375 |'

    _write_summary(tmp_path / "seed-0" / "sapo", before=0.26, after=0.75)
    with pytest.raises(AssertionError, match="start from one model"):
        algorithms.collect(tmp_path, ["grpo", "sapo"], [0])


@pytest.mark.slow
def test_algorithms_go_on_where_they_stopped(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    algorithms = load("algorithms")
    arguments = ["--output", str(tmp_path), "--seeds", "0", "--steps", "1", "--warm-up-steps", "2", "--only"]
    algorithms.main([*arguments, "grpo-lora"])
    done = tmp_path / "seed-0" / "grpo-lora" / "summary.json"
    first = done.stat().st_mtime_ns
    algorithms.main([*arguments, "grpo-lora", "gdpo"])
    assert done.stat().st_mtime_ns == first
    table = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert [row["name"] for row in table["rows"]] == ["grpo-lora", "gdpo"]
    assert not (tmp_path / "seed-0" / "gdpo" / "final").exists()
    assert algorithms.markdown(table) in capsys.readouterr().out


def test_head_memory_compares_one_and_the_same_loss(load) -> None:
    memory = load("head_memory")
    work = memory.Work(tokens=100, vocabulary=700, hidden=16, dtype="float32", device="cpu", chunk_tokens=32, threads=0)
    whole = dataclasses.replace(work, chunk_tokens=0)
    assert memory.measure(work)["loss"] == pytest.approx(memory.measure(whole)["loss"], rel=1e-6)
    assert memory.logits_bytes(work) == 2 * 100 * 700 * 4


@pytest.mark.slow
def test_head_memory_is_below_that_of_the_loss_in_one_piece(load, tmp_path: Path) -> None:
    out = tmp_path / "memory.jsonl"
    sizes = ["--vocabulary", "32768", "--hidden", "16", "--chunk-tokens", "256", "--threads", "1"]
    load("head_memory").main(["--tokens", "4096", "--plain-tokens", "4096", *sizes, "--json", str(out)])
    whole, chunked = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert (whole["chunk_tokens"], chunked["chunk_tokens"]) == (0, 256)
    assert whole["peak_bytes"] > 2 * 4096 * 32768 * 4
    assert chunked["peak_bytes"] < whole["peak_bytes"] / 2


def test_exactness_benchmark_samples_the_same_on_all_sides(load, tmp_path: Path) -> None:
    out = tmp_path / "exactness.json"
    sizes = ["--size", "0.1m", "--prompts", "3", "--samples", "2", "--tokens", "5", "--rounds", "1"]
    load("exactness").main([*sizes, "--json", str(out)])
    document = json.loads(out.read_text("utf-8"))
    assert [result["dtype"] for result in document["results"]] == ["float32", "bfloat16"]
    for result in document["results"]:
        checks, median = result["checks"], result["cpu"]["median"]
        assert checks["exact"] == {"difference_max": 0.0, "difference_mean": 0.0, "greedy_equal": 1.0}
        bound = 1e-5 if result["dtype"] == "float32" else 0.2
        for side in ("sdpa", "products"):
            assert checks[side]["difference_max"] < bound
        assert result["cpu"]["ratio"] == median["exact"] / max(median["sdpa"], median["products"])
    single = document["results"][0]["checks"]
    assert [single[side]["greedy_equal"] for side in ("sdpa", "products")] == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("size", "way", "dtype"),
    [
        *(("10m", way, dtype) for way in ("full", "lora") for dtype in ("float32", "bfloat16")),
        ("50m", "full", "float32"),
        ("50m", "lora", "bfloat16"),
    ],
)
def test_a_plans_memory_is_the_runs(load, tmp_path: Path, size: str, way: str, dtype: str) -> None:
    """The peak of the resident set in six steps, less what is resident once everything is imported: within 15 %. The
    benchmark has three sizes, each in four ways."""
    out = tmp_path / "plan.jsonl"
    what = ["--sizes", size, "--ways", way, "--dtypes", dtype, "--steps", "6"]
    load("plan").main([*what, "--no-seconds", "--json", str(out)])
    (found,) = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert 0.85 < found["planned_bytes"] / found["measured_bytes"] < 1.15, found


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_plans_seconds_are_the_runs(load, tmp_path: Path, way: str) -> None:
    """Of one thread's processor time in the second step, which other work hardly touches: within 30 %."""
    out = tmp_path / "plan.jsonl"
    arguments = ["--sizes", "10m", "--ways", way, "--dtypes", "float32", "--processor-time", "--json", str(out)]
    load("plan").main(arguments)
    (found,) = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert 0.7 < found["planned_seconds"] / found["measured_seconds"] < 1.3, found
