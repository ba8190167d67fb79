"""The quick start's task and model on this device: a warm-up, GRPO, and GRPO once more, killed half-way and resumed."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.bench import write_record
from groupwise.config import Config
from groupwise.launch import run_sft, run_training
from groupwise.quickstart.recipe import prepare

_PATIENCE = 300.0


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder), seed=0)
        model = {"device": args.device, "batch_invariant": args.batch_invariant}
        sft = _changed(recipe.sft, model=model, train={"steps": args.warm_up_steps})
        warm_up = run_sft(sft)
        write_record(args.json, "warm_up", steps=args.warm_up_steps, seconds=warm_up["seconds"])
        grpo = _changed(recipe.grpo, model=model, train={"steps": args.steps, "save_every": 1})
        _record(args, "learning", grpo, _train(grpo))
        again = _changed(grpo, train={"output": str(Path(folder, "killed"))})
        at = _kill_at(again, args.steps // 2)
        summary = _train(again, resume=True)
        _record(args, "killed_and_resumed", again, summary, killed_at=at, equal=_digest(again) == _digest(grpo))


def _changed(config: Config, **sections: dict[str, Any]) -> Config:
    """With these settings, checked anew."""
    settings = config.model_dump(mode="json", exclude_unset=True)
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return Config.model_validate(settings)


def _train(config: Config, *, resume: bool = False) -> dict[str, Any]:
    return run_training(config, resume=resume)


def _kill_at(config: Config, step: int) -> int:
    """Start the run in a process of its own, and end it with SIGKILL when it has written so many steps."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(config,))
    process.start()
    deadline = time.monotonic() + _PATIENCE
    while len(_steps(config)) < step:
        if not process.is_alive() or time.monotonic() > deadline:
            raise SystemExit(f"the run to be killed ended with {process.exitcode} after {len(_steps(config))} steps")
        time.sleep(0.05)
    process.kill()
    process.join()
    return len(_steps(config))


def _steps(config: Config) -> list[dict[str, Any]]:
    path = Path(str(config.train.output), "metrics.jsonl")
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _digest(config: Config) -> str:
    weights = sorted(Path(str(config.train.output), "final").glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()


def _record(args: argparse.Namespace, section: str, config: Config, summary: dict[str, Any], **more: Any) -> None:
    steps = _steps(config)
    gaps = [step.get("sampling/sampling_logp_difference/max") for step in steps]
    known = [gap for gap in gaps if gap is not None]
    write_record(
        args.json, section, dtype=config.model.dtype, batch_invariant=config.model.batch_invariant,
        steps=len(steps), seconds=summary["seconds"],
        accuracy_before=summary["eval"][0]["accuracy"], accuracy_after=summary["eval"][-1]["accuracy"],
        mismatch_max=max(known) if known else None, steps_compared=len(known), weights=_digest(config)[:16], **more,
    )  # fmt: skip
