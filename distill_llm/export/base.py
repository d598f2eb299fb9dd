"""What a format of students has to say: how one is written, and how it is opened in the format's own runtime."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_args

from distill_llm.core.component import Component, kinds
from distill_llm.core.errors import ConfigError
from distill_llm.core.extras import is_there, need

if TYPE_CHECKING:
    from distill_llm.models.generate import Written
    from distill_llm.models.load import LoadedModel

ALL = "all"
PLAIN = "float32"
"""The variant whose name is that of its format alone."""


class Writer(Protocol):
    """Writes greedy texts, a batch at a time."""

    def write_ids(self, prompts: Sequence[Sequence[int]]) -> list[Written]: ...

    def write_pictures(self, pixels: Any) -> list[Written]: ...


@dataclass(frozen=True, slots=True)
class Answering:
    """How a student is asked: all that decides its texts and is not in its weights; ``threads`` decide its speed."""

    max_new_tokens: int
    decoder_prefix: Sequence[int]
    threads: int


class Format(Component, ABC):
    """A form in which a student is shipped, in one of its variants. A subclass has a ``kind`` and a ``variant``."""

    packages: ClassVar[Sequence[str]] = ()
    """Modules that it needs, by the name that they are imported by."""
    extra: ClassVar[str] = "export"
    """The optional dependencies that hold them."""
    runtime: ClassVar[str] = ""
    """What it is opened in."""
    weights: ClassVar[Sequence[str]] = ()
    """Patterns of the files whose size counts."""

    @property
    def name(self) -> str:
        """What the command line and the folder call it."""
        kind, variant = (getattr(self, key) for key in ("kind", "variant"))
        return kind if variant == PLAIN else f"{kind}-{variant}"

    def is_installed(self) -> bool:
        return all(is_there(package) for package in self.packages)

    def check(self, *, where: str) -> None:
        """Raises ConfigError where a package is missing."""
        for package in self.packages:
            need(package, self.extra, where=where)

    def why_not(self, model: Any, tokenizer: Any) -> str:
        """Why a student cannot be written so; "" where it can. ``model`` has shapes, and no weights."""
        return ""

    @abstractmethod
    def write(self, student: LoadedModel, folder: Path) -> None:
        """Writes the model and its tokenizer into an empty folder. Raises ExportError where that fails."""

    @abstractmethod
    def open(self, folder: Path, answering: Answering) -> Writer:
        """The model of a folder that ``write`` filled, in the format's runtime on the CPU."""

    def num_bytes(self, folder: Path) -> int:
        """Size of the weights and graphs on disk, without tokenizer and configs."""
        return sum(path.stat().st_size for pattern in self.weights for path in folder.glob(pattern))


def formats() -> dict[str, Format]:
    """Each variant of each format, by its name."""
    found = [
        cls.model_validate({"variant": variant})
        for cls in kinds(Format, "distill_llm.export").values()
        for variant in get_args(cls.model_fields["variant"].annotation)
    ]
    return {one.name: one for one in sorted(found, key=lambda one: one.name)}


def chosen_formats(names: Sequence[str]) -> list[Format]:
    """The formats of these names, ``all`` being those whose packages are here.

    Raises ConfigError for a name that is none, and where a package that one needs is missing.
    """
    known = formats()
    chosen: list[Format] = []
    for name in names:
        if name == ALL:
            chosen += [one for one in known.values() if one.is_installed()]
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"--format: '{name}' is not one of {', '.join([*known, ALL])}."
                + (f" Did you mean '{near[0]}'?" if near else "")
            )
        known[name].check(where=f"--format {name}")
        chosen.append(known[name])
    return list({one.name: one for one in chosen}.values())


def save_words(student: LoadedModel, folder: Path) -> None:
    """Writes what reads and ends texts: config, list of end tokens, tokenizer, image processor where there is one."""
    student.model.config.save_pretrained(folder)
    student.model.generation_config.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    if student.painter is not None:
        student.painter.save(str(folder))
