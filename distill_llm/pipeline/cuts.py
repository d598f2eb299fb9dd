"""Cuts of students, measured on training rows: once for each, and then the same for all arms, trials and processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.files import fingerprint, read_json, write_json
from distill_llm.core.processes import main_first
from distill_llm.data.rows import Row
from distill_llm.models.load import LoadedModel, load_model, read_tokenizer, weights_of
from distill_llm.models.spec import StudentSpec
from distill_llm.objective import targets_of
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from distill_llm.models.cut import Kept

_ROWS_AT_ONCE = 16


def settle_cut(student: StudentSpec, recipe: Recipe, rows: Sequence[Row], run: RunFolder) -> Path | None:
    """The file that says what the student's cut keeps, measured if it is not there; None where nothing is measured.

    ``recipe`` is the whole run's: a control, which learns from fewer rows, starts from the same cut as the student.
    """
    if not student.measures:
        return None
    assert student.cut is not None
    sample = calibration_rows(recipe, rows, student.cut.calibration_rows)
    model = weights_of(student.model, student.revision, where="student.model")
    facts = {"model": model, "cut": student.cut.model_dump(mode="json"), "rows": [row.key for row in sample]}
    file = run.cut(fingerprint(facts))
    main_first(lambda: None if file.exists() else _write(student, sample, file, run))
    return file


def read_kept(file: Path | None) -> Kept | None:
    from distill_llm.models.cut import Kept

    return None if file is None else Kept(**read_json(file)["kept"])


def calibration_rows(recipe: Recipe, rows: Sequence[Row], number: int) -> list[Row]:
    """So many of the rows that the recipe's objective learns from, drawn by the recipe's seed alone."""
    own = [row for row in rows if row.target in targets_of(recipe.objective)]
    return random.Random(f"{recipe.seed} calibration").sample(own, min(number, len(own)))


def measure_cut(student: StudentSpec, tokenizer: Any, rows: Sequence[Row]) -> tuple[Kept, dict[str, Any]]:
    """What the student's cut keeps, and what was measured of the layers. Loads the whole model."""
    from distill_llm.models.cut import choose
    from distill_llm.models.generate import default_device
    from distill_llm.models.importance import measure
    from distill_llm.training.train import collator_for

    assert student.cut is not None
    model = load_model(student.model, student.revision, where="student.model").to(default_device())
    whole = LoadedModel(model, tokenizer)
    collate = collator_for(whole, {}, "never")
    ordered = sorted(rows, key=lambda row: (row.target, -row.num_tokens))
    batches = [
        {name: column.to(model.device) for name, column in collate(ordered[at : at + _ROWS_AT_ONCE]).items()}
        for at in range(0, len(ordered), _ROWS_AT_ONCE)
    ]
    by_loss = student.cut.layer_importance == "loss"
    importance = measure(model, batches, by_loss=by_loss, where="student.cut")
    kept = choose(model, student.cut, importance, where="student.cut")
    return kept, {"rows": len(rows), "layers": {stack: list(each) for stack, each in importance.layers.items()}}


def _write(student: StudentSpec, rows: Sequence[Row], file: Path, run: RunFolder) -> None:
    kept, measured = measure_cut(student, read_tokenizer(str(run.tokenizer), where="student.tokenizer"), rows)
    assert student.cut is not None
    about = {"model": student.model, "cut": student.cut.model_dump(mode="json"), "measured": measured}
    write_json(file, about | {"kept": kept.facts()})
