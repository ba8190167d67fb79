"""What engines tell beside tokens: the sets that filters left, and the experts that were chosen; true, and wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from groupwise.assembly.engine_check import Checked, check_of
from groupwise.config import Config, RolloutConfig
from groupwise.engines.dialects.base import Tells
from groupwise.engines.external import Speaks, external_engine
from groupwise.errors import ConfigError, EngineError, TrainingError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.launch import Given, run_training
from groupwise.model.forward.as_sampled import KeptTokens
from groupwise.sides import Mixture
from groupwise.types import Completion, SampleRequest, SamplingParams
from tests import made_model
from tests.engines.contract import server, sglang, vllm
from tests.made_environment import nods

KINDS: dict[str, Any] = {"vllm": vllm, "sglang": sglang}
SOME = ["vllm", pytest.param("sglang", marks=pytest.mark.slow)]
CUT = {"top_p": 0.9, "top_k": 20}
SHAPE = {"vocab_size": 384, **made_model.SHAPE}
GLM = Mixture(depth=2, sparse=(1,), experts=8, k=2)


@pytest.fixture(scope="module")
def mixtures(task: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a Qwen3-MoE, and of a GLM-4-MoE whose first layer is dense; with the task's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    shape = SHAPE | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": 0}
    found: dict[str, Path] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "qwen3_moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_experts=8)),
            "glm4_moe": Glm4MoeForCausalLM(Glm4MoeConfig(**shape, n_routed_experts=8, first_k_dense_replace=1)),
        }
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@contextlib.contextmanager
def served(kind: str, model: Path, *traps: str, **flags: Any) -> Iterator[server.Serving]:
    if kind == "vllm":
        flags.setdefault("return_sampling_mask", False)
    else:
        flags = {name: value for name, value in flags.items() if name != "return_sampling_mask"}
    started = KINDS[kind].Flags.as_it_should(**flags)
    with server.serving(KINDS[kind].contract(model, started, *traps)) as serving:
        yield serving


def over(kind: str, url: str, **settings: Any) -> dict[str, Any]:
    return {"engine": kind, "urls": [url], "engine_timeout": 5.0, **settings}


def steps_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def trajectories(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "trajectories").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# Filters


@pytest.mark.parametrize("kind", SOME)
def test_a_run_over_cut_distributions_knows_them(task: Any, tmp_path: Path, kind: str) -> None:
    """The trainer's numbers are the engine's; the KL to the reference is 0 where both are one; weights are about 1."""
    with served(kind, task.model, return_sampling_mask=True) as serving:
        config = task.config(
            tmp_path / "run",
            rollout=over(kind, serving.url, **CUT, temperature=0.8),
            algorithm={"kl": {"coef": 0.1}, "entropy": {"coef": 0.01}},
        )
        run_training(config)
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 4
    assert all(0 < row["sampling/sampling_logp_difference/max"] < 1e-5 for row in steps)
    assert all(row["correction/weight_mean"] == pytest.approx(1, abs=1e-4) for row in steps)
    assert all(row["rollout/failed"] == 0 for row in steps)
    assert steps[0]["kl"] == 0
    assert steps[3]["kl"] > 0
    assert all(0 < row["entropy"] < 3.0 for row in steps), "of at most 20 tokens: ln 20"
    text = "".join(file.read_text() for file in (tmp_path / "run" / "trajectories").glob("*"))
    assert "kept" not in text
    assert "the engine tells which tokens were left" in (tmp_path / "run" / "log.txt").read_text()


def test_without_the_sets_the_trainer_is_far_off(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would say, were they not used."""
    monkeypatch.setattr(KeptTokens, "of", staticmethod(lambda rows: None))
    with served("sglang", task.model) as serving:
        run_training(task.config(tmp_path / "run", rollout=over("sglang", serving.url, **CUT), train={"steps": 1}))
    [step] = steps_of(tmp_path / "run")
    assert step["sampling/sampling_logp_difference/mean"] > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_evaluations_are_drawn_beside_cut_samples(task: Any, tmp_path: Path, kind: str) -> None:
    with served(kind, task.model, return_sampling_mask=True) as serving:
        config = task.config(
            tmp_path / "run",
            rollout=over(kind, serving.url, **CUT),
            data={"train": str(task.rows), "eval": str(task.rows)},
            eval={"every": 1, "limit": 4},
            train={"steps": 1},
        )
        run_training(config)
        greedy = [body for _, path, body in serving.contract.seen if "generate" in path and _greedy(body)]
    assert len(greedy) == 8, "before the first step, and after it"


