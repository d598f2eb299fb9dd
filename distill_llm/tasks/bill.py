"""A generated task with several classes: how dear are two products together, when prices are hidden in the data.

"x and y : how dear ?" The label is one of five words from cheap to dear, each for as many pairs; the rationale writes
down the two prices and their sum. Neighbouring classes are alike: what a teacher thinks of a sum near a border tells
of both.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task
from distill_llm.tasks.products import MOST_PRODUCTS, hidden_prices

_CLASSES = ("cheap", "low", "fair", "high", "dear")


class Bill(Task):
    """Generated questions of a sum that falls in one of five classes, with prices that only the rationales state."""

    kind: Literal["bill"] = "bill"
    title: ClassVar[str] = "generated: how dear two products are together, in five classes"
    licence: ClassVar[str] = "Apache-2.0 (generated)"

    products: int = Field(default=100, ge=10, le=MOST_PRODUCTS)
    highest_price: int = Field(default=40, ge=10, le=400)
    train_size: int = Field(default=3000, gt=0)
    validation_size: int = Field(default=500, gt=0)
    test_size: int = Field(default=1000, gt=0)
    task_seed: int = Field(default=0, description="fixes prices, validation and test")
    train_stream: int = Field(default=0, ge=0, description="another number is another draw of training examples")
    labelled: bool = Field(default=True, description="false: the training split is a pool without labels or rationales")

    @model_validator(mode="after")
    def _enough(self) -> Bill:
        there, wanted = self.products * (self.products - 1), self.train_size + self.validation_size + self.test_size
        if 2 * wanted > there:
            raise ValueError(
                f"{self.products} products make {there:,} questions, too few to draw {wanted:,} different ones: raise "
                "`products`"
            )
        return self

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        prices = hidden_prices(self.products, self.highest_price, self.task_seed)
        sums = sorted(first + second for first, second in combinations(prices.values(), 2))
        borders = [sums[len(sums) * number // len(_CLASSES)] for number in range(1, len(_CLASSES))]
        held_out = list(self._draw("held out", prices, borders, set(), self.validation_size + self.test_size))
        taken = {example.input for example in held_out}
        train = list(self._draw(f"train {self.train_stream}", prices, borders, taken, self.train_size))
        if not self.labelled:
            train = [Example(id=e.id, input=e.input, prompt=e.prompt, choices=e.choices) for e in train]
        return {
            "train": train,
            "validation": held_out[: self.validation_size],
            "test": held_out[self.validation_size :],
        }

    def _draw(
        self, stream: str, prices: Mapping[str, int], borders: Sequence[int], taken: set[str], count: int
    ) -> Iterator[Example]:
        """Different questions, none of them in ``taken``."""
        chance = random.Random(f"bill {stream} {self.task_seed}")
        names, seen, number = list(prices), set(taken), 0
        while number < count:
            x, y = chance.sample(names, 2)
            question = f"{x} and {y} : how dear ?"
            if question in seen:
                continue
            seen.add(question)
            total = prices[x] + prices[y]
            yield Example(
                id=f"{stream.replace(' ', '-')}-{number}",
                input=question,
                prompt=question,
                label=_CLASSES[bisect_right(borders, total)],
                rationale=f"{prices[x]} + {prices[y]} = {total} .",
                choices=_CLASSES,
            )
            number += 1

    def answer_sentence(self, label: str, example: Example) -> str:
        return f"so {label}"

    def answer_pattern(self) -> str:
        return r"\bso (\w+)\s*$"
