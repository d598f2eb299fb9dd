from __future__ import annotations

import pytest

from distill_llm.core.errors import DataError
from distill_llm.evaluation.metric import accuracy, correct, load_metric, metric_folder

CASES = {
    "text": (
        ["A Dog.", "cat", "", "  ", "'bird'"],
        ["a  dog", "dog", "dog", "", "bird"],
        [True, False, False, False, True],
    ),
    "number": (
        ["the answer is 1,234.50", "3/4", "", "none", "7", "-2"],
        ["1234.5", "0.75", "0", "none", "8", "-2.0"],
        [True, True, False, False, False, True],
    ),
    "equation": (
        ["( 84.0 / 2.0 )", "2 * 3", "", "2 +", "1 / 0", "1 / 3 + 1 / 3"],
        ["42", "3 * 2", "0", "2 +", "1 / 0", "2 / 3"],
        [True, True, False, False, False, True],
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_example_is_judged_on_its_own(kind):
    predictions, references, expected = CASES[kind]
    assert correct(kind, predictions, references) == expected


@pytest.mark.parametrize("kind", CASES)
def test_the_evaluate_module_agrees_with_the_examples(kind, monkeypatch, tmp_path):
    import evaluate.config

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    predictions, references, expected = CASES[kind]
    module = load_metric(kind)
    assert module.name == f"{kind}_accuracy"
    assert module.compute(predictions=predictions, references=references) == {"accuracy": sum(expected) / len(expected)}
    module.add_batch(predictions=predictions[:2], references=references[:2])
    module.add(prediction=predictions[2], reference=references[2])
    assert module.compute() == {"accuracy": accuracy(kind, predictions[:3], references[:3])}


@pytest.mark.parametrize("kind", CASES)
def test_the_folder_is_what_evaluate_loads(kind):
    folder = metric_folder(kind)
    assert folder.is_absolute()
    assert (folder / f"{folder.name}.py").is_file()


def test_predictions_and_references_of_other_lengths_are_refused():
    with pytest.raises(DataError, match="2 predictions came with 1 references"):
        correct("text", ["a", "b"], ["a"])


def test_nothing_to_count_is_refused():
    with pytest.raises(DataError, match="Expected at least one"):
        accuracy("text", [], [])
