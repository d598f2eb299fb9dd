"""Accuracy of answers compared as arithmetic expressions: equal when their exact values are."""

import datasets
import evaluate

from distill_llm.evaluation.metric import INPUTS_DESCRIPTION, accuracy


class EquationAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of predictions whose expression has the same exact value as that of their reference.",
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string"))),
        )

    def _compute(self, *, predictions, references):  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"accuracy": accuracy("equation", predictions, references)}
