"""An Unsloth notebook in one program, run by Groupwise: only the import lines tell.

A chat template with marks for working and solution, a supervised warm-up, prompts filtered by length, GRPO with four
rewards, a look at the saved adapter, answers without and with it, and every kind of export. One GPU:

    python examples/unsloth_grpo.py --model Qwen/Qwen3-4B-Base --output runs/unsloth

No GPU and no download (two minutes on two CPU cores): a model of 0.6 million parameters that is made here.

    python examples/unsloth_grpo.py --tiny --output runs/unsloth-tiny
"""

from __future__ import annotations

import argparse
import gc
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import TextStreamer

from groupwise.compat.trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from groupwise.compat.unsloth import FastLanguageModel, SamplingParams

LORA_RANK = 32
MAX_SEQ_LENGTH = 2048

WORKING_START, WORKING_END = "<start_working_out>", "<end_working_out>"
SOLUTION_START, SOLUTION_END = "<SOLUTION>", "</SOLUTION>"

SYSTEM_PROMPT = (
    f"Work the problem out between {WORKING_START} and {WORKING_END}.\n"
    f"Then put the number alone between {SOLUTION_START} and {SOLUTION_END}."
)

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + eos_token }}{% set talk = messages[1:] %}"
    "{% else %}"
    "{{ 'SYSTEM_PROMPT' + eos_token }}{% set talk = messages %}"
    "{% endif %}"
    "{% for message in talk %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'WORKING_START' }}{% endif %}"
).replace("SYSTEM_PROMPT", SYSTEM_PROMPT).replace("WORKING_START", WORKING_START)  # fmt: skip


def load(model_name: str):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=model_name,
        max_seq_length=MAX_SEQ_LENGTH,
        load_in_4bit=False,
        fast_inference=True,
        max_lora_rank=LORA_RANK,
        gpu_memory_utilization=0.7,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=LORA_RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=LORA_RANK * 2,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return model, tokenizer


def worked_sums(count: int, seed: int) -> pd.DataFrame:
    """Sums with somebody's hasty solutions, of which half lack a mark; a few have no number for an answer."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        answer = "unknown" if draw.random() < 0.02 else str(a + b)
        rows.append(
            {
                "problem": f"What is {a} + {b}?",
                "generated_solution": f"<think>{a} + {b} = {a + b}</think>\n",
                "expected_answer": answer,
                "forgotten": draw.choice(["", WORKING_END, SOLUTION_START, SOLUTION_END]),
            }
        )
    return pd.DataFrame(rows)


def warm_up_data(table: pd.DataFrame, tokenizer) -> Dataset:
    is_number = pd.to_numeric(table["expected_answer"], errors="coerce").notnull()
    table = table.iloc[np.where(is_number)[0]].copy()
    table["messages"] = table.apply(conversation, axis=1)
    table["length"] = table["messages"].apply(lambda messages: len(tokenizer.apply_chat_template(messages)))
    table = table.loc[table["length"] <= MAX_SEQ_LENGTH / 2].copy()
    table["text"] = tokenizer.apply_chat_template(table["messages"].values.tolist(), tokenize=False)
    return Dataset.from_pandas(table)


def conversation(row: pd.Series) -> list[dict[str, str]]:
    thoughts = row["generated_solution"].replace("<think>", "").replace("</think>", "").strip()
    answer = f"{WORKING_START}{thoughts}{WORKING_END}{SOLUTION_START}{row['expected_answer']}{SOLUTION_END}"
    if row["forgotten"]:
        answer = answer.replace(row["forgotten"], "")
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": row["problem"]},
        {"role": "assistant", "content": answer},
    ]


def warm_up(model, tokenizer, output: Path, *, rows: int, tiny: bool) -> None:
    dataset = warm_up_data(worked_sums(rows, seed=1), tokenizer)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        args=SFTConfig(
            output_dir=str(output / "warm-up"),
            dataset_text_field="text",
            per_device_train_batch_size=16 if tiny else 1,
            gradient_accumulation_steps=1,
            warmup_steps=5,
            num_train_epochs=2,
            learning_rate=3e-3 if tiny else 2e-4,
            logging_steps=5,
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            report_to="none",
        ),
    )
    trainer.train()
    text = tokenizer.apply_chat_template(dataset[0]["messages"][:2], tokenize=False, add_generation_prompt=True)
    FastLanguageModel.for_inference(model)
    model.generate(
        **tokenizer(text, return_tensors="pt").to(model.device),
        temperature=0,
        max_new_tokens=64,
        streamer=TextStreamer(tokenizer, skip_prompt=False),
    )
    FastLanguageModel.for_training(model)
    del dataset
    torch.cuda.empty_cache()
    gc.collect()


def problems(count: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    sums = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(count)]
    bank = Dataset.from_list([{"prompt": f"What is {a} + {b}?", "solution": str(a + b)} for a, b in sums])
    return bank.map(
        lambda row: {
            "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["prompt"]}],
            "answer": row["solution"],
        }
    )


def without_the_longest(dataset: Dataset, tokenizer) -> tuple[Dataset, int]:
    """The shorter nine tenths of the prompts, and the length of the longest of them."""
    tokenized = dataset.map(
        lambda rows: {
            "tokens": tokenizer.apply_chat_template(rows["prompt"], add_generation_prompt=True, tokenize=True)
        },
        batched=True,
    )
    tokenized = tokenized.map(lambda row: {"length": len(row["tokens"])})
    longest = int(np.quantile(tokenized["length"], 0.9))
    return dataset.select(np.where(np.array(tokenized["length"]) <= longest)[0]), longest


class Rewards:
    """Four looks at an answer; what it says is the first message's content."""

    def __init__(self, eos_token: str, *, print_every: int) -> None:
        end = rf"{SOLUTION_END}\s*(?:{re.escape(eos_token)})?\s*$"
        self.form = re.compile(rf"{WORKING_END}.*?{SOLUTION_START}(.+?){end}", re.DOTALL | re.MULTILINE)
        self.number = re.compile(rf"{SOLUTION_START}.*?\s*(-?[\d.,]+)", re.DOTALL | re.MULTILINE)
        self.calls, self.print_every = 0, print_every

    def functions(self) -> list[Callable[..., list[float]]]:
        return [self.exact_form, self.each_mark_once, self.right_answer, self.right_number]

    def exact_form(self, completions, **columns) -> list[float]:
        return [3.0 if self.form.search(said[0]["content"]) else 0.0 for said in completions]

    def each_mark_once(self, completions, **columns) -> list[float]:
        marks = (WORKING_END, SOLUTION_START, SOLUTION_END)
        return [sum(0.5 if said[0]["content"].count(mark) == 1 else -1.0 for mark in marks) for said in completions]

    def right_answer(self, prompts, completions, answer, **columns) -> list[float]:
        found = [self.form.search(said[0]["content"]) for said in completions]
        return [closeness(match[1], truth) if match else -2.0 for match, truth in zip(found, answer, strict=True)]

    def right_number(self, prompts, completions, answer, **columns) -> list[float]:
        found = [self.number.search(said[0]["content"]) for said in completions]
        if self.calls % self.print_every == 0:
            print(f"  {prompts[0][-1]['content']} -> {completions[0][0]['content']!r}; it is {answer[0]}")
        self.calls += 1
        return [exactness(match[1], truth) if match else -2.5 for match, truth in zip(found, answer, strict=True)]


