"""What the documentation names exists: settings, commands, files, links, layers; and its recipes load."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from groupwise.cli.app import COMMANDS
from groupwise.config import Config
from groupwise.config.keys import annotation_of
from groupwise.config.loading import load_config
from groupwise.config.renamed import RENAMED
from groupwise.rewards import reward_names

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SECTIONS = tuple(Config.model_fields)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
SETTING = re.compile(rf"(?<![\w./-])(?:--)?((?:{'|'.join(SECTIONS)})(?:\.\w+)+)(?![\w/])")
FLAG = re.compile(r"--([a-z_]+(?:\.\w+)+)")
COMMAND = re.compile(r"(?<![\w/.])groupwise ([a-z][\w-]*)(?: ([a-z][\w-]*))?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE_SUFFIXES = (".py", ".toml", ".json", ".jsonl", ".md", ".parquet", ".txt", ".safetensors")
PLACES = (ROOT, ROOT / "groupwise")


def code_of(text: str) -> list[str]:
    """Every code span and code block: what a reader may type or look up."""
    blocks = [match[2] for match in FENCE.finditer(text)]
    return blocks + SPAN.findall(FENCE.sub("", text))


def settings_in(text: str) -> set[str]:
    named = {name for code in code_of(text) for name in SETTING.findall(code)}
    return {name for name in named if not name.endswith(FILE_SUFFIXES)}


def is_setting(name: str) -> bool:
    """`reward.0.weight` and `reward.N.weight` are, and so is a section followed by one of its keys."""
    return annotation_of(re.sub(r"\.(?:N|\d+)(?=\.|$)", ".0", name)) is not None


def blocks(page: Path, language: str) -> list[str]:
    return [match[2] for match in FENCE.finditer(page.read_text(encoding="utf-8")) if match[1] == language]


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = {name for name in settings_in(text) if not is_setting(name)}
    wrong |= {
        name for code in code_of(text) for name in FLAG.findall(code) if not is_setting(name) and "section" not in name
    }
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_setting_has_its_earlier_name(page: Path) -> None:
    text = page.read_text(encoding="utf-8").partition("## Names of earlier versions")[0]
    tables = set(RENAMED) & {name.rpartition(".")[0] for name in RENAMED.values()}  # names of today, too
    allowed = tables | ({"algorithm.kl_coef"} if page.name == "algorithms.md" else set())  # which tells of them
    assert not (settings_in(text) & set(RENAMED)) - allowed


def test_the_search_for_settings_finds_them() -> None:
    text = (
        "`optim.lr`, `train.jsonl`, `--rollout.top_q 1`\n```bash\ngroupwise train --optim.lr 1 --train.stepz 2\n```\n"
    )
    assert settings_in(text) == {"optim.lr", "rollout.top_q", "train.stepz"}
    assert [is_setting(n) for n in ("optim.lr", "reward.N.args", "rollout.top_q", "train.stepz")] == [
        True,
        True,
        False,
        False,
    ]
    assert sum(len(settings_in(page.read_text(encoding="utf-8"))) for page in PAGES) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    names = {command.name for command in COMMANDS}
    groups = {name.split()[0] for name in names if " " in name}
    for code in code_of(page.read_text(encoding="utf-8")):
        for first, second in COMMAND.findall(code):
            assert (f"{first} {second}" if first in groups else first) in names, (
                f"groupwise {first} {second} in {code!r}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place) if place else page
        assert target.is_file(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}; there are {sorted(anchors(target))}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_toml_and_jsonl_blocks_are_valid(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "toml")):
        file = tmp_path / f"{number}.toml"
        file.write_text(block, encoding="utf-8")
        load_config(file)
    for block in blocks(page, "jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in block.splitlines())


def test_every_file_that_the_architecture_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    words = {word.strip(",:;`()") for code in code_of(text) for word in code.split()}
    files = {word for word in words if re.fullmatch(r"[\w/]+\.(?:py|toml|md)", word)} - {"FILE.py"}
    folders = {word for word in words if re.fullmatch(r"(?:groupwise|docs|tests|recipes|benchmarks)/[\w/]*", word)}
    assert len(files) > 30
    assert len(folders) > 10
    assert {name for name in files if not any((place / name).is_file() for place in PLACES)} == set()
    assert {name for name in folders if not (ROOT / name).is_dir()} == set()


def test_every_noun_has_its_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for noun in ("Prompt", "Rollout", "RolloutGroup", "TrainingBatch", "Engine", "Policy", "Buffer"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{noun}` |"))
        record = SPAN.findall(row.split("|")[3])[0]
        assert re.search(
            rf"^class {noun}\b", (ROOT / "groupwise" / record).read_text(encoding="utf-8"), re.MULTILINE
        ), row


def layers_of_the_contract() -> Iterator[list[str]]:
    """Lines of the contract, without what does not exist."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    for line in next(contract for contract in contracts if contract["id"] == "layers")["layers"]:
        names = [name.strip().strip("()") for name in line.split("|")]
        present = [n for n in names if (ROOT / "groupwise" / n).is_dir() or (ROOT / "groupwise" / f"{n}.py").is_file()]
        if present:
            yield sorted(present)


def test_the_layers_are_those_of_the_contract() -> None:
    [picture] = blocks(ROOT / "docs" / "architecture.md", "layers")
    drawn = [sorted(name.strip() for name in line.split("|")) for line in picture.splitlines()]
    assert drawn == list(layers_of_the_contract())


def test_every_built_in_reward_is_described() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert {name for name in reward_names() if f"\n| `{name}` |" not in text} == set()


def test_the_documented_reward_does_what_the_page_says() -> None:
    page = ROOT / "docs" / "rewards.md"
    [source] = blocks(page, "python")
    scope: dict[str, object] = {}
    exec(source, scope)
    [claim] = re.findall(r"`(close_to\(.*)`\.", page.read_text(encoding="utf-8"))
    assert eval(claim, scope) is True
