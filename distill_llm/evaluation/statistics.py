"""How sure a score is: intervals over test examples, and tests of two models on the same examples.

All of it takes one boolean per example (answered correctly or not). Nothing here covers the spread between training
runs: another seed gives another model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from distill_llm.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

# With fewer examples than this on either side, resampling sees too little of the rarer outcome: its interval is too
# short, and has no width at all when every example is right. A closed form takes over there.
RESAMPLED_FROM = 10


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the bounds of its confidence interval, as fractions (0.01 is one percentage point)."""

    estimate: float
    low: float
    high: float


def accuracy_interval(
    correct: Sequence[bool], *, seed: int, resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Accuracy with its percentile bootstrap interval over examples.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13. The number of correct answers in a resample is
    binomial, so it is drawn as such: the same distribution as picking examples, without picking them. With fewer than
    ``RESAMPLED_FROM`` correct or wrong examples it is Wilson's score interval instead.
    """
    right = np.asarray(correct, dtype=bool)
    _check(len(right), resamples, confidence)
    total, successes = len(right), int(right.sum())
    if min(successes, total - successes) < RESAMPLED_FROM:
        return wilson_interval(successes, total, confidence=confidence)
    drawn = np.random.default_rng(seed).binomial(total, successes / total, size=resamples)
    return _percentiles(successes / total, drawn / total, confidence)


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], *, seed: int, resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Accuracy of ``first`` minus that of ``second``, with its paired percentile bootstrap interval over examples.

    Efron and Tibshirani 1993, ch. 8 and 13: an example is drawn with both of its answers. Only four counts matter
    (both correct, only the first, only the second, neither), and in a resample these are multinomial. With fewer than
    ``RESAMPLED_FROM`` examples on which the two differ it is the adjusted Wald interval of Bonett and Price 2012 (J.
    Educational and Behavioral Statistics 37, 479) instead.
    """
    counts = _paired_counts(first, second)
    _check(counts.sum(), resamples, confidence)
    total = int(counts.sum())
    _, only_first, only_second, _ = (int(count) for count in counts)
    if only_first + only_second < RESAMPLED_FROM:
        return _adjusted_wald(only_first, only_second, total, confidence)
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=resamples)
    return _percentiles((only_first - only_second) / total, (drawn[:, 1] - drawn[:, 2]) / total, confidence)


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of "both models are equally often correct", by the exact form of McNemar's test.

    McNemar 1947 (Psychometrika 12, 153): of the examples on which the models differ, each is as likely won by the one
    as by the other, so the wins are binomial with chance 1/2. The sum runs over logarithms: no overflow for many
    examples, and a p below 1e-308 becomes 0.
    """
    _, only_first, only_second, _ = (int(count) for count in _paired_counts(first, second))
    differing, fewer = only_first + only_second, min(only_first, only_second)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, differing + 1)))])
    wins = np.arange(fewer + 1)
    log_chances = log_factorial[differing] - log_factorial[wins] - log_factorial[differing - wins]
    return min(1.0, 2.0 * float(np.exp(log_chances - differing * math.log(2.0)).sum()))


def wilson_interval(successes: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion, never without width (Wilson 1927, J. American Statistical Association 22, 209).

    Brown, Cai and DasGupta 2001 (Statistical Science 16, 101) recommend it for small samples.
    """
    z, share = _z(confidence), successes / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return Interval(share, max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach)))


def _adjusted_wald(only_first: int, only_second: int, total: int, confidence: float) -> Interval:
    """Wald's interval of a paired difference after one more example has been added to both differing counts."""
    first, second = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    reach = _z(confidence) * math.sqrt((first + second - (first - second) ** 2) / (total + 2))
    difference = (only_first - only_second) / total
    low, high = first - second - reach, first - second + reach
    return Interval(difference, max(-1.0, min(difference, low)), min(1.0, max(difference, high)))


def _paired_counts(first: Sequence[bool], second: Sequence[bool]) -> np.ndarray:
    """Examples that both answer correctly, only the first, only the second, and neither."""
    if len(first) != len(second):
        raise DataError(
            f"{len(first)} answers of one model came with {len(second)} of another. Expected both on the same "
            "examples, in the same order."
        )
    outcome = 2 * (~np.asarray(first, dtype=bool)).astype(int) + (~np.asarray(second, dtype=bool)).astype(int)
    return np.bincount(outcome, minlength=4)


def _percentiles(estimate: float, drawn: np.ndarray, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check(num_examples: int, resamples: int, confidence: float) -> None:
    if num_examples < 1:
        raise DataError("no examples came: an accuracy needs at least one. Check the limits of the test split.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: {confidence} came, expected a number between 0 and 1, such as 0.95.")
    if resamples < 1:
        raise ConfigError(f"resamples: {resamples} came, expected at least 1; 10,000 is usual.")
