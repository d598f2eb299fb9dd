"""The published PaLM-540B texts, read by the pipeline's own parts, give the accuracy that is known of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_llm.core.example import Example
from distill_llm.pipeline.rationale_stage import make_asker
from distill_llm.rationales.dataset import Funnel, judge, make_rows
from distill_llm.rationales.keep import AgreesWithLabel
from distill_llm.recipe.load import load_recipe
from distill_llm.teachers.base import Completion

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "dss"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the published PaLM texts are not there ({DATA})")

# Examples, and accuracy in percent, of the outputs published with the code of Hsieh et al. 2023, arXiv:2305.02301.
PUBLISHED = {
    "svamp": {"train": (800, 73.25), "test": (200, 74.00)},
    "cqa": {"train": (9_741, 74.26), "test": (1_221, 77.23)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_teacher_accuracy_is_the_published_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation is put back into train: a replayed text is found by the place where its row stood before the cut."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(f"recipes/real/{name}_palm.yaml")
    spec = recipe.rationales
    assert spec is not None
    splits = recipe.task.load(recipe.seed)
    by_origin: dict[str, list[Example]] = {"train": [], "test": []}
    for example in (*splits.train, *splits.validation, *splits.test):
        by_origin[example.origin].append(example)
    asker = make_asker(recipe, spec)
    for split, (number, percent) in PUBLISHED[name].items():
        counts, rightful = Funnel(), Funnel()
        requests = {example.id: asker.requests(example, split) for example in by_origin[split]}
        asked = (request for of_example in requests.values() for request in of_example)
        there = {
            r.key: result for r, result in asker.speakers[0].teacher.complete(asked) if isinstance(result, Completion)
        }
        for of_example in requests.values():
            plain = judge(of_example, there.get, recipe.task)
            counts.count(make_rows(plain, [], recipe.task, spec.keep), recipe.task)
            rightful.count(make_rows(plain, [], recipe.task, [AgreesWithLabel()]), recipe.task)
        assert counts.completed == counts.examples == number
        assert round(100 * (counts.accuracy or 0), 2) == percent
        # what is kept has a rationale too, which a few right answers lack
        wordless = rightful.dropped["no rationale"] + rightful.dropped["empty"]
        assert rightful.kept <= rightful.right <= rightful.kept + wordless
        assert abs(100 * rightful.kept / number - percent) < 0.3
