"""A task: where its examples come from, and how its answers are written, read and compared."""

from __future__ import annotations

import hashlib
import random
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from distill_llm.core.answers import AnswerKind, normalise_text, same_answer
from distill_llm.core.component import Component
from distill_llm.core.errors import DataError
from distill_llm.core.example import Example, Splits

SplitName = Literal["train", "validation", "test"]


class Limits(Component):
    """At most so many examples of each split; 0 takes all."""

    train: int = Field(default=0, ge=0)
    validation: int = Field(default=0, ge=0)
    test: int = Field(default=0, ge=0)


class Task(Component):
    """Base of all tasks. A task reads examples; splitting, limits and checks are here."""

    title: ClassVar[str] = ""
    licence: ClassVar[str] = "unknown"
    answer: ClassVar[AnswerKind] = "text"

    limits: Limits = Limits()
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="cut from train where the data has no validation split"
    )
    test_fraction: float = Field(default=0.1, gt=0, lt=1, description="cut from train where the data has no test split")
    overlap: Literal["refuse", "drop"] = Field(
        default="refuse", description="training inputs that are also in validation or test"
    )

    @abstractmethod
    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        """The examples as the source has them; ``validation`` and ``test`` may be missing."""

    def answer_kind(self) -> AnswerKind:
        """How two labels are compared, and so the metric."""
        return self.answer

    def answer_sentence(self, label: str, example: Example) -> str:
        """The sentence that states the label behind a rationale; ``find_answer`` reads it back."""
        return f"The answer is {label}."

    def answer_pattern(self) -> str:
        """A regular expression whose one group is the label in a completion; the last match counts."""
        return r"(?:(?:[Ss]o,? )?[Tt]he answer is|####)\s*:?\s*((?:(?!the answer is).)+?)\s*(?:\n|$)"

    def normalise(self, text: str, example: Example) -> str | None:
        """The label that ``text`` states, in the data's own spelling, or None where it states none."""
        if example.choices:
            wanted = normalise_text(text)
            return next((choice for choice in example.choices if normalise_text(choice) == wanted), None)
        return text.strip().rstrip(".").strip() or None

    def same(self, first: str, second: str) -> bool:
        return same_answer(self.answer_kind(), first, second)

    def load(self, seed: int) -> Splits:
        """Checked splits. Test and validation are cut off before anything else looks at the data.

        Raises DataError for no examples, an id twice, a label outside the choices, and inputs in two splits.
        """
        found: dict[str, list[Example]] = {
            name: [replace(example, origin=name, row=row) for row, example in enumerate(examples)]
            for name, examples in self.read().items()
        }
        where = f"task {type(self).model_fields['kind'].default}"
        if not found.get("train"):
            raise DataError(f"{where}: no training examples found. Expected at least one; check the data's path.")
        for name, fraction in (("test", self.test_fraction), ("validation", self.validation_fraction)):
            if not found.get(name):
                found["train"], found[name] = _cut(found["train"], fraction, seed, name)
        for name in ("train", "validation", "test"):
            limit = getattr(self.limits, name)
            found[name] = found[name][:limit] if limit else found[name]
        for name, examples in found.items():
            _check(examples, f"{where}, {name} split")
        before = sum(map(len, found.values()))
        if self.overlap == "refuse":
            _refuse_overlap(found, where)
        else:
            _drop_overlap(found)
        for name, examples in found.items():
            if not examples:
                raise DataError(f"{where}, {name} split: nothing is left without the inputs that other splits share.")
        dropped = before - sum(map(len, found.values()))
        return Splits(tuple(found["train"]), tuple(found["validation"]), tuple(found["test"]), dropped)


def _inputs(examples: Sequence[Example]) -> set[str]:
    return {_seen(example) for example in examples}


def _seen(example: Example) -> str:
    """What makes two inputs the same: the text, and the picture where the data has one."""
    text, picture = normalise_text(example.input), example.picture
    if not picture:
        return text
    return f"{text} [picture {picture if isinstance(picture, str) else hashlib.sha256(picture).hexdigest()}]"


