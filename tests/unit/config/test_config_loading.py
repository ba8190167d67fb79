from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.config import Config
from groupwise.config.keys import OTHER_NAMES, annotation_of, describe_keys, nearest_key
from groupwise.config.loading import config_json, load_config, parse_overrides, render_resolved, settings
from groupwise.config.reference import render_reference
from groupwise.config.values import default_text, literal, parse_literal
from groupwise.errors import ConfigError

RECIPE = """
[model]
path = "some/model"
[data]
train = "train.jsonl"
[[reward]]
name = "gsm8k"
[[reward]]
name = "format"
weight = 0.5
args = {pattern = "x+", deep = {a = 1}}
[optim]
lr = 1e-5
betas = [0.9, 0.95]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    return str(caught.value)


def test_defaults_alone_are_the_defaults():
    loaded = load_config()
    assert loaded.config == Config()  # pyright: ignore[reportCallIssue]
    assert set(loaded.origins.values()) == {"default"}
    assert set(loaded.origins) == set(settings(Config()))  # pyright: ignore[reportCallIssue]


def test_a_setting_that_went_is_read_where_it_meant_nothing(tmp_path: Path):
    """Earlier versions wrote `train.max_off_policy_steps = 0`, its one legal value, into every run's config.json."""
    old = json.loads(config_json(Config()))  # pyright: ignore[reportCallIssue]
    del old["train"]["keep_best"]
    old["train"]["max_off_policy_steps"] = 0
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load_config(tmp_path / "config.json").config == Config()  # pyright: ignore[reportCallIssue]
    old["train"]["max_off_policy_steps"] = 1
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert "train.max_off_policy_steps" in refusal(tmp_path / "config.json")
    assert "no such setting" in refusal(None, ["--train.max_off_policy_steps", "0"])


def test_file_then_command_line_and_their_origins(recipe: Path):
    loaded = load_config(recipe, ["--optim.lr", "1e-6", "--reward.1.weight=2", "--reward.1.args.pattern", "y"])
    assert loaded.config.optim.lr == 1e-6
    assert loaded.config.optim.betas == (0.9, 0.95)
    assert [reward.weight for reward in loaded.config.reward] == [1.0, 2.0]
    assert loaded.config.reward[1].args == {"pattern": "y", "deep": {"a": 1}}
    assert loaded.origins["optim.lr"] == "command line"
    assert loaded.origins["optim.betas"] == str(recipe)
    assert loaded.origins["reward.0.name"] == str(recipe)
    assert loaded.origins["reward.0.weight"] == "default"
    assert loaded.origins["reward.1.weight"] == "command line"
    assert loaded.origins["reward.1.args"] == f"{recipe} + command line"
    assert loaded.origins["train.seed"] == "default"


def test_later_files_win_key_by_key_and_replace_lists(recipe: Path, tmp_path: Path):
    second = tmp_path / "more.toml"
    second.write_text('[optim]\nlr = 3e-6\n[[reward]]\nname = "other"\n', encoding="utf-8")
    loaded = load_config([recipe, second])
    assert loaded.config.optim.lr == 3e-6
    assert loaded.config.optim.betas == (0.9, 0.95)
    assert [reward.name for reward in loaded.config.reward] == ["other"]
    assert loaded.origins["reward.0.name"] == str(second)
    assert loaded.origins["reward.0.weight"] == "default"


