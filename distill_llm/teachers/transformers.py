"""A local or Hub model that writes rationales through transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.teachers.base import Completion, Request, Sampling, TeacherFacts, TextTeacher, TextTeacherSpec

if TYPE_CHECKING:
    from distill_llm.models.generate import Generator
    from distill_llm.tasks.base import Task

_WHERE = "rationales.teacher.model"


class TransformersTeacher:
    """Batches of prompts of about one length, the longest first: what does not fit in memory fails at once.

    ``load`` gives the generator; it is called at the first question, so that a finished journal costs no weights.
    """

    def __init__(self, load: Callable[[], Generator], identity: str, batch_rows: int):
        self.identity = identity
        self._load, self._batch_rows = load, batch_rows
        self._generator: Generator | None = None

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        generator = self._generator = self._generator or self._load()
        lengths = generator.lengths([request.prompt for request in requests])
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self._batch_rows):
            part = [requests[i] for i in order[start : start + self._batch_rows]]
            # The key: after a kill, other samples of the same prompts must not repeat what is in the journal.
            texts = generator.write([request.prompt for request in part], draw=part[0].key)
            for request, written in zip(part, texts, strict=True):
                yield request, Completion(written.text, written.tokens_in, written.tokens_out)


class Transformers(TextTeacherSpec):
    """Encoder-decoder or decoder-only; on a GPU where there is one."""

    kind: Literal["transformers"] = "transformers"
    model: str = Field(min_length=1, description="Hub id or folder")
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_rows: int = Field(default=32, gt=0)
    max_input_tokens: int = Field(default=4096, gt=0)

    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        from distill_llm.models.load import revision_of

        identity = f"{self.model}@{revision_of(self.model, self.revision, where=_WHERE)}"
        return TransformersTeacher(lambda: self._generator(sampling, seed), identity, self.batch_rows)

    def check(self) -> None:
        from distill_llm.models.load import read_config

        read_config(self.model, self.revision, where=_WHERE)

    def _generator(self, sampling: Sampling, seed: int) -> Generator:
        from distill_llm.models.generate import Generator, default_device
        from distill_llm.models.load import load_model, read_tokenizer

        model = load_model(self.model, self.revision, where=_WHERE, dtype=self.dtype)
        return Generator(
            model.to(default_device()),
            read_tokenizer(self.model, self.revision, where=_WHERE),
            max_input_tokens=self.max_input_tokens,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=sampling.stop,
            seed=seed,
        )

    def describe(self) -> TeacherFacts:
        from distill_llm.models.load import count_parameters, weight_bytes

        parameters = count_parameters(self.model, self.revision, where=_WHERE)
        return TeacherFacts(self.model, parameters, weight_bytes(self.model))
