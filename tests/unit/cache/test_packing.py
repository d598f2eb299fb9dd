"""Numbers in few bits come back as they were, and logarithms within half a step."""

from __future__ import annotations

import numpy as np
import pytest

from distill_llm.cache.packing import (
    NATS,
    ODDS,
    bits_for,
    pack,
    pack_logs,
    pack_odds,
    unpack,
    unpack_logs,
    unpack_odds,
)


@pytest.mark.parametrize(
    ("width", "bits"), [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (151_936, 18), (2**18, 18), (2**18 + 1, 19)]
)
def test_bits_hold_the_last_word_and_no_more(width: int, bits: int) -> None:
    assert bits_for(width) == bits
    assert width - 1 < 2**bits


@pytest.mark.parametrize("bits", [1, 2, 7, 8, 9, 16, 18, 25])
@pytest.mark.parametrize("count", [1, 3, 13, 32])
def test_numbers_come_back(bits: int, count: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (20, count))
    numbers[0], numbers[1] = 0, 2**bits - 1
    packed = pack(numbers, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (20, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, count), numbers)


def test_bits_lie_as_they_are_documented() -> None:
    """Lowest bit first: 5 and 3 in three bits each are 101 and, behind it, 110, read from the right."""
    assert pack(np.array([[5, 3]]), 3).tolist() == [[0b011_101]]


def test_logarithms_come_back_within_half_a_step() -> None:
    logs = -np.random.default_rng(1).uniform(0, 31.9, 1000).astype(np.float32)
    found = unpack_logs(pack_logs(logs))
    assert np.abs(found - logs).max() <= 0.5 / NATS + 1e-6
    edges = np.array([0.0, -31.9, -40.0, -1e4, -3e38, -np.inf], np.float32)
    assert unpack_logs(pack_logs(edges)).tolist() == pytest.approx([0, -31.9, -32, -32, -32, -np.inf], abs=1e-3)


def test_odds_come_back_within_half_a_step_on_both_sides() -> None:
    odds = np.random.default_rng(1).uniform(-31.9, 31.9, 1000).astype(np.float32)
    found = unpack_odds(pack_odds(odds))
    assert np.abs(found - odds).max() <= 0.5 / ODDS + 1e-5
    edges = np.array([-np.inf, -1e4, 1e4, 0.0], np.float32)
    assert unpack_odds(pack_odds(edges)).tolist() == pytest.approx([-np.inf, -32, 32, 0.0], abs=2e-3)