@pytest.mark.parametrize(
    ("words", "dotted", "expected"),
    [
        (["--rollout.stop", '["\\n\\n", "END"]'], "rollout.stop", ("\n\n", "END")),
        (["--rollout.stop", "['a,b']"], "rollout.stop", ("a,b",)),
        (["--rollout.stop=END,</s>"], "rollout.stop", ("END", "</s>")),
        (["--rollout.stop="], "rollout.stop", ()),
        (["--rollout.stop_token_ids", "1, 2"], "rollout.stop_token_ids", (1, 2)),
        (["--rollout.stop_token_ids", "[3]"], "rollout.stop_token_ids", (3,)),
        (["--optim.betas", "0.8,0.9"], "optim.betas", (0.8, 0.9)),
        (["--data.shuffle", "false"], "data.shuffle", False),
        (["--data.shuffle"], "data.shuffle", True),
        (["--data.shuffle", "--train.seed", "3"], "train.seed", 3),
        (["--train.steps", "none"], "train.steps", None),
        (["--data.system_prompt", "null"], "data.system_prompt", None),
        (["--model.path", "none"], "model.path", "none"),
        (["--model.path", "123"], "model.path", "123"),
        (["--model.path", "true"], "model.path", "true"),
        (["--data.system_prompt", "[1, 2]"], "data.system_prompt", "[1, 2]"),
        (["--data.system_prompt", "größer = 数学 🙂 = x"], "data.system_prompt", "größer = 数学 🙂 = x"),
        (["--data.system_prompt=--x"], "data.system_prompt", "--x"),
        (
            ["--data.chat_template_kwargs", "{enable_thinking = false}"],
            "data.chat_template_kwargs",
            {"enable_thinking": False},
        ),
        (["--data.chat_template_kwargs.a", "7"], "data.chat_template_kwargs", {"a": 7}),
        (["--data.chat_template_kwargs.a", "seven"], "data.chat_template_kwargs", {"a": "seven"}),
        (["--reward.0.name", "x", "--reward.0.weight", "-2"], "reward.0.weight", -2.0),
        (["--reward", '[{"name": "x", "weight": 3}]'], "reward.0.weight", 3.0),
        (["--reward.0", '{name = "x"}'], "reward.0.name", "x"),
        (["--optim.lr", "1e-6", "--optim.lr", "2e-6"], "optim.lr", 2e-6),
    ],
)
def test_words_of_the_command_line(words: list[str], dotted: str, expected: object):
    loaded = load_config(None, words)
    assert settings(loaded.config)[dotted] == expected
    assert loaded.origins[dotted] == "command line"


def test_python_values_as_overrides_are_not_altered():
    rewards = [{"name": "a"}]
    loaded = load_config(None, {"reward": rewards, "reward.0.weight": 2, "optim.lr": "1e-6"})
    assert loaded.config.reward[0].weight == 2
    assert loaded.config.optim.lr == 1e-6
    assert rewards == [{"name": "a"}]
    assert loaded.origins["reward.0.timeout"] == "default"


@pytest.mark.parametrize(
    ("dotted", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("optim.beta", "optim.betas"),
        ("algorithm.beta", "algorithm.kl.coef"),
        ("num_generations", "rollout.group_size"),
        ("rollout.groupsize", "rollout.group_size"),
        ("rewards.0.name", "reward.0.name"),
        ("reward.3.wieght", "reward.3.weight"),
        ("train.lr", "optim.lr"),
        ("trian.steps", "train.steps"),
        ("data.max_prompt_length", "data.max_prompt_tokens"),
        ("temperature", "rollout.temperature"),
    ],
)
def test_unknown_names_get_the_nearest(dotted: str, meant: str):
    assert f"`{meant}`" in nearest_key(dotted)
    assert f"`{meant}`" in refusal(None, [f"--{dotted}", "1"])


def test_an_unknown_name_near_to_nothing_lists_what_there_is(tmp_path: Path):
    assert "weight_decay" in nearest_key("optim.qqqqqq")
    path = tmp_path / "r.toml"
    path.write_text("[zzz]\nq = 1\n")
    assert "the sections are model, lora, data" in refusal(path)


def test_other_names_lead_to_names_that_exist():
    names = {key.name for key in describe_keys()}
    assert set(OTHER_NAMES.values()) <= names


