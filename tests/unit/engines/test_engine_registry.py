from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from groupwise.assembly.preparation import prepare
from groupwise.cli import main
from groupwise.config import Config, RolloutConfig
from groupwise.engines import check_engine, check_logprobs, check_told, check_weights, checks, has_logprobs, tellings
from groupwise.engines.commands import Start, command_of
from groupwise.engines.external import Speaks, dialect_of
from groupwise.errors import ConfigError
from groupwise.weight_sync.way import own_folder


def rollout(**settings: Any) -> RolloutConfig:
    return RolloutConfig.model_validate(settings)


def test_every_known_name_passes() -> None:
    check_engine(rollout(engine="native"))
    check_engine(rollout(engine="http", urls=["http://127.0.0.1:8000"]))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nativ", "did you mean 'native'"),
        ("NATIVE", "did you mean 'native'"),
        *((name, "expected one of native, http") for name in ("", "übung")),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_or_with_all(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.engine = .* is unknown; {hint}"):
        check_engine(rollout(engine=name))


@pytest.mark.parametrize(
    "setting",
    [
        {"urls": ["http://a"]},
        {"engine_timeout": 3.0},
        {"weights_dir": "/dev/shm/w"},
        {"weights_by": "ipc"},
        {"quantized_engine": True},
    ],
)
def test_what_acts_over_the_wire_alone_is_refused_without_it(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.{next(iter(setting))} = .* has no effect"):
        check_engine(rollout(**setting))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "openai"}, "needs rollout.urls"),
        ({"engine": "openai", "urls": ["http://a"]}, "cannot train"),
        ({"engine": "vllm"}, r"needs rollout.urls, where it is running, or rollout\.launch\.python"),
        ({"engine": "vllm", "urls": ["http://a"], "launch": {"replicas": 2}}, "launch.replicas has no effect"),
        ({"engine": "vllm", "launch": {"python": "/none/python"}}, "no interpreter that can be run"),
        ({"engine": "vllm", "launch": {"python": sys.executable}}, "has no vllm: .* -m pip install vllm"),
        (
            {"engine": "vllm", "urls": ["http://a"], "top_p": 0.9},
            r"only if rollout.top_k bounds them; give one",
        ),
        ({"engine": "vllm", "urls": ["http://a"], "min_p": 0.1}, "such as rollout.top_k = 512"),
        ({"engine": "vllm", "urls": ["http://a"], "top_k": 1}, "a group of equal answers"),
        ({"engine": "sglang", "urls": ["http://a"], "top_k": 4097}, "of at most 4,096"),
        (
            {"engine": "sglang", "urls": ["http://a"], "top_k": 9, "min_p": 0.1},
            "refuses it where a sample has a seed",
        ),
        (
            {"engine": "sglang", "urls": ["http://a"], "top_k": 9, "repetition_penalty": 1.1},
            "does more to the distribution",
        ),
        (
            {"engine": "vllm", "urls": ["http://a"], "min_completion_tokens": 3},
            "min_completion_tokens = 3 does not",
        ),
        ({"engine": "lmdeploy", "urls": ["http://a"], "top_k": 9}, "this engine does not tell them"),
        ({"engine": "lmdeploy", "urls": ["http://a"], "replay_routes": True}, "through Ray, and not over HTTP"),
        ({"engine": "native", "replay_routes": True}, "replay_routes = True has no effect"),
        ({"engine": "native", "replay_routes": False}, "replay_routes = False has no effect"),
        ({"engine": "sglang", "urls": ["http://a"], "temperature": 0}, "rollout.temperature = 0"),
        ({"engine": "openai", "urls": ["http://a"], "min_p": 0.1}, "no such setting"),
        ({"engine": "vllm", "urls": ["a:1"]}, "no address of a server"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_said_in_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine(rollout(**settings))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"stop": ["x"] * 65}, r"rollout\.stop: .* at most 64 items"),
        ({"stop": ["x" * 2000]}, r"rollout\.stop\.0: .* at most 1024 characters"),
        ({"stop_token_ids": [2**40]}, r"rollout\.stop_token_ids\.0: "),
        ({"repetition_penalty": 1e-9}, r"rollout\.repetition_penalty: "),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_our_own_server_takes_from_nobody_is_refused_before(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}.*as rollout.engine = 'http' has it"):
        check_engine(rollout(engine="http", urls=["http://127.0.0.1:8000"], **setting))
    check_engine(rollout(**setting))


