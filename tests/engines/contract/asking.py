"""The four servers asked in one way, so that one test shows a trap on each; bodies are what an adapter should send."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file

from tests.engines.contract import buckets, lmdeploy, openai, server, sglang, vllm
from tests.engines.contract.tiny import PROMPT, Folders


@dataclass(frozen=True)
class Drawn:
    """An answer: tokens, log-probs `[T]`, why it ended, and the whole reply."""

    ids: list[int]
    logprobs: list[Any]
    finish: str
    reply: Any

    def apart(self, folders: Folders, folder: Path, temperature: float = 1.0) -> float:
        """The largest difference to what Hugging Face says of these tokens after `PROMPT`."""
        return apart(self.logprobs, folders.logprobs(folder, PROMPT + self.ids, temperature)[len(PROMPT) - 1 :])


def apart(left: Sequence[float], right: Sequence[float]) -> float:
    assert len(left) == len(right)
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


class Asking:
    """One server; what is the same for all."""

    token_path = ""
    updates = True
    """Whether it takes weights, and scores prompts."""

    def __init__(self, serving: server.Serving, folders: Folders) -> None:
        self.serving, self.folders = serving, folders
        self.engine = serving.contract.engine
        self.http = httpx.Client(base_url=serving.url, timeout=5)

    def traps(self, *named: str) -> None:
        self.serving.set_traps(*named)

    def post(self, path: str, body: Any = None, **arguments: Any) -> httpx.Response:
        return self.http.post(path, json=body, **arguments)

    def clean(self) -> None:
        """As it was when it started."""
        self.traps()
        engine = self.engine
        engine.paused, engine.dead, engine.asleep, engine.version = None, False, set(), "default"
        engine.abort(lambda rid: True)
        deadline = time.monotonic() + 5
        while engine.running:
            assert time.monotonic() < deadline, engine.running
            time.sleep(0.002)
        engine.load(str(self.folders.old))
        for name in engine.model.adapters:
            engine.model.remove_adapter(name)
        engine.flush(running=True)

    def draw(self, rid: str = "a" * 32, *, most: int = 12, prompt: list[int] = PROMPT, **more: Any) -> Drawn:
        """One answer that nothing but `most` ends, at temperature 1 unless said otherwise."""
        reply = self.ask(rid, most=most, prompt=prompt, **more)
        assert reply.status_code == 200, reply.text
        return self.read(reply.json())

    def ask(self, rid: str, *, most: int = 12, prompt: list[int] = PROMPT, **more: Any) -> httpx.Response:
        raise NotImplementedError

    def read(self, reply: Any) -> Drawn:
        raise NotImplementedError

    def scores(self, ids: list[int] = PROMPT) -> list[float]:
        raise NotImplementedError

    def load(self, folder: Path) -> httpx.Response:
        """The call that loads, as soon as nothing is in the way."""
        raise NotImplementedError

    def flush(self) -> bool:
        raise NotImplementedError


class VllmAsking(Asking):
    token_path = vllm.GENERATE

    def ask(self, rid: str, *, most: int = 12, prompt: list[int] = PROMPT, **more: Any) -> httpx.Response:
        top = {key: more.pop(key) for key in ("model", "cache_salt") if key in more}
        sampling = {"max_tokens": most, "seed": 5, "logprobs": 0, "ignore_eos": True, "temperature": 1} | more
        return self.post(vllm.GENERATE, {"request_id": rid, "token_ids": prompt, "sampling_params": sampling} | top)

    def read(self, reply: Any) -> Drawn:
        choice = reply["choices"][0]
        logprobs = [each["logprob"] for each in choice["logprobs"]["content"]]
        return Drawn(choice["token_ids"], logprobs, choice["finish_reason"], reply)

    def scores(self, ids: list[int] = PROMPT, **more: Any) -> list[float]:
        known = self.ask("s", most=1, prompt=ids, prompt_logprobs=0, **more).json()["prompt_logprobs"]
        assert known[0] is None
        return [each[str(token)]["logprob"] for each, token in zip(known[1:], ids[1:], strict=True)]

    def load(self, folder: Path) -> httpx.Response:
        return self.post("/collective_rpc", {"method": "groupwise_load", "kwargs": {"path": str(folder)}})

    def flush(self) -> bool:
        return self.post("/reset_prefix_cache").json()["success"]


class SglangAsking(Asking):
    token_path = "/generate"

    def ask(self, rid: str, *, most: int = 12, prompt: list[int] = PROMPT, **more: Any) -> httpx.Response:
        top = {key: more.pop(key) for key in ("lora_path", "cache_salt", "logprob_start_len") if key in more}
        sampling = {"max_new_tokens": most, "sampling_seed": 5, "ignore_eos": True, "temperature": 1} | more
        return self.post(
            "/generate", {"rid": rid, "input_ids": prompt, "sampling_params": sampling, "return_logprob": True} | top
        )

    def read(self, reply: Any) -> Drawn:
        meta = reply["meta_info"]
        logprobs = [each[0] for each in meta["output_token_logprobs"]]
        return Drawn(reply["output_ids"], logprobs, meta["finish_reason"]["type"], reply)

    def scores(self, ids: list[int] = PROMPT) -> list[float]:
        meta = self.ask("s" * 32, most=0, prompt=ids, logprob_start_len=0).json()["meta_info"]
        known = meta["input_token_logprobs"]
        assert known[0] == [None, ids[0], None]
        assert [each[1] for each in known] == ids
        return [each[0] for each in known[1:]]

    def load(self, folder: Path, **more: Any) -> httpx.Response:
        return self.post("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": False} | more)

    def flush(self) -> bool:
        return self.post("/flush_cache").status_code == 200


class LmdeployAsking(Asking):
    """Draws by chat, which has the seed; without prefix caching, as an adapter ought to start it."""

    token_path = lmdeploy.CHAT

    def ask(self, rid: str, *, most: int = 12, prompt: list[int] = PROMPT, **more: Any) -> httpx.Response:
        body = {
            "model": self.http.get("/v1/models").json()["data"][0]["id"],
            "messages": [],
            "input_ids": prompt,
            "max_completion_tokens": most,
            "seed": 5,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "session_id": int.from_bytes(rid.encode()[-6:], "big"),
            "return_token_ids": True,
            "return_logprob": True,
            "include_stop_str_in_output": True,
            "ignore_eos": True,
        }
        return self.post(lmdeploy.CHAT, body | more)

    def read(self, reply: Any) -> Drawn:
        choice = reply["choices"][0]
        logprobs = [each[0] for each in choice["output_token_logprobs"]]
        return Drawn(choice["output_ids"], logprobs, choice["finish_reason"], reply)

    def generate(self, **more: Any) -> httpx.Response:
        body = {"input_ids": PROMPT, "return_logprob": True, "max_tokens": 12, "temperature": 1, "top_k": 0}
        return self.post("/generate", body | more)

    def scores(self, ids: list[int] = PROMPT) -> list[float]:
        meta = self.generate(input_ids=ids, max_tokens=0, logprob_start_len=0).json()["meta_info"]
        assert [each[1] for each in meta["input_token_logprobs"]] == ids[1:]
        return [each[0] for each in meta["input_token_logprobs"]]

    def load(self, folder: Path, *, finished: bool = True) -> httpx.Response:
        return self.send(load_file(folder / "model.safetensors"), finished=finished)

    def send(self, tensors: Mapping[str, Any], *, finished: bool) -> httpx.Response:
        body = {"serialized_named_tensors": buckets.bucket(tensors), "load_format": "flattened_bucket"}
        return self.post("/update_weights", body | {"finished": finished})

    def flush(self) -> bool:
        self.post("/sleep?level=1")
        return self.post("/wakeup").status_code == 200


class OpenaiAsking(Asking):
    token_path = openai.COMPLETIONS
    updates = False

    def ask(self, rid: str, *, most: int = 12, prompt: list[int] = PROMPT, **more: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": most, "seed": 5, "logprobs": 0, "ignore_eos": True, "temperature": 1}
        return self.post(
            openai.COMPLETIONS, body | {"return_token_ids": True, "return_tokens_as_token_ids": True} | more
        )

    def read(self, reply: Any) -> Drawn:
        choice = reply["choices"][0]
        return Drawn(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"], reply)


ASKING: dict[str, tuple[Any, type[Asking]]] = {
    "vllm": (vllm, VllmAsking),
    "sglang": (sglang, SglangAsking),
    "lmdeploy": (lmdeploy, LmdeployAsking),
    "openai": (openai, OpenaiAsking),
}
