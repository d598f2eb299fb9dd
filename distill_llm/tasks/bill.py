"""A generated task with several classes: how dear are two products together, when prices are hidden in the data.

"x and y : how dear ?" The label is one of five words from cheap to dear, each for as many pairs; the rationale writes
down the two prices and their sum. Neighbouring classes are alike: what a teacher thinks of a sum near a border tells
of both.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from distill_llm.tasks.products import MOST_PRODUCTS, Drawn, ProductTask

_CLASSES = ("cheap", "low", "fair", "high", "dear")


class Bill(ProductTask):
    """Generated questions of a sum that falls in one of five classes, with prices that only the rationales state."""

    kind: Literal["bill"] = "bill"
    title: ClassVar[str] = "generated: how dear two products are together, in five classes"

    products: int = Field(default=100, ge=10, le=MOST_PRODUCTS)
    highest_price: int = Field(default=40, ge=10, le=400)
    train_size: int = Field(default=3000, gt=0)
    validation_size: int = Field(default=500, gt=0)
    test_size: int = Field(default=1000, gt=0)

    @model_validator(mode="after")
    def _enough(self) -> Bill:
        there, wanted = self.products * (self.products - 1), self.train_size + self.validation_size + self.test_size
        if 2 * wanted > there:
            raise ValueError(
                f"{self.products} products make {there:,} questions, too few to draw {wanted:,} different ones: raise "
                "`products`"
            )
        return self

    def questions(self, chance: random.Random, prices: Mapping[str, int]) -> Iterator[Drawn]:
        sums = sorted(first + second for first, second in combinations(prices.values(), 2))
        borders = [sums[len(sums) * number // len(_CLASSES)] for number in range(1, len(_CLASSES))]
        names = list(prices)
        while True:
            x, y = chance.sample(names, 2)
            total = prices[x] + prices[y]
            label = _CLASSES[bisect_right(borders, total)]
            yield Drawn(f"{x} and {y} : how dear ?", label, f"{prices[x]} + {prices[y]} = {total} .", _CLASSES)
