"""Completions that exist already: raw texts in row order, in JSON lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.core.assets import find_file
from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.files import fingerprint
from distill_llm.teachers.base import Completion, Request, Sampling, TeacherFacts, TextTeacher, TextTeacherSpec

if TYPE_CHECKING:
    from distill_llm.tasks.base import Task


class ReplayTeacher:
    """Gives each example the text at its own place in the lists of the split that it came from."""

    def __init__(self, name: str, texts: dict[str, list[str]]):
        self.identity = f"replay {name} {fingerprint(texts)}"
        self._texts = texts

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        for request in requests:
            example = request.example
            texts = self._texts.get(example.origin, [])
            if not 0 <= example.row < len(texts):
                raise TeacherError(
                    f"rationales.teacher: the {example.origin} split has a row {example.row + 1}, but only "
                    f"{len(texts)} completions are there to replay. Give one for every row, in the order of the data."
                )
            yield request, Completion(texts[example.row])


class ReplayFiles(Component):
    """For each split of the source: a file, or a pattern such as llm/train_CoT_*.json whose number gives the order."""

    train: str = ""
    validation: str = ""
    test: str = ""


class Replay(TextTeacherSpec):
    """Raw completions in JSON lists of texts, one text a row of the data."""

    kind: Literal["replay"] = "replay"
    computes: ClassVar[bool] = False
    name: str = Field(default="replayed teacher", description="who wrote them, for tables and cards")
    files: ReplayFiles

    def check(self) -> None:
        for split, pattern in self.files.model_dump().items():
            if pattern:
                _matches(pattern, f"rationales.teacher.files.{split}")

    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        patterns = {split: pattern for split, pattern in self.files.model_dump().items() if pattern}
        return ReplayTeacher(self.name, {split: _read(pattern, split) for split, pattern in patterns.items()})

    def describe(self) -> TeacherFacts:
        return TeacherFacts(self.name)


def _read(pattern: str, split: str) -> list[str]:
    where = f"rationales.teacher.files.{split}"
    texts: list[str] = []
    for path in _matches(pattern, where):
        try:
            part = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: {path} is not a JSON file ({error}).") from None
        if not isinstance(part, list) or not all(isinstance(text, str) for text in part):
            raise ConfigError(f'{where}: {path} holds no list of texts. Expected ["completion of row 1", ...].')
        texts += part
    return texts


def _matches(pattern: str, where: str) -> list[Path]:
    folder = find_file(str(Path(pattern).parent))
    found = sorted(folder.glob(Path(pattern).name), key=_numbers) if folder is not None else []
    if not found:
        raise ConfigError(f"{where}: no file matches '{pattern}'. Give a path or a pattern relative to where you are.")
    return found


def _numbers(path: Path) -> tuple[list[int], str]:
    """File 10 comes after file 9."""
    return [int(digits) for digits in re.findall(r"\d+", path.name)], path.name