def test_an_evaluation_asks_less(tmp_path: Path) -> None:
    check_engine(rollout(engine="openai", urls=["http://a"], top_p=0.9), trains=False)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.engines.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs httpx: pip install 'groupwise\[serve\]'"):
        check_engine(rollout(engine="http", urls=["http://127.0.0.1:8000"]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "http", "kv_cache_gib": 2.0}, r"kv_cache_gib = 2 has no effect .* the server's own setting"),
        ({"engine": "vllm", "kv_cache_gib": 2.0}, r"kv_cache_gib = 2 has no effect .* the server's own setting"),
        ({"engine": "http", "quantized_engine": True}, r"computes with the weights as they are; leave it out"),
    ],
)
def test_what_nobody_would_read_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine(rollout(urls=["http://127.0.0.1:8000"], **settings))


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ({"gpu_memory": 0.5}, "gpu_memory = 0.5: this machine has no GPU"),
        ({"tensor_parallel": 2}, "tensor_parallel = 2"),
    ],
)
def test_what_a_gpu_alone_has_is_refused_without_one(
    launch: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "has_gpu", lambda: False)
    monkeypatch.setattr(checks, "_check_installed", lambda name, python: None)
    settings = rollout(engine="vllm", launch={"python": sys.executable, **launch})
    with pytest.raises(ConfigError, match=said):
        check_engine(settings)
    monkeypatch.setattr(checks, "has_gpu", lambda: True)
    check_engine(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "http", "weights_by": "ipc"}, "'ipc' does not go with .*reads folders; use 'directory' or 'delta'"),
        ({"engine": "http", "weights_by": "nccl"}, "'nccl' does not go with .*reads folders"),
        ({"engine": "sglang", "weights_by": "ipc"}, "'ipc' does not go with .*pickled"),
        ({"engine": "lmdeploy", "weights_by": "ipc"}, "'ipc' does not go with .*pickled"),
        ({"engine": "sglang", "weights_by": "delta"}, "'delta' does not go with .*whole weights"),
        ({"engine": "lmdeploy", "weights_by": "delta"}, "'delta' does not go with .*whole weights"),
        ({"engine": "openai", "weights_by": "delta"}, "'delta' has no effect"),
        ({"engine": "vllm", "weights_by": "nccl", "weights_dir": "/w"}, "weights_dir has no effect"),
        ({"engine": "vllm", "weights_by": "ipc", "urls": ["http://gpu2:8000"]}, "gpu2:8000 may be on another machine"),
    ],
    ids=str,
)
def test_a_way_that_leads_nowhere_is_refused_with_the_reason(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine(rollout(**({"urls": ["http://127.0.0.1:8000"]} | settings)))


@pytest.mark.parametrize(
    ("engine", "way"),
    [
        *(("vllm", way) for way in ("directory", "ipc", "nccl", "delta")),
        *(("sglang", "nccl"), ("lmdeploy", "nccl"), ("http", "delta")),
    ],
)
def test_ways_that_an_engine_has_are_taken(engine: str, way: str) -> None:
    check_engine(rollout(engine=engine, weights_by=way, urls=["http://localhost:8000"]))


@pytest.mark.parametrize(
    ("settings", "gpu", "said"),
    [
        ({"rollout": {"weights_by": "ipc"}, "lora": {"rank": 4}}, False, "'ipc': an adapter is small"),
        ({"rollout": {"weights_by": "nccl"}}, True, r"needs rollout\.launch\.gpus"),
        ({"rollout": {"weights_by": "nccl", "launch": {"gpus": ["1"]}}}, True, ""),
        ({"rollout": {"weights_by": "nccl"}, "model": {"device": "cpu"}}, True, ""),
        ({"rollout": {"weights_by": "nccl", "engine": "sglang"}, "model": {"device": "cpu"}}, True, "GPU to GPU"),
        ({"rollout": {"weights_by": "nccl"}}, False, ""),
    ],
    ids=str,
)
def test_a_way_has_to_fit_the_policy(
    settings: dict[str, Any], gpu: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "has_gpu", lambda: gpu)
    own = settings["rollout"]
    launch = {"python": "python", **own.get("launch", {})}
    config = Config.model_validate({**settings, "rollout": {"engine": "vllm", **own, "launch": launch}})
    if not said:
        check_weights(config)
        return
    with pytest.raises(ConfigError, match=said):
        check_weights(config)


def test_two_runs_have_folders_of_their_own_below_one(tmp_path: Path) -> None:
    first, again, second = (own_folder(tmp_path, tmp_path / place / "run") for place in ("a", "a", "b"))
    assert first == again != second
    assert {first.parent, second.parent} == {tmp_path}
    assert first.name.startswith("run-")


def over(engine: str, temperature: float, **algorithm: Any) -> Config:
    rollout = {"engine": engine, "temperature": temperature, "urls": ["http://127.0.0.1:9"], "prompts_per_step": 4}
    return Config.model_validate({"rollout": rollout, "algorithm": algorithm})


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"correction": {"name": "truncate"}}, "correction.name = 'truncate' has no effect"),
        ({"correction": {"name": "decoupled", "level": "sequence"}}, "correction.name = 'decoupled' has no effect"),
        ({"correction": {"veto": 0.1}}, "correction.veto = 0.1 has no effect"),
        ({"correction": {"off_policy_mask": 0.5}}, "correction.off_policy_mask = 0.5 has no effect"),
        ({"old_logprobs": "sampler"}, "old_logprobs = 'sampler' has no effect"),
    ],
    ids=str,
)
def test_log_probs_that_the_engine_does_not_have_cannot_be_weighed(algorithm: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{said} .* and rollout.temperature = 0.7: .* set rollout.temperature to 1"):
        check_logprobs(over("lmdeploy", 0.7, **algorithm))
    check_logprobs(over("lmdeploy", 1.0, **algorithm))
    check_logprobs(over("vllm", 0.7, **algorithm))


def test_a_mask_of_drift_acts_beside_them_where_weights_move_within_a_step() -> None:
    config = over("lmdeploy", 0.7, correction={"off_policy_mask": 0.5})
    check_logprobs(config.model_copy(update={"optim": config.optim.model_copy(update={"steps_per_batch": 2})}))


def test_a_run_is_refused_before_any_server_is_asked(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    config = over("lmdeploy", 0.7, correction={"name": "truncate"}).model_dump(exclude_unset=True)
    config |= {"model": {"path": "Qwen/Qwen3-0.6B"}, "data": {"train": str(tmp_path / "rows.jsonl")}}
    config["train"] = {"output": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"correction\.name = 'truncate' has no effect"):
        prepare(Config.model_validate({**config, "reward": [{"name": "gsm8k"}]}))


@pytest.mark.parametrize("engine", ["http", "vllm", "sglang", "lmdeploy", "openai"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weights_are_cut_where_there_is_something_to_weigh_by(engine: str, temperature: float) -> None:
    config = over(engine, temperature)
    there = has_logprobs(config.rollout)
    assert there == (engine != "openai" and (engine, temperature) != ("lmdeploy", 0.7))
    assert dialect_of(engine, Speaks((), logprobs=there)).caps.logprobs == there
    assert config.corrected(exact=False, logprobs=there).algorithm.correction.name == ("truncate" if there else "none")


def test_a_command_is_not_printed_by_what_cannot_act_or_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["engine", "command", "--engine", "vllm", "--model", "some/model"]
    for given in ("--rollout.urls", "--rollout.launch.gpus", "--rollout.sync_tolerance", "--rollout.engine_timeout"):
        assert main([*words, given, "1"]) == 2
        assert f"{given} has no effect in `groupwise engine command`" in capsys.readouterr().err
    assert main([*words, "--url", "http://127.0.0.1:8000"]) == 2
    assert "has no flag --url" in capsys.readouterr().err
    assert main([*words, "--rollout.launch.port", "8123"]) == 0
    assert "--port 8123" in capsys.readouterr().out
    monkeypatch.setattr("groupwise.engines.checks.find_spec", lambda name: None)
    assert main(words) == 2
    assert "engine 'vllm' needs httpx: pip install 'groupwise[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"top_k": 64}, "top_k = 64: the trainer has to be told"), ({"replay_routes": True}, "replay_routes = true")],
    ids=str,
)
def test_a_vllm_that_is_started_without_a_gpu_tells_nothing_beside_tokens(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(checks, "_check_installed", lambda *_: None)
    given = rollout(engine="vllm", launch={"python": sys.executable}, **settings)
    monkeypatch.setattr(tellings, "has_gpu", lambda: False)
    with pytest.raises(ConfigError, match=said + "(?s:.*)needs Triton, and this machine has no GPU"):
        check_engine(given)
    monkeypatch.setattr(tellings, "has_gpu", lambda: True)
    check_engine(given)


def test_evaluations_of_a_vllm_that_tells_of_filters_are_greedy() -> None:
    def check(engine: str, temperature: float, every: int = 1) -> None:
        settings = {"engine": engine, "urls": ["http://a"], "top_p": 0.9, "top_k": 64}
        given = {"data": {"train": "a", "eval": "b"}, "eval": {"temperature": temperature, "every": every}}
        check_told(Config.model_validate({"model": {"path": "m"}, "rollout": settings, **given}))

    check("vllm", 0.0)
    check("sglang", 0.5)
    check("vllm", 0.5, every=0)
    with pytest.raises(ConfigError, match="wants a top-k in every request"):
        check("vllm", 0.5)


@pytest.mark.parametrize(
    ("settings", "routes", "expected"),
    [
        ({"engine": "vllm"}, False, set()),
        ({"engine": "vllm", "top_p": 0.9, "top_k": 64}, False, {"--return-sampling-mask"}),
        ({"engine": "vllm"}, True, {"--enable-return-routed-experts"}),
        ({"engine": "sglang", "top_k": 64}, True, {"--enable-return-routed-experts"}),
        ({"engine": "sglang", "top_k": 64}, False, set()),
    ],
    ids=str,
)
def test_an_engine_is_started_to_tell_what_is_learned_from(
    settings: dict[str, Any], routes: bool, expected: set[str]
) -> None:
    given = rollout(**settings)
    start = Start("python", "m", 8000, length=64, dtype="bfloat16", seed=1, rollout=given, routes=routes)
    words = set(command_of(given.engine, start).words)
    assert words & {"--return-sampling-mask", "--enable-return-routed-experts"} == expected
