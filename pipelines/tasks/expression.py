"""Arithmetic read safely: numbers, + - * /, unary signs and parentheses; nothing is ever executed.

Values are exact fractions, so `0.1 + 0.2` equals `0.3`. Length, nesting and the size of numbers are
bounded, so no text can make it slow.
"""

import re
from fractions import Fraction

MAX_LENGTH = 256
MAX_DEPTH = 32
MAX_DIGITS = 18

# A number must end where it ends: of `7x`, `1e5` and `1.2.3` no part is one.
_NUMBER = re.compile(r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?![.,]?\w)")
_SPACE = re.compile(r"\s*")
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_ENDINGS = ("", "1", "0", "00", "000")  # one of which completes whatever can be: `3 +`, `1,0`, `1,`, `2 / 0`
_TIMES = re.compile(r"(?<=[\d) ])[xX](?= ?[\d(])")  # 7 x 14


class ExpressionError(ValueError):
    """The text is not an arithmetic expression within the limits, or it divides by zero."""


class DivisionByZeroError(ExpressionError):
    """What is divided by is zero."""


def evaluate(text: str) -> Fraction:
    """The exact value of an expression.

    Raises:
        ExpressionError: not an expression, beyond a limit, or a division by zero.
    """
    value, end = _parse(text)
    rest = text[end:].strip()
    if rest:
        raise ExpressionError(f"unexpected {rest[:20]!r}")
    return value


def leading_expression(text: str) -> str:
    """The longest expression at the start of a text, as written.

    `(102 * 11) - 8. Then …` gives `(102 * 11) - 8`, and `84 / 2 = 42` gives `84 / 2`. An operator with no
    number after it is an error: `25 + x` is not 25.

    Raises:
        ExpressionError: the text does not begin with an expression.
    """
    _, end = _parse(text)
    return text[:end].strip()


def may_begin(text: str) -> bool:
    """Whether the text is an expression, or one can begin with it."""
    closing = ")" * (text.count("(") - text.count(")"))
    for ending in _ENDINGS:
        try:
            evaluate(text + ending + closing)
        except DivisionByZeroError:
            if closing:  # what is still open may become another number
                return True
        except ExpressionError:
            continue
        else:
            return True
    return False


def _parse(text: str) -> tuple[Fraction, int]:
    """(value, end) of the longest expression at the start of a text."""
    parser = _Parser(_TIMES.sub("*", text.translate(_SPELLINGS)))  # both keep every character's place
    return parser.sum(0), parser.at


class _Parser:
    """Recursive descent with one rule of grammar a method; `at` is always after the last token used."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while (sign := self.peek()) in ("+", "-"):
            self.take()
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while (sign := self.peek()) in ("*", "/"):
            self.take()
            factor = self.factor(depth)
            if sign == "/" and factor == 0:
                raise DivisionByZeroError("division by zero")
            value = value * factor if sign == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
        token = self.peek()
        if token in ("+", "-"):
            self.take()
            value = self.factor(depth + 1)
            return -value if token == "-" else value
        if token == "(":
            self.take()
            value = self.sum(depth + 1)
            if self.peek() != ")":
                raise ExpressionError("a parenthesis is not closed")
            self.take()
            return value
        return self.number()

    def number(self) -> Fraction:
        start = self.skip()
        found = _NUMBER.match(self.text, start)
        if not found:
            raise ExpressionError(f"a number was expected at {self.text[start : start + 20]!r}")
        if found.end() > MAX_LENGTH:
            raise ExpressionError(f"longer than {MAX_LENGTH} characters")
        digits = found.group().replace(",", "")
        if len(digits) > MAX_DIGITS:
            raise ExpressionError(f"a number has more than {MAX_DIGITS} digits")
        self.at = found.end()
        return Fraction(digits)

    def skip(self) -> int:
        """Where the next token starts."""
        space = _SPACE.match(self.text, self.at)
        return space.end() if space else self.at

    def peek(self) -> str:
        start = self.skip()
        return self.text[start : start + 1]

    def take(self) -> None:
        self.at = self.skip() + 1
