"""Training over an engine in another process: the same bits, also when the server dies, and weights that are whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from groupwise.cli import main
from groupwise.errors import ConfigError
from groupwise.launch import Given, run_training
from groupwise.weight_sync.folder import MANIFEST, WEIGHTS, read_weights, write_weights
from tests.made_environment import nods


class Served:
    """A `groupwise serve` of the task's model, in a process of its own."""

    def __init__(self, model: Path, *flags: str, port: int = 0, stderr: IO[str] | None = None) -> None:
        self._stderr = stderr
        self._command = [sys.executable, "-m", "groupwise.cli", "serve", str(model), "--model.dtype", "float32", *flags]
        self.start(port)
        line = self.process.stdout.readline() if self.process.stdout else ""
        assert " at http://" in line, line
        self.url = line.rsplit(" ", 1)[1].strip()

    def start(self, port: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*self._command, "--port", str(port), "--model.device", "cpu"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._stderr, text=True, env=environment
        )

    def kill_and_start_again(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self.start(int(self.url.rsplit(":", 1)[1]))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


@pytest.fixture(scope="module")
def served(task: Any) -> Iterator[Served]:
    server = Served(task.model)
    yield server
    server.stop()


def digest_of(run: Path) -> tuple[bytes, str]:
    return (run / "final" / "model.safetensors").read_bytes(), (run / "ledger.jsonl").read_text()


def differences(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["sampling/sampling_logp_difference/max"] for row in rows if "reward" in row]


def over(url: str, **settings: Any) -> dict[str, Any]:
    return {"engine": "http", "urls": [url], **settings}


def test_a_run_over_the_wire_has_the_bits_of_one_in_process(task: Any, served: Served, tmp_path: Path) -> None:
    run_training(task.config(tmp_path / "here"))
    run_training(task.config(tmp_path / "there", rollout=over(served.url)))
    assert digest_of(tmp_path / "there") == digest_of(tmp_path / "here")
    assert differences(tmp_path / "there") == [0.0] * 4
    folders = sorted(folder.name for folder in (tmp_path / "there" / "weights").iterdir())
    assert folders == ["version_000003", "version_000004"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--model.dtype", "bfloat16"), ("--lora.rank", "2")], ids=["bfloat16", "lora"])
def test_it_holds_in_bfloat16_and_with_an_adapter(task: Any, tmp_path: Path, flags: tuple[str, str]) -> None:
    section, key = flags[0].removeprefix("--").split(".")
    settings: dict[str, Any] = {section: {key: int(flags[1]) if flags[1].isdigit() else flags[1]}}
    server = Served(task.model, *flags)
    try:
        run_training(task.config(tmp_path / "here", **settings))
        run_training(task.config(tmp_path / "there", rollout=over(server.url), **settings))
    finally:
        server.stop()
    name = "adapter_model.safetensors" if section == "lora" else "model.safetensors"
    here, there = ((tmp_path / run / "final" / name).read_bytes() for run in ("here", "there"))
    assert here == there
    assert differences(tmp_path / "there") == [0.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replaying_what_this_server_chose_changes_no_bit(task: Any, tmp_path: Path, dtype: str) -> None:
    """Its router is the trainer's: none of its choices is another, in several turns and where layers are computed
    again."""
    model = mixture_of(task, tmp_path / "model")
    file = tmp_path / "nods.py"
    file.write_text(nods())
    server = Served(model, "--model.dtype", dtype)
    stops = {"stop_token_ids": list(range(60, 160)), "max_completion_tokens": 32}
    settings: dict[str, Any] = {
        "model": {"path": str(model), "dtype": dtype, "gradient_checkpointing": True},
        "environment": {"name": f"{file}:make", "max_turns": 3},
        "algorithm": {"router_aux_loss_coef": 0.01, "kl": {"coef": 0.1}},
    }
    try:
        for name, replays in (("replayed", True), ("plain", "auto")):
            rollout = over(server.url, replay_routes=replays, **stops)
            run_training(task.config(tmp_path / name, **settings, rollout=rollout))
    finally:
        server.stop()
    run_training(task.config(tmp_path / "here", **settings, rollout=stops))
    assert digest_of(tmp_path / "replayed") == digest_of(tmp_path / "plain") == digest_of(tmp_path / "here")
    assert differences(tmp_path / "replayed") == [0.0] * 4
    rows = [json.loads(line) for line in (tmp_path / "replayed" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    assert [row["moe/replaced"] for row in steps] == [0.0] * 4
    assert [row["moe/prompt_differs"] for row in steps] == [0.0] * 4
    assert all(row["environment/answers_per_episode"] > 0 for row in steps)
    assert "moe/replaced" not in (tmp_path / "plain" / "metrics.jsonl").read_text()


def mixture_of(task: Any, folder: Path) -> Path:
    """A Qwen3-MoE with the task's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 48}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3MoeConfig(**shape, **sizes, **ends, vocab_size=384, num_experts=8, initializer_range=0.1)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_server_that_is_killed_within_a_step_comes_back_with_the_same_bits(task: Any, tmp_path: Path) -> None:
    server, calls = Served(task.model), 0

    def low(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the second step: some of its groups are sampled, others are not
            server.kill_and_start_again()
        return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

    try:
        rollout = over(server.url, max_concurrent_samples=4, engine_timeout=60.0)
        run_training(task.config(tmp_path / "there", reward=[], rollout=rollout), given=Given(rewards=[low]))
    finally:
        server.stop()
    assert calls == 16
    run_training(task.config(tmp_path / "here", reward=[]), given=Given(rewards=[low]))
    assert digest_of(tmp_path / "there") == digest_of(tmp_path / "here")
    assert differences(tmp_path / "there") == [0.0] * 4


@pytest.mark.slow
def test_what_changed_alone_travels_and_the_bits_are_the_same(task: Any, tmp_path: Path) -> None:
    """Also where the server is killed, and begins with the last whole version."""
    server, calls = Served(task.model, "--model.dtype", "bfloat16"), 0

    def low(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 14:  # in the last step: version 3 is served
            server.kill_and_start_again()
        return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

    model = {"path": str(task.model), "dtype": "bfloat16", "device": "cpu"}
    small = {"model": model, "reward": [], "optim": {"lr": 2e-5}}
    try:
        rollout = over(server.url, weights_by="delta", max_concurrent_samples=4, engine_timeout=60.0)
        run_training(task.config(tmp_path / "there", rollout=rollout, **small), given=Given(rewards=[low]))
    finally:
        server.stop()
    assert calls == 16
    run_training(task.config(tmp_path / "here", **small), given=Given(rewards=[low]))
    assert digest_of(tmp_path / "there") == digest_of(tmp_path / "here")
    assert differences(tmp_path / "there") == [0.0] * 4
    rows = [json.loads(line) for line in (tmp_path / "there" / "metrics.jsonl").read_text().splitlines()]
    sent = [row["sync/bytes"] for row in rows if "reward" in row]
    whole = sum(file.stat().st_size for file in task.model.glob("*.safetensors")) / 2
    assert sent[0] == pytest.approx(whole, rel=0.05)
    assert all(size < whole / 3 for size in sent[1:]), sent


def test_a_server_that_does_not_come_back_ends_the_run(task: Any, tmp_path: Path) -> None:
    server = Served(task.model)

    def kills(completions: list[str], **_: Any) -> list[float]:
        server.process.kill()
        return [0.0] * len(completions)

    config = task.config(tmp_path / "run", reward=[], rollout=over(server.url, engine_timeout=1.0))
    with pytest.raises(Exception, match=f"{server.url} (does not answer|was lost)"):
        run_training(config, given=Given(rewards=[kills]))


def ask(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/inference/v1/generate", json={"token_ids": [5, 6, 7], **body}, timeout=30)


def drawn(url: str, **body: Any) -> dict[str, Any]:
    (choice,) = ask(url, **body).raise_for_status().json()["choices"]
    return choice


def version_of(url: str) -> int:
    return httpx.get(f"{url}/health").json()["version"]


@pytest.fixture
def own(task: Any) -> Iterator[Served]:
    server = Served(task.model)
    yield server
    server.stop()


@pytest.mark.parametrize("damage", ["cut", "bit", "manifest", "missing", "shape", "names", "version"])
def test_torn_weights_are_refused_and_the_old_ones_go_on(
    task: Any, served: Served, tmp_path: Path, damage: str
) -> None:
    from groupwise.config import ModelConfig
    from groupwise.model.loading import load_model

    model = load_model(ModelConfig.model_validate({"path": str(task.model), "dtype": "float32", "device": "cpu"})).model
    tensors = {name: weight.detach() + 0.01 for name, weight in model.named_parameters()}
    version = version_of(served.url)
    if damage == "shape":
        tensors = {name: torch.cat([t, t]) for name, t in tensors.items()}
    if damage == "names":
        tensors = dict(list(tensors.items())[1:])
    folder = write_weights(tmp_path / "version", tensors.items(), version=version + (damage == "version"))
    weights = folder / WEIGHTS
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(content[:-100])
    if damage == "bit":
        content[-1] ^= 1
        weights.write_bytes(content)
    if damage == "manifest":
        (folder / MANIFEST).write_text("{")
    if damage == "missing":
        weights.unlink()
    before = drawn(served.url, sampling_params={"max_tokens": 8, "seed": 3}, request_id="same")
    answer = httpx.post(f"{served.url}/update_weights", json={"version": version, "path": str(folder)}, timeout=30)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(f"version {version} stays: {folder}")
    assert version_of(served.url) == version
    assert drawn(served.url, sampling_params={"max_tokens": 8, "seed": 3}, request_id="same") == before


def test_a_folder_of_weights_is_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.ones(2, dtype=torch.bfloat16)}
    folder = write_weights(tmp_path / "v", tensors.items(), version=4)
    found = read_weights(folder, version=4)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [place.name for place in tmp_path.iterdir()] == ["v"]


def test_the_wire_is_that_of_other_clients(served: Served) -> None:
    params = {"temperature": 1, "top_k": -1, "max_tokens": 6, "stop_token_ids": [2], "logprobs": 1, "seed": 7}
    answer = ask(served.url, request_id="r1", model="any", cache_salt="v0", sampling_params=params).json()
    assert answer["request_id"] == "r1"
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] in ("stop", "length")
    content = choice["logprobs"]["content"]
    assert [each["token_id"] for each in content] == choice["token_ids"]
    assert [each["token"] for each in content] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(-9999 < each["logprob"] <= 0 for each in content)
    assert choice["weight_versions"] == [{"version": str(version_of(served.url)), "start": 0, "end": len(content)}]
    models = httpx.get(f"{served.url}/v1/models").json()
    assert models["data"][0]["max_model_len"] > 0
    other = {**params, "seed": 8}
    assert drawn(served.url, request_id="r1", sampling_params=params) == choice
    assert drawn(served.url, request_id="r1", sampling_params=other) != choice


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"sampling_params": {"temprature": 1}}, "did you mean 'temperature'?"),
        ({"sampling_parms": {}}, "did you mean 'sampling_params'?"),
        ({"sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens"),
        ({"sampling_params": {"n": 2}}, "sampling_params.n"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [10**9]}, "the model has embeddings for"),
    ],
    ids=str,
)
def test_what_the_server_cannot_do_it_says(served: Served, body: dict[str, Any], said: str) -> None:
    answer = ask(served.url, **body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_samples_end_when_they_are_aborted_and_when_their_client_goes(own: Served) -> None:
    long = {"max_tokens": 100_000}
    found: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: found.append(drawn(own.url, request_id="a/0/0", sampling_params=long)))
    asking.start()
    time.sleep(0.5)
    httpx.post(f"{own.url}/abort_requests", json={}).raise_for_status()
    asking.join(20)
    assert found[0]["finish_reason"] in ("abort", "stop")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{own.url}/inference/v1/generate",
            json={"token_ids": [5], "sampling_params": {**long, "min_tokens": 90_000}},
            timeout=0.5,
        )
    started = time.monotonic()
    assert len(drawn(own.url, sampling_params={"max_tokens": 2})["token_ids"]) <= 2
    assert own.stop() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert time.monotonic() - started < 15


def test_a_key_is_asked_for(task: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GROUPWISE_API_KEY", "secret")
    server = Served(task.model)
    try:
        assert ask(server.url).status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        run_training(task.config(tmp_path / "run", rollout=over(server.url), train={"steps": 1}))
        monkeypatch.delenv("GROUPWISE_API_KEY")
        with pytest.raises(ConfigError, match="401"):
            run_training(task.config(tmp_path / "other", rollout=over(server.url), train={"steps": 1}))
    finally:
        server.stop()


def test_another_model_is_refused_with_both(task: Any, served: Served, tmp_path: Path) -> None:
    config = task.config(tmp_path / "run", rollout=over(served.url), lora={"rank": 2})
    with pytest.raises(ConfigError, match=r"serves another model: weights: got .* expected .*with the recipe of this"):
        run_training(config)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rollout.engine", "http"], "needs rollout.urls"),
        (["--rollout.urls", "http://127.0.0.1:1"], "set rollout.engine to 'http'"),
        (["--rollout.engine", "http", "--rollout.urls", "here"], "no address of a server"),
        (["--rollout.engine", "htp"], "did you mean 'http'?"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_loaded(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["train", *task.flags(tmp_path / "run", *flags)]) == 2
    assert said in capsys.readouterr().err


def test_a_server_that_is_not_there_is_said(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.engines.external._START_SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"no engine answers there.*docs/engines.md"):
        run_training(task.config(tmp_path / "run", rollout=over("http://127.0.0.1:9")))


def test_commands_with_a_model_of_their_own_refuse_an_engine_elsewhere(
    task: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rollout.engine", "http", "--rollout.urls", "http://127.0.0.1:9"]
    assert main(["generate", str(task.model), "--prompt", "a", "--raw", *flags[:2]]) == 2
    assert "rollout.url" in capsys.readouterr().err
