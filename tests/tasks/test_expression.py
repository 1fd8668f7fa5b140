import contextlib
import operator
import time
from collections.abc import Callable
from fractions import Fraction
from functools import reduce

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipelines.tasks.expression import ExpressionError, evaluate, leading_expression, may_begin

OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}

Node = tuple[str, Fraction | None]  # an expression's text and its value; None when it divides by zero


def number(whole: int, decimals: str) -> Node:
    text = f"{whole}.{decimals}" if decimals else str(whole)
    return text, Fraction(text)


def combine(left: Node, sign: str, right: Node, space: str) -> Node:
    text = f"({left[0]}{space}{sign}{space}{right[0]})"
    if left[1] is None or right[1] is None or (sign == "/" and right[1] == 0):
        return text, None
    return text, OPERATORS[sign](left[1], right[1])


def negate(node: Node) -> Node:
    return f"-{node[0]}", None if node[1] is None else -node[1]


numbers = st.builds(number, st.integers(0, 9999), st.text("0123456789", max_size=3))
signs = st.sampled_from("+-*/")
trees = st.recursive(
    numbers,
    lambda nodes: st.builds(combine, nodes, signs, nodes, st.sampled_from(["", " "])) | st.builds(negate, nodes),
    max_leaves=10,
)
arithmetic_looking = st.text("0123456789+-*/()., xX×÷−=", max_size=60)


@given(trees)
def test_a_tree_of_operations_has_the_value_of_exact_fractions(tree: Node) -> None:
    text, value = tree
    if value is None:
        with pytest.raises(ExpressionError, match="division by zero"):
            evaluate(text)
    else:
        assert evaluate(text) == value


@given(numbers, st.lists(st.tuples(signs, st.integers(1, 99)), max_size=8))
def test_without_parentheses_products_bind_tighter_and_both_associate_to_the_left(
    first: Node, rest: list[tuple[str, int]]
) -> None:
    assume(first[1] is not None)
    text = first[0] + "".join(f" {sign} {n}" for sign, n in rest)
    terms = [first[1] or Fraction(0)]
    for sign, n in rest:
        if sign in "+-":
            terms.append(Fraction(n) if sign == "+" else -Fraction(n))
        else:
            terms[-1] = OPERATORS[sign](terms[-1], Fraction(n))
    assert evaluate(text) == reduce(operator.add, terms)


@given(st.text(max_size=40) | arithmetic_looking)
def test_no_text_raises_anything_but_an_expression_error(text: str) -> None:
    with contextlib.suppress(ExpressionError):
        evaluate(text)


@given(arithmetic_looking)
def test_a_leading_expression_is_an_expression_by_itself_and_stands_at_the_start(text: str) -> None:
    try:
        found = leading_expression(text)
    except ExpressionError:
        return
    assert text.lstrip().startswith(found)
    evaluate(found)


@given(trees, st.sampled_from([".", ". Then 4 more.", " = 42", " apples", ", which is it", ")", "\n\nQ: 1 + 1", " x"]))
def test_what_follows_an_expression_does_not_change_it(tree: Node, after: str) -> None:
    text, value = tree
    assume(value is not None)
    assert leading_expression(f" {text}{after}") == text


def test_decimals_are_exact() -> None:
    assert evaluate("0.1 + 0.2") == evaluate(".3")
    assert evaluate("1 / 3 * 3") == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 × 3 ÷ 4 − 1", Fraction(1, 2)),
        ("7 – 2", Fraction(5)),
        ("7 x 14", Fraction(98)),
        ("(2 + 3)X(4)", Fraction(20)),
        ("1,234,567 + 1", Fraction(1234568)),
        ("- ( 2 - -3 )", Fraction(-5)),
        ("\u00a07\u2003*\t2\n", Fraction(14)),
        ("٣ + 4", Fraction(7)),
    ],
)
def test_ways_of_writing_it(text: str, value: Fraction) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "+", "(", "()", "(1", "1)", "1 2", "1 +", "* 2", "2 ** 3", "2 // 3", "7x", "3 y", "1e5", "1.2.3", "1,23"]
    + ["1,234,5", "12_000", "5²", "½", "1j", "nan", "inf", "abs(1)", "__import__('os')", "1 if 1 else 2", "a"],
)
def test_what_is_not_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(102 * 11) - 8. Then 3 more.", "(102 * 11) - 8"),
        ("84 / 2 = 42", "84 / 2"),
        ("12 apples", "12"),
        ("50%", "50"),
        ("(8 / 4) and (6 / 4)", "(8 / 4)"),
        ("2 × 3.", "2 × 3"),
        ("5 - 3 (that is 2)", "5 - 3"),
    ],
)
def test_leading_expression(text: str, found: str) -> None:
    assert leading_expression(text) == found


@pytest.mark.parametrize("text", ["25 + x", "(25 + x)", "7x = 14", "2 ** 3", "5 + $3", "(175, 5)", "(9 + 6", "about 4"])
def test_a_part_of_a_longer_formula_is_never_taken_for_the_whole(text: str) -> None:
    with pytest.raises(ExpressionError):
        leading_expression(text)


@pytest.mark.parametrize("text", ["1 / 0", "1 / (2 - 2)", "0 / 0.0", "1 / -0"])
def test_division_by_zero(text: str) -> None:
    with pytest.raises(ExpressionError, match="division by zero"):
        evaluate(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(" * 100_000 + "1" + ")" * 100_000, "nested"),
        ("-" * 100_000 + "1", "nested"),
        ("9" * 100_000, "longer"),
        ("9" * 19, "digits"),
        ("0." + "3" * 40, "digits"),
        ("1+" * 100_000 + "1", "longer"),
        ("1," + "000," * 100_000 + "000", "longer"),
        ("1" + " " * 100_000 + "+ 1", "longer"),
    ],
)
def test_limits_hold_and_are_found_fast(text: str, reason: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ExpressionError, match=reason):
        evaluate(text)
    with pytest.raises(ExpressionError, match=reason):
        leading_expression(text)
    assert time.perf_counter() - start < 1


def test_a_long_text_after_a_short_expression_is_no_obstacle() -> None:
    assert leading_expression("(3 + 4). " + "And so on. " * 100) == "(3 + 4)"


def test_an_expression_of_the_greatest_length_is_read_and_a_longer_one_is_not_cut() -> None:
    longest = "+".join("1" * 128) + " "  # 256 characters
    assert evaluate(longest) == 128
    with pytest.raises(ExpressionError, match="longer"):
        leading_expression(longest + "+ 1")


@given(trees)
def test_whatever_begins_an_expression_may_begin_one(tree: Node) -> None:
    text, value = tree
    assume(value is not None)
    assert all(may_begin(text[:length]) for length in range(len(text) + 1))


@pytest.mark.parametrize(
    "text", ["", "-", "1,", "1,0", "1,000.", "2 / 0", "2 / (3 - 3", "((", "7 x", "8 ÷ (1 +", " ", "5 / (0 * (3"]
)
def test_what_may_go_on(text: str) -> None:
    assert may_begin(text)


@pytest.mark.parametrize(
    "text", ["a", "1 2", "1 +*", ")", "1)", "()", "2 / (3 - 3)", "1,00,", "1.2.", "7 x y", "1e", "="]
)
def test_what_can_be_no_expression_any_more(text: str) -> None:
    assert not may_begin(text)