def _greedy(body: Any) -> bool:
    """Not of a proof, which scores by one token."""
    params = body["sampling_params"]
    most = params.get("max_tokens") or params.get("max_new_tokens")
    return most > 1 and (params["temperature"] == 0 or params["top_k"] == 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_check_of_the_contract_passes_with_filters_and_routes(mixtures: Any, kind: str) -> None:
    flags = {"return_sampling_mask": True, "enable_return_routed_experts": True}
    with served(kind, mixtures["glm4_moe"], **flags) as serving:
        model = {"path": str(mixtures["glm4_moe"]), "dtype": "float32", "device": "cpu"}
        rollout = over(kind, serving.url, max_completion_tokens=200, replay_routes=True, **CUT)
        config = Config.model_validate({"model": model, "rollout": rollout})
        lines: list[Checked] = []
        found = asyncio.run(check_of(config, tell=lines.append).run())
    assert [line.name for line in found if not line.passed] == [], [line.seen for line in found]
    assert len(found) == 10


def test_a_vllm_that_tells_nothing_of_filters_is_refused_before_training(task: Any, tmp_path: Path) -> None:
    with served("vllm", task.model) as serving:
        config = task.config(tmp_path / "run", rollout=over("vllm", serving.url, **CUT))
        with pytest.raises(ConfigError, match="start vLLM with --return-sampling-mask"):
            run_training(config)


# Experts


@pytest.mark.parametrize("kind", SOME)
def test_a_run_over_a_mixture_replays_its_experts(mixtures: Any, task: Any, tmp_path: Path, kind: str) -> None:
    """The reference has none to replay: it is the policy, and chooses alike in float32, so the KL begins at about 0."""
    with served(kind, mixtures["glm4_moe"], enable_return_routed_experts=True) as serving:
        model = {"path": str(mixtures["glm4_moe"]), "dtype": "float32", "gradient_checkpointing": True}
        config = task.config(
            tmp_path / "run", model=model, rollout=over(kind, serving.url), algorithm={"kl": {"coef": 0.1}}
        )
        run_training(config)
    steps = steps_of(tmp_path / "run")
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in steps)
    assert [row["moe/replaced"] for row in steps] == pytest.approx([0.0] * 4, abs=0.01)
    assert [row["moe/prompt_differs"] for row in steps] == [0.0] * 4
    assert abs(steps[0]["kl"]) < 1e-6
    assert "not replayed" not in (tmp_path / "run" / "log.txt").read_text()
    text = "".join(file.read_text() for file in (tmp_path / "run" / "trajectories").glob("*"))
    assert "routes" not in text + (tmp_path / "run" / "ledger.jsonl").read_text()


