"""FastLanguageModel: loading, adapters, answers, and what is said of hardware that is not there."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel

from groupwise.compat.trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from groupwise.compat.unsloth import FastLanguageModel, FastModel, FastPeftModel, SamplingParams
from groupwise.compat.unsloth.settings import ADAPTER, LOADING, SAVING
from groupwise.errors import ConfigError
from groupwise.model.forward.recompute import recomputes_layers

Load = Callable[..., Any]
DRAWN = SamplingParams(max_tokens=10, seed=1)


def tokens(model: Any, prompt: Any = "red green", params: Any = DRAWN, **options: Any) -> tuple[int, ...]:
    return model.fast_generate(prompt, params, **options)[0].outputs[0].token_ids


def test_the_model_is_transformers_and_peft_own(fast_load: Load, tmp_path: Path) -> None:
    model = fast_load()
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, FastModel)
    model.save_pretrained(tmp_path)
    assert '"Qwen3ForCausalLM"' in (tmp_path / "config.json").read_text()
    made = FastLanguageModel.get_peft_model(model, r=4)
    assert isinstance(made, FastPeftModel)
    assert isinstance(made, peft.PeftModel)
    assert made.get_base_model() is model
    trained = {name.rpartition(".lora_")[2][0] for name, weights in made.named_parameters() if weights.requires_grad}
    assert trained == {"A", "B"}


def test_without_a_request_the_base_answers(fast_load: Load, peft_model: FastPeftModel, tmp_path: Path) -> None:
    base = tokens(fast_load())
    peft_model.save_lora(tmp_path / "lora")
    assert tokens(peft_model) == base
    adapted = tokens(peft_model, lora_request=peft_model.load_lora(tmp_path / "lora"))
    assert adapted != base
    assert tokens(peft_model) == base


def test_a_saved_adapter_answers_as_it_was_saved(fast_load: Load, peft_model: FastPeftModel, tmp_path: Path) -> None:
    peft_model.save_lora(tmp_path / "lora")
    adapted = tokens(peft_model, lora_request=peft_model.load_lora(tmp_path / "lora"))
    before = {name: weights.clone() for name, weights in peft_model.named_parameters()}
    other = FastLanguageModel.get_peft_model(fast_load(), r=8, target_modules=["v_proj"])
    assert tokens(other, lora_request=other.load_lora(tmp_path / "lora")) == adapted, "its own adapter is another"
    again = fast_load(model_name=str(tmp_path / "lora"))
    assert tokens(again, lora_request=again.load_lora(tmp_path / "lora")) == adapted
    assert all(torch.equal(weights, before[name]) for name, weights in again.named_parameters())


def test_an_answer_leaves_the_model_as_it_was(peft_model: FastPeftModel, tmp_path: Path) -> None:
    peft_model.save_lora(tmp_path)
    before = [(name, weights.requires_grad) for name, weights in peft_model.named_parameters()]
    state = torch.random.get_rng_state()
    tokens(peft_model, lora_request=peft_model.load_lora(tmp_path))
    assert [(name, weights.requires_grad) for name, weights in peft_model.named_parameters()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (list(peft_model.peft_config), peft_model.active_adapter) == (["default"], "default")
    assert peft_model.base.config._attn_implementation == "sdpa"
    assert recomputes_layers(peft_model.base)


def test_a_failed_answer_leaves_it_so_too(peft_model: FastPeftModel, tmp_path: Path) -> None:
    peft_model.save_lora(tmp_path)
    with pytest.raises(ConfigError, match="prompt 0"):
        peft_model.fast_generate([3], DRAWN, lora_request=peft_model.load_lora(tmp_path))
    assert list(peft_model.peft_config) == ["default"]
    assert tokens(peft_model)


def test_answers_do_not_depend_on_company_and_repeat_by_seed(fast_load: Load) -> None:
    model = fast_load()
    alone = tokens(model, "blue")
    together = model.fast_generate(["red", "blue", "blue", {"prompt": "blue"}], DRAWN)
    assert [answer.outputs[0].token_ids for answer in together[1:]] == [alone] * 3
    ids = together[1].prompt_token_ids
    assert tokens(model, {"prompt_token_ids": list(ids)}) == alone
    free = SamplingParams(max_tokens=10)
    assert tokens(model, "blue", free) != tokens(model, "blue", free), "each call draws anew"
    assert tokens(fast_load(), "blue", free) == tokens(fast_load(), "blue", free), "a program that runs again does not"
    assert tokens(fast_load(random_state=4), "blue", free) != tokens(fast_load(), "blue", free)


def test_several_answers_and_their_log_probs(fast_load: Load) -> None:
    model = fast_load()
    params = SamplingParams(n=3, max_tokens=5, seed=2, logprobs=0)
    [found] = model.fast_generate(["red"], [params])
    assert [each.index for each in found.outputs] == [0, 1, 2]
    assert len({each.token_ids for each in found.outputs}) == 3
    for each in found.outputs:
        assert each.logprobs is not None
        assert each.cumulative_logprob == pytest.approx(sum(each.logprobs))
        assert each.finish_reason == "length"
    ids = torch.tensor([[*found.prompt_token_ids, *found.outputs[0].token_ids]])
    with torch.inference_mode():
        scores = model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(found.prompt_token_ids) - 1
    expected = [float(scores[start + i, token]) for i, token in enumerate(found.outputs[0].token_ids)]
    assert found.outputs[0].logprobs == pytest.approx(expected, abs=1e-4)


def test_a_stop_text_is_kept_only_where_asked(fast_load: Load) -> None:
    model = fast_load()
    whole = model.fast_generate("red", SamplingParams(max_tokens=20, seed=1))[0].outputs[0].text
    stop = next(c for c in whole[2:] if c.isascii() and c.isprintable())
    cut = model.fast_generate("red", SamplingParams(max_tokens=20, seed=1, stop=[stop]))[0].outputs[0]
    kept = model.fast_generate("red", SamplingParams(max_tokens=20, seed=1, stop=stop, include_stop_str_in_output=True))
    assert (cut.stop_reason, cut.finish_reason) == (stop, "stop")
    assert cut.text == whole[: whole.index(stop)]
    assert kept[0].outputs[0].text.startswith(cut.text + stop)


def test_prompt_and_answer_share_max_seq_length(fast_load: Load) -> None:
    model = fast_load(max_seq_length=12)
    [found] = model.fast_generate(["red"], SamplingParams(max_tokens=None, seed=1))
    assert len(found.prompt_token_ids) + len(found.outputs[0].token_ids) <= 12
    with pytest.raises(ConfigError, match=r"prompt 1 has \d+ tokens; expected 1 to 11"):
        model.fast_generate(["red", "red " * 30], DRAWN)
    with pytest.raises(ConfigError, match="prompt 0 has 0 tokens"):
        model.fast_generate([""], DRAWN)


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        (7, None, "got a int for prompts"),
        ([["red"]], None, "prompt 0 is ['red']"),
        ([{"role": "user", "content": "x"}], None, "apply_chat_template"),
        (["a", "b"], [DRAWN], "got 1 sampling_params for 2 prompts"),
        (["a"], "hot", "got a str; expected SamplingParams"),
    ],
)
def test_malformed_questions_are_refused(fast_load: Load, prompts: Any, params: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fast_load().fast_generate(prompts, params)
    assert says in str(caught.value)


def test_no_prompts_no_answers(fast_load: Load) -> None:
    assert fast_load().fast_generate([], DRAWN) == []


def test_generate_at_temperature_0_is_greedy(peft_model: FastPeftModel, tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    peft_model.generation_config.do_sample = True
    asked = tokenizer("red green", return_tensors="pt")
    found = FastLanguageModel.for_inference(peft_model).generate(**asked, temperature=0, max_new_tokens=6)
    expected = peft_model.generate(**asked, do_sample=False, max_new_tokens=6)
    assert torch.equal(found, expected)
    assert not recomputes_layers(peft_model.base)
    assert recomputes_layers(FastLanguageModel.for_training(peft_model).base)


def test_training_by_trl_recomputes_layers_and_learns(fast_load: Load, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(fast_load(), r=4, use_gradient_checkpointing="unsloth")
    base = {name: weights.clone() for name, weights in model.named_parameters() if "lora_" not in name}
    warm_up = SFTTrainer(
        model=model,
        tokenizer=model.settings.tokenizer,
        train_dataset=[{"text": "red green blue"}] * 4,
        args=SFTConfig(str(tmp_path / "sft"), max_steps=2, learning_rate=1e-2, disable_tqdm=True),
    )
    warm_up.train()
    trainer = GRPOTrainer(
        model=model,
        processing_class=model.settings.tokenizer,
        reward_funcs=[lambda completions, **columns: [float(len(text) % 3) for text in completions]],
        args=GRPOConfig(
            str(tmp_path / "grpo"),
            max_steps=2,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            learning_rate=1e-2,
            vllm_sampling_params=SamplingParams(
                min_p=0.1, top_k=-1, seed=3407, stop=["<|im_end|>"], include_stop_str_in_output=True
            ),
            disable_tqdm=True,
        ),
        train_dataset=[{"prompt": "red"}, {"prompt": "blue"}],
    )
    assert warm_up.config.model.gradient_checkpointing
    assert trainer.config.model.gradient_checkpointing, "the first run leaves it on"
    assert (trainer.config.rollout.min_p, trainer.config.train.seed) == (0.1, 3407)
    trainer.train()
    assert trainer.model is model
    assert all(torch.equal(weights, base[name]) for name, weights in model.named_parameters() if name in base)
    assert all(bool(weights.any()) for name, weights in model.named_parameters() if "lora_B" in name)
    plain = FastLanguageModel.get_peft_model(fast_load(), r=4, use_gradient_checkpointing=False)
    assert not recomputes_layers(plain.base)


def test_the_adapters_seed_is_random_state(fast_load: Load) -> None:
    def first(**options: Any) -> torch.Tensor:
        made = FastLanguageModel.get_peft_model(fast_load(), r=4, **options)
        return next(weights for name, weights in made.named_parameters() if "lora_A" in name)

    assert torch.equal(first(random_state=1), first(random_state=1))
    assert not torch.equal(first(random_state=1), first())


def test_a_second_call_with_the_same_adapter_changes_nothing(
    peft_model: FastPeftModel, caplog: pytest.LogCaptureFixture
) -> None:
    same = {"r": 4, "lora_alpha": 8, "target_modules": ["down_proj", "q_proj"]}
    assert FastLanguageModel.get_peft_model(peft_model, **same) is peft_model
    assert "that adapter already" in caplog.text
    with pytest.raises(ConfigError, match="r = 8, but the model has an adapter already, with 4"):
        FastLanguageModel.get_peft_model(peft_model, **{**same, "r": 8})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "r = 0: expected a whole number above 0"),
        ({"r": True}, "r = True: expected a whole number above 0"),
        ({"lora_alpha": 0}, "lora_alpha = 0: expected a number above 0"),
        ({"lora_dropout": 2}, "lora_dropout = 2: expected a number from 0 to 1"),
        ({"target_modules": None}, "expected names of layers, or all-linear"),
        ({"use_gradient_checkpointing": "yes"}, "expected True, False or 'unsloth'"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes': expected True or False"),
        ({"random_state": None}, "random_state = None: expected a whole number"),
        ({"target_modules": ["q_proj", "nowhere"]}, "nowhere"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embedding or the head"),
        ({"bias": "all"}, "an adapter has no biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"loftq_config": {"bits": 4}}, "loftq_config"),
        ({"init_lora_weights": "pissa"}, "others change the base's weights"),
        ({"lora_alhpa": 3}, "did you mean lora_alpha?"),
    ],
)
def test_adapters_that_cannot_be_are_refused(fast_load: Load, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FastLanguageModel.get_peft_model(fast_load(), **options)
    assert says in str(caught.value)


def test_max_lora_rank_counts_with_fast_inference(fast_load: Load, peft_model: FastPeftModel, tmp_path: Path) -> None:
    bounded = fast_load(fast_inference=True, max_lora_rank=2)
    with pytest.raises(ConfigError, match="rank 4 is above max_lora_rank = 2"):
        FastLanguageModel.get_peft_model(bounded, r=4)
    small = FastLanguageModel.get_peft_model(bounded, r=2)
    peft_model.save_lora(tmp_path)
    with pytest.raises(ConfigError, match="rank 4 is above"):
        small.load_lora(tmp_path)
    assert FastLanguageModel.get_peft_model(fast_load(max_lora_rank=2), r=4)


def test_adapters_that_are_not_there_are_refused(fast_load: Load, peft_model: FastPeftModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no adapter"):
        peft_model.load_lora(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{ torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        peft_model.load_lora(tmp_path)
    with pytest.raises(ConfigError, match="the model has no adapter"):
        tokens(fast_load(), lora_request=object())
    for call in (FastLanguageModel.get_peft_model, FastLanguageModel.for_inference, FastLanguageModel.for_training):
        with pytest.raises(ConfigError, match="expected what FastLanguageModel"):
            call(torch.nn.Linear(2, 2))
    peft_model.save_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(
        ConfigError, match=r"load_lora: .*adapter_model.safetensors cannot be read: .*expected what model.save_lora"
    ):
        peft_model.load_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors"):
        peft_model.load_lora(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_name": None}, "got a NoneType; expected a folder or a Hub name"),
        ({"dtype": "float7"}, "dtype = 'float7': expected torch.bfloat16, torch.float32 or auto"),
        ({"dtype": torch.int8}, "dtype = torch.int8: expected"),
        ({"device_map": "cuda:x"}, "model.device = 'cuda:x' is no device"),
        ({"gpu_memory_utilization": 2}, "expected a number above 0, to 1"),
        ({"load_in_4bit": "yes"}, "load_in_4bit = 'yes': expected True or False"),
        ({"max_seq_length": 1.5}, "expected a whole number of tokens, 2 or more"),
        ({"max_lora_rank": 0}, "max_lora_rank = 0: expected a whole number above 0"),
        ({"quantization_config": 3}, "got a int; expected a BitsAndBytesConfig"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(fast_load: Load, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fast_load(**options)
    assert says in str(caught.value)


def test_its_tokenizer_gives_tokens_as_unsloths_programs_expect(tiny_folder: Path) -> None:
    """`len(tokenizer.apply_chat_template(messages))` has to be that of the conversation, which filters rely on."""
    _, tokenizer = FastLanguageModel.from_pretrained(str(tiny_folder), load_in_4bit=False)
    plain = AutoTokenizer.from_pretrained(tiny_folder)
    messages = [{"role": "user", "content": "red green"}]
    tokens_of = plain.apply_chat_template(messages)["input_ids"]
    assert tokenizer.apply_chat_template(messages) == tokens_of
    assert tokenizer.apply_chat_template([messages] * 2) == [tokens_of] * 2
    assert tokenizer.apply_chat_template(messages, return_tensors="pt").tolist() == [tokens_of]
    assert tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] == tokens_of
    assert tokenizer.apply_chat_template(messages, tokenize=False) == plain.decode(tokens_of)
    rows = Dataset.from_list([{"prompt": messages}] * 3)
    mapped = rows.map(lambda batch: {"tokens": tokenizer.apply_chat_template(batch["prompt"])}, batched=True)
    assert mapped["tokens"][:] == [tokens_of] * 3
    for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert again.apply_chat_template(messages) == tokens_of
    assert type(tokenizer).__name__ == type(plain).__name__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device_map": "cuda:7"}, "device_map = 'cuda:7': torch sees no GPU here"),
        ({"device_map": {"": 0}}, "no GPU here"),
        ({"attn_implementation": "flash_attention_2"}, "Groupwise's own packed attention"),
        ({"gpu_memory_utilization": 0.7}, "gpu_memory_utilization = 0.7 changes nothing here: there is no GPU"),
        ({"dtype": torch.float16}, "training computes in bfloat16"),
        ({"fast_inference": True}, "samples come from Groupwise's own engine"),
        ({"tensor_parallel_size": 8}, "one device samples"),
        ({"float8_kv_cache": True}, "keys and values have the weights' dtype"),
        ({"load_in_4bit": True, "full_finetuning": True}, "with full_finetuning the weights are trained"),
        ({"max_seq_length": 99_999}, "the model knows 4096 positions"),
    ],
)
def test_hardware_that_is_not_there_gives_a_sentence(
    fast_load: Load, caplog: pytest.LogCaptureFixture, options: dict[str, Any], says: str
) -> None:
    with caplog.at_level(logging.WARNING):
        model = fast_load(**options)
    assert says in caplog.text
    assert len(caplog.records) == 1
    assert tokens(model)


def test_four_bits_need_bitsandbytes(fast_load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("groupwise.compat.hardware.find_spec", lambda name: None)
    model = fast_load(load_in_4bit=True)
    assert "bitsandbytes is not installed, so the weights have 16 bits, or 32 on a CPU" in caplog.text
    assert model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def test_four_bits_are_trained_and_saved_where_they_can_be(fast_load: Load, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = FastLanguageModel.get_peft_model(fast_load(load_in_4bit=True), r=8)
    assert model.base.is_loaded_in_4bit
    rows = [{"text": "red green blue"}] * 2
    SFTTrainer(model, SFTConfig(str(tmp_path / "out"), max_steps=1, disable_tqdm=True), train_dataset=rows).train()
    assert tokens(model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"load_in_8bit": True}, "use load_in_4bit"),
        ({"quantization_config": {"load_in_8bit": True}}, "use load_in_4bit"),
        ({"token": "hf_x"}, "set HF_TOKEN"),
        ({"revision": "main"}, "hf download --revision"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"max_seq_len": 5}, "did you mean max_seq_length?"),
        ({"max_seq_length": 1}, "max_seq_length = 1: expected"),
        ({"model_name": "./nowhere"}, "is no folder"),
    ],
)
def test_loading_refuses_what_cannot_act(fast_load: Load, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fast_load(**options)
    assert says in str(caught.value)


def test_full_finetuning_needs_no_adapter(fast_load: Load, caplog: pytest.LogCaptureFixture) -> None:
    model = fast_load(full_finetuning=True)
    assert FastLanguageModel.get_peft_model(model, r=4) is model
    assert "get_peft_model changes nothing" in caplog.text
    assert all(weights.requires_grad for weights in model.parameters())


def test_every_argument_is_in_the_docs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "migrate.md").read_text(encoding="utf-8")
    section = page.partition("\n## Unsloth\n")[2].partition("\n## ")[0]
    for table in (LOADING, ADAPTER, SAVING):
        missing = [name for name in table if f"`{name}`" not in section and f"`{name}=" not in section]
        assert not missing
