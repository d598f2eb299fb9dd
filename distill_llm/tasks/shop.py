"""A generated task that needs two steps of reasoning: who pays more, when prices are hidden in the training data.

"Ann buys x and y. Bob buys z and w. Who pays more?" The label is a name. The rationale writes down the four prices,
the two sums and the comparison. Prices are fixed for a seed and never stated in an input, so they must be learned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from distill_llm.tasks.products import MOST_PRODUCTS, Drawn, ProductTask

_NAMES = ("ann", "bob", "carl", "dora", "emil", "fay", "gus", "hana")


class Shop(ProductTask):
    """Generated questions of two sums and a comparison, with prices that only the rationales state."""

    kind: Literal["shop"] = "shop"
    title: ClassVar[str] = "generated: who pays more, with hidden prices"

    products: int = Field(default=300, ge=4, le=MOST_PRODUCTS)
    highest_price: int = Field(default=20, ge=2, le=400)
    train_size: int = Field(default=4000, gt=0)
    validation_size: int = Field(default=500, gt=0)
    test_size: int = Field(default=2000, gt=0)

    @model_validator(mode="after")
    def _enough(self) -> Shop:
        if self.products < 10 and self.train_size + self.validation_size + self.test_size > 2000:
            raise ValueError("so few products cannot give so many different questions: raise `products`")
        return self

    def questions(self, chance: random.Random, prices: Mapping[str, int]) -> Iterator[Drawn]:
        """Their two sums differ."""
        names = list(prices)
        while True:
            first, second = chance.sample(_NAMES, 2)
            x, y, z, w = chance.sample(names, 4)
            left, right = prices[x] + prices[y], prices[z] + prices[w]
            if left == right:
                continue
            yield Drawn(
                f"{first} buys {x} and {y} . {second} buys {z} and {w} . who pays more ?",
                first if left > right else second,
                f"{prices[x]} + {prices[y]} = {left} . {prices[z]} + {prices[w]} = {right} . "
                f"{left} {'>' if left > right else '<'} {right} .",
                (first, second),
            )
