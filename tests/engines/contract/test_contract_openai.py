"""What the contract server of OpenAI's routes says of tokens, as far as it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from groupwise.quickstart.tiny_model import build_tokenizer
from tests.engines.contract import openai, server
from tests.engines.contract.asking import OpenaiAsking
from tests.engines.contract.tiny import PROMPT, Folders, tiny

CLOSE = 2e-5


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatty") / "model"
    tiny(4).save_pretrained(folder)
    build_tokenizer(["the cat sat on the mat"], vocab_size=270).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chatty(with_tokenizer: Path, folders: Folders) -> Iterator[OpenaiAsking]:
    flags = openai.Flags(model_name="tiny", api_key="sk-1")
    with server.serving(openai.contract(with_tokenizer, flags)) as serving:
        asking = OpenaiAsking(serving, folders)
        asking.http.headers["Authorization"] = "Bearer sk-1"
        yield asking


CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the cat"}],
    "max_completion_tokens": 8,
    "seed": 5,
    "logprobs": True,
    "return_token_ids": True,
    "ignore_eos": True,
}


def test_chat_gives_ids_texts_and_logprobs(chatty: OpenaiAsking, folders: Folders, with_tokenizer: Path):
    choice = chatty.post(openai.CHAT, CHAT).json()["choices"][0]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    logprobs = [each["logprob"] for each in choice["logprobs"]["content"]]
    wanted = folders.logprobs(with_tokenizer, ids)[-8:]
    assert max(abs(a - b) for a, b in zip(logprobs, wanted, strict=True)) < CLOSE
    assert not any(each["token"].startswith("token_id:") for each in choice["logprobs"]["content"])


def test_tokens_by_id_strings(chatty: OpenaiAsking):
    choice = chatty.post(openai.CHAT, CHAT | {"return_tokens_as_token_ids": True}).json()["choices"][0]
    named = [each["token"] for each in choice["logprobs"]["content"]]
    assert named == [f"token_id:{token}" for token in choice["token_ids"]]


def test_a_server_that_knows_nothing_of_ids(with_tokenizer: Path, folders: Folders):
    flags = openai.Flags(token_ids=False, token_id_strings=False, model_name="tiny")
    with server.serving(openai.contract(with_tokenizer, flags)) as serving:
        asking = OpenaiAsking(serving, folders)
        choice = asking.post(openai.CHAT, CHAT | {"return_tokens_as_token_ids": True}).json()["choices"][0]
        assert "token_ids" not in choice
        assert not any(each["token"].startswith("token_id:") for each in choice["logprobs"]["content"])
        choice = asking.ask("a").json()["choices"][0]
        assert "token_ids" not in choice
        assert not any(each.startswith("token_id:") for each in choice["logprobs"]["tokens"])


def test_completions_of_a_text(chatty: OpenaiAsking):
    tokenizer = chatty.engine.model.tokenizer
    assert tokenizer is not None
    body = {"max_tokens": 4, "seed": 5, "return_token_ids": True, "ignore_eos": True}
    by_text, by_ids = (
        chatty.post(openai.COMPLETIONS, body | {"prompt": prompt}).json()["choices"][0]
        for prompt in ("the cat", tokenizer.encode("the cat", add_special_tokens=False))
    )
    assert by_text["prompt_token_ids"] == by_ids["prompt_token_ids"]
    assert by_text["token_ids"] == by_ids["token_ids"]


def test_completions_without_logprobs(chatty: OpenaiAsking):
    choice = chatty.ask("a", logprobs=None).json()["choices"][0]
    assert choice["logprobs"] is None
    assert len(chatty.ask("a", n=2).json()["choices"]) == 2


def test_what_it_refuses(chatty: OpenaiAsking):
    assert chatty.post(openai.CHAT, CHAT, headers={"Authorization": "Bearer no"}).status_code == 401
    assert chatty.post(openai.CHAT, CHAT | {"model": "other"}).status_code == 404
    assert chatty.post(openai.CHAT, CHAT | {"messages": []}).status_code == 400
    assert chatty.post(openai.CHAT, CHAT | {"stream": True}).status_code == 400
    assert chatty.ask("a", prompt=[5] * 512).status_code == 400
    assert chatty.post("/update_weights", {}).status_code == 404


def test_it_has_no_template_without_a_tokenizer(folders: Folders):
    with server.serving(openai.contract(folders.old)) as serving:
        asking = OpenaiAsking(serving, folders)
        assert "chat template" in asking.post(openai.CHAT, CHAT | {"model": None}).json()["error"]["message"]
        assert asking.draw(prompt=PROMPT).apart(folders, folders.old) < CLOSE