def test_everything_wrong_is_reported_at_once_with_name_value_and_origin(tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text(
        '[optim]\nlr = -1\nschedule = "cosin"\nbetas = [0.1]\n[train]\nseed = true\nsteps = 1.5\n'
        '[rollout]\nstop = "x"\ntop_p = nan\n[[reward]]\nargs = {x = inf}\n[model]\npth = 3\n'
    )
    text = refusal(path, ["--data.max_prompt_tokens", "many", "--nonsense.key", "1"])
    assert f"optim.lr ({path}): got -1; expected a number above 0" in text
    assert "did you mean 'cosine'?" in text
    assert "optim.betas" in text
    assert "a list of 2 numbers" in text
    assert "train.seed" in text
    assert "got true; expected a whole number" in text
    assert "train.steps" in text
    assert "rollout.stop" in text
    assert "a list of text" in text
    assert "rollout.top_p" in text
    assert "reward.0.args.x" in text
    assert "got inf; expected a finite number" in text
    assert "reward.0.name" in text
    assert "did you mean `model.path`?" in text
    assert 'data.max_prompt_tokens (command line): got "many"; expected a whole number' in text
    assert "nonsense.key (command line)" in text


def test_settings_that_contradict_each_other_are_refused():
    assert "lower the first" in refusal(None, ["--rollout.min_completion_tokens", "600"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["optim.lr", "1"], "expected `--section.key value`"),
        (["--optim.lr"], "without a value"),
        (["--"], "expected `--section.key value`"),
        (["--reward.1.name", "x"], "there are 0 entries"),
        (["--reward.N.name", "x"], "a list of tables"),
        (["--reward.-1.name", "x"], "reward.-1.name"),
        (["--reward", "gsm8k"], "list of tables"),
        (["--optim", "adamw"], "it is a section"),
        (["--data.chat_template_kwargs", "yes"], "expected a table"),
        (["--data.chat_template_kwargs", "{"], "literal"),
        (["--rollout.stop", '["a"'], "literal"),
        (["--rollout.stop", "[" * 100_000], "literal"),
        (["--rollout.stop_token_ids", "1,x"], "a whole number"),
        (["--data.system_prompt", "\udcff"], "valid UTF-8"),
        (["--model.path.x", "1"], "no such setting"),
        (["--optim..lr", "1"], "no such setting"),
        (["--data.chat_template_kwargs.a=1\nb=2"], "no problem here"),
    ],
)
def test_bad_words(words: list[str], part: str):
    if part == "no problem here":
        assert load_config(None, words).config.data.chat_template_kwargs == {"a": "1\nb=2"}
    else:
        assert part in refusal(None, words)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[model\npath = 3", "not TOML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"model = 3\n", "a table with the section's keys"),
        (b'reward = {name = "x"}\n', "each under [[reward]]"),
        (b"[model]\npath = 1\n", "got 1; expected text"),
        (b'[model]\npath = "a"\npath = "b"\n', "not TOML"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, part: str):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    text = refusal(path)
    assert part in text
    assert str(path) in text


def test_empty_file_bom_and_crlf(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"")
    assert load_config(path).config == Config()  # pyright: ignore[reportCallIssue]
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nseed = 4\r\n")
    assert load_config(path).config.train.seed == 4


def test_missing_file_folder_and_unreadable_json(tmp_path: Path, recipe: Path):
    assert f"did you mean {recipe}?" in refusal(tmp_path / "recipes.toml")
    assert "no such file" in refusal(tmp_path / "nowhere" / "x.toml")
    assert "got a folder" in refusal(tmp_path)
    array = tmp_path / "config.json"
    array.write_text("[1]")
    assert "got a JSON list" in refusal(array)


def test_config_json_is_stable_and_loads_back(recipe: Path, tmp_path: Path):
    config = load_config(recipe).config
    text = config_json(config)
    other = load_config(None, {"reward.0.args": {"b": 1, "a": 2}, "reward.0.name": "x"}).config
    same = load_config(None, {"reward.0.args": {"a": 2, "b": 1}, "reward.0.name": "x"}).config
    assert config_json(other) == config_json(same)
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    assert load_config(path).config == config
    assert json.loads(text)["optim"]["betas"] == [0.9, 0.95]


def test_the_listing_has_every_value_with_its_origin_and_loads_back(recipe: Path, tmp_path: Path):
    loaded = load_config(
        recipe, ["--rollout.stop", '["\\n\\"\\u007f"]', "--data.system_prompt", "Größe: 'x' # no comment"]
    )
    text = render_resolved(loaded)
    path = tmp_path / "again.toml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path).config == loaded.config
    for dotted in loaded.origins:
        key = dotted.rpartition(".")[2]
        assert any(line.removeprefix("# ").startswith(f"{key} = ") for line in text.splitlines()), dotted
    assert any(line.startswith("lr = 1e-05") and line.endswith(f"# {recipe}") for line in text.splitlines())
    assert "# steps = none" in text


def test_every_key_is_found_by_its_own_name():
    for key in describe_keys():
        assert annotation_of(key.name.replace(".N.", ".2.")) == key.annotation


