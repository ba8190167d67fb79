from __future__ import annotations

from typing import Any

import pytest

from groupwise.config import RolloutConfig
from groupwise.config.rollout import EXACT_ENGINES
from groupwise.engines import ENGINES, build_engine, check_engine
from groupwise.engines.native import NativeEngine
from groupwise.errors import ConfigError


def test_every_known_name_passes() -> None:
    for name in ENGINES:
        check_engine(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nativ", "did you mean 'native'"),
        ("NATIVE", "did you mean 'native'"),
        *((name, "expected one of native") for name in ("", "übung", "vllm2")),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_or_with_all(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.engine = .* is unknown; {hint}"):
        check_engine(name)


def test_the_native_engine_is_built(lab: Any) -> None:
    engine = build_engine(RolloutConfig(engine="native"), lab.model())
    assert isinstance(engine, NativeEngine)
    assert engine.caps.exact_logprobs == ("native" in EXACT_ENGINES)