@pytest.mark.slow
def test_replay_brings_a_sampler_of_less_precision_nearer(mixtures: Any, task: Any, tmp_path: Path) -> None:
    """An engine in bfloat16, a trainer in float32: some choices differ, and the largest differences come from them."""
    found: dict[bool, list[dict[str, Any]]] = {}
    for replays in (True, False):
        model, run = mixtures["qwen3_moe"], tmp_path / f"run {replays}"
        with served("vllm", model, enable_return_routed_experts=True, dtype="bfloat16") as serving:
            config = task.config(
                run,
                model={"path": str(model), "dtype": "float32"},
                rollout=over("vllm", serving.url, sync_tolerance=1.0, replay_routes=replays, max_completion_tokens=32),
                algorithm={"router_aux_loss_coef": 0.01},
                train={"steps": 2, "micro_batch_tokens": 400},
                optim={"lr": 1e-4},
            )
            run_training(config)
        found[replays] = steps_of(run)
    for with_it, without in zip(found[True], found[False], strict=True):
        assert 0 < with_it["moe/replaced"] < 0.1
        name = "sampling/sampling_logp_difference/max"
        assert with_it[name] < 0.7 * without[name], (with_it[name], without[name])
        assert "moe/replaced" not in without
        assert "aux_loss" in with_it
    assert (
        "not replayed in training (rollout.replay_routes = false)" in (tmp_path / "run False" / "log.txt").read_text()
    )


