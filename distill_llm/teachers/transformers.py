"""A local or Hub model that writes rationales through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distill_llm.teachers.base import Completion, Request, Sampling, TeacherFacts, TextTeacher, TextTeacherSpec

if TYPE_CHECKING:
    from distill_llm.tasks.base import Task


class TransformersTeacher:
    """Batches of prompts of about one length, the longest first: what does not fit in memory fails at once."""

    def __init__(self, generator: Any, identity: str, batch_rows: int):
        self.identity = identity
        self._generator, self._batch_rows = generator, batch_rows

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        lengths = self._generator.lengths([request.prompt for request in requests])
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self._batch_rows):
            part = [requests[i] for i in order[start : start + self._batch_rows]]
            for request, written in zip(part, self._generator.write([r.prompt for r in part]), strict=True):
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
        from distill_llm.models.generate import Generator, default_device
        from distill_llm.models.load import load_model, read_tokenizer, revision_of

        where = "rationales.teacher.model"
        tokenizer = read_tokenizer(self.model, self.revision, where=where)
        model = load_model(self.model, self.revision, where=where, dtype=self.dtype).to(default_device())
        generator = Generator(
            model,
            tokenizer,
            max_input_tokens=self.max_input_tokens,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=sampling.stop,
            seed=seed,
        )
        return TransformersTeacher(generator, f"{self.model}@{revision_of(model, self.revision)}", self.batch_rows)

    def describe(self) -> TeacherFacts:
        from distill_llm.models.load import count_parameters, weight_bytes

        parameters = count_parameters(self.model, self.revision, where="rationales.teacher.model")
        return TeacherFacts(self.model, parameters, weight_bytes(self.model))
