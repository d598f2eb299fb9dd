"""e-SNLI: inference about image captions, with human explanations."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.tasks.nli import Nli
from distill_llm.tasks.source import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distill_llm.core.example import Example
    from distill_llm.tasks.base import SplitName

_LAYOUT = Layout(
    stems={
        "train": ("esnli_train", "train"),
        "validation": ("esnli_valid", "validation", "valid", "dev"),
        "test": ("esnli_test", "test"),
    },
    hub={"train": "train", "validation": "validation", "test": "test"},
)


class ESnli(Nli):
    """Captions and statements about them, 549,367 / 9,842 / 9,824 rows.

    Camburu et al. 2018, arXiv:1812.01193, on SNLI (Bowman et al. 2015, arXiv:1508.05326). ``overlap`` drops by
    default: short captions and statements were written more than once.
    """

    kind: Literal["esnli"] = "esnli"
    title: ClassVar[str] = "e-SNLI: inference about captions, explained"
    licence: ClassVar[str] = "MIT (e-SNLI), CC BY-SA 4.0 (SNLI)"

    data: str = Field(default="esnli/esnli", min_length=1, description="Hub id, or a folder with esnli_train.json")

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        return self._read(_LAYOUT, "explanation_1")