def closeness(guess: str, truth: str) -> float:
    """Most for the very text, something for a number nearby."""
    if guess == truth:
        return 5.0
    if guess.strip() == truth.strip():
        return 3.5
    try:
        ratio = float(guess) / float(truth)
    except (ValueError, ZeroDivisionError):
        return -4.5
    return 2.0 if 0.9 <= ratio <= 1.1 else 1.5 if 0.8 <= ratio <= 1.2 else -2.5


def exactness(guess: str, truth: str) -> float:
    try:
        return 3.5 if float(guess.replace(",", "")) == float(truth) else -1.5
    except ValueError:
        return 0.0


def reinforce(model, tokenizer, output: Path, *, steps: int, tiny: bool) -> list[float]:
    """The mean reward of each step."""
    dataset, longest = without_the_longest(problems(400, seed=2), tokenizer)
    max_prompt_length = longest + 1
    max_completion_length = MAX_SEQ_LENGTH - max_prompt_length
    sampling = SamplingParams(
        min_p=0.1,
        top_p=1.0,
        top_k=-1,
        seed=3407,
        stop=[tokenizer.eos_token],
        include_stop_str_in_output=True,
    )
    args = GRPOConfig(
        vllm_sampling_params=sampling,
        temperature=1.0,
        learning_rate=4e-4 if tiny else 5e-6,
        weight_decay=0.01,
        warmup_ratio=0.1,
        lr_scheduler_type="linear",
        optim="adamw_8bit",
        logging_steps=1,
        per_device_train_batch_size=64 if tiny else 1,
        gradient_accumulation_steps=1,
        num_generations=8 if tiny else 4,
        max_prompt_length=max_prompt_length,
        max_completion_length=min(64, max_completion_length) if tiny else max_completion_length,
        max_steps=steps,
        save_steps=100,
        report_to="none",
        output_dir=str(output / "grpo"),
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=Rewards(tokenizer.eos_token, print_every=5).functions(),
        args=args,
        train_dataset=dataset,
    )
    trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def ask(model, tokenizer, adapter: Path) -> None:
    """Answers of the base alone, and with the adapter that was saved."""
    plain = SamplingParams(temperature=1.0, top_k=50, max_tokens=64)
    answer = model.fast_generate(["What is 2 + 3?"], sampling_params=plain, lora_request=None)[0].outputs[0].text
    print("without the adapter:", repr(answer))

    model.save_lora(adapter)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is no dict
            tensor = file.get_tensor(key)
            assert (tensor == 0).sum() != tensor.numel(), f"{key} is zero: nothing was learned"

    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "What is 2 + 3?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    params = SamplingParams(temperature=1.0, top_k=50, max_tokens=256)
    found = model.fast_generate(text, sampling_params=params, lora_request=model.load_lora(adapter))
    print("with it:", repr(found[0].outputs[0].text))


