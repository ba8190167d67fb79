"""Arguments, messages and exit codes of the command, in this process where nothing heavy loads, else in a fresh one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groupwise import __version__
from groupwise.cli import main
from groupwise.cli.app import COMMANDS
from groupwise.cli.commands import quickstart
from groupwise.cli.parsing import Command, split_overrides
from groupwise.errors import EngineError, Interrupted

ROWS = '{"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}\n{"prompt": "3+3?", "answer": "6"}\n'


def run_fresh(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "groupwise.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **kwargs)  # type: ignore[call-overload]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


# --- start-up ---


def test_help_is_fast_and_lists_every_command() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = run_fresh("--help")
        seconds.append(time.perf_counter() - started)
        assert result.returncode == 0
        assert all(command.name in result.stdout for command in COMMANDS)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([*c.name.split(), "--help"] for c in COMMANDS), ["config"], ["algorithms"]],
)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy"}
    if "--help" in arguments:
        heavy.add("pydantic")
    code = (
        "import sys\nfrom groupwise.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as e: assert not e.code\n"
        f"print('LOADED', sorted({heavy!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "LOADED []" in result.stdout


def test_what_a_name_shows_is_refused_without_torch(training: list[str]) -> None:
    arguments = ["train", *training, "--data", "no-such.jsonl", "--dry-run"]
    code = f"import sys\nfrom groupwise.cli import main\nprint(main({arguments!r}), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.endswith("2 False\n"), result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_command_has_help(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*command.name.split(), "--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: groupwise {command.name}")
    assert command.summary in " ".join(out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"groupwise {__version__}\n"


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "`train`"),
        (["evaluate"], "`eval`"),
        (["zzz"], "groupwise --help"),
        (["--verzion"], "`--version`"),
        ([""], "no command"),
        ([], "no command"),
        (["data"], "data gsm8k"),
        (["data", "stat"], "`stats`"),
        (["data", "zzz"], "gsm8k or stats"),
        (["model", "tini"], "`tiny`"),
        (["eval", "m", "--dat", "f"], "`--data`"),
        (["generate", "m", "--max-token", "3"], "`--max-tokens`"),
        (["generate", "m"], "--prompt"),
        (["generate", "m", "--prompt", "x", "-k", "3"], "no flag -k"),
        (["generate", "m", "--prompt", "x", "-n", "0"], "at least 1"),
        (["generate", "m", "--prompt", "x", "-n", "zwei"], "'zwei'"),
        (["model", "tiny", "--out", "o", "--tokenizer-from", "f", "--seed", "-1"], "at least 0"),
        (["model", "tiny", "--out", "o", "--tokenizer-from", "f", "--size", "5.8"], "5.8m"),
        (["model", "tiny", "--out", "o", "--tokenizer-from", "no-such-file.txt"], "no-such-file.txt"),
        (["data", "gsm8k", "--input-dir", "no-such-dir", "--out-dir", "o"], "no-such-dir"),
        (["data", "stats", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["config", "optimizer"], "optim"),
        (["algorithms", "grpo"], "grpo"),
        (["train", "no-such.toml"], "no-such.toml"),
        (["train", "a.toml", "b.toml"], "b.toml"),
        (["train", "--resume", "--overwrite"], "not allowed with"),
        (["eval", "./no-such-model", "--data", "f", "--reward", "gsm8k"], "./no-such-model"),
        (["generate", ".", "--prompt", "x"], "config.json"),
        (["generate", "m", "--prompt", ""], "prompt is empty"),
        (["generate", "m", "--prompt", "x", "--raw", "--system", "y"], "--system"),
        (["generate", "m", "--prompt", "x", "--temperature", "-1"], "rollout.temperature"),
        (["generate", "m", "--prompt", "x", "--optim.lr", "1"], "no effect in `groupwise generate`"),
        (["generate", "m", "--prompt", "x", "--model.devise", "cpu"], "model.device"),
        (["eval", "m", "--reward", "gsm8k"], "--data FILE"),
        (["eval", "m", "--data", "f"], "--reward NAME"),
        (["eval", "m", "--data", "f", "--reward", "gsm8k", "--samples", "4"], "temperature 0"),
        (["eval", "m", "--data", "f", "--reward", "gsm8k", "--rollout.engine", "nativ"], "'native'"),
        (["eval", "m", "--data", "f", "--reward", "gsm8k", "--rollout.group_size", "4"], "no effect"),
        (["eval", "m", "--data", "f", "--reward", "gsm8kk"], "gsm8k"),
        (["eval", "m", "--data", "no-such.jsonl", "--reward", "gsm8k"], "no-such.jsonl"),
    ],
)
def test_refusals_say_what_was_meant(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", "1e-6"], "`--optim.lr`"),
        (["--num-generations", "8"], "`--rollout.group_size`"),
        (["--outptu", "x"], "`--output`"),
        (["--optim.learning_rate", "1e-6"], "optim.lr"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.lr"], "without a value"),
        (["--seed", "-3"], "train.seed"),
        (["--reward", "gsm8kk"], "gsm8k"),
        (["--rollout.engine", "vlm"], "native"),
        (["--algorithm.name", "grop"], "grpo"),
        (["--rollout.group_size", "1"], "group_size"),
        (["--data", "no-such.jsonl"], "no-such.jsonl"),
        (["--model", "./no-such-model"], "./no-such-model"),
    ],
)
def test_train_refuses_before_it_loads(
    training: list[str], arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, "train", *training, *arguments, "--dry-run")


@pytest.mark.parametrize("content", ["", "{broken\n", '{"question": "?"}\n', '{"prompt": ""}\n', "[1]\n"])
def test_dry_run_reads_the_data(training: list[str], content: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(training[3]).write_text(content)
    assert "train.jsonl" in refused(capsys, "train", *training, "--dry-run")


def test_a_broken_recipe_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    for content in (b"[optim\nlr = 1", b"\xff\xfe", b'[optim]\nlr = "a"', b"[optim]\nlearning_rate = 1"):
        recipe.write_bytes(content)
        assert "r.toml" in refused(capsys, "train", str(recipe), "--dry-run")


# --- what the flags mean ---


def test_dry_run_shows_each_value_and_its_origin(
    training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[optim]\nlr = 1e-5\n[train]\nseed = 4\n[[reward]]\nname = "format"\nweight = 3.0\n')
    flags = ["--seed", "7", "--rollout.stop", '["\\n\\n", "--x"]', "--reward", "format", "--data.shuffle=false"]
    arguments = ["train", str(recipe), *training, *flags, "--dry-run"]
    assert main(arguments) == 0
    given = capsys.readouterr().out
    assert "lr = 1e-05" in given
    assert "# default" not in given
    assert "[algorithm.kl]" not in given
    assert "goes with --dry-run" in refused(capsys, *arguments[:-1], "--all")
    assert main([*arguments, "--all"]) == 0
    lines = [line.split("  #") for line in capsys.readouterr().out.splitlines() if "  #" in line]
    shown = {line[0].strip(): line[1].strip() for line in lines}
    assert shown["lr = 1e-05"] == str(recipe)
    assert shown["seed = 7"] == "command line"
    assert shown["shuffle = false"] == "command line"
    assert shown['stop = ["\\n\\n", "--x"]'] == "command line"
    assert shown["group_size = 8"] == "default"
    assert 'name = "gsm8k"' in shown, "--reward replaces the recipe's rewards, in order"
    assert 'name = "format"' in shown
    assert "weight = 3.0" not in shown


def test_dry_run_ends_with_the_rows_that_were_read(training: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *training, "--eval-data", training[3], "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert "train.jsonl: 2 prompts of" in lines[0]
    assert lines[1] == "# 1 steps of 32 prompts"
    assert lines[2].endswith("model-train: a new run")
    assert main(["train", *training, "--eval-data", training[3], "--eval.every", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("train.jsonl: 2 prompts of") == 2


def test_sft_needs_no_reward_but_answers(training: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", *training[:4], "--data.answer_column", "answer", "--dry-run"]) == 0
    capsys.readouterr()
    assert "train.jsonl" in refused(capsys, "sft", *training[:4], "--dry-run")


def test_aliases(training: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    aliased = ["--model-path", training[1], "--data-path", training[3], *training[4:]]
    assert main(["train", *aliased, "--dry-run"]) == 0
    assert training[1] in capsys.readouterr().out


def test_resume_without_recipe_takes_the_runs_own_config(
    training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from groupwise.config.loading import config_json, load_config

    run = tmp_path / "run"
    run.mkdir()
    words = [f"--{key}={value}" for key, value in (("model.path", training[1]), ("data.train", training[3]))]
    config = load_config(None, [*words, '--reward=[{"name": "gsm8k"}]', "--optim.lr=0.003"]).config
    (run / "config.json").write_text(config_json(config))
    refusal = refused(capsys, "train", "--output", str(run), "--resume", "--optim.lr", "0.004", "--dry-run")
    assert "optim.lr: was 0.003, now 0.004" in refusal
    assert main(["train", "--output", str(run), "--resume", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"# {run}: the run begins again; none was saved\n")
    assert "lr = 0.003" in out
    assert "lr = 1e-06" not in out


def test_split_overrides_takes_only_dotted_keys() -> None:
    rest, overrides = split_overrides(
        [
            "a.toml",
            "--optim.lr",
            "1e-6",
            "--seed",
            "3",
            "--x.y=1=2",
            "--data.shuffle",
            "--resume",
            "--a.b",
            "-1",
            "--c.d=",
        ]
    )
    assert rest == ["a.toml", "--seed", "3", "--resume"]
    assert overrides == ["--optim.lr=1e-6", "--x.y=1=2", "--data.shuffle", "--a.b=-1", "--c.d="]


# --- listings ---


def test_config_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    from groupwise.config.keys import describe_keys

    assert main(["config"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{key.name} " in f"\n{out}" for key in describe_keys())
    assert "rollout.group_size = 8  (whole number)\n    G, samples per prompt" in out
    assert main(["config", "optim"]) == 0
    assert all(line.startswith(("optim.", "    ")) for line in capsys.readouterr().out.splitlines())


def test_algorithms_lists_each_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms"]) == 0
    out = capsys.readouterr().out
    assert "\ndr_grpo " in out
    assert "arXiv:2402.03300" in out


# --- failures while a command runs ---


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineError("engine lost"), 1, "error: engine lost\n"),
        (Interrupted("saved step 3"), 130, "saved step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero\n"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "x"), 1, "error: UnicodeEncodeError"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(args: object) -> None:
        raise error

    failing = Command(name="quickstart", summary="", add_arguments=quickstart.QUICKSTART.add_arguments, run=fail)
    monkeypatch.setattr("groupwise.cli.app.COMMANDS", (failing,))
    assert main(["quickstart"]) == code
    plain = capsys.readouterr().err
    assert plain.startswith(message)
    assert "Traceback" not in plain
    assert main(["quickstart", "--debug"]) == code
    if code == 1:
        assert "Traceback" in capsys.readouterr().err


def test_process_exit_code_and_streams() -> None:
    result = run_fresh("trian")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown command 'trian'; did you mean `train`?\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m groupwise.cli config | head -n 1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("model.path")
    assert result.stderr == ""


@pytest.mark.parametrize(
    "word",
    [
        *("--reward=gsm8k", "--eval-data=t.jsonl", "--rollout.group_size=4", "--eval.every=5", "--data.eval=t.jsonl"),
        *("--data.data_source=x", "--optim.steps_per_batch=2", "--optim.passes_per_batch=2"),
        *("--train.keep_best=eval/accuracy", "--train.trajectories=false", "--trust-rewards"),
    ],
)
def test_sft_refuses_what_would_not_act(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert word.split("=")[0] in refused(capsys, "sft", "--model", "m", "--data", "d.jsonl", word)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "m", "--prompt", "x", "--raw", "--data.chat_template_kwargs.thinking=false"],
        ["generate", "m", "--prompt", "x", "--raw", "--model.chat_template=t.jinja"],
        ["data", "stats", "f", "--model.trust_remote_code=true"],
        ["data", "stats", "f", "--data.chat_template_kwargs.thinking=false"],
    ],
)
def test_what_would_be_taken_and_ignored_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert f"{arguments[-1].partition('=')[0]} has no effect" in refused(capsys, *arguments)


def test_no_setting_has_one_legal_value() -> None:
    from typing import Literal, get_args, get_origin

    from groupwise.config.keys import annotation_of, describe_keys, without_none

    for key in describe_keys():
        annotation = without_none(annotation_of(key.name.replace(".N.", ".0.")))
        if get_origin(annotation) is Literal:
            assert len(get_args(annotation)) > 1, key.name


# --- a reward that the data names ---


def test_rows_of_gsm8k_need_no_reward(training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--model-path", training[1], "--data-path", training[3], "--dry-run"]
    row = '{"prompt": "2+2?", "data_source": "SOURCE", "reward_model": {"ground_truth": "4"}}\n'
    (tmp_path / "train.jsonl").write_text(row.replace("SOURCE", "openai/gsm8k"))
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert re.search(r'name = "gsm8k" +# data_source of .*train\.jsonl\n', shown)
    assert re.search(r'data_source = \["openai/gsm8k"\] +# data_source of', shown)
    assert main([*flags, "--reward", "format"]) == 0
    assert re.findall(r'^name = "(\w+)" .*line$', capsys.readouterr().out, re.MULTILINE) == ["format"]
    (tmp_path / "train.jsonl").write_text(row.replace("SOURCE", "mine"))
    assert "training needs at least one" in refused(capsys, *flags)
    (tmp_path / "train.jsonl").write_text("")
    assert "has no rows" in refused(capsys, *flags)
