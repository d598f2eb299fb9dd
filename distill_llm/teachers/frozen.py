"""A frozen Hugging Face model that is run beside the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from distill_llm.teachers.base import StudentFacts, TensorTeacher, TensorTeacherSpec
from distill_llm.teachers.beside import ModelBeside


class FrozenTeacher(ModelBeside):
    """A model whose weights stay as they are."""

    whose = "teachers: frozen"


class Frozen(TensorTeacherSpec):
    """Sees the same input as the student, prefix included."""

    has_head: ClassVar[bool] = True
    kind: Literal["frozen"] = "frozen"
    model: str = Field(min_length=1, description="Hub id or folder")
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in: Literal["full", "8bit", "4bit"] = Field(
        default="full", description="8bit and 4bit quantize the weights through bitsandbytes"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:NUMBER or mps; auto: the student's")

    def check(self) -> None:
        from distill_llm.models.load import check_bits, choose_device, read_config

        choose_device(self.device, where=f"{self._where}.device")
        read_config(self.model, self.revision, where=self._where)
        check_bits(self.model, self.load_in, where=self._where)

    def open(self, student: StudentFacts, members: Sequence[TensorTeacher] = ()) -> TensorTeacher:
        from distill_llm.models.load import choose_device, load_on, read_config, read_tokenizer

        where = self._where
        vocabulary = read_tokenizer(self.model, self.revision, where=where).get_vocab()
        student.must_share(vocabulary, read_config(self.model, self.revision, where=where), where=where)
        device = student.device if self.device == "auto" else choose_device(self.device, where=f"{where}.device")
        model = load_on(device, self.model, self.revision, where=where, dtype=self.dtype, load_in=self.load_in)
        return FrozenTeacher(model, student.width)

    def identity(self, others: Mapping[str, TensorTeacherSpec]) -> dict[str, Any]:
        from distill_llm.models.load import weights_of

        own = super().identity(others)
        del own["model"], own["revision"]
        return own | {"weights": weights_of(self.model, self.revision, where=self._where)}

    def num_parameters(self, student_parameters: int) -> int:
        from distill_llm.models.load import count_parameters

        return count_parameters(self.model, self.revision, where=self._where)

    @property
    def _where(self) -> str:
        return f"teachers: frozen '{self.model}'"
