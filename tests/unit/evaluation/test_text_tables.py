from __future__ import annotations

import pytest

from distill_llm.evaluation.text_tables import p_value, short_bytes, short_count, short_number


@pytest.mark.parametrize(
    ("number", "count", "size"),
    [
        (None, "-", "-"),
        (7, "7", "7 B"),
        (999, "999", "999 B"),
        (1_000, "1.0k", "1.0 kB"),
        (9_949, "9.9k", "9.9 kB"),
        (9_951, "10k", "10 kB"),
        (118_400, "118k", "118 kB"),
        (999_499, "999k", "999 kB"),
        (999_500, "1.0M", "1.0 MB"),
        (1_240_000, "1.2M", "1.2 MB"),
        (220_000_000, "220M", "220 MB"),
        (70_600_000_000, "71B", "71 GB"),
    ],
)
def test_sizes_are_short(number, count, size):
    assert (short_count(number), short_bytes(number)) == (count, size)


def test_numbers_are_short():
    given = [None, 0.0, 0.424, 9.994, 9.996, 31.66, 99.96, 12_345.4]
    assert [short_number(number) for number in given] == ["-", "0.00", "0.42", "9.99", "10.0", "31.7", "100", "12,345"]
    assert [p_value(chance) for chance in (0.00099, 0.001, 0.0456, 1.0)] == ["<0.001", "0.001", "0.046", "1.000"]
