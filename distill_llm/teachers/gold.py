"""The data's own rationales as a teacher: human-written, or generated with the task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.teachers.base import Completion, Request, Sampling, TeacherFacts, TextTeacher, TextTeacherSpec

if TYPE_CHECKING:
    from distill_llm.tasks.base import Task


class GoldTeacher:
    """Completes every request with the example's rationale and the sentence that states its label."""

    identity = "gold"

    def __init__(self, task: Task):
        self._task = task

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        for request in requests:
            example = request.example
            if example.rationale is None or example.label is None:
                raise TeacherError(
                    f"rationales.teacher: kind gold gives the data's own rationales, but example '{example.id}' has "
                    f"no {'rationale' if example.rationale is None else 'label'}. Choose another teacher, or a task "
                    "with rationales."
                )
            sentence = self._task.answer_sentence(example.label, example)
            yield request, Completion(f"{example.rationale} {sentence}")


class Gold(TextTeacherSpec):
    """The data's own rationales, each with the sentence that states its label."""

    kind: Literal["gold"] = "gold"
    knows_answers: ClassVar[bool] = True
    computes: ClassVar[bool] = False

    def check(self, *, chat: bool, sampling: Sampling) -> None:
        if sampling.top_logprobs:
            raise ConfigError(
                "rationales.sampling.top_logprobs: rationales.teacher of kind gold repeats the data and has no "
                "log-probabilities. Set it to 0, or choose a teacher that computes."
            )

    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        return GoldTeacher(task)

    def describe(self) -> TeacherFacts:
        return TeacherFacts("gold", licence=self.licence)
