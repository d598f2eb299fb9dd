"""Products with hidden prices, of which generated tasks are made."""

from __future__ import annotations

import random

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
