"""What the student's pictures are like, and whether the data has those that it should bring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from distill_llm.core.errors import DataError
from distill_llm.core.example import Example, Splits
from distill_llm.data.rows import Row
from distill_llm.models.picture import Painter, check_image
from distill_llm.recipe.recipe import Recipe

_OPENED = 32  # images of each split that are opened before anything is trained
_SHOWN = 8  # characters without a sign that are named


def check_pictures(recipe: Recipe, splits: Splits) -> None:
    """Raises DataError where the data should bring the student's pictures, and an example has none or one that cannot
    be opened."""
    picture = recipe.student.picture
    if picture is None or picture.source != "data":
        return
    for name in ("train", "validation", "test"):
        examples: Sequence[Example] = getattr(splits, name)
        for number, example in enumerate(examples):
            where = f"student.picture.source: data: {name} example '{example.id}'"
            if not example.picture:
                raise DataError(
                    f"{where} has no image. Name the column that holds it (`fields.picture` of a jsonl task), or set "
                    "source: text."
                )
            if number < _OPENED:
                check_image(example.picture, where)


def findings_of_pictures(painter: Painter, rows: Sequence[Row]) -> Iterator[tuple[Literal["ok", "warning"], str]]:
    """What doctor says of what the student sees."""
    spec, (channels, height, width) = painter.spec, painter.shape
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    drawn = "the data's images" if spec.source == "data" else f"drawn on {spec.width} x {spec.height} pixels"
    yield (
        "ok",
        f"the student sees pictures, {drawn}; the model gets {width} x {height}, {colours}, and makes "
        f"{painter.num_tokens} states of each",
    )
    pictures = list(dict.fromkeys(row.picture for row in rows if row.picture is not None))
    if spec.source == "data" or not pictures:
        return
    lacking = [picture for picture in pictures if not painter.is_whole(picture)]
    unknown = sorted({sign for picture in lacking for sign in painter.unknown(picture.text)})
    said = f"{len(lacking):,} of {len(pictures):,} lack some of their text"
    if unknown:
        said += f"; the font ({spec.font}) has no sign for {unknown[:_SHOWN]}"
    if lacking:
        said += ". Change `student.picture` (size, font, font_size)"
    yield "warning" if lacking else "ok", said
    longest = max(pictures, key=lambda picture: len(picture.text))
    yield "ok", "the longest, line by line: " + " / ".join(painter.lines(longest.text)[:_SHOWN])
