"""Texts of a model that transformers has loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_llm.export.base import Answering
from distill_llm.models.generate import Generator
from distill_llm.models.load import load_model, read_tokenizer


def written_from(folder: Path, answering: Answering) -> Generator:
    """What writes with the model and the tokenizer of a Hugging Face folder, in the precision of its weights."""
    where = str(folder)
    model = load_model(where, where=where, dtype="auto")
    return written_by(model, read_tokenizer(where, where=where), answering)


def written_by(model: Any, tokenizer: Any, answering: Answering) -> Generator:
    """The same of a model and a tokenizer."""
    asked = {"max_new_tokens": answering.max_new_tokens, "decoder_prefix": answering.decoder_prefix}
    return Generator(model.eval(), tokenizer, **asked)