def _refuse_overlap(found: Mapping[str, list[Example]], where: str) -> None:
    for first, second in (("validation", "test"), ("train", "test"), ("train", "validation")):
        shared = sorted(_inputs(found[first]) & _inputs(found[second]))
        if shared:
            raise DataError(
                f"{where}: {len(shared)} inputs are in both {first} and {second}, such as {shared[0][:80]!r}: a score "
                "on them would measure memory. Remove them from the data, or set `task.overlap=drop` to leave them out."
            )


def _drop_overlap(found: dict[str, list[Example]]) -> None:
    """Test keeps all of its examples; validation loses those of test, train those of both."""
    held_out = _inputs(found["test"])
    for name in ("validation", "train"):
        found[name] = [example for example in found[name] if _seen(example) not in held_out]
        held_out |= _inputs(found[name])


def _cut(examples: list[Example], fraction: float, seed: int, name: str) -> tuple[list[Example], list[Example]]:
    """Splits off a random share, at least one example where there are two."""
    order = list(range(len(examples)))
    random.Random(f"{seed} {name}").shuffle(order)
    cut = set(order[: max(1, round(len(examples) * fraction))])
    if len(cut) >= len(examples):
        raise DataError(
            f"{len(examples)} examples are too few to cut a {name} split of {fraction:.0%} from. Add examples, or give "
            f"a {name} split of your own."
        )
    return [e for i, e in enumerate(examples) if i not in cut], [examples[i] for i in sorted(cut)]


def _check(examples: Sequence[Example], where: str) -> None:
    if not examples:
        raise DataError(f"{where}: it is empty. Expected at least one example.")
    twice = [i for i, n in Counter(e.id for e in examples).items() if n > 1]
    if twice:
        raise DataError(
            f"{where}: {len(twice)} ids stand on more than one example, such as '{twice[0]}'. Ids must be unique: "
            "remove the copies or name another id field."
        )
    for example in examples:
        if not example.input.strip():
            raise DataError(f"{where}: example '{example.id}' has an empty input. Remove the row or fill it in.")
        if example.choices and example.label is not None and example.label not in example.choices:
            raise DataError(
                f"{where}: example '{example.id}' has the label {example.label!r}, which is not one of its choices "
                f"{list(example.choices)}. Correct the row, or the list of choices."
            )


def lettered(choices: Sequence[str]) -> str:
    """The choices as lines ``(a) text``."""
    return "\n".join(f"({chr(ord('a') + i)}) {choice}" for i, choice in enumerate(choices))


def chosen(text: str, choices: Sequence[str], match_case: bool = False) -> str | None:
    """The choice that an answer such as ``(d) math problem.`` names: by its text first, by its letter if alone.

    Choices may repeat, and a letter may be wrong: the text decides. With ``match_case`` it must be letter for letter.
    """
    stated = re.fullmatch(r"\s*(?:\(([a-zA-Z])\)|([a-zA-Z])[).:])\s*(.*)|\s*([a-zA-Z])\.?\s*", text, re.DOTALL)
    letter = (stated[1] or stated[2] or stated[4]).lower() if stated else ""
    index = ord(letter) - ord("a") if letter else -1
    named = choices[index] if 0 <= index < len(choices) else None
    for wanted in dict.fromkeys((text, (stated[3] or "") if stated else text)):
        found = _by_text(wanted, choices, match_case)
        if found:
            return named if named in found else found[0]
    alone = stated is not None and not normalise_text(stated[3] or "")
    return named if alone else None


def _by_text(wanted: str, choices: Sequence[str], match_case: bool) -> list[str]:
    exact = wanted.strip()
    found = [choice for choice in choices if choice.strip() in (exact, exact.removesuffix("."))]
    if found or match_case or not normalise_text(wanted):
        return found
    return [choice for choice in choices if normalise_text(choice) == normalise_text(wanted)]
