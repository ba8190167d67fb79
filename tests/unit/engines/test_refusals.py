"""What a server refuses is said with what to do."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from groupwise.engines.connection import Connection, NoKey, Refused
from groupwise.engines.dialects.lmdeploy import LmDeploy
from groupwise.engines.dialects.openai import OpenAi
from groupwise.engines.dialects.own import Own
from groupwise.engines.dialects.sglang import SgLang
from groupwise.engines.dialects.updated import old_adapter
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


@pytest.mark.parametrize("dialect", [*DIALECTS, LmDeploy(), OpenAi()], ids=lambda dialect: type(dialect).__name__)
def test_a_missing_key_is_not_taken_for_another_server(dialect: Any) -> None:
    with pytest.raises(NoKey):
        asyncio.run(dialect.reach(Refusing(NoKey("http://a", 401, "no"))))
    with pytest.raises(EngineError, match=r"is a server, but (none of|lists no models)"):
        asyncio.run(dialect.reach(Refusing(Refused("http://a", 404, "no"))))


class Saying:
    """A connection to a server that answers everything so."""

    url = "http://a"

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def get(self, *args: Any, **options: Any) -> Any:
        return self._answer


NO_LISTS = [None, "a page", []]
NO_MODELS = [{}, {"data": []}, {"data": [{}]}, {"data": [7]}]  # of SGLang's facts all may be left out


@pytest.mark.parametrize(
    ("dialect", "answer"),
    [
        *((DIALECTS[2], answer) for answer in NO_LISTS),
        *((dialect, answer) for dialect in (*DIALECTS[:2], LmDeploy(), OpenAi()) for answer in NO_LISTS + NO_MODELS),
    ],
    ids=lambda each: type(each).__name__ if hasattr(each, "caps") else str(each),
)
def test_another_server_is_known_by_what_it_says(dialect: Any, answer: Any) -> None:
    with pytest.raises(EngineError, match=r"is a server, but [^\n]*: it does not say which model it has"):
        asyncio.run(dialect.reach(Saying(answer)))


@pytest.mark.parametrize(
    ("dialect", "flag"), [(DIALECTS[1], "--enable-sleep-mode"), (DIALECTS[2], "--enable-memory-saver")]
)
def test_a_server_that_cannot_sleep_is_to_be_started_otherwise(dialect: Any, flag: str) -> None:
    with pytest.raises(EngineError, match=f"does not sleep: no; start it with {flag}"):
        asyncio.run(dialect.sleep(Refusing(Refused("http://a", 404, "no"))))


def test_the_adapter_before_the_last_is_let_go() -> None:
    assert [old_adapter(version) for version in (0, 1)] == [None, None]
    assert old_adapter(7) == old_adapter(8).replace("6", "5")  # type: ignore[union-attr]
