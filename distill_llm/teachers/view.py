"""The recipe's side of what a teacher of signals reads in place of the student's input."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_llm.core.component import Component
from distill_llm.models.spec import PictureSpec, PrefixSide

if TYPE_CHECKING:
    from distill_llm.models.picture import Painter

PLACES = re.compile(r"\{(prompt|input)\}")


class TeacherView(Component):
    """A prompt of the teacher's own: exemplars before the question, the answer in it, other words around it.

    Privileged context: the teacher is right because it sees more, and the student learns to do without. With `ema` it
    is the student itself, shown more; with `scheme: {kind: on_policy}` too, on texts that the student writes, that is
    SDFT (2026, arXiv:2601.19897).
    """

    template: str = Field(
        default="{prompt}",
        description="around the question: {prompt}, as a few-shot prompt has it, or {input}, as the student reads it",
    )
    exemplars: str = Field(default="", description="a YAML file, or a name in data/exemplars; empty: none")
    num_exemplars: int = Field(default=0, ge=0, description="the first so many; 0 takes all")
    gold_label: bool = Field(default=False, description="tell the gold label, as `hint` words it")
    rationale: bool = Field(
        default=False, description="tell the rationale that the row is about, as `hint` words it, before the gold label"
    )
    hint: str = Field(
        default="{question}\n(Hint: {answer})",
        description="{question}, and {answer}: the rationale, the sentence with the gold label, or both",
    )
    style: Literal["text", "chat"] = Field(default="text", description="chat: turns, for an instruct model")
    system: str = Field(default="", description="the system message of a chat")
    max_input_tokens: int = Field(default=2048, gt=0, description="a longer prompt is refused, never cut")
    picture: PictureSpec | None = Field(
        default=None,
        description="it reads a picture of the text (vision-encoder-decoder models), or the data's own beside the text "
        "(llava); absent: the text",
    )
    prefix_side: PrefixSide = Field(
        default="encoder",
        description="decoder: the student's prefix begins what the teacher's decoder reads, and is not in {input}",
    )

    @field_validator("template")
    @classmethod
    def _has_question(cls, template: str) -> str:
        if not PLACES.search(template):
            raise ValueError("the template must contain {prompt} or {input}, the place of the question")
        return template

    @field_validator("hint")
    @classmethod
    def _has_both(cls, hint: str) -> str:
        if "{question}" not in hint or "{answer}" not in hint:
            raise ValueError("the hint must contain {question} and {answer}")
        return hint

    @model_validator(mode="after")
    def _system_in_a_chat(self) -> TeacherView:
        if self.system and self.style == "text":
            raise ValueError("`system` is a message of a chat: set style: chat, or put the text into `template`")
        if self.picture is not None and self.style == "chat":
            raise ValueError("a chat cannot be drawn: set style: text, or remove `picture`")
        return self


AS_THE_STUDENT = TeacherView(template="{input}")


@dataclass(frozen=True, slots=True)
class Reader:
    """How a teacher that does not read the student's columns reads a row.

    ``align``: how its tokens of a target find the student's, where its tokenizer is its own; empty where it is the
    student's, and the tokens are the same. ``painter``: makes the pictures of a teacher that reads them, alone or
    within a text.
    """

    view: TeacherView
    tokenizer: Any
    config: Any
    align: Literal["", "text", "position"]
    painter: Painter | None = None

    @property
    def reads_text(self) -> bool:
        return self.painter is None or self.painter.place_id is not None

    @property
    def decoder_start_token_id(self) -> int | None:
        """None for a decoder-only teacher."""
        return self.config.decoder_start_token_id if self.config.is_encoder_decoder else None
