"""What a model is given: pieces of tokens and of images, and the key that every draw of a sample is made with.

Nothing here holds a pixel. Two inputs are one if their digests are equal: then they share a prompt's computation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, cast


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Names one sample of a run. With a position it decides a token; its text is the sample's id everywhere.

    Attributes:
        uid: the prompt's.
        draw: how often this prompt came before in the run's stream.
        sample_index: which of the prompt's G samples.

    Example:
        str(SampleKey("train-000017-3fa9", draw=2, sample_index=5)) == "train-000017-3fa9/2/5"
    """

    uid: str
    draw: int
    sample_index: int

    def __str__(self) -> str:
        return f"{self.uid}/{self.draw}/{self.sample_index}"


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """A stretch of plain tokens, `[n]`."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image's pixels are. No part of its identity: the same picture may lie in two places.

    Attributes:
        kind: a file, a row of a table, or bytes that the run keeps.
        place: its path, `table#row`, or the name in the run directory.
        width, height: in pixels.

    Example:
        ImageSource("file", "images/00017.png", width=640, height=480)
    """

    kind: Literal["file", "row", "run"]
    place: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImagePiece:
    """An image, as it stands among the tokens.

    Attributes:
        token_ids: `[n]`, placeholders, and separators where a model has them.
        runs: (start, length) within `token_ids` that take features, in order; their sum is the number of features.
        grid: what positions and the vision tower need beside the pixels, such as `(1, height, width)` in patches.
        digest: of the pixels after rotation, and the size.
        source: where the pixels are.

    Example:
        ImagePiece(token_ids=(7, 9, 9, 9, 9, 8), runs=((1, 4),), grid=(1, 4, 4), digest="5f…", source=source)
    """

    token_ids: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    grid: tuple[int, ...]
    digest: str
    source: ImageSource

    def __post_init__(self) -> None:
        end = 0
        for start, length in self.runs:
            assert start >= end and length > 0, f"an image's runs overlap or are empty: {self.runs}"
            end = start + length
        assert end <= len(self.token_ids), f"a run ends at {end}, and the image has {len(self.token_ids)} tokens"


Piece: TypeAlias = TokenPiece | ImagePiece


@dataclass(frozen=True)
class ModelInput:
    """Pieces, in order. Equal if the digests are.

    Example:
        ModelInput.of((5, 17, 9)).token_ids == (5, 17, 9)
    """

    pieces: tuple[Piece, ...] = ()

    @staticmethod
    def of(token_ids: Sequence[int]) -> ModelInput:
        """Plain tokens."""
        return ModelInput((TokenPiece(tuple(token_ids)),)) if len(token_ids) else ModelInput()

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """`[P]`, those of all pieces, images' placeholders among them."""
        if len(self.pieces) == 1:
            return self.pieces[0].token_ids
        return tuple(token for piece in self.pieces for token in piece.token_ids)

    @property
    def images(self) -> tuple[ImagePiece, ...]:
        return tuple([piece for piece in self.pieces if isinstance(piece, ImagePiece)])

    @cached_property
    def digest(self) -> str:
        """Of all that decides what a model computes: kinds, tokens, and each image's runs, grid and pixels. Plain
        tokens count as one stretch, however many pieces they came in."""
        digest = hashlib.blake2b(digest_size=16)
        for piece in self.pieces:
            what = f"i{piece.runs}{piece.grid}{piece.digest}" if isinstance(piece, ImagePiece) else ""
            digest.update(f"{what}{','.join(map(str, piece.token_ids))},".encode())
        return digest.hexdigest()

    def __add__(self, other: ModelInput) -> ModelInput:
        return ModelInput(self.pieces + other.pieces)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelInput) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def as_json(given: ModelInput) -> list[Any]:
    """Its pieces: a list of ids for tokens, an object for an image."""
    return [asdict(piece) if isinstance(piece, ImagePiece) else list(piece.token_ids) for piece in given.pieces]


def from_json(pieces: Sequence[Any]) -> ModelInput:
    """What `as_json` made."""
    return ModelInput(tuple(map(_piece, pieces)))


def _piece(given: Any) -> Piece:
    return _image(cast("dict[str, Any]", given)) if isinstance(given, dict) else TokenPiece(tuple(given))


def _image(piece: Mapping[str, Any]) -> ImagePiece:
    return ImagePiece(
        token_ids=tuple(piece["token_ids"]),
        runs=tuple((start, length) for start, length in piece["runs"]),
        grid=tuple(piece["grid"]),
        digest=piece["digest"],
        source=ImageSource(**piece["source"]),
    )