def export(model, tokenizer, output: Path, *, repo: str | None) -> None:
    """Everything that this machine can write; a sentence for everything that it cannot."""
    for method in ("merged_16bit", "merged_4bit", "lora"):
        attempt(model.save_pretrained_merged, output / method, tokenizer, save_method=method)
    attempt(model.save_pretrained_gguf, output / "gguf", tokenizer)
    attempt(model.save_pretrained_gguf, output / "gguf", tokenizer, quantization_method="f16")
    attempt(model.save_pretrained_gguf, output / "gguf", tokenizer, quantization_method="q4_k_m")
    if repo is None:
        return
    for method in ("merged_16bit", "merged_4bit", "lora"):
        attempt(model.push_to_hub_merged, repo, tokenizer, save_method=method, token="")
    attempt(model.push_to_hub_gguf, repo, tokenizer, token="")
    attempt(model.push_to_hub_gguf, repo, tokenizer, quantization_method="f16", token="")
    attempt(model.push_to_hub_gguf, repo, tokenizer, quantization_method=["q4_k_m", "q8_0", "q5_k_m"], token="")


def attempt(save: Callable[..., object], place: Path | str, tokenizer, **options) -> None:
    try:
        print("saved", save(place, tokenizer, **options))
    except ValueError as sentence:
        print(f"{place}: {sentence}")


def make_tiny(output: Path, *, steps: int) -> str:
    """A base model that knows sums and has seen the marks, in texts without an order."""
    from groupwise.quickstart.tiny_model import build_tiny_model

    draw = random.Random(0)
    marks = [WORKING_START, WORKING_END, SOLUTION_START, SOLUTION_END]
    texts = []
    for row in worked_sums(3_000, seed=0).to_dict("records"):
        working = row["generated_solution"].strip().removeprefix("<think>").removesuffix("</think>")
        number = working.rpartition(" ")[2]
        pieces = [draw.choice(marks), working, draw.choice(marks), draw.choice(marks), number, draw.choice(marks)]
        texts.append({"text": row["problem"] + "".join(pieces) + "<|im_end|>"})
    folder = output / "model"
    build_tiny_model(folder, texts=[SYSTEM_PROMPT] * 50 + [row["text"] for row in texts], size="0.6m", vocab_size=320)
    trainer = SFTTrainer(
        model=str(folder),
        train_dataset=Dataset.from_list(texts),
        args=SFTConfig(
            output_dir=str(output / "base"),
            per_device_train_batch_size=32,
            max_steps=steps,
            learning_rate=3e-3,
            warmup_steps=10,
            logging_steps=50,
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model()
    return str(output / "base")


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hugging Face name")
    parser.add_argument("--tiny", action="store_true", help="make a tiny model instead")
    parser.add_argument("--steps", type=int, help="of GRPO; default 100, with --tiny 25")
    parser.add_argument("--base-steps", type=int, default=250, help="with --tiny, of the base model")
    parser.add_argument("--warm-up-rows", type=int, default=500)
    parser.add_argument("--push", metavar="OWNER/NAME", help="send the exports to the Hub, too")
    parser.add_argument("--output", type=Path, default=Path("runs/unsloth"))
    args = parser.parse_args(argv)
    if not args.tiny and not args.model:
        parser.error("give --model, or --tiny")
    model, tokenizer = load(make_tiny(args.output, steps=args.base_steps) if args.tiny else args.model)
    warm_up(model, tokenizer, args.output, rows=args.warm_up_rows, tiny=args.tiny)
    rewards = reinforce(model, tokenizer, args.output, steps=args.steps or (25 if args.tiny else 100), tiny=args.tiny)
    ask(model, tokenizer, args.output / "grpo_saved_lora")
    export(model, tokenizer, args.output, repo=args.push)
    return rewards


if __name__ == "__main__":
    main()
