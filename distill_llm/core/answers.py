"""When two answers are the same: as text, as a number, or as an equation of equal value.

Numbers are exact fractions. Equations are read by a small parser of + - * / and parentheses; nothing is evaluated
as code.
"""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction
from typing import Literal

AnswerKind = Literal["text", "number", "equation"]

_THOUSANDS = r"\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)"
_NUMBER = re.compile(
    rf"""(?:(?<![\w.)])[-+](?=[\d.$€£]))?[$€£]?\s?  # a sign, but neither the operator of "3 - 4" nor the range "3-4"
    (?:(?P<whole>\d{{1,3}})\s+(?=\d+/\d))?          # the 1 of "1 1/2"
    (?P<number>(?:{_THOUSANDS}|\d+)(?:\.\d+)?|\.\d+)
    (?:/(?P<divisor>\d+)|[eE](?P<exponent>[-+]?\d{{1,2}})(?!\d))?""",
    re.VERBOSE,
)
_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|([-+*/()]))")
_MAX_TOKENS = 200
_MAX_CHARACTERS = 2000  # far above a real answer, far below the length at which int() refuses
# minus, en dash; times, middle dot; divided by; currencies
_SAME_SIGN = str.maketrans("\u2212\u2013\u00d7\u00b7\u00f7$\u20ac\u00a3", "--**/   ")
_SAME_QUOTE = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def normalise_text(text: str) -> str:
    """Lower case, single spaces, plain quotes, none of them around, and no full stop at the end."""
    text = re.sub(r"\s+", " ", text.translate(_SAME_QUOTE))
    return text.rstrip(" .\"'`").lstrip(" \"'`").lower()


def parse_number(text: str) -> Fraction | None:
    """The last number in a text (``$1,234.50`` is 1234.5, ``3/4`` is 0.75, ``1 1/2`` is 1.5), or None."""
    found = deque(_NUMBER.finditer(text.translate({0x2212: "-"})), maxlen=1)
    if not found or len((last := found[0])[0]) > _MAX_CHARACTERS:
        return None
    try:
        value = Fraction(last["number"].replace(",", "")) / int(last["divisor"] or 1) * _power(last["exponent"])
        value += int(last["whole"] or 0)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if last[0].lstrip().startswith("-") else value


def number_text(value: Fraction) -> str:
    """A number as plain digits: ``1080``, ``0.75``, or ``1/3`` where the decimals do not end."""
    for places in range(10):
        digits = value * 10**places
        if digits.denominator == 1:
            whole, rest = divmod(abs(digits.numerator), 10**places)
            return f"{'-' if value < 0 else ''}{whole}" + (f".{rest:0{places}d}" if places else "")
    return f"{value.numerator}/{value.denominator}"


def equation_value(text: str) -> Fraction | None:
    """The exact value of an arithmetic expression such as ``( 84.0 / 2.0 )``, or None where it is not one.

    Of ``84 / 2 = 42`` the left side counts, of ``x = 84 / 2`` the right side.
    """
    tokens = equation_tokens(text)
    if not tokens or len(tokens) > _MAX_TOKENS:
        return None
    parser = _Parser(tokens)
    try:
        value = parser.sum()
    except (_NotAnEquationError, ZeroDivisionError):
        return None
    return value if parser.at_end() else None


def equation_tokens(text: str) -> list[str]:
    """Numbers, operators and parentheses in order; empty where anything else is in the text."""
    if len(text) > _MAX_CHARACTERS:
        return []
    text = _one_side(text.translate(_SAME_SIGN).strip().rstrip(". "))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=[\d)\s])[xX](?=[\d(\s])", "*", text).strip()
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return []
        tokens.append(match[1] or match[2])
        position = match.end()
    return tokens


def same_answer(kind: AnswerKind, first: str, second: str) -> bool:
    """Whether two answers are the same; an answer that cannot be read is equal to none."""
    if kind == "text":
        wanted = normalise_text(first)
        return bool(wanted) and wanted == normalise_text(second)
    read = parse_number if kind == "number" else equation_value
    left, right = read(first), read(second)
    return left is not None and left == right


def _power(exponent: str | None) -> Fraction:
    return Fraction(10) ** int(exponent or 0)


def _one_side(text: str) -> str:
    if "=" not in text:
        return text
    text = re.sub(r"^\s*\(?\s*[A-Za-z]\w*\s*=", lambda match: "(" if "(" in match[0] else "", text)
    left = text.split("=")[0]
    opened = left.count("(") - left.count(")")
    return left.lstrip()[1:] if opened == 1 and left.lstrip().startswith("(") else left


class _NotAnEquationError(Exception):
    pass


class _Parser:
    """Recursive descent: sum = product (+|- product)*, product = atom (*|/ atom)*."""

    def __init__(self, tokens: list[str]):
        self._tokens, self._next = tokens, 0

    def at_end(self) -> bool:
        return self._next == len(self._tokens)

    def sum(self) -> Fraction:
        value = self._product()
        while (operator := self._take("+", "-")) is not None:
            other = self._product()
            value = value + other if operator == "+" else value - other
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while (operator := self._take("*", "/")) is not None:
            other = self._atom()
            value = value * other if operator == "*" else value / other
        return value

    def _atom(self) -> Fraction:
        if (sign := self._take("-", "+")) is not None:
            return -self._atom() if sign == "-" else self._atom()
        if self._take("(") is not None:
            value = self.sum()
            if self._take(")") is None:
                raise _NotAnEquationError
            return value
        if self.at_end() or self._tokens[self._next] in "+-*/()":
            raise _NotAnEquationError
        self._next += 1
        return Fraction(self._tokens[self._next - 1])

    def _take(self, *wanted: str) -> str | None:
        if not self.at_end() and self._tokens[self._next] in wanted:
            self._next += 1
            return self._tokens[self._next - 1]
        return None
