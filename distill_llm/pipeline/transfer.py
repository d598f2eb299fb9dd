"""The examples that a student learns from, where some classes are left out of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Example, Splits
from distill_llm.data.rows import learned_label
from distill_llm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from distill_llm.pipeline.rationale_stage import Material


def transferred(recipe: Recipe, material: Material) -> Material:
    """The material without what the recipe keeps from the student.

    Training examples go by the label that would be learned, gold or voted; one without a label goes too: it may be of
    any class. Validation examples go by theirs: they choose checkpoints and learning rates, and a choice that knows
    the other classes would have learned of them. Test stays whole. Raises ConfigError for a label that does not exist,
    DataError where nothing is left.
    """
    spec = recipe.transfer
    if spec is None:
        return material
    splits = material.splits
    check_transfer(recipe, splits)
    train = tuple(
        example
        for example in splits.train
        if stays(recipe, learned_label(example, material.answers.get(example.id), recipe.label_from))
    )
    validation = tuple(example for example in splits.validation if stays(recipe, example.label))
    for split, left in (("train", train), ("validation", validation)):
        if not left:
            raise DataError(f"transfer: no {split} example is left of {list(spec.named)}. Leave out fewer labels.")
    return replace(material, splits=replace(splits, train=train, validation=validation))


def stays(recipe: Recipe, label: str | None) -> bool:
    """Whether the student sees examples of this label."""
    spec = recipe.transfer
    if spec is None:
        return True
    named = label is not None and any(recipe.task.same(label, one) for one in spec.named)
    return label is not None and named == bool(spec.only)


def check_transfer(recipe: Recipe, splits: Splits) -> None:
    """Raises ConfigError where ``transfer`` names a label that no example has or may have."""
    spec = recipe.transfer
    if spec is None:
        return
    known = labels_of((*splits.train, *splits.validation, *splits.test))
    unknown = [label for label in spec.named if not any(recipe.task.same(label, one) for one in known)]
    if unknown:
        raise ConfigError(
            f"transfer: no example has the label {unknown[0]!r}, nor may have it; there are {known[:12]}. Name "
            "labels as the data writes them."
        )


def labels_of(examples: Iterable[Example]) -> list[str]:
    """All labels and choices, in the order in which they come."""
    found: dict[str, None] = {}
    for example in examples:
        found |= dict.fromkeys(example.choices or ([example.label] if example.label is not None else []))
    return list(found)


def left_out(recipe: Recipe, labels: Sequence[str]) -> list[str]:
    """Those of ``labels`` whose examples the student does not see."""
    return [label for label in labels if not stays(recipe, label)]
