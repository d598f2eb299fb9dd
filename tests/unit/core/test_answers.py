"""Answers are read as people write them, exactly, and never run as code."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from distill_llm.core.answers import equation_value, normalise_text, number_text, parse_number, same_answer

NUMBERS = [
    ("18", 18),
    ("$1,234.50", Fraction("1234.5")),
    ("The total is 12,000.", 12000),
    ("1,00,000 rupees", 100000),
    ("3/4", Fraction(3, 4)),
    ("1 1/2 cups", Fraction(3, 2)),
    ("-7", -7),
    ("\u22127", -7),
    ("-$5", -5),
    ("10 - 5", 5),
    ("10-12", 12),
    ("1, 2, 3", 3),
    ("1,2,3", 3),
    ("50%", 50),
    (".5", Fraction(1, 2)),
    ("1e3", 1000),
    ("x=3.", 3),
]
EQUATIONS = [
    ("( 84.0 / 2.0 )", 42),
    ("(17 + 15 + 2)", 34),
    ("((16 * 17) * 4) - ((3 + 2) * (8 / (2 + 2)))", 1078),
    ("2 + 3 * 4", 14),
    ("20 / 2 / 5", 2),
    ("10 - 3 - 2", 5),
    ("-(3 + 4)", -7),
    ("--5", 5),
    ("2 * -3", -6),
    ("84 / 2 = 42", 42),
    ("(84 / 2 = 42)", 42),
    ("(84 / 2) = (42)", 42),
    ("x = 84 / 2", 42),
    ("7 x 3", 21),
    ("7\u00d73", 21),
    ("21 \u00f7 3.", 7),
    ("$5 + $3", 8),
    ("1,000 + 1", 1001),
    ("3 + 4 .", 7),
    ("0.1 + 0.2", Fraction(3, 10)),
]
NOT_EQUATIONS = [
    "",
    "()",
    "(1",
    "1)",
    "((1 + 2)",
    "1 / 0",
    "3 / (2 - 2)",
    "2 * x",
    "(25 + x)",
    "7x = 14",
    "= 4",
    "(175,5)",
    "(175, 5)",
    "3 4",
    "2(3)",
    "3 + * 4",
    "3 +",
    "9 ** 9",
    "9 // 2",
    "some - 8",
    "__import__('os')",
    "(1).__class__",
    "9" * 5000,
    "1+" * 5000 + "1",
    "(" * 199 + "1",
    "(" * 100000 + "1" + ")" * 100000,
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_number_is_read(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["", "none", "3/0", "9" * 5000, "$", "-", "/", "."])
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


def test_number_in_very_long_text_is_the_last_one() -> None:
    assert parse_number("1 apple and " * 20000 + "7 pears") == 7
    assert parse_number("1" + " " * 100000 + "x") == 1


@pytest.mark.parametrize("digits", [1000, 10000])
def test_number_of_many_digits_is_never_an_error(digits: int) -> None:
    value = parse_number(f"{'9' * digits}/{'7' * digits}")
    assert value is None or number_text(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(1080), "1080"),
        (Fraction(0), "0"),
        (Fraction(3, 4), "0.75"),
        (Fraction(-1, 8), "-0.125"),
        (Fraction(1, 3), "1/3"),
        (Fraction(10**30 + 1, 2), "500000000000000000000000000000.5"),
    ],
)
def test_number_is_written_so_that_it_reads_back(value: Fraction, text: str) -> None:
    assert number_text(value) == text
    assert parse_number(text) == value


@pytest.mark.parametrize(("text", "value"), EQUATIONS)
def test_equation_has_its_exact_value(text: str, value: Fraction) -> None:
    assert equation_value(text) == value


@pytest.mark.parametrize("text", NOT_EQUATIONS, ids=lambda text: text[:20])
def test_what_is_no_equation_has_no_value(text: str) -> None:
    assert equation_value(text) is None


def test_equations_agree_with_python() -> None:
    chance = random.Random(0)

    def grow(depth: int) -> str:
        if depth == 0 or chance.random() < 0.2:
            return str(chance.randint(1, 20))
        text = f"{grow(depth - 1)} {chance.choice('+-*')} {chance.choice(['', '-'])}{grow(depth - 1)}"
        return f"({text})" if chance.random() < 0.5 else text

    for _ in range(300):
        text = grow(4)
        assert equation_value(text) == eval(text), text


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  Math   Problem. ", "math problem"),
        ('"math problem".', "math problem"),
        ('"math problem."', "math problem"),
        ("doctor\u2019s office", "doctor's office"),
        (".5", ".5"),
        ("Washington D.C.", "washington d.c"),
    ],
)
def test_text_is_normalised(text: str, normal: str) -> None:
    assert normalise_text(text) == normal
    assert normalise_text(normalise_text(text)) == normalise_text(text)


@pytest.mark.parametrize(
    ("kind", "first", "second", "same"),
    [
        ("text", "Yes.", "yes", True),
        ("text", "yes", "no", False),
        ("text", "", "", False),
        ("number", "$1,080.00", "1080", True),
        ("number", "0.5", "1/2", True),
        ("number", "none", "none", False),
        ("equation", "(84 / 2)", "( 84.0 / 2.0 )", True),
        ("equation", "(84 / 2)", "(21 * 2)", True),
        ("equation", "(84 / 2)", "(84 / 3)", False),
        ("equation", "(1 / 0)", "(1 / 0)", False),
    ],
)
def test_same_answer(kind: str, first: str, second: str, same: bool) -> None:
    assert same_answer(kind, first, second) is same  # pyright: ignore[reportArgumentType]
