from __future__ import annotations

from typing import Any

import pytest

from groupwise.config import RolloutConfig
from groupwise.engines import check_engine, require_in_process
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
        *((name, "expected one of native, http") for name in ("", "übung", "vllm2")),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_or_with_all(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.engine = .* is unknown; {hint}"):
        check_engine(rollout(engine=name))


@pytest.mark.parametrize("setting", [{"urls": ["http://a"]}, {"engine_timeout": 3.0}, {"weights_dir": "/dev/shm/w"}])
def test_what_acts_over_the_wire_alone_is_refused_without_it(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.{next(iter(setting))} = .* has no effect"):
        check_engine(rollout(**setting))


def test_whoever_samples_here_refuses_an_engine_elsewhere() -> None:
    with pytest.raises(ConfigError, match="groupwise eval samples in this process"):
        require_in_process(rollout(engine="http", urls=["http://127.0.0.1:8000"]), "groupwise eval")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.engines.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs starlette, uvicorn, httpx: pip install 'groupwise\[serve\]'"):
        check_engine(rollout(engine="http", urls=["http://127.0.0.1:8000"]))
