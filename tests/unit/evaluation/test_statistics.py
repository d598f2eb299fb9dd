from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.evaluation.statistics import accuracy_interval, mcnemar_exact, paired_difference, wilson_interval


def answers(right: int, wrong: int) -> list[bool]:
    return [True] * right + [False] * wrong


def pairs(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = answers(both + only_first, only_second + neither)
    return first, answers(both, only_first) + answers(only_second, neither)


def test_accuracy_interval_matches_naive_resampling():
    correct = np.array(answers(130, 70))
    rng = np.random.default_rng(1)
    naive = np.quantile([rng.choice(correct, 200).mean() for _ in range(10_000)], [0.025, 0.975])
    interval = accuracy_interval(correct.tolist(), seed=0)
    assert interval.estimate == 0.65
    np.testing.assert_allclose([interval.low, interval.high], naive, atol=0.006)


def test_accuracy_interval_matches_the_exact_quantiles_of_the_bootstrap():
    interval = accuracy_interval(answers(400, 100), seed=0, resamples=200_000, confidence=0.9)
    expected = stats.binom(500, 0.8).ppf([0.05, 0.95]) / 500
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.0021)


def test_a_seed_gives_the_same_interval_again():
    correct = answers(60, 40)
    assert accuracy_interval(correct, seed=3) == accuracy_interval(correct, seed=3)
    first, second = pairs(40, 20, 15, 25)
    assert paired_difference(first, second, seed=3) == paired_difference(first, second, seed=3)


@pytest.mark.parametrize(("right", "wrong"), [(0, 50), (50, 0), (3, 97), (97, 3), (1, 0)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_few_right_or_wrong_examples_get_the_wilson_interval(right, wrong, confidence):
    expected = stats.binomtest(right, right + wrong).proportion_ci(confidence, method="wilson")
    interval = accuracy_interval(answers(right, wrong), seed=0, confidence=confidence)
    np.testing.assert_allclose([interval.low, interval.high], [expected.low, expected.high], atol=1e-12)
    assert interval.low < interval.high
    assert interval.low <= interval.estimate <= interval.high


def test_wilson_interval_has_the_published_numbers():
    """Newcombe 1998, Statistics in Medicine 17, 857, table I, method 3 (score): 81 of 263 and 0 of 20."""
    interval = wilson_interval(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    interval = wilson_interval(0, 20)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0, 0.1611)


@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95, 0.99])
def test_accuracy_interval_covers_the_truth(truth):
    """Exact coverage: the chance of each number of correct answers, where its interval holds the truth."""
    chances = stats.binom.pmf(np.arange(151), 150, truth)
    covered = 0.0
    for right, chance in enumerate(chances):
        if chance > 1e-7:
            interval = accuracy_interval(answers(right, 150 - right), seed=right, resamples=2_000)
            covered += chance * (interval.low <= truth <= interval.high)
    assert 0.92 < covered < 0.99


def test_paired_difference_matches_naive_resampling():
    first, second = (np.array(side) for side in pairs(90, 40, 22, 48))
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 200, 200) for _ in range(10_000)]
    naive = np.quantile([first[rows].mean() - second[rows].mean() for rows in drawn], [0.025, 0.975])
    interval = paired_difference(first.tolist(), second.tolist(), seed=0)
    assert interval.estimate == pytest.approx(0.09)
    np.testing.assert_allclose([interval.low, interval.high], naive, atol=0.006)


def test_paired_difference_changes_its_sign_with_its_sides():
    first, second = pairs(90, 40, 22, 48)
    one, other = paired_difference(first, second, seed=0), paired_difference(second, first, seed=0)
    np.testing.assert_allclose(
        [one.estimate, one.low, one.high], [-other.estimate, -other.high, -other.low], atol=0.006
    )


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("counts", [(30, 0, 0, 20), (0, 1, 0, 0), (0, 5, 0, 0), (0, 0, 5, 0), (50, 4, 1, 45)])
def test_models_that_hardly_differ_keep_an_interval_with_width(counts, confidence):
    interval = paired_difference(*pairs(*counts), seed=0, confidence=confidence)
    assert -1 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low < interval.high


def test_few_differing_examples_get_the_adjusted_wald_interval():
    """Bonett and Price 2012 by hand: 6 and 1 wins after the added ones, of 202."""
    p12, p21 = 6 / 202, 1 / 202
    reach = stats.norm.ppf(0.975) * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / 202)
    interval = paired_difference(*pairs(100, 5, 0, 95), seed=0)
    assert interval.estimate == pytest.approx(0.025)
    np.testing.assert_allclose([interval.low, interval.high], [5 / 202 - reach, 5 / 202 + reach], atol=1e-12)
    assert interval.low < 0, "five wins to none are no proof: the exact test gives p = 0.0625"


@pytest.mark.parametrize("chances", [(0.5, 0.2, 0.15, 0.15), (0.7, 0.06, 0.06, 0.18), (0.9, 0.03, 0.005, 0.065)])
def test_paired_difference_covers_the_truth(chances):
    truth = chances[1] - chances[2]
    drawn = np.random.default_rng(5).multinomial(150, chances, size=600)
    intervals = [paired_difference(*pairs(*counts), seed=i, resamples=1_000) for i, counts in enumerate(drawn)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.92 < covered < 0.99


@pytest.mark.parametrize(
    ("only_first", "only_second"),
    [*itertools.combinations_with_replacement(range(0, 13, 3), 2), (40, 22), (4_000, 4_321)],
)
def test_mcnemar_matches_the_binomial_test(only_first, only_second):
    differing = only_first + only_second
    expected = stats.binomtest(only_first, differing, 0.5).pvalue if differing else 1.0
    assert mcnemar_exact(*pairs(7, only_first, only_second, 5)) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(*pairs(7, only_second, only_first, 5)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_has_the_textbook_number():
    """Agresti 2013, Categorical Data Analysis, table 11.1: 150 and 86 changed approval, z^2 = 17.36."""
    assert mcnemar_exact(*pairs(794, 150, 86, 570)) == pytest.approx(stats.binom(236, 0.5).cdf(86) * 2, rel=1e-9)
    assert mcnemar_exact(*pairs(794, 150, 86, 570)) == pytest.approx(stats.chi2(1).sf(17.36), abs=1e-5)


def test_mcnemar_stands_many_examples():
    assert mcnemar_exact(*pairs(0, 500_000, 499_000, 0)) == pytest.approx(
        stats.binom(999_000, 0.5).cdf(499_000) * 2, rel=1e-6
    )
    assert mcnemar_exact(*pairs(0, 200_000, 0, 0)) == 0.0


def test_wrong_input_is_refused():
    with pytest.raises(DataError, match="no examples"):
        accuracy_interval([], seed=0)
    with pytest.raises(DataError, match="2 answers of one model came with 1"):
        paired_difference([True, False], [True], seed=0)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        accuracy_interval([True], seed=0, confidence=95)
    with pytest.raises(ConfigError, match="resamples"):
        paired_difference([True], [True], seed=0, resamples=0)
