from __future__ import annotations

from pathlib import Path

import pytest

from groupwise.config import Config
from groupwise.config.checks import check_model_path, check_supervised, check_trainable, sampling_remark
from groupwise.config.loading import config_json, load_config
from groupwise.errors import ConfigError


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "test.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return {"model.path": "model", "data.train": "train.jsonl", "reward.0.name": "gsm8k"}


def config(values: dict[str, object]) -> Config:
    return load_config(None, values).config


def refusal(values: dict[str, object], **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        check_trainable(config(values), **kwargs)
    return str(caught.value)


def test_a_good_config_passes(good: dict[str, object]):
    check_trainable(config(good))
    check_trainable(config({**good, "model.path": "Qwen/Qwen3-0.6B", "data.eval": "test.jsonl", "eval.every": 5}))


def test_an_empty_config_lists_all_that_is_missing():
    text = refusal({})
    for name in ("model.path", "data.train", "reward"):
        assert f"{name}" in text
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ({"rollout.group_size": 1}, "expected at least 2"),
        ({"rollout.group_size": 0}, "expected at least 2"),
        ({"rollout.temperature": 0}, "greedy"),
        ({"data.train": "train.json"}, "did you mean 'train.jsonl'?"),
        ({"data.train": "no/such/place.jsonl"}, "no folder 'no/such'"),
        ({"data.eval": "tset.jsonl"}, "did you mean 'test.jsonl'?"),
        ({"eval.every": 10}, "data.eval is empty"),
        ({"model.path": "./modell"}, "no such folder"),
        ({"model.path": "/nowhere/model"}, "no such folder"),
        ({"model.path": "a/b/c"}, "not a Hugging Face Hub name"),
        ({"model.path": "my model"}, "not a Hugging Face Hub name"),
        ({"model.path": "train.jsonl"}, "got a file"),
        ({"algorithm.correction.name": "truncate"}, "set algorithm.old_logprobs to 'policy'"),
        (
            {"algorithm.correction.name": "decoupled", "algorithm.old_logprobs": "sampler"},
            "correction.name = 'decoupled'",
        ),
        ({"algorithm.correction.veto": 0.1}, "algorithm.correction.veto = 0.1"),
        (
            {"algorithm.correction.name": "mask", "algorithm.old_logprobs": "policy", "rollout.top_p": 0.9},
            "does not go with rollout.top_p = 0.9",
        ),
        (
            {
                "algorithm.correction.veto": 0.1,
                "algorithm.old_logprobs": "policy",
                "rollout.repetition_penalty": 1.1,
                "rollout.min_completion_tokens": 3,
            },
            "rollout.repetition_penalty = 1.1 and rollout.min_completion_tokens = 3",
        ),
        ({"algorithm.correction.off_policy_mask": 0.5}, "no drift to mask"),
        ({"algorithm.name": "pass_k", "algorithm.advantage.k": 9}, "lower k or raise group_size"),
        ({"rollout.dynamic_sampling_cap": 1}, "no prompt could be replaced"),
        ({"rollout.dynamic_sampling_cap": 3, "algorithm.name": "reinforce_pp"}, "use 'reinforce_pp_baseline'"),
        (
            {"reward.0.name": "overlong", "reward.0.args": {"max_tokens": 900, "buffer_tokens": 300}},
            "starts beyond 600 tokens",
        ),
    ],
)
def test_what_is_refused(good: dict[str, object], override: dict[str, object], part: str):
    assert part in refusal({**good, **override})


def test_supervised_training_needs_neither_group_nor_reward(good: dict[str, object]):
    plain = {name: value for name, value in good.items() if not name.startswith("reward")}
    check_supervised(config({**plain, "rollout.group_size": 1, "rollout.temperature": 0}))
    with pytest.raises(ConfigError, match=r"data\.train"):
        check_supervised(config({**plain, "data.train": "nothing"}))


def test_python_objects_stand_in_for_files():
    check_trainable(Config(), provided={"model.path", "data.train", "reward"})  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="reward"):
        check_trainable(Config(), provided={"model.path", "data.train"})  # pyright: ignore[reportCallIssue]


def test_a_folder_without_a_model_says_what_is_in_it(tmp_path: Path):
    (tmp_path / "weights.gguf").touch()
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError, match=r"sub/, weights\.gguf"):
        check_model_path(str(tmp_path))
    empty = tmp_path / "sub"
    with pytest.raises(ConfigError, match="nothing"):
        check_model_path(str(empty))


def test_a_run_directory_leads_to_its_final_model(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(config_json(Config()))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="run directory without a final model and without a checkpoint"):
        check_model_path(str(tmp_path))
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    check_model_path(str(tmp_path))
    check_model_path(str(tmp_path / "final"))


def test_a_tilde_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    with pytest.raises(ConfigError, match="not expanded"):
        check_model_path("~/m")


@pytest.mark.parametrize(
    "override",
    [
        {"algorithm.correction.name": "truncate", "algorithm.old_logprobs": "policy"},
        {"algorithm.correction.veto": 0.1, "algorithm.old_logprobs": "policy", "rollout.temperature": 0.7},
        {"algorithm.correction.off_policy_mask": 0.5, "optim.steps_per_batch": 2, "rollout.top_p": 0.9},
        {"rollout.dynamic_sampling_cap": 2, "algorithm.name": "dapo"},
        {"reward.0.name": "overlong", "reward.0.args": {"max_tokens": 900, "buffer_tokens": 400}},
    ],
    ids=str,
)
def test_what_acts_is_accepted(good: dict[str, object], override: dict[str, object]):
    check_trainable(config({**good, **override}))


def test_old_logprobs_are_the_samplers_where_these_are_exact():
    assert not config({}).recomputes_logprobs(exact=True)
    assert config({}).recomputes_logprobs(exact=False)
    assert config({"algorithm.old_logprobs": "policy"}).recomputes_logprobs(exact=True)
    assert not config({"algorithm.old_logprobs": "sampler"}).recomputes_logprobs(exact=False)


def test_filters_are_remarked_on():
    assert sampling_remark(config({"rollout.temperature": 0.7})) is None
    remark = sampling_remark(config({"rollout.top_k": 20, "rollout.min_p": 0.1}))
    assert remark is not None
    assert remark.startswith("rollout.top_k = 20 and rollout.min_p = 0.1: ")
