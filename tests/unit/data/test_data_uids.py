"""A row's uid is a function of its content: the same in every process, and another for another picture."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groupwise.config.data import DataConfig
from groupwise.data import load_prompts
from groupwise.data.rows import prompt_key, row_uid
from groupwise.errors import DataError

PROGRAM = """
import datetime, numpy, types
from PIL import Image
from groupwise.data.rows import row_uid

class Picture:
    size, mode = (1, 2), "RGB"
    def tobytes(self): return b"rgbrgb"

junk = [object() for _ in range(SHIFT)]  # so that addresses differ
for value in (
    Image.new("RGB", (3, 2), (1, 2, 3)), Picture(), b"pixels", bytearray(b"pixels"), memoryview(b"pixels"),
    numpy.arange(6.0).reshape(2, 3), numpy.array([{"b": 1, "a": b"x"}, None], dtype=object),
    {"a", "b", "c", "d"}, frozenset({("x", 1), ("y", 2)}), datetime.date(2026, 1, 2), 3 + 4j,
    types.SimpleNamespace(a=1),
):
    print(row_uid(5, [{"role": "user", "content": "what is it?", "image": value}]))
"""


def uids(seed: int) -> list[str]:
    program = PROGRAM.replace("SHIFT", str(1000 * seed))
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, env=environment)
    return found.stdout.split()


def key(value: Any) -> str:
    return prompt_key([{"role": "user", "content": "what is it?", "image": value}])


def test_two_processes_give_a_row_one_uid() -> None:
    first = uids(1)
    assert first == uids(2)
    assert len(first) == 12
    assert len(set(first)) == 10, "bytes are bytes, whatever holds them"


def png(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()))


def test_a_picture_is_its_pixels_wherever_they_lie() -> None:
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    assert type(png(image)) is not type(image)
    assert key(image) == key(image.copy()) == key(png(image))
    changed = image.copy()
    changed.putpixel((2, 1), (1, 2, 4))
    assert len({key(image), key(changed), key(image.resize((2, 3))), key(image.convert("L"))}) == 4


def test_a_picture_of_other_colours_is_another() -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([1, 2, 3] * 256)
    other = image.copy()
    other.putpalette([9, 2, 3] * 256)
    assert image.tobytes() == other.tobytes()
    assert key(image) != key(other)


def test_arrays_are_their_values() -> None:
    values = np.arange(6.0)
    assert key(values) == key(values.copy()) == key(np.arange(12.0)[:6])
    assert len({key(v) for v in (values, values.reshape(2, 3), values.astype("float32"), values + 1)}) == 4


class Hidden:
    def __repr__(self) -> str:
        return f"<a picture, 0X{id(self):X}>"


class Numbered:
    def __repr__(self) -> str:
        return f"<picture no {id(self)}>"


@pytest.mark.parametrize(
    "value",
    [object(), Hidden(), Numbered(), lambda: 1, iter([1]), [{"deep": object()}], np.array([object()], dtype=object)],
    ids=["object", "hex", "number", "function", "iterator", "nested", "in an array"],
)
def test_what_is_known_by_its_address_alone_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"a message holds .*, which no other process would know again; give text"):
        row_uid(0, [{"role": "user", "content": "x", "image": value}])


def test_rows_with_pictures_are_read_to_the_same_uids(tokenizer: Any) -> None:
    def rows() -> list[dict[str, Any]]:
        pictures = (Image.new("RGB", (4, 4), (0, 0, shade)) for shade in (1, 2))
        return [{"prompt": [{"role": "user", "content": "what is it?", "image": picture}]} for picture in pictures]

    first, again = (load_prompts(rows(), DataConfig(), tokenizer).prompts for _ in range(2))  # pyright: ignore[reportCallIssue]
    assert [prompt.uid for prompt in first] == [prompt.uid for prompt in again]
    assert first[0].uid[7:] != first[1].uid[7:]
