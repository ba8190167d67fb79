from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groupwise.data import (
    EncodedConversation,
    encode_conversation,
    encode_text,
    encode_text_pair,
    render,
    set_chat_template,
)
from groupwise.errors import ConfigError, DataError


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def learned(encoded: EncodedConversation, tokenizer: Any) -> str:
    ids = [token for token, loss in zip(encoded.token_ids, encoded.loss_mask, strict=True) if loss]
    return tokenizer.decode(ids)


def test_one_turn_learns_the_answer_and_its_end_and_nothing_else(tokenizer: Any) -> None:
    encoded = encode_conversation(turns("2+2?", "four"), tokenizer, template_kwargs={})
    assert tokenizer.decode(encoded.prompt_ids) == render(turns("2+2?"), tokenizer, template_kwargs={})
    assert tokenizer.decode(encoded.token_ids) == "four<|im_end|>"
    assert encoded.token_ids[-1] == tokenizer.eos_token_id
    assert set(encoded.loss_mask) == {1}


def test_the_prompt_is_the_one_met_when_sampling_even_where_tokens_would_merge(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    messages = turns("why?", "\n\nbecause")
    prompt = render(messages[:1], tokenizer, template_kwargs={})
    whole = render(messages, tokenizer, template_kwargs={}, add_generation_prompt=False)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    merged = tokenizer.encode(whole, add_special_tokens=False)
    assert merged[: len(prompt_ids)] != prompt_ids, "the test needs a merge over the border"
    encoded = encode_conversation(messages, tokenizer, template_kwargs={})
    assert list(encoded.prompt_ids) == prompt_ids
    assert tokenizer.decode(encoded.token_ids) == "\n\nbecause<|im_end|>"


def test_answers_are_encoded_in_their_place_by_tokenizers_that_put_a_space_before_any_text() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Like Llama's: a space mark comes first in whatever text is encoded, but not after the prompt.
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz[]?:"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    spaced: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    spaced.chat_template = "{% for m in messages %}{{ '[' if m.role == 'user' else ']' }}{{ m.content }}{% endfor %}"
    spaced.chat_template += "{% if add_generation_prompt %}]{% endif %}"
    assert spaced.encode("one")[0] == vocab["\u2581"], "the test needs the mark"
    encoded = encode_conversation(turns("a?", "one"), spaced, template_kwargs={})
    assert encoded.token_ids == (*(vocab[letter] for letter in "one"), vocab["</s>"])
    pair = encode_text_pair("a?:", "one", tokenizer=spaced)
    assert pair.token_ids == encoded.token_ids


def test_several_turns_mask_what_the_user_says(tokenizer: Any) -> None:
    encoded = encode_conversation(turns("a?", "one", "b?", "two"), tokenizer, template_kwargs={})
    assert learned(encoded, tokenizer) == "one<|im_end|>two<|im_end|>"
    text = "one<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    assert tokenizer.decode(encoded.token_ids) == text


def test_context_turns_are_part_of_the_prompt(tokenizer: Any) -> None:
    encoded = encode_conversation(turns("a?", "one", "b?", "two"), tokenizer, template_kwargs={}, num_context=3)
    assert learned(encoded, tokenizer) == "two<|im_end|>"
    assert "one" in tokenizer.decode(encoded.prompt_ids)


def test_dropped_thoughts_leave_earlier_turns_without_loss(thinking: Any) -> None:
    messages = turns("a?", "<think>\nhm\n</think>\n\none", "b?", "<think>\nso\n</think>\n\ntwo")
    encoded = encode_conversation(messages, thinking, template_kwargs={})
    assert learned(encoded, thinking) == "<think>\nso\n</think>\n\ntwo<|im_end|>"
    assert encoded.num_untrained_turns == 1
    assert "hm" not in thinking.decode(encoded.prompt_ids)
    assert thinking.decode(encoded.prompt_ids) == render(messages[:3], thinking, template_kwargs={})


def test_an_empty_thought_that_the_template_writes_is_learned(thinking: Any) -> None:
    encoded = encode_conversation(turns("a?", "one"), thinking, template_kwargs={})
    assert learned(encoded, thinking) == "<think>\n\n</think>\n\none<|im_end|>"


def test_unstable_last_turn_is_refused(tokenizer: Any) -> None:
    # The prompt opens a thought that the rendered conversation does not have.
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    with pytest.raises(DataError, match=r"cannot be told apart; set model\.chat_template"):
        encode_conversation(turns("a?", "one"), tokenizer, template_kwargs={})


def test_a_template_without_end_of_turn_gets_the_end_token(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    encoded = encode_conversation(turns("a?", "one"), tokenizer, template_kwargs={})
    assert tokenizer.decode(encoded.token_ids) == "one<|im_end|>"
    assert encoded.loss_mask[-1] == 1
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="nothing ends the answers"):
        encode_conversation(turns("a?", "one"), tokenizer, template_kwargs={})


@pytest.mark.parametrize(
    ("messages", "message"),
    [([], "nothing to learn"), (turns("a?"), "nothing to learn"), (turns("a?", "b")[1:], "begins with the assistant")],
)
def test_conversations_with_nothing_to_learn(tokenizer: Any, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_conversation(messages, tokenizer, template_kwargs={})


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), min_size=1).filter(str.strip)


