"""Which names `train.stop_on` and `train.doctor.ignore` take."""

from __future__ import annotations

from typing import Any

import pytest

from groupwise.config import Config
from groupwise.doctor import check_rules
from groupwise.errors import ConfigError


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"stop_on": ["answer_cut"]}, r"train\.stop_on: got 'answer_cut'.*did you mean 'answers_cut'\?"),
        ({"doctor": {"ignore": ["entropy"]}}, r"train\.doctor\.ignore: got 'entropy'; expected any of no_usable"),
        ({"stop_on": ["kl_high"]}, r"'kl_high', which could never act: no KL is measured; set algorithm\.kl\.coef"),
        ({"stop_on": ["accuracy_falls"]}, r"nothing is evaluated; set eval\.every"),
        ({"stop_on": ["kl_high"], "doctor": {"ignore": ["kl_high"]}}, "turns off; take it out of one"),
    ],
)
def test_names_that_no_rule_has_are_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rules(Config.model_validate({"train": train}))


def test_supervised_runs_have_rules_of_their_own() -> None:
    with pytest.raises(ConfigError, match="got 'reward_flat'; expected any of no_usable_sample, grad"):
        check_rules(Config.model_validate({"train": {"stop_on": ["reward_flat"]}}), supervised=True)
    check_rules(Config.model_validate({"train": {"stop_on": ["gradient_norm"]}}), supervised=True)
