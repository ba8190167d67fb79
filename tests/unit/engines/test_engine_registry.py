from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import RolloutConfig
from groupwise.engines import check_engine
from groupwise.errors import ConfigError


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


@pytest.mark.parametrize("setting", [{"urls": ["http://a"]}, {"engine_timeout": 3.0}, {"weights_dir": "/dev/shm/w"}])
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
