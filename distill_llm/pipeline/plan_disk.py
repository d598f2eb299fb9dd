"""What a recipe will take on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill_llm.models.load import count_parameters, read_config, read_tokenizer
from distill_llm.pipeline.needs import needs_of_stages
from distill_llm.pipeline.plan_teachers import cached_shapes, head_bytes
from distill_llm.teachers.frozen import Frozen
from distill_llm.teachers.transformers import Transformers

if TYPE_CHECKING:
    from distill_llm.pipeline.plan_rows import PlanRows
    from distill_llm.pipeline.preview import Preview
    from distill_llm.recipe.recipe import Recipe

_A_TOKEN = 4.5  # bytes of a text, roughly
_COPIES = 3  # of a completion: in the journal, which has more about it, and in the data set


def disk_of(recipe: Recipe, rows: PlanRows, preview: Preview | None) -> dict[str, int]:
    """Bytes by what lies there; what is there already is counted too."""
    needs = needs_of_stages(recipe, read_tokenizer(str(rows.folder), where="student.tokenizer"))
    further = len(recipe.evaluate.ablations) + len(recipe.evaluate.controls)
    found = {
        "models": sum(one.disk for one in needs) + further * needs[-1].disk,
        "checkpoints": max(one.checkpoints for one in needs) * recipe.train.workers,
        "signals": _signals(recipe, rows),
        "rationales": _rationales(preview),
        "downloads": sum(_downloads(recipe).values()),
    }
    return {name: size for name, size in found.items() if size}


def _signals(recipe: Recipe, rows: PlanRows) -> int:
    shapes = cached_shapes(recipe, rows.rows, rows.tokenizer).values()
    return round(sum(rows.times * one.num_bytes + head_bytes(one) for one in shapes))


def _rationales(preview: Preview | None) -> int:
    if preview is None:
        return 0
    return round(_COPIES * _A_TOKEN * sum(part.most_tokens_out for part in preview.splits))


def _downloads(recipe: Recipe) -> Mapping[str, int]:
    """Weights that come from the Hub, each once."""
    asked = [(recipe.student.model, recipe.student.revision)]
    asked += [(one.model, one.revision) for one in recipe.teachers.values() if isinstance(one, Frozen)]
    voices = recipe.rationales.voices if recipe.rationales is not None else ()
    asked += [(one.teacher.model, one.teacher.revision) for one in voices if isinstance(one.teacher, Transformers)]
    found = {}
    for model, revision in dict.fromkeys(asked):
        if model and not Path(model).expanduser().is_dir():
            stored = str(read_config(model, revision, where=model).dtype or "float32")
            found[model] = count_parameters(model, revision, where=model) * (4 if "32" in stored else 2)
    return found
