"""What a teacher reads: exemplars, then the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml
from pydantic import Field, ValidationError, field_validator

from distill_llm.core.assets import find_file
from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError
from distill_llm.core.files import fingerprint
from distill_llm.tasks.wording import bare_question, few_shot, reworded
from distill_llm.teachers.base import Message, Prompt
from distill_llm.teachers.prompt import PromptSpec

if TYPE_CHECKING:
    from distill_llm.core.example import Example


class Exemplar(Component):
    """One worked question of a few-shot prompt."""

    question: str
    rationale: str
    answer: str


class HintSpec(Component):
    """Another try where every vote was wrong: the teacher sees the gold label (STaR, Zelikman et al. 2022,
    arXiv:2203.14465, sec. 3.2). What it then writes is kept only where it reaches that label, and is flagged."""

    template: str = Field(
        default="{question}\n(Hint: {answer})", description="{question}, and {answer}: the sentence with its label"
    )
    samples: int = Field(default=1, ge=1, description="completions of a hinted prompt")

    @field_validator("template")
    @classmethod
    def _has_both(cls, template: str) -> str:
        if "{question}" not in template or "{answer}" not in template:
            raise ValueError("the template must contain {question} and {answer}")
        return template


@dataclass(frozen=True, slots=True)
class Prompter:
    """Renders prompts. ``head``, the exemplars, is the same for all examples."""

    spec: PromptSpec
    exemplars: tuple[Exemplar, ...]
    head: Prompt

    @property
    def fingerprint(self) -> str:
        """Changes with all that stands around a question."""
        return fingerprint([_plain(self.head), self.spec.template, self.spec.style])

    def question(self, example: Example, hint: str = "") -> str:
        """What is the example's own in its prompt; ``hint`` is a question to put in place of its own."""
        prompt = reworded(example.prompt, hint) if hint else example.prompt
        return self.spec.template.replace("{prompt}", bare_question(prompt) if self.spec.style == "chat" else prompt)

    def render(self, example: Example, hint: str = "") -> Prompt:
        return self.framed(self.question(example, hint))

    def framed(self, question: str) -> Prompt:
        """A question as it is, behind the exemplars."""
        return self.head + question if isinstance(self.head, str) else (*self.head, Message("user", question))


def make_prompter(spec: PromptSpec, *, where: str = "rationales.prompt") -> Prompter:
    exemplars = read_exemplars(spec.exemplars, where=where) if spec.exemplars else ()
    chosen = exemplars[: spec.num_exemplars] if spec.num_exemplars else exemplars
    if spec.style == "text":
        return Prompter(spec, chosen, "".join(f"{few_shot(e.question)} {e.rationale} {e.answer}\n\n" for e in chosen))
    turns = [Message("system", spec.system)] if spec.system else []
    for exemplar in chosen:
        turns.append(Message("user", exemplar.question))
        turns.append(Message("assistant", f"{exemplar.rationale} {exemplar.answer}"))
    return Prompter(spec, chosen, tuple(turns))


def hinted(template: str, question: str, answer: str) -> str:
    """A question that tells ``answer``, as ``template`` words it."""
    return template.replace("{answer}", answer).replace("{question}", question)


def prompt_text(prompt: Prompt) -> str:
    """A prompt for a reader's eyes; a chat with the name of the speaker before each turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{message.role}]\n{message.content}" for message in prompt)


def _plain(prompt: Prompt) -> str | list[list[str]]:
    return prompt if isinstance(prompt, str) else [[message.role, message.content] for message in prompt]


def read_exemplars(name: str, *, where: str = "rationales.prompt") -> tuple[Exemplar, ...]:
    """Exemplars from a file of the user's, or from the package's own by name; ``where``: the section that names it."""
    where = f"{where}.exemplars '{name}'"
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