@given(contents=st.lists(TEXT, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_loss_covers_exactly_what_the_assistant_says(tokenizer: Any, contents: list[str]) -> None:
    messages = turns(*contents)
    encoded = encode_conversation(messages, tokenizer, template_kwargs={})
    assert encoded.num_untrained_turns == 0
    assert learned(encoded, tokenizer) == "".join(f"{content.strip()}<|im_end|>" for content in contents[1::2])
    whole = render(messages, tokenizer, template_kwargs={}, add_generation_prompt=False)
    assert tokenizer.decode([*encoded.prompt_ids, *encoded.token_ids]) == whole.removesuffix("\n")


def test_text_pairs_end_with_the_end_token_once(bare: Any) -> None:
    encoded = encode_text_pair("2+2=", " four", tokenizer=bare)
    assert encoded.prompt_ids == encode_text("2+2=", bare)
    assert encoded.prompt_ids[0] == bare.bos_token_id
    assert bare.decode(encoded.token_ids) == " four<|im_end|>"
    assert encode_text_pair("2+2=", " four<|im_end|>", tokenizer=bare) == encoded
    assert set(encoded.loss_mask) == {1}


def test_an_appended_end_token_is_taken_off_prompts(bare: Any) -> None:
    from tokenizers import processors

    backend = bare.backend_tokenizer
    special = [("<|bos|>", 0), ("<|im_end|>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|im_end|>", special_tokens=special)
    assert bare.encode("two")[-1] == bare.eos_token_id
    assert bare.decode(encode_text("two", bare)) == "<|bos|>two"
    assert bare.decode(encode_text("two<|im_end|>", bare)).endswith("two<|im_end|>")


def test_chat_template_from_text_and_file(bare: Any, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    set_chat_template(bare, template)
    assert render(turns("é"), bare, template_kwargs={}) == "é;"
    path = tmp_path / "chat.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + template.replace(";", "!").encode())
    set_chat_template(bare, str(path))
    assert render(turns("é"), bare, template_kwargs={}) == "é!"


def test_a_template_that_refuses_the_probe_is_kept(bare: Any) -> None:
    set_chat_template(bare, "{% if messages | length < 2 %}{{ raise_exception('two!') }}{% endif %}ok")
    assert render(turns("a", "b"), bare, template_kwargs={}) == "ok"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "not valid Jinja: line 1"),
        ("chat.jnja", r"neither a Jinja template nor a file: chat\.jnja"),
        ("", "neither a Jinja template nor a file"),
    ],
)
def test_bad_chat_templates(bare: Any, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_chat_template(bare, template)


def test_bad_chat_template_files(bare: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"\n")
    with pytest.raises(ConfigError, match="is empty"):
        set_chat_template(bare, tmp_path / "chat.jinja")
    with pytest.raises(ConfigError, match=r'did you mean "chat\.jinja"'):
        set_chat_template(bare, tmp_path / "caht.jinja")
    (tmp_path / "chat.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        set_chat_template(bare, tmp_path / "chat.jinja")


def test_rendering_without_a_template(bare: Any) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        render(turns("a"), bare, template_kwargs={})
