"""Every name of TRL's trainers is there, or refused with a reason when a class is made, a value set, or a name read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from groupwise.compat.trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, script_tail
from groupwise.compat.trl.reference import render_members
from groupwise.compat.trl.surface import GRPO_MEMBERS, SFT_MEMBERS
from groupwise.errors import ConfigError
from groupwise.export.push import Push

ROOT = Path(__file__).parents[3]
RECORD = json.loads((Path(__file__).parent / "trl_surface.json").read_text())
"""What `dir` and the assignments to `self` of TRL's own trainers have; versions are in it."""

ROWS = [{"prompt": f"say {word}:"} for word in ("red", "green", "blue")]
TRAINERS = {"GRPOTrainer": GRPOTrainer, "SFTTrainer": SFTTrainer}
MEMBERS = {"GRPOTrainer": GRPO_MEMBERS, "SFTTrainer": SFT_MEMBERS}


def length(completions: Any, **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def grpo_trainer(folder: Path, output: Path, **arguments: Any) -> GRPOTrainer:
    small: dict[str, Any] = {"num_generations": 4, "max_completion_length": 4, "use_cpu": True, "disable_tqdm": True}
    args = GRPOConfig(str(output), per_device_train_batch_size=4, **{**small, **arguments})
    return GRPOTrainer(AutoModelForCausalLM.from_pretrained(folder), length, args, ROWS)


@pytest.fixture
def trainers(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    args = SFTConfig(str(tmp_path), use_cpu=True, disable_tqdm=True)
    texts = [{"text": "say red"}]
    return {
        "GRPOTrainer": grpo_trainer(tiny_folder, tmp_path),
        "SFTTrainer": SFTTrainer(AutoModelForCausalLM.from_pretrained(tiny_folder), args, train_dataset=texts),
    }


@pytest.mark.parametrize("name", TRAINERS)
def test_no_name_is_missing(name: str, trainers: dict[str, Any]) -> None:
    assert set(RECORD[name]) <= set(MEMBERS[name])
    for member in RECORD[name]:
        kind = MEMBERS[name][member].kind
        if kind == "refused":
            with pytest.raises(AttributeError, match=rf"{name}\.{member}: ."):
                getattr(trainers[name], member)
        else:
            getattr(trainers[name], member)
            assert callable(getattr(trainers[name], member)) or kind != "hook" or member.startswith("_")


@pytest.mark.parametrize("name", TRAINERS)
def test_the_record_is_that_of_trl(name: str) -> None:
    trl = pytest.importorskip("trl")
    if trl.__version__ != RECORD["trl"]:
        pytest.skip(f"recorded with {RECORD['trl']}")
    own = {member for member in dir(getattr(trl, name)) if not member.startswith("__")}
    assert own <= set(RECORD[name])


@pytest.mark.parametrize("name", TRAINERS)
def test_an_override_is_called_or_refused_when_the_class_is_made(name: str) -> None:
    for member, known in MEMBERS[name].items():
        body = {member: lambda self, *given, **more: None}
        if known.kind == "hook":
            type("Mine", (TRAINERS[name],), body)
            continue
        with pytest.raises(ConfigError, match=f"Mine overrides {member}, which nobody would call here: ."):
            type("Mine", (TRAINERS[name],), body)
        mixin = type("Mixin", (), body)
        with pytest.raises(ConfigError, match=rf"Mine \(in Mixin\) overrides {member}"):
            type("Mine", (mixin, TRAINERS[name]), {})


def test_a_subclass_may_have_helpers_of_its_own_under_names_that_are_free(tiny_folder: Path, tmp_path: Path) -> None:
    class Mine(GRPOTrainer):
        bonus = 2

        def my_helper(self) -> int:
            return self.bonus

    args = GRPOConfig(str(tmp_path), num_generations=4, use_cpu=True)
    trainer = Mine(AutoModelForCausalLM.from_pretrained(tiny_folder), length, args, ROWS)
    trainer.seen = 3  # an attribute of its own
    assert trainer.my_helper() + trainer.seen == 5
    for taken in ("_scorer", "_plan", "_start", "config"):
        with pytest.raises(ConfigError, match=f"Mine defines {taken}, a name that the trainer uses itself"):
            type("Mine", (GRPOTrainer,), {taken: 1})


def test_what_is_set_on_the_class_is_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="GRPOTrainer overrides compute_loss"):
        GRPOTrainer.compute_loss = print
    with pytest.raises(ConfigError, match="a name that the trainer uses itself"):
        GRPOTrainer._extras = print  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(GRPOTrainer, "log", GRPOTrainer.log)


def test_what_is_set_later_acts_or_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(tiny_folder, tmp_path)
    for name, value, why in (
        ("model", None, "when it is made"),
        ("processing_class", None, "when it is made"),
        ("state", None, "the run decides it"),
        ("beta", 0.1, "set it in args"),
        ("compute_metrics", print, "scores them by the rewards"),
        ("data_collator", print, "change train_dataset"),
        ("optimizer", None, "the optimiser is optim"),
        ("compute_loss", print, "loss_type"),
        ("config", None, "the trainer uses that name itself"),
        ("_watcher", None, "the trainer uses that name itself"),
        ("accelerator", None, "it says what is so here"),
    ):
        with pytest.raises(ConfigError, match=f"GRPOTrainer.{name} cannot be set: .*{why}"):
            setattr(trainer, name, value)
    for wrong, right in (
        ("reward_func", "reward_funcs"),
        ("train_datset", "train_dataset"),
        ("eval_datasets", "eval_"),
    ):
        with pytest.raises(ConfigError, match=f"has no attribute '{wrong}'; did you mean '{right}"):
            setattr(trainer, wrong, [])
    with pytest.raises(AttributeError, match="has no attribute 'train_datasets'; did you mean 'train_dataset'"):
        trainer.train_datasets  # noqa: B018 - reading it is the test
    with pytest.raises(ConfigError, match="got a int; expected functions"):
        trainer.reward_funcs = 3
    assert trainer.reward_funcs is length
    trainer.train_dataset = ROWS[:2]
    assert trainer.num_examples() == 2
    trainer.args.temperature = 0.5
    trainer.evaluate(ROWS[:1])
    assert (trainer.config.rollout.temperature, trainer.temperature) == (0.5, 0.5)
    trainer.args = GRPOConfig(str(tmp_path), num_generations=2, use_cpu=True)
    assert trainer.config.rollout.group_size == 2


def test_arguments_that_had_their_effect_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    args = GRPOConfig(str(tmp_path), num_generations=4, use_cpu=True)
    args.bf16 = False
    trainer = GRPOTrainer(AutoModelForCausalLM.from_pretrained(tiny_folder), length, args, ROWS)
    with pytest.raises(ConfigError, match=r"GRPOConfig.bf16 cannot change: the trainer's model was loaded by it"):
        args.bf16 = True
    with pytest.raises(ConfigError, match="has no argument 'learning_rates'; did you mean learning_rate"):
        trainer.args.learning_rates = 1.0
    with pytest.raises(ConfigError, match="use_cpu differs, and the model was loaded by it"):
        trainer.args = GRPOConfig(str(tmp_path), num_generations=4, bf16=False)
    with pytest.raises(ConfigError, match="got a SFTConfig"):
        trainer.args = SFTConfig(str(tmp_path))  # pyright: ignore[reportAttributeAccessIssue]
    assert trainer.args is args


def test_an_override_of_evaluate_is_refused_where_the_run_evaluates(tiny_folder: Path, tmp_path: Path) -> None:
    class Mine(GRPOTrainer):
        def evaluate(self, *given: Any, **more: Any) -> dict[str, float]:
            return {"mine": 1.0}

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    small: dict[str, Any] = {"num_generations": 4, "use_cpu": True}
    assert Mine(model, length, GRPOConfig(str(tmp_path), **small), ROWS, ROWS).evaluate() == {"mine": 1.0}
    with pytest.raises(ConfigError, match="Mine overrides evaluate, and eval_strategy"):
        Mine(model, length, GRPOConfig(str(tmp_path), **small, eval_strategy="epoch"), ROWS, ROWS)


def test_the_end_of_a_script(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What TRL's and open-r1's scripts do when training is done."""
    trainer = grpo_trainer(tiny_folder, tmp_path, max_steps=1, logging_steps=1)
    metrics = {**(trainer.train().metrics or {}), "train_samples": 3}
    capsys.readouterr()
    trainer.log_metrics("train", metrics)
    printed = capsys.readouterr().out
    assert printed.startswith("***** train metrics *****\n")
    assert "  train_samples" in printed
    trainer.save_metrics("train", metrics)
    trainer.save_metrics("eval", {"eval_reward": 1.5})
    trainer.save_state()
    trainer.create_model_card(dataset_name="sums", tags=["mine"])
    trainer.model.config.use_cache = True
    assert json.loads((tmp_path / "train_results.json").read_text()) == metrics
    assert json.loads((tmp_path / "all_results.json").read_text()) == {**metrics, "eval_reward": 1.5}
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 1
    card = (tmp_path / "README.md").read_text()
    assert 'datasets: "sums"' in card
    assert '"mine"' in card
    if trainer.is_world_process_zero() and trainer.accelerator.is_main_process:
        trainer.accelerator.wait_for_everyone()
        assert trainer.accelerator.unwrap_model(trainer.model) is trainer.model
    assert trainer.accelerator.state.num_processes == 1
    with pytest.raises(AttributeError, match=r"accelerator.backward: training steps are Groupwise's own"):
        trainer.accelerator.backward(None)
    with pytest.raises(ConfigError, match=r"GRPOConfig.hub_model_id: got none; expected 'owner/name'"):
        trainer.push_to_hub(dataset_name="sums")
    assert (tmp_path / "model.safetensors").is_file()  # saved before the Hub is asked


def test_the_hub_gets_the_model_and_its_card_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[Push, str, str | None]] = []

    def send(plan: Push, *, message: str, token: str | None) -> str:
        sent.append((plan, message, token))
        return "address"

    monkeypatch.setattr(script_tail, "push", send)
    (tmp_path / "mine.txt").write_text("private")
    trainer = grpo_trainer(tiny_folder, tmp_path, max_steps=1, hub_model_id="me/sums", hub_token="hf_x")
    trainer.train()
    assert trainer.push_to_hub("done", dataset_name="sums", private=True) == "address"
    [(plan, message, token)] = sent
    assert (plan.repo, plan.private, message, token) == ("me/sums", True, "done", "hf_x")
    names = {file.name for file in plan.files}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("/" in name or name == "mine.txt" for name in names)
    with pytest.raises(ConfigError, match="leave blocking and revision out"):
        trainer.push_to_hub(blocking=False)


def test_a_config_of_a_programs_own(caplog: pytest.LogCaptureFixture) -> None:
    from copy import deepcopy
    from dataclasses import dataclass, field

    @dataclass
    class Mine(GRPOConfig):
        benchmarks: list[str] = field(default_factory=lambda: ["sums"])
        learning_rate: float = 3e-6
        system_prompt: str | None = None

    args = Mine("out", system_prompt="Be brief.", num_generations=4)  # pyright: ignore[reportCallIssue]
    assert (args.benchmarks, args.learning_rate, args.system_prompt) == (["sums"], 3e-6, "Be brief.")
    assert "learning_rate" in args.given
    args.benchmarks.append("other")
    assert Mine("out").benchmarks == ["sums"]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="has no argument 'sytem_prompt'"):
        args.sytem_prompt = "x"
    with pytest.raises(ConfigError, match="Wrong overrides __post_init__"):
        type("Wrong", (GRPOConfig,), {"__post_init__": lambda self: None})
    with pytest.raises(AttributeError, match="has no argument 'learning_rates'; did you mean learning_rate"):
        args.learning_rates  # noqa: B018 - reading it is the test
    args.use_vllm = True
    assert "GRPOConfig.use_vllm" not in caplog.text
    assert "Mine.use_vllm = true changes nothing here" in caplog.text
    copied = deepcopy(args)
    copied.temperature = 0.3
    assert args.temperature == 1.0


def test_tokens_are_masked_wherever_arguments_are_written() -> None:
    args = GRPOConfig("out", hub_token="hf_secret")
    for text in (args.to_json_string(), repr(args), str(args.to_sanitized_dict())):
        assert "hf_secret" not in text
    assert args.hub_token == "hf_secret"


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    assert render_members() in page, (
        "write the output of `python -m groupwise.compat.trl.reference` into docs/migrate.md"
    )
