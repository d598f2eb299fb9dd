"""A frozen Hugging Face model that is run beside the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill_llm.core.errors import ConfigError
from distill_llm.models.vision import is_mixed, is_vision, read_painter
from distill_llm.teachers.base import TensorTeacher, TensorTeacherSpec
from distill_llm.teachers.beside import ModelBeside
from distill_llm.teachers.student import StudentFacts, check_head
from distill_llm.teachers.view import AS_THE_STUDENT, Reader, TeacherView


class FrozenTeacher(ModelBeside):
    """A model whose weights stay as they are."""

    whose = "teachers: frozen"


class Frozen(TensorTeacherSpec):
    """Sees the same input as the student, prefix included, or through a `view` a prompt of its own."""

    has_head: ClassVar[bool] = True
    kind: Literal["frozen"] = "frozen"
    model: str = Field(min_length=1, description="Hub id or folder")
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in: Literal["full", "8bit", "4bit"] = Field(
        default="full", description="8bit and 4bit quantize the weights through bitsandbytes"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:NUMBER or mps; auto: the student's")
    view: TeacherView | None = Field(default=None, description="absent: it reads what the student reads")
    own_tokenizer: bool = Field(
        default=False, description="of another vocabulary, or of another family, than the student: for universal_logit"
    )
    align: Literal["text", "position"] = Field(
        default="text",
        description="with own_tokenizer, tokens are compared that begin at the same character, or with the same number",
    )

    @model_validator(mode="after")
    def _aligns_its_own(self) -> Frozen:
        if self.align != "text" and not self.own_tokenizer:
            raise ValueError(
                f"`align: {self.align}` is for tokens of another tokenizer. Set own_tokenizer: true, or remove `align`"
            )
        return self

    def speaks_otherwise(self) -> bool:
        return self.own_tokenizer

    def own_view(self) -> TeacherView | None:
        return AS_THE_STUDENT if self.view is None and self.own_tokenizer else self.view

    def reader(self, student: Any = None) -> Reader | None:
        from distill_llm.models.load import read_config, read_tokenizer

        view = self.own_view()
        if view is None:
            return None
        config = read_config(self.model, self.revision, where=self._where)
        if is_vision(config) != (view.picture is not None) and not is_mixed(config):
            reads, do = ("pictures", "Add") if is_vision(config) else ("text", "Remove")
            if hasattr(config, "vision_config"):
                reads = f"pictures within a text, in a way that is not known here ({config.model_type}; llava is)"
            raise ConfigError(f"{self._where}: its view: the model reads {reads}. {do} `picture` there.")
        return Reader(
            view,
            read_tokenizer(self.model, self.revision, where=self._where),
            config,
            self.align if self.own_tokenizer else "",
            read_painter(view.picture, self.model, self.revision, config, where=f"{self._where}: view")
            if view.picture
            else None,
        )

    def sees(self) -> bool | None:
        from distill_llm.models.load import read_config

        return is_vision(read_config(self.model, self.revision, where=self._where))

    def check(self) -> None:
        from distill_llm.models.folder import check_weights
        from distill_llm.models.load import check_bits, choose_device, read_config
        from distill_llm.models.quantize import can_be_read

        choose_device(self.device, where=f"{self._where}.device")
        can_be_read(read_config(self.model, self.revision, where=self._where), where=self._where)
        check_weights(self.model, where=self._where)
        check_bits(self.model, self.load_in, where=self._where)

    def open(self, student: StudentFacts, members: Sequence[TensorTeacher] = ()) -> TensorTeacher:
        return FrozenTeacher(*self.load(student))

    def load(self, student: StudentFacts) -> tuple[Any, int]:
        """The model, and how many words it speaks of. Raises ConfigError where these are not the student's."""
        from distill_llm.models.load import choose_device, load_on, read_config, read_tokenizer

        where = self._where
        vocabulary = read_tokenizer(self.model, self.revision, where=where).get_vocab()
        config = read_config(self.model, self.revision, where=where)
        width = student.width
        if self.own_tokenizer:
            width = max(vocabulary.values()) + 1
            check_head(config, width, where=where)
        else:
            student.must_share(vocabulary, config, where=where, own_columns=self.view is not None)
        device = student.device if self.device == "auto" else choose_device(self.device, where=f"{where}.device")
        model = load_on(device, self.model, self.revision, where=where, dtype=self.dtype, load_in=self.load_in)
        return model, width

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
