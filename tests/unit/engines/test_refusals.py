"""What a server refuses is said with what to do."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from groupwise.engines.connection import Connection, NoKey, Refused
from groupwise.engines.dialects.base import old_adapter
from groupwise.engines.dialects.own import Own
from groupwise.engines.dialects.sglang import SgLang
from groupwise.engines.dialects.vllm import Vllm
from groupwise.errors import EngineError


@pytest.mark.parametrize(("status", "kind"), [(401, NoKey), (403, NoKey), (404, Refused), (500, Refused)])
def test_a_wrong_key_is_told_from_other_refusals(status: int, kind: type[Refused]) -> None:
    with pytest.raises(Refused) as refused:
        Connection("http://a", most=1, alive="/health")._content(httpx.Response(status, text="no"))
    assert type(refused.value) is kind
    assert ("GROUPWISE_API_KEY" in str(refused.value)) == (kind is NoKey)


class Refusing:
    """A connection to a server that answers everything so."""

    url = "http://a"

    def __init__(self, error: Refused) -> None:
        self._error = error

    async def get(self, *args: Any, **options: Any) -> Any:
        raise self._error

    post = get


DIALECTS = [Own(exact=True), Vllm(kind="model", stop_token_ids=[]), SgLang(kind="model", stop_token_ids=[])]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: type(dialect).__name__)
def test_a_missing_key_is_not_taken_for_another_server(dialect: Any) -> None:
    with pytest.raises(NoKey):
        asyncio.run(dialect.reach(Refusing(NoKey("http://a", 401, "no"))))
    with pytest.raises(EngineError, match="is a server, but none of"):
        asyncio.run(dialect.reach(Refusing(Refused("http://a", 404, "no"))))


@pytest.mark.parametrize(
    ("dialect", "flag"), [(DIALECTS[1], "--enable-sleep-mode"), (DIALECTS[2], "--enable-memory-saver")]
)
def test_a_server_that_cannot_sleep_is_to_be_started_otherwise(dialect: Any, flag: str) -> None:
    with pytest.raises(EngineError, match=f"does not sleep: no; start it with {flag}"):
        asyncio.run(dialect.sleep(Refusing(Refused("http://a", 404, "no"))))


def test_the_adapter_before_the_last_is_let_go() -> None:
    assert [old_adapter(version) for version in (0, 1)] == [None, None]
    assert old_adapter(7) == old_adapter(8).replace("6", "5")  # type: ignore[union-attr]
