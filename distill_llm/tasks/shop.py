"""A generated task that needs two steps of reasoning: who pays more, when prices are hidden in the training data.

"Ann buys x and y. Bob buys z and w. Who pays more?" The label is a name. The rationale writes down the four prices,
the two sums and the comparison. Prices are fixed for a seed and never stated in an input, so they must be learned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task
from distill_llm.tasks.products import MOST_PRODUCTS, hidden_prices

_NAMES = ("ann", "bob", "carl", "dora", "emil", "fay", "gus", "hana")


class Shop(Task):
    """Generated questions of two sums and a comparison, with prices that only the rationales state."""

    kind: Literal["shop"] = "shop"
    title: ClassVar[str] = "generated: who pays more, with hidden prices"
    licence: ClassVar[str] = "Apache-2.0 (generated)"

    products: int = Field(default=300, ge=4, le=MOST_PRODUCTS)
    highest_price: int = Field(default=20, ge=2, le=400)
    train_size: int = Field(default=4000, gt=0)
    validation_size: int = Field(default=500, gt=0)
    test_size: int = Field(default=2000, gt=0)
    task_seed: int = Field(default=0, description="fixes prices, validation and test")
    train_stream: int = Field(default=0, ge=0, description="another number is another draw of training examples")
    labelled: bool = Field(default=True, description="false: the training split is a pool without labels or rationales")

    @model_validator(mode="after")
    def _enough(self) -> Shop:
        if self.products < 10 and self.train_size + self.validation_size + self.test_size > 2000:
            raise ValueError("so few products cannot give so many different questions: raise `products`")
        return self

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        prices = hidden_prices(self.products, self.highest_price, self.task_seed)
        held_out = list(islice(self._draw("held out", prices, set()), self.validation_size + self.test_size))
        taken = {example.input for example in held_out}
        train = list(islice(self._draw(f"train {self.train_stream}", prices, taken), self.train_size))
        if not self.labelled:
            train = [Example(id=e.id, input=e.input, prompt=e.prompt, choices=e.choices) for e in train]
        return {
            "train": train,
            "validation": held_out[: self.validation_size],
            "test": held_out[self.validation_size :],
        }

    def _draw(self, stream: str, prices: Mapping[str, int], taken: set[str]) -> Iterator[Example]:
        """Different questions whose two sums differ, none of them in ``taken``."""
        chance = random.Random(f"shop {stream} {self.task_seed}")
        names, seen, number = list(prices), set(taken), 0
        while True:
            first, second = chance.sample(_NAMES, 2)
            x, y, z, w = chance.sample(names, 4)
            question = f"{first} buys {x} and {y} . {second} buys {z} and {w} . who pays more ?"
            left, right = prices[x] + prices[y], prices[z] + prices[w]
            if left == right or question in seen:
                continue
            seen.add(question)
            sign = ">" if left > right else "<"
            yield Example(
                id=f"{stream.replace(' ', '-')}-{number}",
                input=question,
                prompt=question,
                label=first if left > right else second,
                rationale=f"{prices[x]} + {prices[y]} = {left} . {prices[z]} + {prices[w]} = {right} . "
                f"{left} {sign} {right} .",
                choices=(first, second),
            )
            number += 1

    def answer_sentence(self, label: str, example: Example) -> str:
        return f"so {label}"

    def answer_pattern(self) -> str:
        return r"\bso (\w+)\s*$"
