"""e-SNLI and ANLI in the layout of Hsieh et al. 2023, with labels as names or numbers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import DataError
from distill_llm.tasks.anli import Anli
from distill_llm.tasks.esnli import ESnli

if TYPE_CHECKING:
    from pathlib import Path

ROW = {"premise": "It rains. ", "hypothesis": "It is wet.", "label": "entailment"}


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("\n".join(json.dumps(ROW | row) for row in rows))


def test_esnli_reads_names_numbers_and_no_agreement(tmp_path: Path) -> None:
    write(tmp_path / "esnli_train.json", {"explanation_1": "Rain is wet."}, {"label": 1}, {"label": "2"}, {"label": -1})
    write(tmp_path / "esnli_valid.json", {"label": "-"})
    write(tmp_path / "esnli_test.json", {"label": "Neutral"})
    found = ESnli(data=str(tmp_path)).read()
    assert [e.label for e in found["train"]] == ["entailment", "neutral", "contradiction", None]
    assert [found[split][0].label for split in ("validation", "test")] == [None, "neutral"]
    first = found["train"][0]
    assert first.input == "premise: It rains. hypothesis: It is wet."
    assert first.prompt == f"Q: {first.input}\nA:"
    assert (first.rationale, found["train"][1].rationale) == ("Rain is wet.", None)


def test_anli_reads_its_round(tmp_path: Path) -> None:
    write(tmp_path / "anli1_train.json", {"reason": "Rain is wet."})
    write(tmp_path / "anli3_train.json", {"label": 0}, {"label": 2})
    assert Anli(data=str(tmp_path)).read()["train"][0].rationale == "Rain is wet."
    assert len(Anli(data=str(tmp_path), round="r3").read()["train"]) == 2


def test_rows_in_two_splits_are_dropped_by_default(tmp_path: Path) -> None:
    write(tmp_path / "train.json", {}, {"hypothesis": "It is dry."})
    write(tmp_path / "validation.json", {"hypothesis": "It snows."})
    write(tmp_path / "test.json", {})
    assert [e.id for e in ESnli(data=str(tmp_path)).load(0).train] == ["train-2"]
    with pytest.raises(DataError, match="1 inputs are in both train and test"):
        ESnli(data=str(tmp_path), overlap="refuse").load(0)


def test_unknown_label_and_missing_hypothesis(tmp_path: Path) -> None:
    write(tmp_path / "train.json", {}, {"label": "maybe"})
    with pytest.raises(
        DataError, match=r"train\.json, row 2: the field 'label' is 'maybe'\. Expected one of \['entail"
    ):
        ESnli(data=str(tmp_path)).read()
    write(tmp_path / "train.json", {"hypothesis": ""})
    with pytest.raises(DataError, match=r"row 1: the field 'hypothesis' is empty"):
        ESnli(data=str(tmp_path)).read()


@pytest.mark.parametrize(
    ("completion", "label"),
    [
        ("Rain is wet. The answer is entailment.", "entailment"),
        ("So the answer is that the premise contradicts the hypothesis.", "contradiction"),
        ("The answer is neutral. Another sentence.", "neutral"),
        ("The answer is neutral or entailment.", None),
        ("The answer is unknown.", None),
    ],
)
def test_answer_is_read(tmp_path: Path, completion: str, label: str | None) -> None:
    write(tmp_path / "train.json", {})
    task = ESnli(data=str(tmp_path))
    (stated,) = re.findall(task.answer_pattern(), completion)
    assert task.normalise(stated, task.read()["train"][0]) == label
