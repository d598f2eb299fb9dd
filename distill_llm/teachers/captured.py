"""What the rationales' teacher held likely while it wrote them: soft labels without a second pass over any teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PrivateAttr

from distill_llm.cache.top_k import TopK
from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Target
from distill_llm.teachers.base import Sampling, TensorTeacher, TensorTeacherSpec, TextTeacherSpec
from distill_llm.teachers.cached import CachedWords
from distill_llm.teachers.student import StudentFacts

if TYPE_CHECKING:
    from distill_llm.losses.base import TermLoss

TEMPERATURE = 1.0
"""That of log-probabilities which a teacher of text tells."""


class Captured(TensorTeacherSpec):
    """The log-probabilities that `rationales.sampling.top_logprobs` kept, at the tokens of the rationales.

    They are the teacher's behind its own prompt, exemplars included. No model is loaded for them. Needs a teacher of
    text with the student's tokenizer that tells ids: `transformers`, `vllm`.
    """

    kind: Literal["captured"] = "captured"
    has_layers: ClassVar[bool] = False
    asked_once: ClassVar[bool] = True
    instead_of_mixing: ClassVar[str] = "Give it a term of its own beside the ensemble's, or name a frozen teacher"
    knows: ClassVar[frozenset[Target]] = frozenset({"rationale", "rationale_then_label"})
    _folder: str = PrivateAttr(default="")

    @property
    def gives_logits(self) -> bool:
        return False

    def check_rationales(self, teacher: TextTeacherSpec | None, sampling: Sampling | None) -> None:
        if teacher is None or sampling is None:
            raise ValueError(
                "it repeats log-probabilities that came with rationales, but the recipe has no `rationales` section. "
                "Add one with sampling.top_logprobs above 0"
            )
        if teacher.members():
            raise ValueError(
                "rationales.teacher is several teachers, and what one of them held likely is nothing to compare with "
                "what the others wrote. Name a frozen teacher for each in place of it"
            )
        if not teacher.tells_ids:
            kind = type(teacher).model_fields["kind"].default
            raise ValueError(
                f"rationales.teacher of kind {kind} tells no log-probabilities, or tells tokens as texts, which leave "
                "open which words of the student's they are. Take a teacher that tells ids (kind transformers or "
                "vllm), or name a frozen one"
            )
        if not sampling.top_logprobs:
            raise ValueError(
                "rationales.sampling.top_logprobs is 0: no log-probabilities are kept. Set it to 20, say; rationales "
                "that are there already were written without, and are asked for again"
            )

    def check_loss(self, loss: TermLoss) -> None:
        super().check_loss(loss)
        kind = type(loss).model_fields["kind"].default
        if "top_k" not in loss.takes:
            raise ValueError(
                f"{kind} cannot be computed from the likeliest words alone. Take a loss between distributions, such as "
                "forward_kl, or name a frozen teacher"
            )
        temperature = getattr(loss, "temperature", TEMPERATURE)
        if temperature != TEMPERATURE:
            given = f"{temperature:g}" if isinstance(temperature, float) else "a schedule"
            raise ValueError(
                f"temperature is {given}, but captured log-probabilities are those at temperature 1, and what all "
                "other words hold at another is not known. Set `temperature: 1`, or name a frozen or cached teacher"
            )

    def placed(self, folder: Path) -> TensorTeacherSpec:
        if self._folder:
            return self
        there = self.model_copy()
        there._folder = str(folder)
        return there

    def open(self, student: StudentFacts, members: Sequence[TensorTeacher] = ()) -> TensorTeacher:
        from distill_llm.cache.manifest import read_manifest
        from distill_llm.cache.shards import Shards

        folder = Path(self._folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise ConfigError(
                f"{folder}: there are no captured signals here. First type: distill-llm cache-signals RECIPE"
            )
        payload = TopK(k=manifest["payload"]["k"])
        return CachedWords(Shards(folder), payload, width=manifest["width"], temperatures=(TEMPERATURE,))

    def num_parameters(self, student_parameters: int) -> int:
        return 0
