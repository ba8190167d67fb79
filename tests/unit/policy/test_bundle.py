"""Gradients that are really not finite: skipped, bundled, counted, stopped, and computed again from the bundle."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.algorithms import build_algorithm
from groupwise.batches import Denominators, TrainingRow
from groupwise.config import AlgorithmConfig, Config, LoraConfig, OptimConfig, TrainConfig
from groupwise.errors import DataError, TrainingError
from groupwise.inputs import ModelInput
from groupwise.metrics import resolve
from groupwise.model.loading import with_adapter
from groupwise.policy import Learner
from groupwise.policy.bundle import BundleWriter, LearnedBatch, load_bundle
from groupwise.policy.microbatches import MicroBatch
from groupwise.rundir import RunDirectory
from groupwise.sides import Kept, Routes, Sides

DENOMINATORS = Denominators(6.0, 2.0, 16.0, ((3, 1), (0, 4)))
ROW = TrainingRow(
    0, ModelInput.of((10, 11, 12)), ModelInput.of((5, 6, 7)), (1, 1, 0), (0.5, -0.5, 0.1), (-4.0, -3.5, -math.inf)
)
CUT = replace(ROW, sides=Sides(kept=Kept.of([(5, 9), (), (7, 8, 30)])))
ROUTED = replace(ROW, sides=Sides(Routes(bytes(range(10)), "uint8", layers=1, k=2), Kept.none(3)))


def make_policy(make_model: Any, folder: Path, *, lora: bool = False, steps_per_batch: int = 1) -> Learner:
    loaded = make_model()
    if lora:
        loaded = with_adapter(loaded, LoraConfig.model_validate({"rank": 2}))
    config = Config.model_validate({"model": {"path": "a/b"}, "optim": {"steps_per_batch": steps_per_batch}})
    return Learner(
        loaded,
        build_algorithm(AlgorithmConfig.model_validate({})),
        optim=OptimConfig.model_validate({"lr": 0.01}),
        train=TrainConfig.model_validate({}),
        total_updates=10,
        bundles=BundleWriter(RunDirectory.create(folder / "run", overwrite=True), config),
    )


def norm_weight(policy: Learner) -> torch.Tensor:
    return policy.loaded.model.get_parameter("model.layers.1.post_attention_layernorm.weight")


def learn(policy: Learner) -> dict[str, float]:
    for batch in (MicroBatch((ROW,)), MicroBatch((ROW, ROW), backward=False)):
        policy.forward_backward(batch, DENOMINATORS)
    return resolve(policy.optim_step())


def test_a_poisoned_weight_leaves_a_bundle_that_gives_the_gradient_again(
    make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = make_policy(make_model, tmp_path)
    assert learn(policy)["updates_skipped"] == 0
    with torch.no_grad():
        norm_weight(policy)[3] = torch.inf
    with caplog.at_level(logging.WARNING, logger="groupwise"):
        found = learn(policy)
    folder = tmp_path / "run" / "bundles" / "step_000002"
    assert found["updates_skipped"] == 1
    assert [str(folder) in record.getMessage() for record in caplog.records if "skipped" in record.getMessage()] == [
        True
    ]
    assert sorted(p.name for p in folder.iterdir()) == [
        "bundle.json",
        "config.json",
        "versions.json",
        "weights.safetensors",
    ]
    bundle = load_bundle(folder)
    assert bundle.update == 1
    assert not bundle.supervised
    assert [b.batch for b in bundle.batches] == [MicroBatch((ROW,)), MicroBatch((ROW, ROW), backward=False)]
    assert bundle.batches[0].denominators == DENOMINATORS
    assert math.isnan(bundle.batches[0].loss)
    assert bundle.weights is not None
    assert set(bundle.weights) == {name for name, _ in policy.loaded.model.named_parameters()}

    content = json.loads(
        (folder / "bundle.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    bad = {name for name, gradient in bundle.gradients.items() if gradient.num_bad}
    assert set(content["bad_parameters"]) == bad != set()
    assert content["last_checkpoint"] is None
    again = make_policy(make_model, tmp_path / "other")
    replayed = again.gradients_of(bundle.batches, update=bundle.update, weights=bundle.weights)
    assert replayed == bundle.gradients


def test_three_in_a_row_stop_with_the_bundles_path(make_model: Any, tmp_path: Path) -> None:
    policy = make_policy(make_model, tmp_path, lora=True)
    with torch.no_grad():
        norm_weight(policy).fill_(torch.nan)
    assert learn(policy)["updates_skipped"] == 1
    assert learn(policy)["updates_skipped"] == 1
    with pytest.raises(TrainingError, match=r"reproduce it is in .*step_000003$"):
        learn(policy)
    bundles = sorted((tmp_path / "run" / "bundles").iterdir())
    assert [folder.name for folder in bundles] == ["step_000001", "step_000002", "step_000003"]
    weights = load_bundle(bundles[0]).weights
    assert weights is not None
    assert all(".lora_" in name for name in weights)  # with LoRA, a bundle is as small as the adapter


def test_the_newest_three_are_kept(make_model: Any, tmp_path: Path) -> None:
    policy = make_policy(make_model, tmp_path, steps_per_batch=2)
    good = norm_weight(policy).detach().clone()
    for k in range(10):
        with torch.no_grad():
            norm_weight(policy).copy_(good if k % 2 else good * torch.inf)
        assert learn(policy)["updates_skipped"] == (0 if k % 2 else 1)
    names = sorted(folder.name for folder in (tmp_path / "run" / "bundles").iterdir())
    assert names == ["step_000003", "step_000004", "step_000005"]
    with torch.no_grad():
        norm_weight(policy).fill_(torch.inf)
    learn(policy)
    learn(policy)
    names = sorted(folder.name for folder in (tmp_path / "run" / "bundles").iterdir())
    assert names == ["step_000005", "step_000006", "step_000006_update_2"]


def test_micro_batches_of_earlier_updates_are_not_in_it(make_model: Any, tmp_path: Path) -> None:
    policy = make_policy(make_model, tmp_path)
    for _ in range(3):
        learn(policy)
    with torch.no_grad():
        norm_weight(policy).fill_(torch.inf)
    learn(policy)
    assert len(load_bundle(tmp_path / "run" / "bundles" / "step_000004").batches) == 2


def test_weights_that_are_too_large_are_left_out(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groupwise.policy.bundle.MOST_WEIGHT_BYTES", 100)
    policy = make_policy(make_model, tmp_path)
    with torch.no_grad():
        norm_weight(policy).fill_(torch.inf)
    learn(policy)
    assert load_bundle(tmp_path / "run" / "bundles" / "step_000001").weights is None


@pytest.mark.parametrize("damage", ["nothing", "empty", "cut", "no weights"])
def test_a_damaged_bundle_is_refused(make_model: Any, tmp_path: Path, damage: str) -> None:
    policy = make_policy(make_model, tmp_path)
    with torch.no_grad():
        norm_weight(policy).fill_(torch.inf)
    learn(policy)
    folder = tmp_path / "run" / "bundles" / "step_000001"
    if damage == "nothing":
        folder = tmp_path / "nowhere"
    elif damage == "empty":
        (folder / "bundle.json").write_text("{}")
    elif damage == "cut":
        (folder / "bundle.json").write_bytes((folder / "bundle.json").read_bytes()[:200])
    else:
        (folder / "weights.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="not a whole reproduction bundle"):
        load_bundle(folder)


def test_a_run_directory_with_bundles_can_be_overwritten(make_model: Any, tmp_path: Path) -> None:
    policy = make_policy(make_model, tmp_path)
    with torch.no_grad():
        norm_weight(policy).fill_(torch.inf)
    learn(policy)
    run = RunDirectory(tmp_path / "run")
    run.record(Config.model_validate({}))
    RunDirectory.create(tmp_path / "run", overwrite=True)
    assert not run.bundles.exists()


def test_a_bundle_has_what_the_engine_told_and_gives_its_gradient_again(make_model: Any, tmp_path: Path) -> None:
    """It is in no JSON; and without it the gradient would be another."""
    policy = make_policy(make_model, tmp_path)
    batches = (MicroBatch((ROW, CUT)), MicroBatch((CUT,)))
    learned = [LearnedBatch(batch, DENOMINATORS, 0.0) for batch in (*batches, MicroBatch((ROUTED,), backward=False))]
    masters = policy.gradients_of([], update=0, weights=policy._optimizer.masters())
    weights = {name: weight.detach() for name, weight in policy.source()}
    assert policy.bundles is not None
    folder = policy.bundles.write(0, learned, gradients=masters, weights=weights)
    bundle = load_bundle(folder)
    rows = [row for batch in bundle.batches for row in batch.batch.rows]
    assert [row.sides.kept and list(row.sides.kept) for row in rows] == [
        None, [(5, 9), (), (7, 8, 30)], [(5, 9), (), (7, 8, 30)], [(), (), ()],
    ]  # fmt: skip
    assert rows[3].sides.routes is not None
    assert rows[3].sides.routes.data == bytes(range(10))
    assert rows[3].sides.routes == ROUTED.sides.routes
    assert "kept" not in (folder / "bundle.json").read_text()

    def norms(batches: Sequence[LearnedBatch]) -> list[float]:
        assert bundle.weights is not None
        return [gradient.norm for gradient in policy.gradients_of(batches, update=0, weights=bundle.weights).values()]

    whole = [
        LearnedBatch(MicroBatch((ROW, ROW)), DENOMINATORS, 0.0),
        LearnedBatch(MicroBatch((ROW,)), DENOMINATORS, 0.0),
    ]
    assert norms(bundle.batches[:2]) == norms(learned[:2])
    assert norms(bundle.batches[:2]) != norms(whole)
