"""What the student is like, and where a teacher of signals does not fit it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill_llm.core.errors import ConfigError
from distill_llm.models.vision import head_words, is_vision, picture_shape


@dataclass(frozen=True, slots=True)
class StudentFacts:
    """What a tensor teacher must agree with. ``model`` is the student itself, for a teacher that is made of it.

    ``picture``: channels, height and width of what the student reads; None where it reads text.
    """

    vocabulary: dict[str, int]
    is_encoder_decoder: bool
    device: str
    model: Any = None
    picture: tuple[int, int, int] | None = None

    @property
    def width(self) -> int:
        """Words that a loss compares: entries of a head beyond the tokenizer's mean nothing, and differ by model."""
        return max(self.vocabulary.values()) + 1

    def must_share(self, vocabulary: dict[str, int], config: Any, where: str, *, own_columns: bool = False) -> None:
        """Raises ConfigError where token ids differ: losses would compare other words. And, unless the teacher reads
        ``own_columns``, where families do, or what they read: the student's columns would mean nothing to it."""
        if not own_columns:
            self._must_read_alike(config, where)
        if config.is_encoder_decoder != self.is_encoder_decoder and not own_columns:
            names = {True: "an encoder-decoder", False: "decoder-only"}
            raise ConfigError(
                f"{where}: the teacher is {names[config.is_encoder_decoder]}, the student is "
                f"{names[self.is_encoder_decoder]}. A loss on logits needs two models of one family; give the teacher "
                '`view: {template: "{input}"}` if its tokenizer is the student\'s; `own_tokenizer: true` and the term '
                "the loss universal_logit if it is not; or teach by rationales (text)."
            )
        if vocabulary != self.vocabulary:
            different = [word for word, index in self.vocabulary.items() if vocabulary.get(word) != index]
            raise ConfigError(
                f"{where}: teacher and student have different vocabularies ({len(vocabulary)} and "
                f"{len(self.vocabulary)} entries; {len(different)} of the student's are missing or elsewhere, such as "
                f"{different[:3]}). Give the student the teacher's tokenizer (`student.tokenizer`), or the teacher "
                "`own_tokenizer: true` and the term the loss universal_logit, or teach by text."
            )
        check_head(config, self.width, where=where)

    def _must_read_alike(self, config: Any, where: str) -> None:
        if is_vision(config) != (self.picture is not None):
            raise ConfigError(reads_otherwise(where, teacher_sees=is_vision(config)))
        if self.picture is not None and self.picture != picture_shape(config):
            raise ConfigError(
                f"{where}: it reads pictures of {picture_shape(config)} (channels, height, width), and the student "
                f"those of {self.picture}. Give it pictures of its own (`view: {{picture: ...}}`), or make them alike."
            )


def reads_otherwise(where: str, *, teacher_sees: bool) -> str:
    """What is wrong with a teacher of the other modality that reads the student's columns."""
    what, other = ("pictures", "text") if teacher_sees else ("text", "pictures")
    view = '{template: "{input}", picture: {width: ..., height: ...}}' if teacher_sees else '{template: "{input}"}'
    return f"{where}: the teacher reads {what}, the student {other}. Give the teacher a view of its own: view: {view}"


def check_head(config: Any, width: int, *, where: str) -> None:
    """Raises ConfigError where a teacher's head is too small for the ``width`` words of its tokenizer."""
    if head_words(config) < width:
        raise ConfigError(
            f"{where}: the teacher's head has {head_words(config)} entries, its tokenizer {width}: some words "
            "have no logit. Choose a tokenizer that belongs to the model."
        )
