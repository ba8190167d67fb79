"""What each side of `vs_trl.py` does, and how it is timed: the same stopwatch and the same reward for both."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

ROWS = 64


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement: tokens per second, or seconds per step, by the clock on the wall and by processor time.

    Processor time counts all threads; with one thread it hardly depends on what else the machine does.
    """

    wall: float
    cpu: float


class Stopwatch:
    """Marks of both clocks."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def spans(self, *, every: int = 1) -> list[Figure]:
        """Seconds between each mark and the one `every` marks later."""
        marks = sorted(self._marks)[::every]
        return [Figure(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)]

    def rate(self, count: int) -> list[Figure]:
        """`count` per second of the only span."""
        (span,) = self.spans()
        return [Figure(count / span.wall, count / span.cpu)]


@dataclass(frozen=True, slots=True)
class Setting:
    """The work that both sides do; `folder` holds `model/` and `train.jsonl`.

    Attributes:
        threads: of torch.
        steps: counted steps of one training run.
        trl_batch: TRL's per_device_train_batch_size; smaller values accumulate gradients to the same batch.
    """

    folder: str
    prompts: int
    samples: int
    tokens: int
    kl_coef: float
    threads: int
    steps: int
    trl_batch: int

    @property
    def model(self) -> str:
        return str(Path(self.folder) / "model")

    @property
    def data(self) -> str:
        return str(Path(self.folder) / "train.jsonl")

    @property
    def batch(self) -> int:
        return self.prompts * self.samples


def make_reward(watch: Stopwatch) -> Callable[..., list[float | None]]:
    """The reward of both sides: cheap, not the same for a whole group, and it marks the moment when sampling ended.

    From that moment of one step to that of the next is one whole step: training, weights, records, sampling.
    """

    def distinct_characters(completions: list[Any], **_: Any) -> list[float | None]:
        watch.mark()
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [len(set(text)) / 100 for text in texts]

    return distinct_characters


def make_native(setting: Setting) -> Callable[[], list[Figure]]:
    """Tokens per second of Groupwise's engine."""
    import groupwise.config as gw
    from groupwise.data import load_prompts, read_rows
    from groupwise.engines.native import NativeEngine
    from groupwise.model.loading import load_model
    from groupwise.types import SampleRequest, SamplingParams

    config = gw.Config.model_validate(_groupwise_settings(setting, output=""))
    loaded = load_model(config.model)
    prompts = load_prompts(read_rows(setting.data), config.data, loaded.tokenizer).prompts[: setting.prompts]
    engine = NativeEngine(loaded, config.rollout)
    passes = 0

    async def sample(seed: int) -> int:
        params = SamplingParams(max_tokens=setting.tokens, min_tokens=setting.tokens, seed=seed)
        requests = [SampleRequest.of(prompt, i, params) for prompt in prompts for i in range(setting.samples)]
        return sum([len(completion.token_ids) async for completion in engine.generate(requests)])

    def run() -> list[Figure]:
        nonlocal passes
        passes += 1
        watch = Stopwatch()
        watch.mark()
        count = asyncio.run(sample(passes))
        watch.mark()
        _expect(count, setting.batch * setting.tokens)
        return watch.rate(count)

    return run


