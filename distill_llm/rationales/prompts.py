"""What a teacher reads: exemplars, then the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml
from pydantic import Field, ValidationError, field_validator

from distill_llm.core.assets import find_file
from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError

if TYPE_CHECKING:
    from distill_llm.core.example import Example


class Exemplar(Component):
    """One worked question of a few-shot prompt."""

    question: str
    rationale: str
    answer: str


class PromptSpec(Component):
    """How an example becomes the teacher's prompt."""

    exemplars: str = Field(default="", description="a YAML file, or a name in data/exemplars; empty: zero-shot")
    num_exemplars: int = Field(default=0, ge=0, description="the first so many; 0 takes all")
    template: str = Field(default="{prompt}", description="text around the question, which stands for {prompt}")

    @field_validator("template")
    @classmethod
    def _has_question(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("the template must contain {prompt}, the place of the question")
        return template


@dataclass(frozen=True, slots=True)
class Prompter:
    """Renders prompts. ``head`` is the same for all examples."""

    head: str
    template: str

    def render(self, example: Example) -> str:
        return self.head + self.template.replace("{prompt}", example.prompt)


def make_prompter(spec: PromptSpec) -> Prompter:
    if not spec.exemplars:
        return Prompter("", spec.template)
    exemplars = read_exemplars(spec.exemplars)
    chosen = exemplars[: spec.num_exemplars] if spec.num_exemplars else exemplars
    return Prompter("".join(f"Q: {e.question}\nA: {e.rationale} {e.answer}\n\n" for e in chosen), spec.template)


def read_exemplars(name: str) -> tuple[Exemplar, ...]:
    """Exemplars from a file of the user's, or from the package's own by name."""
    where = f"rationales.prompt.exemplars '{name}'"
    candidates = (find_file(name), find_file(f"data/exemplars/{name}.yaml"))  # the first may be a folder with data
    path = next((found for found in candidates if found is not None and found.is_file()), None)
    if path is None:
        raise ConfigError(f"{where}: no such file, and no exemplars of that name came with the package.")
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not rows:
            raise ConfigError(f"{where}: expected a list of exemplars, each with question, rationale and answer.")
        return tuple(Exemplar.model_validate(row) for row in rows)
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(
            f"{where} ({path}): not a list of exemplars with the keys question, rationale, answer: {error}"
        ) from None
