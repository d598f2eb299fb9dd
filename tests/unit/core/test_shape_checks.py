"""The shapes in the annotations of the numeric modules are checked while the tests run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from distill_llm.core.signals import Signals, signals_of
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses import base as losses_base
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.schemes import base as schemes_base


def _signals(num_tokens: int, vocabulary: int = 5) -> Signals:
    ids = torch.zeros(num_tokens, dtype=torch.long)
    return Signals(torch.zeros(num_tokens, vocabulary), ids, ids)


def test_one_dimension_too_few_is_refused() -> None:
    with pytest.raises(TypeCheckError):
        Signals(torch.zeros(4), torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long))


def test_axes_of_one_name_must_have_one_size() -> None:
    with pytest.raises(TypeCheckError):
        Signals(torch.zeros(4, 5), torch.zeros(3, dtype=torch.long), torch.zeros(4, dtype=torch.long))


def test_a_wrong_element_type_is_refused() -> None:
    with pytest.raises(TypeCheckError):
        Signals(torch.zeros(4, 5), torch.zeros(4), torch.zeros(4, dtype=torch.long))
    with pytest.raises(TypeCheckError):
        _signals(4).where(torch.ones(4))  # type: ignore[arg-type]


def test_functions_and_losses_are_checked_too() -> None:
    with pytest.raises(TypeCheckError):
        signals_of(torch.zeros(2, 3), {"labels": torch.zeros(2, 3), "targets": torch.zeros(2)})
    with pytest.raises(TypeCheckError):
        CrossEntropy()(torch.zeros(4, 5), None)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        Collator("0", None)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        Collator(0, None)([1, 2])  # type: ignore[list-item]


def test_right_shapes_pass() -> None:
    assert CrossEntropy()(_signals(4), None).tolist() == pytest.approx([1.6094379] * 4)
    assert Collator(0, None)([Row(0, "label", [3], [4])])["labels"].tolist() == [[-100, 4]]


def test_names_lent_to_the_checker_are_gone_again() -> None:
    """A module that uses at run time what it imports for annotations only must still fail in the tests."""
    assert not hasattr(losses_base, "Tensor")
    assert not hasattr(schemes_base, "Objective")
    assert schemes_base.Signals is Signals


def test_a_recipe_loads_without_torch() -> None:
    """What the checks above must not spoil: annotations cost no import of torch or transformers."""
    code = (
        "import sys; from distill_llm.recipe.load import load_recipe; load_recipe('recipes/quickstart/teacher.yaml'); "
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
