"""Secrets are in no file that a run writes, and a run that had one goes on when it is given again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Config, RewardConfig
from groupwise.config.loading import config_json, load_config
from groupwise.config.secrets import REDACTED, public_values
from groupwise.errors import ConfigError
from groupwise.resume import Identity
from groupwise.rewards.loading import load_reward
from groupwise.rundir import setting_changes

HF, SK = "hf_" + "a1B2" * 9, "sk-proj-" + "Zz9" * 8


def config(args: dict[str, Any], **sections: Any) -> Config:
    return Config.model_validate({"reward": [{"name": "judge.py:score", "args": args}], **sections})


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        ({"api_key": "abc"}, {"api_key": REDACTED}),
        ({"apiKey": "abc", "API-KEY": "x"}, {"apiKey": REDACTED, "API-KEY": REDACTED}),
        ({"headers": {"Authorization": "Bearer x"}}, {"headers": {"Authorization": REDACTED}}),
        ({"access_token": ["a", {"b": "c"}]}, {"access_token": [REDACTED, {"b": REDACTED}]}),
        ({"db_password": "x", "clientSecret": "y"}, {"db_password": REDACTED, "clientSecret": REDACTED}),
        ({"max_tokens": 12, "token": ""}, {"max_tokens": 12, "token": ""}),
        ({"monkey": "banana", "keyboard": "qwerty"}, {"monkey": "banana", "keyboard": "qwerty"}),
        ({"api_key": "env:JUDGE_KEY"}, {"api_key": "env:JUDGE_KEY"}),
        ({"url": "https://me:hunter2@judge.example/v1"}, {"url": f"https://{REDACTED}@judge.example/v1"}),
        ({"note": f"use {HF} or {SK}"}, {"note": f"use {REDACTED} or {REDACTED}"}),
        ({"url": "https://judge.example:8080/v1"}, {"url": "https://judge.example:8080/v1"}),
    ],
)
def test_what_is_a_secret(args: dict[str, Any], kept: dict[str, Any]) -> None:
    made = config(args)
    assert public_values(made)["reward"][0]["args"] == kept
    assert json.loads(config_json(made))["reward"][0]["args"] == kept
    assert made.reward[0].args == args


def test_settings_whose_names_only_sound_like_it_stay() -> None:
    made = config({}, data={"max_prompt_tokens": 77}, rollout={"stop_token_ids": [3]}, model={"path": "a/tokenizer"})
    assert public_values(made) == made.model_dump(mode="json")


def test_a_secret_in_any_setting_is_known_by_its_looks() -> None:
    made = config({}, tracking={"project": HF}, data={"chat_template_kwargs": {"secret": "x"}})
    assert HF not in config_json(made)
    assert public_values(made)["data"]["chat_template_kwargs"] == {"secret": REDACTED}


def test_a_written_config_asks_for_the_secret_again(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(config_json(config({"api_key": "abc", "model": "m"})))
    with pytest.raises(ConfigError, match=r"reward\.0\.args .*a secret was here.*give it again"):
        load_config(file)
    again = load_config(file, ["--reward.0.args.api_key", "another"]).config
    assert again.reward[0].args == {"api_key": "another", "model": "m"}


def test_a_resumed_run_may_have_another_secret_and_no_other_argument() -> None:
    before = Identity.of(config({"api_key": "abc", "model": "m"}), {}).settings
    for same in ("rotated", "env:KEY", "(redacted)"):
        assert Identity.of(config({"api_key": same, "model": "m"}), {}).settings == before
    now = Identity.of(config({"api_key": "rotated", "model": "other"}), {}).settings
    [(name, shown)] = setting_changes(before, now).items()
    assert name == "reward.0.args"
    assert "rotated" not in str(shown)


def test_a_reference_is_looked_up_when_the_reward_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def score(completions, api_key, headers, **columns):\n    return [1.0 for _ in completions]\n")
    args = {"api_key": "env:JUDGE_KEY", "headers": {"x": ["env:JUDGE_KEY", "plain"]}}
    monkeypatch.setenv("JUDGE_KEY", "abc")
    loaded = load_reward(RewardConfig(name=f"{file}:score", args=args))  # type: ignore[call-arg]
    assert loaded.args == {"api_key": "abc", "headers": {"x": ["abc", "plain"]}}
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="no environment variable 'JUDGE_KEY' is set"):
        load_reward(RewardConfig(name=f"{file}:score", args=args))  # type: ignore[call-arg]
