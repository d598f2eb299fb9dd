"""The recipe's side of what a teacher of text reads around a question."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from distill_llm.core.component import Component


class PromptSpec(Component):
    """How an example becomes the teacher's prompt."""

    exemplars: str = Field(default="", description="a YAML file, or a name in data/exemplars; empty: zero-shot")
    num_exemplars: int = Field(default=0, ge=0, description="the first so many; 0 takes all")
    template: str = Field(default="{prompt}", description="text around the question, which stands for {prompt}")
    style: Literal["text", "chat"] = Field(
        default="text", description="text: one text that a base model goes on with; chat: turns, for an instruct model"
    )
    system: str = Field(default="", description="the system message of a chat, such as how the answer is to end")

    @field_validator("template")
    @classmethod
    def _has_question(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("the template must contain {prompt}, the place of the question")
        return template

    @model_validator(mode="after")
    def _system_in_a_chat(self) -> PromptSpec:
        if self.system and self.style == "text":
            raise ValueError("`system` is a message of a chat: set style: chat, or put the text into `template`")
        return self
