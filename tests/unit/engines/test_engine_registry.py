from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import RolloutConfig
from groupwise.engines import check_engine, checks
from groupwise.errors import ConfigError
from groupwise.weight_sync.directory import own_folder


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
    [{"urls": ["http://a"]}, {"engine_timeout": 3.0}, {"weights_dir": "/dev/shm/w"}, {"quantized_engine": True}],
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
        ({"engine": "vllm", "urls": ["http://a"], "top_p": 0.9}, r"rollout.top_p = 0.9 does not go with"),
        ({"engine": "sglang", "urls": ["http://a"], "temperature": 0}, "rollout.temperature = 0"),
        ({"engine": "openai", "urls": ["http://a"], "min_p": 0.1}, "no such setting"),
        ({"engine": "vllm", "urls": ["a:1"]}, "no address of a server"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_said_in_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine(rollout(**settings))


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


def test_two_runs_have_folders_of_their_own_below_one(tmp_path: Path) -> None:
    first, again, second = (own_folder(tmp_path, tmp_path / place / "run") for place in ("a", "a", "b"))
    assert first == again != second
    assert {first.parent, second.parent} == {tmp_path}
    assert first.name.startswith("run-")