def make_generate(setting: Setting) -> Callable[[], list[Figure]]:
    """Tokens per second of transformers' `generate` with its own attention (SDPA) and cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setting.model, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval()
    texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in _messages(setting)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

    def run() -> list[Figure]:
        watch = Stopwatch()
        watch.mark()
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=setting.samples,
                max_new_tokens=setting.tokens,
                min_new_tokens=setting.tokens,
            )
        watch.mark()
        count = out.shape[0] * (out.shape[1] - inputs["input_ids"].shape[1])
        _expect(count, setting.batch * setting.tokens)
        return watch.rate(count)

    return run


def make_groupwise(setting: Setting) -> Callable[[], list[Figure]]:
    """Seconds of each counted GRPO step of `groupwise train`, from the call behind its command line."""
    import groupwise.config as gw
    from groupwise.launch import Given, run_training

    def run() -> list[Figure]:
        watch = Stopwatch()
        output = tempfile.mkdtemp(prefix="run-", dir=setting.folder)
        config = gw.Config.model_validate(_groupwise_settings(setting, output=output))
        run_training(config, overwrite=True, given=Given(rewards=(make_reward(watch),)))
        rows = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text("utf-8").splitlines()]
        for row in rows:
            _expect(row["completions/mean_length"], setting.tokens)
        # Each group is scored by a call of its own.
        return _counted(watch.spans(every=setting.prompts), setting)

    return run


def _groupwise_settings(setting: Setting, *, output: str) -> dict[str, Any]:
    return {
        "model": {"path": setting.model, "dtype": "float32", "device": "cpu"},
        "data": {"train": setting.data},
        "rollout": {
            "group_size": setting.samples,
            "prompts_per_step": setting.prompts,
            "max_completion_tokens": setting.tokens,
            "min_completion_tokens": setting.tokens,
        },
        "algorithm": {"kl": {"coef": setting.kl_coef}},
        # One pass may hold what one of TRL's does: its prompts have up to 64 tokens.
        "train": {
            "output": output,
            "steps": setting.steps + 2,
            "micro_batch_tokens": setting.trl_batch * (setting.tokens + 64),
        },
        "tracking": {"backends": ["jsonl"]},
    }


def make_trl(setting: Setting, *, keeping: bool = False) -> Callable[[], list[Figure]]:
    """Seconds of each counted step of `GRPOTrainer`, generation and optimiser included.

    Args:
        keeping: keep activations for the backward pass, where TRL by default computes them again.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class CheckLengths(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "completions/mean_length" in logs:
                _expect(logs["completions/mean_length"], setting.tokens)

    def run() -> list[Figure]:
        watch = Stopwatch()
        trainer = GRPOTrainer(
            model=setting.model,
            reward_funcs=make_reward(watch),
            args=GRPOConfig(**_trl_settings(setting), gradient_checkpointing=not keeping),
            train_dataset=Dataset.from_list([{"prompt": message} for message in _messages(setting, ROWS)]),
            callbacks=[CheckLengths()],
        )
        trainer.train()
        return _counted(watch.spans(), setting)

    return run


def _trl_settings(setting: Setting) -> dict[str, Any]:
    accumulation, rest = divmod(setting.batch, setting.trl_batch)
    if rest:
        raise SystemExit(f"--trl-batch {setting.trl_batch} does not divide {setting.batch} samples per step")
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-", dir=setting.folder),
        "max_steps": setting.steps + 2,
        "per_device_train_batch_size": setting.trl_batch,
        "gradient_accumulation_steps": accumulation,
        "num_generations": setting.samples,
        "max_completion_length": setting.tokens,
        "generation_kwargs": {"min_new_tokens": setting.tokens},
        "beta": setting.kl_coef,
        "learning_rate": 1e-6,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }


def _messages(setting: Setting, count: int | None = None) -> list[list[dict[str, str]]]:
    lines = Path(setting.data).read_text("utf-8").splitlines()[: count or setting.prompts]
    return [json.loads(line)["prompt"] for line in lines]


def _counted(spans: list[Figure], setting: Setting) -> list[Figure]:
    """Without the first step, which warms up; the last one's training has no mark after it."""
    _expect(len(spans), setting.steps + 1)
    return spans[1:]


def _expect(got: float, wanted: float) -> None:
    """Both sides must do the same work, or their times say nothing."""
    if not abs(got - wanted) <= 1e-6:
        raise SystemExit(f"this side did other work than asked: got {got}, expected {wanted}")


SIDES = {
    "generate": make_generate,
    "native": make_native,
    "trl": make_trl,
    "trl-keeping": partial(make_trl, keeping=True),
    "groupwise": make_groupwise,
}
