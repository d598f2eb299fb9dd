"""The frozen teacher of logits: what it says, and whom it refuses to teach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.core.errors import ConfigError
from distill_llm.core.signals import model_inputs, signals_of
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.teachers.base import StudentFacts
from distill_llm.teachers.frozen import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel

ROWS = [Row(0, "label", [5, 6, 7], [8, 1]), Row(0, "rationale", [5], [9, 10, 11, 1])]


def _spec(model: LoadedModel, folder: Path) -> Frozen:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return Frozen(model=str(folder))


def _facts(student: LoadedModel, **changes: Any) -> StudentFacts:
    facts: dict[str, Any] = {
        "vocabulary": student.tokenizer.get_vocab(),
        "is_encoder_decoder": student.is_encoder_decoder,
        "vocab_size": student.model.config.vocab_size,
        "device": "cpu",
    }
    return StudentFacts(**(facts | changes))


def test_it_says_what_the_model_says_without_dropout_or_gradient(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    dropout = "attention_dropout" if tiny_model().model.config.model_type == "llama" else "dropout_rate"
    student, big = tiny_model(seed=1), tiny_model(seed=2, **{dropout: 0.5})
    spec = _spec(big, tmp_path)
    teacher = spec.open(_facts(student))
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    said = teacher.signals(batch)
    expected = signals_of(big.model.eval()(**model_inputs(batch)).logits, batch)
    torch.testing.assert_close(said.logits, expected.logits)
    assert not said.logits.requires_grad
    assert said.token_ids.tolist() == expected.token_ids.tolist()
    assert spec.num_parameters() == big.num_parameters


def test_another_family_is_refused(
    tiny_t5: Callable[..., LoadedModel], tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    spec = _spec(tiny_llama(), tmp_path)
    with pytest.raises(ConfigError, match=r"teacher is decoder-only, the student is an encoder-decoder.*rationales"):
        spec.open(_facts(tiny_t5()))


def test_another_vocabulary_is_refused_with_the_words_that_differ(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Also where both have the same number of entries, and only some stand elsewhere."""
    student, spec = tiny_t5(text="ann bob carl"), _spec(tiny_t5(text="ann bob dora"), tmp_path)
    with pytest.raises(ConfigError, match=r"different vocabularies \(6 and 6 entries; 1 of .* \['carl'\]") as caught:
        spec.open(_facts(student))
    assert "teachers: frozen" in str(caught.value)
    assert "student.tokenizer" in str(caught.value)


def test_a_head_of_another_width_is_refused(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """One tokenizer, but one head padded to a multiple of 8: the logits would not line up."""
    spec = _spec(tiny_t5(text="ann bob carl", vocab_size=8), tmp_path)
    with pytest.raises(ConfigError, match=r"the heads have 8 \(teacher\) and 6 \(student\) entries"):
        spec.open(_facts(tiny_t5(text="ann bob carl")))


def test_a_missing_teacher_is_a_config_error() -> None:
    spec = Frozen(model="./runs/nothing/here")
    with pytest.raises(ConfigError, match=r"teachers: frozen .* there is no folder"):
        spec.num_parameters()