@given(
    st.recursive(
        st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_literals_come_back(value: object):
    assert parse_literal(literal(value)) == value


@given(st.text(min_size=1))
def test_any_text_survives_as_a_text_setting(text: str):
    assert load_config(None, [f"--model.path={text}"]).config.model.path == text


def test_parse_overrides_gives_plain_texts():
    assert parse_overrides(["--optim.lr", "1e-6", "--data.shuffle", "--model.path=a=b"]) == {
        "optim.lr": "1e-6",
        "data.shuffle": "true",
        "model.path": "a=b",
    }


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[3] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == render_reference(), "run `make docs`"


def test_loading_needs_no_torch(tmp_path: Path):
    code = (
        "import sys, groupwise.config.loading, groupwise.config.checks, groupwise.config.reference, groupwise.files\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    root = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})


# --- parts of the algorithm ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--algorithm.loss.name gpso", "algorithm.loss.name (command line): got \"gpso\"; expected one of 'ppo_clip',"),
        ("--algorithm.loss.name gpso", "(did you mean 'gspo'?)"),
        (
            "--algorithm.name sapo --algorithm.loss.clip_low 0.2",
            "algorithm.loss.clip_low (command line): got '0.2', which has no effect with name = sapo; remove it, or "
            "set name to ppo_clip, gspo, gspo_token, cispo or gmpo",
        ),
        (
            "--algorithm.reference.mixup 0.5",
            "algorithm.reference.mixup (command line): got '0.5', which has no effect with sync_every = 0; remove it, "
            "or set sync_every to 1 or more",
        ),
        ("--algorithm.loss.clip_lw 0.1", "there is no such setting; did you mean `algorithm.loss.clip_low`?"),
        ("--algorithm.clip_lw 0.1", "there is no such setting; did you mean `algorithm.loss.clip_low`?"),
        ("--algorithm.loss.clip_low -1", 'algorithm.loss.clip_low (command line): got "-1"; expected at least 0'),
        ("--algorithm.advantage.scale batc", "expected 'group', 'batch' or 'none' (did you mean 'batch'?)"),
        (
            "--algorithm.name grop",
            "algorithm.name (command line): got 'grop', which does not exist; did you mean 'grpo'",
        ),
        ("--algorithm.kl.place reward", "algorithm.kl.place (command line): got 'reward', which has no effect with"),
        ("--algorithm.kl.coef true", 'algorithm.kl.coef (command line): got "true"; expected a number'),
        ("--algorithm.kl 0.1", 'algorithm.kl (command line): got "0.1"; expected a table'),
    ],
)
def test_a_part_refuses_by_the_keys_full_name_and_origin(words: str, expected: str):
    assert expected in refusal(None, words.split())


@pytest.mark.parametrize(
    "words",
    [
        "--algorithm.name sapo --algorithm.kl.coef 0.1 --algorithm.kl.place reward --algorithm.reference.sync_every 3",
        "--algorithm.name gspo --algorithm.correction.name mask --algorithm.entropy.target 0.3",
        "--algorithm.name pass_k --algorithm.loss.name reinforce",
        "--algorithm.advantage.scale none --algorithm.reference.sync_every 0 --algorithm.entropy.target none",
    ],
)
def test_the_shown_config_with_any_parts_is_a_recipe_of_the_same(words: str, tmp_path: Path):
    loaded = load_config(None, words.split())
    recipe, run = tmp_path / "r.toml", tmp_path / "config.json"
    recipe.write_text(render_resolved(loaded))
    run.write_text(config_json(loaded.config))
    assert load_config(recipe).config == loaded.config == load_config(run).config
    assert set(loaded.origins) == set(settings(loaded.config))


def test_a_key_of_several_parts_has_all_their_defaults():
    keys = {key.name: key for key in describe_keys()}
    assert default_text(keys["algorithm.kl.estimator"]) == '"k3" with loss, "k1" with reward'
    assert default_text(keys["algorithm.loss.clip_low"]).startswith("0.2 with ppo_clip, 0.0003 with gspo/gspo_token")
    assert keys["algorithm.loss.dual_clip"].description.startswith("name = ppo_clip: ")
    assert keys["algorithm.entropy.target"].type_text == "number or none"
    assert default_text(keys["algorithm.loss.name"]) == '"ppo_clip"'
