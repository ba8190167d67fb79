"""Data files: JSON Lines, JSON, CSV and Parquet with rows of every kind of wrongness."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from cases import SMALL, SMALL_SFT, Case
from hypothesis import strategies as st
from values import damaged_bytes, damaged_json, texts, values

MESSAGE = {"role": "user", "content": "say red"}
ROWS: tuple[Any, ...] = (
    {"prompt": "say red:", "answer": "red"},
    {"prompt": [MESSAGE], "answer": "red"},
    {"prompt": "say red:", "completion": " red"},
    {"messages": [MESSAGE, {"role": "assistant", "content": "red"}]},
    {"prompt": [MESSAGE], "completion": [{"role": "assistant", "content": "red"}], "data_source": "a"},
    {
        "prompt": [MESSAGE],
        "data_source": "openai/gsm8k",
        "reward_model": {"ground_truth": "7"},
        "extra_info": {"answer": "7"},
    },
    {"question": "How many?", "answer": "It is 3. #### 3"},
)
ODD_MESSAGES = (
    *(
        [],
        [{}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "", "content": "x"}],
        [{"role": "user", "content": None}],
    ),
    *(
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "assistant", "content": "x"}],
        "x",
        None,
        7,
    ),
    *([[MESSAGE]], [MESSAGE, MESSAGE], [{"role": "system", "content": "s"}], [{"role": "user", "content": "\ud800"}]),
    *([MESSAGE | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], [MESSAGE | {"thinking": "x"}]),
)


@st.composite
def row(draw: st.DrawFn) -> Any:
    base = draw(st.sampled_from(ROWS))
    way = draw(st.sampled_from(["right", "right", "damaged", "value", "messages", "stranger"]))
    if way == "right":
        return base
    if way == "damaged":
        return draw(damaged_json(base))
    if way == "messages":
        return {
            **base,
            draw(st.sampled_from(["prompt", "messages", "completion"])): draw(st.sampled_from(ODD_MESSAGES)),
        }
    if way == "stranger":
        return {**base, draw(texts): draw(values)}
    return draw(values)


def _jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in rows)


def _csv(rows: list[Any]) -> bytes:
    out = io.StringIO()
    tables = [item for item in rows if isinstance(item, dict)]
    names = list(dict.fromkeys(str(key) for item in tables for key in item))
    writer = csv.writer(out)
    writer.writerow(names)
    writer.writerows([[str(item.get(name, "")) for name in names] for item in tables])
    return out.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist([item for item in rows if isinstance(item, dict)])
        pyarrow.parquet.write_table(table, out)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, UnicodeError, NotImplementedError):
        return b"PAR1 not quite"
    return out.getvalue()


WRITERS = {"jsonl": _jsonl, "json": lambda rows: json.dumps(rows).encode(), "csv": _csv, "parquet": _parquet}


def rows(world: Path) -> st.SearchStrategy[Case]:
    @st.composite
    def one(draw: st.DrawFn) -> Case:
        shape = draw(st.sampled_from(ROWS))
        made = [shape] * draw(st.integers(0, 2)) + draw(st.lists(row(), min_size=0, max_size=3))
        suffix = draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "json", "csv", "parquet", "jsonl.gz", "txt"]))
        content = WRITERS.get(suffix, _jsonl)(made)
        if draw(st.integers(0, 3)) == 0:
            content = draw(damaged_bytes(content))
        file = f"data.{suffix}"
        command = draw(
            st.sampled_from(
                [
                    (
                        "train",
                        "--model",
                        "model",
                        "--data",
                        file,
                        "--reward",
                        "reward.py:low",
                        "--output",
                        "out",
                        *SMALL,
                    ),
                    ("train", "--model", "model", "--data", file, "--reward", "gsm8k", "--output", "out", *SMALL),
                    ("train", "--model", "model", "--data", file, "--output", "out", "--dry-run"),
                    ("sft", "--model", "model", "--data", file, "--output", "out", *SMALL_SFT),
                    ("data", "stats", file),
                    ("data", "stats", file, "--model", "model"),
                    ("eval", "model", "--data", file, "--reward", "reward.py:low", "--max-completion-tokens", "4"),
                    ("eval", "model", "--data", file, "--reward", "match", "--max-completion-tokens", "4", "--json"),
                    ("model", "tiny", "--out", "out", "--tokenizer-from", file, "--size", "0.1m"),
                ]
            )
        )
        if command[0] in ("train", "sft", "eval") and draw(st.integers(0, 3)) == 0:
            command = (*command, "--data.question_column", "question", "--data.answer_column", "answer")
        codes = frozenset({0, 1, 2}) if "gsm8k" in command else frozenset({0, 2})
        return Case("rows", command, {"model": "model", "reward.py": "reward.py"}, {file: content}, codes)

    return one()
