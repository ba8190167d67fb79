"""A GRPO program in TRL's words, run by Groupwise: only the import lines tell.

It teaches a model to answer in two tagged parts, and rewards right sums. One GPU and a model of useful size:

    python examples/trl_grpo.py --model Qwen/Qwen2.5-1.5B-Instruct --steps 200 --output runs/trl

No GPU and no download (two minutes on two CPU cores): a model of 0.6 million parameters, made here and warmed up on
answers of which many forget a tag.

    python examples/trl_grpo.py --tiny --output runs/trl-tiny
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback, pipeline

from groupwise.compat.trl import AutoModelForCausalLM, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

SYSTEM_PROMPT = """Answer in this form:
<reasoning>
how you work it out
</reasoning>
<answer>
the number alone
</answer>"""

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def questions(count: int, seed: int) -> Dataset:
    """Sums of two small numbers, with the columns that a question bank has."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        rows.append({"question": f"What is {a} + {b}?", "raw_answer": f"{a} + {b} = {a + b}\n#### {a + b}"})
    return Dataset.from_list(rows)


def prepare(bank: Dataset) -> Dataset:
    """A conversation to go on with, and the true answer for the rewards."""
    return bank.map(
        lambda row: {
            "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["question"]}],
            "answer": row["raw_answer"].split("####")[1].strip(),
        }
    )


def said(completions) -> list[str]:
    return [completion[0]["content"] for completion in completions]


def tag_reward(completions, **columns) -> list[float]:
    """A quarter for each tag, less for text after the last one."""
    scores = []
    for text in said(completions):
        score = sum(0.25 for tag in TAGS if tag in text)
        if text.count("</answer>") == 1:
            score -= 0.001 * len(text.split("</answer>")[-1].strip())
        scores.append(score)
    return scores


def form_reward(completions, **columns) -> list[float]:
    form = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
    return [1.0 if form.search(text) else 0.0 for text in said(completions)]


def correct_reward(prompts, completions, answer, **columns) -> list[float]:
    found = [re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL) for text in said(completions)]
    return [2.0 if match and match[1] == truth else 0.0 for match, truth in zip(found, answer, strict=True)]


class Scaled:
    """A reward with a weight that the program moves between stages."""

    def __init__(self, reward, weight: float = 1.0) -> None:
        self.reward, self.weight = reward, weight

    def __call__(self, completions, **columns) -> list[float]:
        return [self.weight * score for score in self.reward(completions=completions, **columns)]

    def follow(self, success: float) -> None:
        """More weight while the model struggles, less when it succeeds."""
        self.weight *= 1.2 if success < 0.3 else 0.9 if success > 0.8 else 1.0


def show_reward(completions, **columns) -> list[float]:
    """For a look at what the model says; every answer gets the same."""
    for text in said(completions)[:2]:
        print(f"  {text[:200]!r}")
    return [1.0] * len(completions)


class Progress(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **objects):
        if logs and "reward" in logs:
            print(f"step {state.global_step:4d}  reward {logs['reward']:.3f}  reward_std {logs['reward_std']:.3f}")


def load(model_name: str):
    model = AutoModelForCausalLM.from_pretrained(
        model_name,
        torch_dtype=torch.bfloat16,
        attn_implementation="flash_attention_2",
        device_map="auto",
    )
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def arguments(output: Path, *, steps: int | None, tiny: bool) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(output),
        learning_rate=3e-3 if tiny else 5e-6,
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.1,
        warmup_ratio=0.1,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=16 if tiny else 1,
        gradient_accumulation_steps=4,
        num_generations=8,
        max_prompt_length=256,
        max_completion_length=64 if tiny else 512,
        num_train_epochs=1,
        max_steps=steps,
        bf16=True,
        use_vllm=True,
        optim="adamw_8bit",
        max_grad_norm=1.0 if tiny else 0.1,
        logging_steps=1,
        save_steps=100,
        report_to="wandb",
    )


def adapter() -> LoraConfig:
    return LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
        lora_dropout=0.05,
    )


