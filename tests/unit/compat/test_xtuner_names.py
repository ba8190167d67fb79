"""XTuner's names: what programs with them become, and what is refused and how."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import groupwise.compat.xtuner as door
from groupwise.config.algorithm.advantages import PassK
from groupwise.config.algorithm.losses import PpoClip
from groupwise.errors import ConfigError

ROWS = (
    '{"prompt": [{"role": "user", "content": "2+2?"}], "data_source": "s", "reward_model": {"ground_truth": "4"}}\n' * 3
)
SHAPE = {"model_type": "qwen3", "hidden_size": 64, "vocab_size": 300, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `model`, `train.jsonl` and `test.jsonl`, as far as checks look."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(ROWS)
    return tmp_path


def loss(**given: Any) -> door.GRPOLossConfig:
    policy = {"cliprange_low": 0.2, "cliprange_high": 0.3, **given.pop("policy", {})}
    return door.GRPOLossConfig(policy_loss_cfg=policy, **given)  # pyright: ignore[reportArgumentType]


def worker(**given: Any) -> door.WorkerConfig:
    return door.WorkerConfig(**{"loss_cfg": loss(), "load_from": "model", "pack_max_length": 4096, **given})


def first(**given: Any) -> door.RLTrainer:
    """A program of the first generation."""
    parts: dict[str, Any] = {
        "resources": door.AcceleratorResourcesConfig(num_workers=8),
        "rollout_config": door.RolloutConfig(model_path="model"),
        "dataflow_config": door.DataFlowConfig(prompt_repeat_k=5, global_batch_size=16),
        "judger_config": door.JudgerConfig(reward_judger_configs={"s": door.GSM8KJudgerConfig()}),
        "replay_buffer_config": door.ReplayBufferConfig(
            dataset_cfg=[{"dataset": door.DatasetConfig(anno_path="train.jsonl")}],  # pyright: ignore[reportArgumentType]
            tokenizer="model",  # pyright: ignore[reportArgumentType]
        ),
        "train_worker_cfg": worker(),
        "tokenizer_path": "model",
        "total_epochs": 2,
        "enable_evaluate": False,
    }
    return door.RLTrainer(**{**parts, **given})


def task(file: str = "train.jsonl", *, judger: door.JudgerConfig | None = None, **sampling: Any) -> Any:
    dataset = {
        "dataset": door.DatasetConfig(anno_path=file),
        "tokenize_fn": door.RLTextTokenizeFnConfig(max_length=100),
    }
    return door.AgentLoopManagerConfig(
        tasks=door.TaskSpecConfig(
            task_name=file,
            agent_loop_config=door.SingleTurnAgentLoopConfig(
                hf_checkpoint="model", sample_params=door.SampleParams(**sampling)
            ),
            judger_config=judger or door.GSM8KJudgerConfig(),
            sampler_config=door.SamplerConfig(
                dataloader_cfg=door.DataloaderConfig(dataset_config_list=[dataset]),  # pyright: ignore[reportArgumentType]
                prompt_repeat_k=4 if file == "train.jsonl" else 1,
            ),
        )
    )


def present(**given: Any) -> door.RLColocateTrainerConfig:
    """A program of the present generation."""
    parts: dict[str, Any] = {
        "resources": door.AcceleratorResourcesConfig(num_workers=8),
        "rollout_config": door.RolloutConfig(model_path="model"),
        "train_worker_cfg": worker(),
        "agent_loop_manager_cfg": task(max_tokens=50),
        "eval_agent_loop_manager_cfg": task("test.jsonl", max_tokens=60, temperature=0.0, top_k=1),
        "load_from": "model",
        "total_train_steps": 7,
        "train_batch_size": 32,
        "evaluate_step": 3,
    }
    return door.RLColocateTrainerConfig(**{**parts, **given})


def refused(trainer: door.RLTrainer | door.RLColocateTrainerConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        trainer.to_config()
    return str(caught.value)


# --- what becomes of a program ---


def test_a_program_of_the_first_generation() -> None:
    given = worker(
        optim_cfg=door.AdamWConfig(lr=3e-5, foreach=False),
        lr_cfg=door.LRConfig(lr_type="cosine", warmup_ratio=0.1, lr_min=3e-6),
        loss_cfg=loss(use_kl_loss=True, kl_loss_coef=0.01, kl_loss_type="low_var_kl", mode="chunk", chunk_size=256),
        optimizer_steps=4,
    )
    config = first(train_worker_cfg=given, work_dir="work").to_config().config
    rollout, algorithm, optim, train = config.rollout, config.algorithm, config.optim, config.train
    assert (config.model.path, config.data.train, config.data.max_prompt_tokens) == ("model", "train.jsonl", 1024)
    assert (rollout.group_size, rollout.prompts_per_step, rollout.max_completion_tokens) == (5, 16, 2048)
    assert (algorithm.kl.coef, algorithm.kl.estimator, algorithm.kl.place) == (0.01, "k3", "loss")
    assert algorithm.loss == PpoClip(clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    assert (algorithm.advantage.name, algorithm.normaliser) == ("grpo", "token")
    assert (optim.lr, optim.betas, optim.weight_decay, optim.steps_per_batch) == (3e-5, (0.9, 0.95), 0.01, 4)
    assert (optim.schedule, optim.warmup_ratio, optim.min_lr_ratio) == ("cosine", 0.1, pytest.approx(0.1))
    assert (train.epochs, train.steps, train.seed, Path(train.output).parent) == (2, None, 42, Path("work"))
    assert (train.micro_batch_tokens, train.logprob_chunk_tokens) == (4096, 256)
    assert config.eval.every == 0
    (reward,) = config.reward
    assert (reward.name, reward.data_source) == ("gsm8k", ("s",))
    assert reward.args == {"mode": "strict", "score": 1, "format_score": 0}


def test_a_program_of_the_present_generation() -> None:
    trainer = present(
        advantage_estimator_config=door.PassKAdvantageConfig(k=2),
        checkpoint_interval=5,
        exp_tracker="jsonl",
        enable_initial_evaluate=True,
        evaluator_config=door.EvaluatorConfig(eval_sample_num=9),
    )
    loaded = trainer.build().to_config()
    config = loaded.config
    rollout, evaluation = config.rollout, config.eval
    assert (rollout.group_size, rollout.prompts_per_step, rollout.max_completion_tokens) == (4, 32, 50)
    assert (evaluation.every, evaluation.at_start, evaluation.limit, evaluation.samples) == (3, True, 9, 1)
    assert (evaluation.temperature, evaluation.max_completion_tokens) == (0.0, 60)
    assert (config.data.train, config.data.eval, config.data.max_prompt_tokens) == ("train.jsonl", "test.jsonl", 100)
    assert (config.train.steps, config.train.save_every) == (7, 5)
    assert (config.algorithm.advantage, config.algorithm.loss.name) == (PassK(k=2), "ppo_clip")
    assert config.tracking.backends == ("console", "jsonl")
    assert config.reward[0].data_source == ()
    assert loaded.origins["rollout.prompts_per_step"] == "train_batch_size"
    assert loaded.origins["reward.0.name"] == "agent_loop_manager_cfg.tasks.judger_config"


def test_evaluation_acts_in_the_first_generation(caplog: pytest.LogCaptureFixture) -> None:
    evaluator = door.EvaluatorConfig(
        dataset_cfg=[{"dataset": door.DatasetConfig(anno_path="test.jsonl")}],  # pyright: ignore[reportArgumentType]
        tokenizer="model",
        evaluate_step=10,
        eval_sample_ratio=1,
    )
    on = first(enable_evaluate=True, evaluator_config=evaluator).to_config().config
    assert (on.eval.every, on.eval.at_start, on.data.eval, on.eval.temperature) == (10, False, "test.jsonl", 1.0)
    assert first(enable_evaluate=False, evaluator_config=evaluator).to_config().config.eval.every == 0
    assert first(enable_evaluate=True).to_config().config.eval.every == 0
    assert "the program gives no rows to evaluate on" in caplog.text


@pytest.mark.parametrize(("name", "estimator"), [("low_var_kl", "k3"), ("k3", "k3"), ("kl", "k1"), ("mse", "k2")])
def test_kl_estimators(name: str, estimator: str) -> None:
    config = first(train_worker_cfg=worker(loss_cfg=loss(use_kl_loss=True, kl_loss_type=name))).to_config().config
    assert (config.algorithm.kl.estimator, config.algorithm.kl.coef) == (estimator, 0.001)


def test_without_use_kl_loss_there_is_no_kl(caplog: pytest.LogCaptureFixture) -> None:
    given = loss(use_kl_loss=False, kl_loss_coef=0.5, kl_loss_type="abs")
    assert first(train_worker_cfg=worker(loss_cfg=given)).to_config().config.algorithm.kl.coef == 0
    assert "kl_loss_coef, train_worker_cfg.loss_cfg.kl_loss_type: there is no KL" in caplog.text


def test_eager_is_one_chunk_and_chunks_count_tokens() -> None:
    assert first(train_worker_cfg=worker(loss_cfg=loss())).to_config().config.train.logprob_chunk_tokens == 4096
    chunked = worker(loss_cfg=loss(mode="chunk", chunk_size=64))
    assert first(train_worker_cfg=chunked).to_config().config.train.logprob_chunk_tokens == 64


def test_what_a_recompute_ratio_and_dtypes_become() -> None:
    plain = first().to_config().config.model
    assert (plain.dtype, plain.gradient_checkpointing) == ("auto", True)
    other = worker(fsdp_cfg=door.FSDPConfig(recompute_ratio=0, param_dtype=torch.float32))
    model = first(train_worker_cfg=other).to_config().config.model
    assert (model.dtype, model.gradient_checkpointing) == ("float32", False)
    assert first(rollout_config=door.RolloutConfig(dtype="bfloat16")).to_config().config.model.dtype == "bfloat16"
    assert "expected bfloat16 or float32" in refused(first(rollout_config=door.RolloutConfig(dtype="float16")))


def test_the_resources_choose_the_device() -> None:
    assert first().to_config().config.model.device == "auto"
    cpu = door.AcceleratorResourcesConfig(accelerator="CPU")
    assert first(resources=cpu).to_config().config.model.device == "cpu"


def test_what_was_given_beats_a_default_and_two_that_were_given_must_agree() -> None:
    loader = door.DataloaderConfig(pack_max_length=4096)
    rows = [{"dataset": door.DatasetConfig(anno_path="train.jsonl")}]
    buffer = door.ReplayBufferConfig(dataset_cfg=rows, dataloader_cfg=loader, tokenizer="./model")  # pyright: ignore[reportArgumentType]
    assert first(replay_buffer_config=buffer).to_config().config.train.micro_batch_tokens == 4096
    loader.pack_max_length = 100
    message = refused(first(replay_buffer_config=buffer))
    assert "dataloader_cfg.pack_max_length = 100 and train_worker_cfg.pack_max_length = 4096 are both" in message
    assert "are both model.path here" in refused(first(tokenizer_path="other"))


# --- judgers ---


def grade(reward: Any, texts: list[str], **columns: Any) -> Any:
    result = reward(completions=texts, **{name: [value] * len(texts) for name, value in columns.items()})
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


def judge(response: str, label: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    return {"score": extra_info["right"] if response == label else 0.5}


async def judge_later(response: str, label: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    return judge(response, label, extra_info)


@pytest.mark.parametrize("handler", [judge, judge_later])
def test_a_handler_is_a_reward(handler: Any) -> None:
    judger = door.JudgerConfig(judger_name="mine", reward_handler=handler, extra_info={"right": 2})
    (reward,) = present(agent_loop_manager_cfg=task(judger=judger, max_tokens=50))._translate().rewards.functions
    assert reward.__name__ == "mine"
    assert grade(reward, ["4", "5"], reward_model={"ground_truth": "4"}, data_source="s") == [2, 0.5]
    routed = first(judger_config=door.JudgerConfig(reward_judger_configs={"s": judger}))
    (reward,) = routed._translate().rewards.functions
    assert grade(reward, ["4", "5"], reward_model={"ground_truth": "4"}, data_source="s") == [2, 0.5]
    assert grade(reward, ["4", "5"], reward_model={"ground_truth": "4"}, data_source="other") == [None, None]


def test_judgers_of_a_list_are_routed_by_their_names() -> None:
    listed = door.JudgerConfig(reward_judger_configs=[door.GSM8KJudgerConfig(judger_name="openai/gsm8k")])
    (reward,) = first(judger_config=listed).to_config().config.reward
    assert reward.data_source == ("openai/gsm8k",)


def test_judgers_that_cannot_be() -> None:
    web = door.JudgerConfig(judger_name="web", reward_handler="http://judge:80")
    assert "rewards over HTTP are not there" in refused(present(agent_loop_manager_cfg=task(judger=web)))
    assert "it judges nothing" in refused(present(agent_loop_manager_cfg=task(judger=door.JudgerConfig())))
    assert "expected a judger" in refused(first(judger_config=door.JudgerConfig(reward_judger_configs={"s": 3})))


# --- presets ---


def test_a_preset_that_disagrees_warns_and_the_folder_wins(caplog: pytest.LogCaptureFixture) -> None:
    first(train_worker_cfg=worker(model_cfg=door.Qwen3Dense8BConfig())).to_config()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "Qwen3Dense8BConfig: vocab_size = 151936, and the folder has 300; hidden_size = 4096" in line
    assert line.endswith("model/config.json decides")


def test_a_preset_that_agrees_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    found = door.get_model_config_from_hf(Path("model"))
    assert (found.hidden_size, found.head_dim) == (64, None)
    first(train_worker_cfg=worker(model_cfg=found)).to_config()
    assert not caplog.records


def test_a_folder_without_a_model(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"got no folder with a config\.json"):
        door.get_model_config_from_hf("nowhere")
    (place / "model" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        door.get_model_config_from_hf("model")
    (place / "model" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a table"):
        door.get_model_config_from_hf("model")


# --- refusals ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataflow_config": door.DataFlowConfig(enable_partial_rollout=1)}, "drawn whole, by one version"),
        ({"train_worker_cfg": worker(loss_cfg=loss(policy={"loss_type": "cispo"}))}, "XTuner has 'vanilla' alone"),
        ({"train_worker_cfg": worker(loss_cfg=loss(use_kl_loss=True))}, "kl_loss_type = None: expected one of"),
        ({"train_worker_cfg": worker(loss_cfg=loss(use_kl_loss=True, kl_loss_type="abs"))}, "expected one of"),
        ({"train_worker_cfg": worker(loss_cfg=loss(mode="chunk", chunk_size=None))}, "give a number of tokens"),
        ({"train_worker_cfg": worker(loss_cfg=loss(mode="chunk", chunk_size=4))}, "logprob_chunk_tokens (train_"),
        ({"train_worker_cfg": worker(ref_load_from="other")}, "are both model.path here"),
        ({"dataflow_config": door.DataFlowConfig(sample_params=door.SampleParams(n=2))}, "counted by prompt_repeat_k"),
        (
            {"dataflow_config": door.DataFlowConfig(sample_params=door.SampleParams(presence_penalty=1.0))},
            "repetition_penalty",
        ),
        ({"rollout_config": door.RolloutConfig(context_length=100)}, "do not fit; raise it"),
        ({"rollout_config": door.RolloutConfig(extra_rollout_config={"vllm_x": 1})}, "engines that are not used here"),
        ({"enable_evaluate": True, "evaluator_config": door.EvaluatorConfig(eval_sample_ratio=0.5)}, "eval_sample_num"),
        ({"total_epochs": None}, "total_epochs: got none"),
        ({"total_epochs": 0}, "train.epochs (total_epochs): got 0; expected a number above 0"),
    ],
)
def test_what_cannot_act_is_refused_by_name_with_the_reason(given: dict[str, Any], message: str) -> None:
    assert message in refused(first(**given))


def test_several_problems_come_together() -> None:
    message = refused(first(seed=-1, debug=True, dataflow_config=door.DataFlowConfig(enable_partial_rollout=1)))
    assert message.startswith("the program has 2 setting(s)")


def test_evaluation_that_cannot_be() -> None:
    hot = task("test.jsonl", temperature=0.7, top_k=5)
    assert "top_k = 1 for greedy" in refused(present(eval_agent_loop_manager_cfg=hot))
    stops = task("test.jsonl", stops=["x"])
    assert "evaluation shares rollout.stop with training" in refused(present(eval_agent_loop_manager_cfg=stops))
    greedy = task("test.jsonl", temperature=0.7, top_k=1)
    assert present(eval_agent_loop_manager_cfg=greedy).to_config().config.eval.temperature == 0


def test_only_one_data_set_and_one_task() -> None:
    rows = {"dataset": door.DatasetConfig(anno_path="train.jsonl")}
    two = door.ReplayBufferConfig(dataset_cfg=[rows, rows], tokenizer="model")  # pyright: ignore[reportArgumentType]
    assert "put all rows into one file" in refused(first(replay_buffer_config=two))
    assert "expected one" in refused(
        present(agent_loop_manager_cfg=door.AgentLoopManagerConfig(tasks=[task().tasks, task().tasks]))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: door.RolloutConfig(tensor_paralel_size=2), "did you mean 'tensor_parallel_size'?"),  # pyright: ignore[reportCallIssue]
        (lambda: door.SyncReplayBufferConfig(size=2), "there is no such argument; known here: none at all"),  # pyright: ignore[reportCallIssue]
        (lambda: door.AdamWConfig(lr="fast"), "AdamWConfig.lr: got 'fast'; expected"),  # pyright: ignore[reportArgumentType]
        (lambda: door.WorkerConfig(loss_cfg=loss()), "WorkerConfig.pack_max_length: it has no default"),  # pyright: ignore[reportCallIssue]
        (lambda: loss(policy={"clip_ratio": 3}), "PolicyLossConfig.clip_ratio: there is no such argument"),
        (lambda: loss(mode="liger"), "GRPOLossConfig.mode: got 'liger'; expected 'eager' or 'chunk'"),
        (lambda: door.DatasetConfig(anno_path=3), "DatasetConfig.anno_path"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_wrong_arguments_are_refused_where_they_are_given(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_assignment_is_checked_too() -> None:
    trainer = present()
    trainer.work_dir = "elsewhere"
    assert Path(trainer.to_config().config.train.output).parent == Path("elsewhere")
    with pytest.raises(ConfigError, match=r"RLColocateTrainerConfig\.seed: got 'x'"):
        trainer.seed = "x"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="did you mean 'work_dir'"):
        trainer.workdir = "x"  # type: ignore[attr-defined]


def test_names_without_an_equal_say_what_to_do() -> None:
    for name in door.REFUSED:
        with pytest.raises(ConfigError, match=f"XTuner's {name} has no equal here: "):
            getattr(door, name)
    with pytest.raises(ImportError):
        exec("from groupwise.compat.xtuner import GRPOLosConfig")
    with pytest.raises(AttributeError, match="did you mean 'GRPOLossConfig'"):
        _ = door.GRPOLosConfig  # type: ignore[attr-defined]


def test_harmless_fields_get_one_line(caplog: pytest.LogCaptureFixture) -> None:
    rollout = door.RolloutConfig(tensor_parallel_size=2, expert_parallel_size=4, enable_float8=True, api_key="secret")
    first(rollout_config=rollout).to_config()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert any(
        line == "rollout_config.tensor_parallel_size = 2, rollout_config.expert_parallel_size = 4: one process trains "
        "and samples, on one device; nothing is spread over more"
        for line in lines
    )
    assert "secret" not in caplog.text


def test_ray_starts_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from groupwise.compat.xtuner import ray

    assert not ray.is_initialized()
    ray.init(num_cpus=128, ignore_reinit_error=True)
    assert ray.is_initialized()
    assert caplog.messages == [
        "ray.init(num_cpus=128, ignore_reinit_error=True): no cluster is started; this process samples and trains"
    ]
    ray.shutdown()
    assert not ray.is_initialized()


def test_a_subclass_overrides_what_is_called_or_is_refused() -> None:
    class Mine(door.RLTrainer):
        label: str = "a field"

        def fit(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return {"mine": self.helper()}

        def helper(self) -> int:
            return 1

    assert Mine.model_fields["label"].default == "a field"
    for base, name in (
        (door.RLTrainer, "_train_step"),
        (door.RLTrainer, "to_config"),
        (door.RLColocateTrainerConfig, "_prepare_train_data"),
        (door.JudgerConfig, "build"),
        (door.GRPOLossConfig, "build_batches"),
        (door.GRPOLossConfig, "marks"),
    ):
        with pytest.raises(ConfigError, match=f"Mine overrides {name}, which nobody would call here"):
            type("Mine", (base,), {name: lambda self: None})