def test_a_server_that_tells_of_no_experts_is_gone_without_or_refused(
    mixtures: Any, task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = {"path": str(mixtures["qwen3_moe"]), "dtype": "float32"}
    for kind in KINDS:
        with served(kind, mixtures["qwen3_moe"]) as serving:
            given = task.config(tmp_path / kind, model=model, rollout=over(kind, serving.url), train={"steps": 1})
            run_training(given)
            asked = over(kind, serving.url, replay_routes=True)
            with pytest.raises(ConfigError, match=r"start .* with --enable-return-routed-experts"):
                run_training(task.config(tmp_path / f"{kind} asked", model=model, rollout=asked))
        [step] = steps_of(tmp_path / kind)
        assert "moe/replaced" not in step
        assert re.search("not replayed in training .*does not tell which experts it chose", caplog.text)
        caplog.clear()


def test_a_dense_model_has_nothing_to_replay(task: Any, tmp_path: Path) -> None:
    with served("vllm", task.model) as serving:
        config = task.config(tmp_path / "run", rollout=over("vllm", serving.url, replay_routes=True))
        with pytest.raises(ConfigError, match="is no mixture of experts, so there is nothing to replay"):
            run_training(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_each_turn_tells_what_the_ones_before_did_not(mixtures: Any, task: Any, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "nods.py"
    file.write_text(nods(done="float(len(turn.token_ids))"))
    flags = {"return_sampling_mask": True, "enable_return_routed_experts": True}
    with served(kind, mixtures["qwen3_moe"], **flags) as serving:
        stops = {"stop_token_ids": list(range(60, 160)), "max_completion_tokens": 48}
        config = task.config(
            tmp_path / "run",
            model={"path": str(mixtures["qwen3_moe"]), "dtype": "float32"},
            reward=[],
            environment={"name": f"{file}:make", "max_turns": 3},
            rollout=over(kind, serving.url, replay_routes=True, **CUT, **stops),
            train={"steps": 1},
        )
        run_training(config)
        bodies = [body for _, path, body in serving.contract.seen if "generate" in path]
    name = "routed_experts_prompt_start"
    starts = {body.get("routed_experts_start_len", body["sampling_params"].get(name)) for body in bodies}
    assert len(starts - {None, 0}) > 3
    [step] = steps_of(tmp_path / "run")
    assert step["environment/answers_per_episode"] > 1
    assert 0 < step["sampling/sampling_logp_difference/max"] < 1e-5
    assert step["moe/replaced"] < 0.01
    assert step["rollout/failed"] == 0


# What goes wrong


def drawn_by(kind: str, url: str, *, tells: Tells, mixture: Mixture | None, count: int = 1) -> list[Completion]:
    """Samples as a run asks for them, one after another."""
    config = RolloutConfig.model_validate(over(kind, url))
    engine = external_engine(
        config, Speaks((2,), tells=tells), decode=str, encode=lambda text: (), vocabulary=384, mixture=mixture
    )
    sampling = SamplingParams(max_tokens=6, **(CUT if tells.kept else {}))

    async def draw() -> list[Completion]:
        found = []
        for number in range(count):
            prompt = ModelInput.of([5 + number, 9, 11, 30, 41])
            request = SampleRequest(
                SampleKey("p", 0, number), prompt, sampling, wants_routes=tells.routes, wants_kept=tells.kept
            )
            found += [one async for one in engine.generate([request])]
        await engine.close()
        return found

    return asyncio.run(draw())


@pytest.mark.parametrize(
    ("trap", "said"),
    [
        ("lost_mask", r"it drew token \d+ \(number 1\), which its filters had cut"),
        ("no_sides", "it did not tell which tokens its filters left"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_set_that_cannot_be_fails_its_sample(task: Any, kind: str, trap: str, said: str) -> None:
    with served(kind, task.model, *([trap] if trap else []), return_sampling_mask=True) as serving:
        [completion] = drawn_by(kind, serving.url, tells=Tells(kept=True), mixture=None)
    assert re.search(said, completion.error) if said else not completion.error
    assert (completion.finish_reason == "error") == bool(said)
    assert (completion.sides.kept is None) == bool(said)


@pytest.mark.parametrize(
    ("trap", "said"),
    [
        ("zero_routes", "one expert twice for one token, and of zeros alone"),
        ("wrong_rows", r"its experts are \[9, 2, 2\] numbers; expected \[10, 2, 2\]|cannot be read"),
        ("no_sides", "it told of no experts"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_cannot_be_fail_their_sample(mixtures: Any, kind: str, trap: str, said: str) -> None:
    traps = [trap] if trap else []
    with served(kind, mixtures["glm4_moe"], *traps, enable_return_routed_experts=True) as serving:
        [completion] = drawn_by(kind, serving.url, tells=Tells(routes=True), mixture=GLM)
    routes = completion.sides.routes
    assert re.search(said, completion.error) if said else not completion.error
    assert (completion.finish_reason == "error") == bool(said)
    assert (routes is None) == bool(said)
    if routes is not None:
        assert (routes.rows, routes.layers, routes.k, routes.dtype) == (10, 1, 2, "uint8")


def test_a_failed_sample_is_data_and_says_where_it_failed(task: Any, tmp_path: Path) -> None:
    with served("sglang", task.model, "lost_mask") as serving:
        config = task.config(tmp_path / "run", rollout=over("sglang", serving.url, **CUT))
        with pytest.raises(TrainingError, match="which its filters had cut"):
            run_training(config)
    rows = trajectories(tmp_path / "run")
    assert {(row["status"], row["boundary"]) for row in rows} == {("failed", "engine")}
    assert all("which its filters had cut" in row["cause"] for row in rows)


def test_a_proof_asks_for_the_sets_too(task: Any, tmp_path: Path) -> None:
    with served("vllm", task.model, "lost_mask", return_sampling_mask=True) as serving:
        config = task.config(tmp_path / "run", rollout=over("vllm", serving.url, **CUT))
        with pytest.raises(EngineError, match="does not draw as it must: it drew token"):
            run_training(config)


def test_experts_of_another_answer_are_seen(
    mixtures: Any, task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They pass for this answer's at the boundary; the routers would not have chosen them."""
    with served("sglang", mixtures["qwen3_moe"], enable_return_routed_experts=True) as serving:

        def low(completion_ids: list[list[int]], **_: Any) -> list[float]:
            serving.set_traps("stale_routes")
            return [sum(token < 130 for token in ids) / len(ids) + len(ids) / 100 for ids in completion_ids]

        model = {"path": str(mixtures["qwen3_moe"]), "dtype": "float32"}
        config = task.config(tmp_path / "run", model=model, reward=[], rollout=over("sglang", serving.url))
        with caplog.at_level(logging.WARNING):
            run_training(config, given=Given(rewards=[low]))
    steps = steps_of(tmp_path / "run")
    assert steps[1]["moe/replaced"] > 0.3
    findings = (tmp_path / "run" / "findings.jsonl").read_text()
    assert "experts_strange" in findings
    assert "they are likely those of another request" in caplog.text
