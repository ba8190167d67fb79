"""Names of earlier versions: each still acts wherever a setting is given, and is told what it is today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from groupwise.config import AlgorithmConfig, Config
from groupwise.config.keys import annotation_of, describe_keys
from groupwise.config.loading import load_config, settings, settings_of_today
from groupwise.config.renamed import RENAMED, of_today
from groupwise.errors import ConfigError
from groupwise.resume import Identity
from groupwise.rundir import read_run_config

BESIDE: dict[str, dict[str, Any]] = {
    "algorithm.pass_k": {"algorithm.name": "pass_k"},
    "algorithm.pass_k_threshold": {"algorithm.name": "pass_k"},
    "algorithm.sapo_temperature_positive": {"algorithm.name": "sapo"},
    "algorithm.sapo_temperature_negative": {"algorithm.name": "sapo"},
    "algorithm.kl_in": {"algorithm.kl.coef": 0.1},
    "algorithm.reference_sync_every": {"algorithm.kl.coef": 0.1},
    "algorithm.reference_mixup": {"algorithm.kl.coef": 0.1, "algorithm.reference.sync_every": 2},
    "algorithm.entropy_coef_step": {"algorithm.entropy.target": 1.0},
    "algorithm.entropy_coef_min": {"algorithm.entropy.target": 1.0, "algorithm.entropy.coef": 0.9},
    "algorithm.entropy_coef_max": {"algorithm.entropy.target": 1.0},
    "algorithm.correction_level": {"algorithm.correction.name": "mask"},
    "algorithm.correction_low": {"algorithm.correction.name": "mask"},
    "algorithm.correction_high": {"algorithm.correction.name": "mask"},
}
VALUES: dict[str, Any] = {
    "algorithm.advantage": "rloo",
    "algorithm.loss": "gspo",
    "algorithm.correction": "truncate",
    "algorithm.scale": "batch",
    "algorithm.kl_in": "reward",
    "algorithm.kl_estimator": "k2",
    "algorithm.pass_k": 3,
    "algorithm.reference_sync_every": 7,
    "algorithm.dual_clip": 3.5,
    "algorithm.correction_level": "geometric",
    "algorithm.correction_high": 6.5,
}
FLAT_OF_GSPO: dict[str, Any] = {
    "name": "gspo",
    "advantage": "grpo",
    "scale": "group",
    "pass_k": None,
    "pass_k_threshold": None,
    "loss": "gspo",
    "normaliser": "sequence",
    "clip_low": 3e-4,
    "clip_high": 4e-4,
    "dual_clip": None,
    "sapo_temperature_positive": None,
    "sapo_temperature_negative": None,
    "kl_coef": 0.05,
    "kl_in": "reward",
    "kl_estimator": "k1",
    "reference_sync_every": 0,
    "reference_mixup": None,
    "entropy_coef": 0.0,
    "entropy_target": None,
    "entropy_coef_step": None,
    "entropy_coef_min": None,
    "entropy_coef_max": None,
    "top_entropy_fraction": 1.0,
    "router_aux_loss_coef": 0.0,
    "overlong": "keep",
    "old_logprobs": "policy",
    "correction": "mask",
    "correction_level": "sequence",
    "correction_low": 0.5,
    "correction_high": 5.0,
    "correction_veto": None,
    "off_policy_mask": None,
}
"""What a resolved config.json of an earlier version holds: all its keys."""


OF_ALGORITHM = [old for old in RENAMED if old.startswith("algorithm.")]


def beside(old: str, value: Any) -> dict[str, Any]:
    return {**BESIDE.get(old, {}), old: value}


@pytest.mark.parametrize("old", OF_ALGORITHM)
def test_each_acts_on_the_command_line_and_is_told_once(old: str, caplog: pytest.LogCaptureFixture) -> None:
    value = VALUES.get(old, 0.5)
    loaded = load_config(None, [f"--{name}={text}" for name, text in beside(old, value).items()])
    assert settings(loaded.config)[RENAMED[old]] == value != settings(Config()).get(RENAMED[old])  # pyright: ignore[reportCallIssue]
    assert loaded.origins[RENAMED[old]] == "command line"
    assert [record.getMessage() for record in caplog.records] == [
        f"command line: {old} is now {RENAMED[old]}; the earlier name still acts"
    ]
    assert annotation_of(old) is not None


@pytest.mark.parametrize("old", OF_ALGORITHM)
def test_each_acts_in_python_and_in_a_file(old: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value, key = VALUES.get(old, 0.5), old.removeprefix("algorithm.")
    around = {f"algorithm.{name}": other for name, other in _flat(BESIDE.get(old, {}))}
    file = tmp_path / "r.toml"
    file.write_text(
        "[algorithm]\n" + "".join(f"{k[10:]} = {json.dumps(v)}\n" for k, v in {**around, old: value}.items())
    )
    loaded = load_config(file)
    assert settings(loaded.config)[RENAMED[old]] == value
    assert loaded.origins[RENAMED[old]] == str(file)
    assert [f"{file}: {old} is now {RENAMED[old]}" in record.getMessage() for record in caplog.records] == [True]
    nested = of_today({"algorithm": {}}).values["algorithm"]
    for name, other in _flat(BESIDE.get(old, {})):
        part, _, inside = name.partition(".")
        nested |= {part: {**nested.get(part, {}), inside: other}} if inside else {part: other}
    assert AlgorithmConfig.model_validate({**nested, key: value}) == loaded.config.algorithm


def _flat(values: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name.removeprefix("algorithm."), value) for name, value in values.items()]


def test_they_lead_to_names_that_exist_and_are_none_themselves() -> None:
    names = {key.name for key in describe_keys()}
    assert set(RENAMED.values()) <= names
    assert not RENAMED.keys() & names
    assert len(FLAT_OF_GSPO) == 32
    assert {f"algorithm.{key}" for key in FLAT_OF_GSPO} == {
        *OF_ALGORITHM,
        *(name for name in names if name.startswith("algorithm.") and name.count(".") == 1),
    }


def test_both_names_together_are_refused_by_both_names(tmp_path: Path) -> None:
    sentence = "it is algorithm.kl.coef today, and that is given too"
    with pytest.raises(ConfigError, match=rf"command line: algorithm\.kl_coef: {sentence}"):
        load_config(None, ["--algorithm.kl_coef", "0.1", "--algorithm.kl.coef", "0.2"])
    with pytest.raises(ConfigError, match=r"algorithm\.loss: it is algorithm\.loss\.name today"):
        load_config(None, ["--algorithm.loss", "gspo", "--algorithm.loss.name", "sapo"])
    file = tmp_path / "r.toml"
    file.write_text("[algorithm]\nkl_coef = 0.1\nkl.coef = 0.1\n")
    with pytest.raises(ConfigError, match=rf"algorithm\.kl_coef \({file}\): {sentence}"):
        load_config(file)
    with pytest.raises(ValidationError, match=f"kl_coef: {sentence}"):
        AlgorithmConfig.model_validate({"kl_coef": 0.1, "kl": {"coef": 0.1}})


def test_a_later_place_wins_by_whichever_name(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[algorithm]\nkl_coef = 0.1\nloss = 'gspo'\nclip_low = 0.3\n")
    assert load_config(file, ["--algorithm.kl.coef", "0.2"]).config.algorithm.kl.coef == 0.2
    file.write_text("[algorithm.loss]\nname = 'gspo'\nclip_low = 0.3\n")
    loaded = load_config(file, ["--algorithm.loss=cispo", "--algorithm.clip_high=2"])
    assert loaded.config.algorithm.loss.model_dump() == {"name": "cispo", "clip_low": 0.3, "clip_high": 2.0}
    assert loaded.origins["algorithm.loss.clip_low"] == str(file)


def test_files_are_laid_over_each_other_key_by_key_within_a_part(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("[algorithm.loss]\nclip_low = 0.1\nclip_high = 0.3\n[data.chat_template_kwargs]\na = 1\n")
    second.write_text("[algorithm]\nclip_high = 0.4\n[data.chat_template_kwargs]\nb = 2\n")
    loaded = load_config([first, second])
    assert loaded.config.algorithm.loss.model_dump() == {
        "name": "ppo_clip",
        "clip_low": 0.1,
        "clip_high": 0.4,
        "dual_clip": None,
    }
    assert loaded.origins["algorithm.loss.clip_low"] == str(first)
    assert loaded.origins["algorithm.loss.clip_high"] == str(second)
    assert loaded.config.data.chat_template_kwargs == {"b": 2}  # a table of free keys is one setting


def test_a_run_of_an_earlier_version_is_read_without_a_word_and_is_the_same_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {**Config().model_dump(mode="json"), "algorithm": FLAT_OF_GSPO}  # pyright: ignore[reportCallIssue]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_run_config(tmp_path)
    assert load_config(tmp_path / "config.json").config == config
    assert not caplog.records
    today = settings(config)
    algorithm = {name[10:]: value for name, value in today.items() if name.startswith("algorithm.")}
    assert (algorithm["loss.name"], algorithm["kl.coef"], algorithm["kl.place"]) == ("gspo", 0.05, "reward")
    assert (algorithm["correction.level"], algorithm["correction.high"]) == ("sequence", 5.0)
    flat = {f"algorithm.{key}": value for key, value in FLAT_OF_GSPO.items()}
    saved = {name: value for name, value in today.items() if not name.startswith("algorithm.")} | flat
    assert settings_of_today(saved) == today
    assert settings_of_today({**saved, "algorithm.kl_coef": 0.1}) == {**today, "algorithm.kl.coef": 0.1}
    assert settings_of_today(today) == today
    checkpoint = {"settings": saved, "facts": {}, "files": {}}
    assert Identity.of(config, {}).changes_since(checkpoint, tmp_path) == []
    checkpoint = {**checkpoint, "settings": {**saved, "algorithm.clip_high": 0.5}}
    assert [str(change) for change in Identity.of(config, {}).changes_since(checkpoint, tmp_path)] == [
        "algorithm.loss.clip_high: was 0.5, now 0.0004"
    ]
    older = {name: value for name, value in saved.items() if not name.startswith("environment.")}
    assert Identity.of(config, {}).changes_since({**checkpoint, "settings": older}, tmp_path) == []
    turned = config.model_copy(update={"environment": config.environment.model_copy(update={"max_turns": 3})})
    assert [
        str(change) for change in Identity.of(turned, {}).changes_since({**checkpoint, "settings": older}, tmp_path)
    ] == ["environment.max_turns: was absent, now 3"]
    broken = {**saved, "algorithm.loss": "gone"}
    assert settings_of_today(broken) == broken


@pytest.mark.parametrize("old", ["kl_coef", "kl_in", "entropy_coef", "loss", "reference_sync_every"])
def test_none_is_refused_for_what_could_never_be_none(old: str) -> None:
    with pytest.raises(ValidationError):
        AlgorithmConfig.model_validate({old: None})


def test_what_was_given_is_not_changed() -> None:
    given = {"algorithm": {"clip_low": 0.1, "loss": {"clip_high": 0.2}}}
    assert of_today(given).values == {"algorithm": {"loss": {"clip_high": 0.2, "clip_low": 0.1}}}
    assert given == {"algorithm": {"clip_low": 0.1, "loss": {"clip_high": 0.2}}}


def test_the_address_of_an_engine_was_one(tmp_path: Path) -> None:
    """A run of the days when it had one name goes on under the other, and one without any has not changed."""
    url = "http://127.0.0.1:8000"
    file = tmp_path / "r.toml"
    file.write_text(f'[rollout]\nengine = "http"\nurl = "{url}"\n')
    assert load_config(file).config.rollout.urls == (url,)
    assert load_config(None, ["--rollout.engine=http", f"--rollout.url={url}"]).config.rollout.urls == (url,)
    assert settings_of_today({"rollout.url": None, "rollout.top_k": 0}) == {"rollout.top_k": 0}
    assert settings_of_today({"rollout.url": url}) == {"rollout.urls": url}
