"""Several teachers of text that answer the same questions, one after the other, and vote together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias

from pydantic import Field, field_validator

from distill_llm.core.component import Component, any_of
from distill_llm.core.errors import ConfigError
from distill_llm.core.prices import Prices
from distill_llm.teachers.base import Sampling, TeacherFacts, TextTeacherSpec
from distill_llm.teachers.prompt import PromptSpec

if TYPE_CHECKING:
    AnyMember: TypeAlias = TextTeacherSpec
else:  # all other kinds: this module is imported for the first time here, and its own class does not exist yet
    AnyMember = any_of(TextTeacherSpec, "distill_llm.teachers")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Member(Component):
    """One of several teachers: how it is asked, and what its votes weigh."""

    teacher: AnyMember
    samples: int = Field(default=0, ge=0, description="completions an example; 0: `rationales.samples`")
    prompt: PromptSpec | None = Field(default=None, description="in place of the whole of `rationales.prompt`")
    sampling: Sampling | None = Field(default=None, description="in place of the whole of `rationales.sampling`")
    prices: Prices | None = Field(default=None, description="in place of `rationales.prices`")
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="what it has to say in votes, shared out among its completions of an example"
    )


class Several(TextTeacherSpec):
    """Teachers by name; each writes its completions of every example, and all of them vote.

    You et al. 2017 (KDD, "Learning from Multiple Teacher Networks") average what several teachers say; of texts the
    labels are voted on, and the rationales of all are learned from.
    """

    kind: Literal["several"] = "several"
    of: dict[str, Member] = Field(min_length=1)
    weigh_by: Literal["fixed", "accuracy"] = Field(
        default="fixed",
        description="accuracy: `weight` times the log-odds of being right, measured on labelled train and validation "
        "examples",
    )
    drop_failing: bool = Field(
        default=False, description="go on with the others where one cannot be had or gives up; a warning says so"
    )

    @field_validator("of")
    @classmethod
    def _plain_names(cls, of: dict[str, Member]) -> dict[str, Member]:
        odd = [name for name in of if not _NAME.fullmatch(name)]
        if odd:
            raise ValueError(f"{odd[0]!r} cannot name a teacher: take letters, digits, '_' and '-'")
        return of

    def members(self) -> Mapping[str, Member]:
        return self.of

    def content(self) -> dict[str, Any]:
        own = self.model_dump(mode="json", exclude={"of"})
        return own | {"of": [[name, _content(member)] for name, member in self.of.items()]}

    def open(self, **_: Any) -> NoReturn:
        raise TypeError("several teachers are opened one by one")

    def describe(self) -> TeacherFacts:
        """Sums and lists of what is known of all members."""
        known = [self.facts_of(name) for name in self.of]
        sizes = [facts.parameters for facts in known if facts.parameters is not None]
        on_disk = [facts.num_bytes for facts in known if facts.num_bytes is not None]
        licences = list(dict.fromkeys(facts.licence for facts in known))
        return TeacherFacts(
            " + ".join(self.of),
            sum(sizes) if len(sizes) == len(known) else None,
            sum(on_disk) if len(on_disk) == len(known) else None,
            licence=self.licence or (" and ".join(licences) if all(licences) else ""),
        )

    def facts_of(self, name: str) -> TeacherFacts:
        """What is known of one member; its name alone where it is gone, and may be."""
        try:
            return self.of[name].teacher.describe()
        except ConfigError:
            if not self.drop_failing:
                raise
            return TeacherFacts(name)


def _content(member: Member) -> dict[str, Any]:
    return member.model_dump(mode="json", exclude={"teacher", "prices"}) | {"teacher": member.teacher.content()}
