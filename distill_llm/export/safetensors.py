"""The format that transformers reads: one folder, adapters merged, in full or half precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from distill_llm.export.base import Answering, Format, Writer, save_words
from distill_llm.export.in_torch import written_from

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel


class Safetensors(Format):
    """A plain Hugging Face folder for transformers, vLLM, TGI and others; in half precision half as large."""

    runtime: ClassVar[str] = "transformers"
    weights = ("*.safetensors",)
    kind: Literal["safetensors"] = "safetensors"
    variant: Literal["float32", "bfloat16", "float16"] = "float32"

    def write(self, student: LoadedModel, folder: Path) -> None:
        import copy

        import torch

        save_words(student, folder)
        # Of a copy: the student goes on to the next format as it is.
        copy.deepcopy(student.model).to(getattr(torch, self.variant)).save_pretrained(folder)

    def open(self, folder: Path, answering: Answering) -> Writer:
        return written_from(folder, answering)
