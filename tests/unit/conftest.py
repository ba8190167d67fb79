"""A tiny model with the flags of a run; tiny mixtures of experts; and a server that speaks the Hub's API: repositories,
LFS and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from groupwise.cli import main

TOKEN = "hf_" + "x" * 20
ROWS = '{"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}\n{"prompt": "3+3?", "answer": "6"}\n'


class Hub(BaseHTTPRequestHandler):
    """Keeps what it is sent; files ending in .safetensors go the way of large files."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server: Any = self.server
        server.seen.append((self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            self._answer({"url": f"{server.address}/{server.repo}"})
        elif self.path.endswith("/preupload/main"):
            files = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for item in json.loads(body)["files"]
            ]
            self._answer({"files": files, "commitOid": None})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": item["oid"],
                    "size": item["size"],
                    "actions": {"upload": {"href": f"{server.address}/lfs/{item['oid']}"}},
                }
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                if entry["key"] == "lfsFile":
                    server.files[entry["value"]["path"]] = server.blobs[entry["value"]["oid"]]
            url = f"{server.address}/{server.repo}/commit/abc"
            self._answer({"success": True, "commitOid": "a" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self) -> None:
        server: Any = self.server
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        server.blobs[oid] = content
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "Repository not found"}, 404)

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repo, server.token = "someone/sums", TOKEN
    server.seen, server.created, server.files, server.blobs = [], [], {}, {}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets torch's thread count until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


_SIXTEEN = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 36, "intermediate_size": 52}
MIXTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**_SIXTEEN, "head_dim": 16, "norm_topk_prob": True}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 8, "intermediate_size": 52}),
    "glm4_moe": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        {**_SIXTEEN, "n_routed_experts": 16, "head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {**_SIXTEEN, "intermediate_size": 36}),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**_SIXTEEN, "shared_expert_intermediate_size": 44}),
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM, {"num_local_experts": 8, "intermediate_size": 36}),
}
"""Mixtures of experts by their model_type; those of GLM and Qwen2 have a shared expert, GLM's a dense first layer."""


@pytest.fixture(scope="session")
def make_mixture() -> Callable[..., PreTrainedModel]:
    """`make_mixture("mixtral", dtype=…, seed=…, **settings)`: three layers, weights wide enough that routers choose."""

    def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> PreTrainedModel:
        config_class, model_class, own = MIXTURES[name]
        shape = {
            "vocab_size": 283,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.12,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config_class(**(shape | own | settings)))
        for name, weight in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        return model.to(dtype)

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts.jsonl").write_text(ROWS)
    flags = ["--tokenizer-from", str(folder / "texts.jsonl"), "--size", "0.1m", "--vocab-size", "280"]
    assert main(["model", "tiny", "--out", str(folder / "model"), *flags]) == 0
    return folder / "model"


@pytest.fixture
def training(tiny: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that passes every check."""
    (tmp_path / "train.jsonl").write_text(ROWS)
    return ["--model", str(tiny), "--data", str(tmp_path / "train.jsonl"), "--reward", "gsm8k"]
