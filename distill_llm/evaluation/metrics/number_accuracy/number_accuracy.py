"""Accuracy of answers compared as numbers: the last number of each text, as an exact fraction."""

import datasets
import evaluate

from distill_llm.evaluation.metric import INPUTS_DESCRIPTION, accuracy


class NumberAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of predictions whose last number equals that of their reference.",
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string"))),
        )

    def _compute(self, *, predictions, references):  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"accuracy": accuracy("number", predictions, references)}
