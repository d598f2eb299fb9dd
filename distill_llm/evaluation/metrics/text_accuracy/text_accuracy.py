"""Accuracy of answers compared as text: case, spacing, quotes and a final full stop do not count."""

import datasets
import evaluate

from distill_llm.evaluation.metric import INPUTS_DESCRIPTION, accuracy


class TextAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of predictions with the same text as their reference.",
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string"))),
        )

    def _compute(self, *, predictions, references):  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"accuracy": accuracy("text", predictions, references)}
