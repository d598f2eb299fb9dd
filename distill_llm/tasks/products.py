"""Products with hidden prices, and what the generated tasks that are made of them share."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import ClassVar, NamedTuple

from pydantic import Field

from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task

_FIRST = (
    "red",
    "blue",
    "old",
    "new",
    "big",
    "tiny",
    "soft",
    "warm",
    "thin",
    "fresh",
    "plain",
    "fine",
    "rare",
    "dark",
    "light",
)
_SECOND = (
    "hat", "cup", "pen", "bag", "tea", "jam", "rug", "fan", "map", "pot",
    "toy", "key", "bell", "lamp", "soap", "rope", "drum", "cake", "coat", "desk",
)  # fmt: skip


MOST_PRODUCTS = len(_FIRST) * len(_SECOND)


def hidden_prices(products: int, highest_price: int, seed: int) -> dict[str, int]:
    """A price for each of so many products, fixed by ``seed``."""
    chance = random.Random(f"shop prices {seed}")
    names = [f"{first}{second}" for first in _FIRST for second in _SECOND]
    chance.shuffle(names)
    return {name: chance.randint(1, highest_price) for name in names[:products]}


class Drawn(NamedTuple):
    """A question with all that is known of it."""

    question: str
    label: str
    rationale: str
    choices: tuple[str, ...]


class ProductTask(Task):
    """Questions about products, drawn for three splits; validation and test are the same whatever is trained on."""

    licence: ClassVar[str] = "Apache-2.0 (generated)"

    products: int
    highest_price: int
    train_size: int
    validation_size: int
    test_size: int
    task_seed: int = Field(default=0, description="fixes prices, validation and test")
    train_stream: int = Field(default=0, ge=0, description="another number is another draw of training examples")
    labelled: bool = Field(default=True, description="false: the training split is a pool without labels or rationales")

    @abstractmethod
    def questions(self, chance: random.Random, prices: Mapping[str, int]) -> Iterator[Drawn]:
        """Questions without end, drawn with ``chance``; some come again."""

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

    def answer_sentence(self, label: str, example: Example) -> str:
        return f"so {label}"

    def answer_pattern(self) -> str:
        return r"\bso (\w+)\s*$"

    def _draw(self, stream: str, prices: Mapping[str, int], taken: set[str]) -> Iterator[Example]:
        """Different questions, none of them in ``taken``."""
        kind = type(self).model_fields["kind"].default
        seen, number = set(taken), 0
        for question, label, rationale, choices in self.questions(
            random.Random(f"{kind} {stream} {self.task_seed}"), prices
        ):
            if question in seen:
                continue
            seen.add(question)
            yield Example(
                id=f"{stream.replace(' ', '-')}-{number}",
                input=question,
                prompt=question,
                label=label,
                rationale=rationale,
                choices=choices,
            )
            number += 1
