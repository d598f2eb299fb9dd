"""ANLI: inference that was written to fool a model, in three rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.tasks.nli import Nli
from distill_llm.tasks.source import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distill_llm.core.example import Example
    from distill_llm.tasks.base import SplitName


class Anli(Nli):
    """Adversarial inference on Wikipedia texts, Nie et al. 2020, arXiv:1910.14599.

    Rounds 1 to 3 have 16,946 / 45,460 / 100,459 training rows; Hsieh et al. 2023 (arXiv:2305.02301) use round 1.
    Only part of the rows has a human ``reason``. The licence allows no commercial use.
    """

    kind: Literal["anli"] = "anli"
    title: ClassVar[str] = "ANLI: inference written to fool a model"
    licence: ClassVar[str] = "CC BY-NC 4.0"

    data: str = Field(default="facebook/anli", min_length=1, description="Hub id, or a folder with anli1_train.json")
    round: Literal["r1", "r2", "r3"] = "r1"

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        number = self.round[1]
        stems: dict[SplitName, tuple[str, ...]] = {
            "train": (f"anli{number}_train", "train"),
            "validation": (f"anli{number}_valid", f"anli{number}_dev", "validation", "valid", "dev"),
            "test": (f"anli{number}_test", "test"),
        }
        hub: dict[SplitName, str] = {
            "train": f"train_{self.round}",
            "validation": f"dev_{self.round}",
            "test": f"test_{self.round}",
        }
        return self._read(Layout(stems, hub), "reason")