def train(model_name: str, output: Path, *, steps: int | None, tiny: bool) -> list[list[float]]:
    """Two stages, a merged model, an answer; returns the mean reward of each step of each stage."""
    dataset = prepare(questions(2_000, seed=1))
    model, tokenizer = load(model_name)

    # First the form alone, then with it the sums. The second stage goes on with the first one's adapter.
    first = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[tag_reward, form_reward],
        args=arguments(output / "form", steps=steps and max(1, steps // 4), tiny=tiny),
        train_dataset=dataset,
        peft_config=adapter(),
        callbacks=[Progress],
    )
    print("before:")
    GRPOTrainer(
        model=first.model,
        processing_class=tokenizer,
        reward_funcs=[show_reward],
        args=arguments(output / "look", steps=1, tiny=tiny),
        train_dataset=dataset,
    ).generate_completions(dataset[:1])
    first.train()

    form = Scaled(form_reward)
    form.follow(first.state.log_history[-2]["rewards/form_reward/mean"])
    trainer = GRPOTrainer(
        model=first.model,
        processing_class=tokenizer,
        reward_funcs=[tag_reward, form, correct_reward],
        args=arguments(output / "sums", steps=steps, tiny=tiny),
        train_dataset=dataset,
        eval_dataset=prepare(questions(64, seed=2)),
        callbacks=[Progress],
    )
    trainer.train()
    print("held out:", {name: round(value, 3) for name, value in trainer.evaluate().items() if "rewards/" in name})
    trainer.save_model(str(output / "adapter"))

    if hasattr(trainer.model, "merge_and_unload"):
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(output / "production")
        tokenizer.save_pretrained(output / "production")
        ask(output / "production", tokenizer)
    stages = (first, trainer)
    return [[entry["reward"] for entry in stage.state.log_history if "reward" in entry] for stage in stages]


def ask(folder: Path, tokenizer) -> None:
    generator = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    asked = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "What is 3 + 4?"}]
    result = generator(asked, max_new_tokens=64, do_sample=True, temperature=0.7, top_p=0.9)
    print(result[0]["generated_text"][-1]["content"])


def make_tiny(output: Path, *, steps: int) -> str:
    """A model made from the task's own text, which has learned from answers that a hasty person wrote."""
    from groupwise.quickstart.tiny_model import build_tiny_model

    draw = random.Random(0)
    rows = []
    for row in prepare(questions(2_000, seed=0)):
        working = row["raw_answer"].split("\n")[0]
        parts = ["<reasoning>", working, "</reasoning>", "<answer>", row["answer"], "</answer>"]
        if draw.random() < 0.6:
            parts.remove(draw.choice(TAGS))
        rows.append({"messages": [*row["prompt"], {"role": "assistant", "content": "\n".join(parts)}]})
    folder = output / "model"
    texts = [message["content"] for row in rows for message in row["messages"]] + ["system", "user", "assistant"]
    build_tiny_model(folder, texts=texts, size="0.6m", vocab_size=320)
    warm_up = SFTTrainer(
        model=str(folder),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(output / "warm-up"),
            assistant_only_loss=True,
            per_device_train_batch_size=32,
            max_steps=steps,
            learning_rate=3e-3,
            warmup_steps=10,
            lr_scheduler_type="linear",
            logging_steps=50,
            report_to="none",
            seed=3407,
        ),
    )
    warm_up.train()
    warm_up.save_model()
    return str(output / "warm-up")


def main(argv: list[str] | None = None) -> list[list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hugging Face name")
    parser.add_argument("--tiny", action="store_true", help="make a tiny model instead")
    parser.add_argument("--steps", type=int, help="of the last stage; default: one epoch, with --tiny 30")
    parser.add_argument("--warm-up-steps", type=int, default=150, help="with --tiny")
    parser.add_argument("--output", type=Path, default=Path("runs/trl"))
    args = parser.parse_args(argv)
    if not args.tiny and not args.model:
        parser.error("give --model, or --tiny")
    model = make_tiny(args.output, steps=args.warm_up_steps) if args.tiny else args.model
    return train(model, args.output, steps=args.steps or (30 if args.tiny else None), tiny=args.tiny)


if __name__ == "__main__":
    main()
