"""Ray's label selectors."""

from __future__ import annotations

import pytest

from placement.core.labels import meets, parse_condition


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("a", (True, {"a"})),
        ("!a", (False, {"a"})),
        ("in(a, b)", (True, {"a", "b"})),
        ("in(a,b)", (True, {"a", "b"})),
        ("in( a )", (True, {"a"})),
        ("!in(a, b)", (False, {"a", "b"})),
        ("A100-80G_x.y", (True, {"A100-80G_x.y"})),
        ("in", (True, {"in"})),
        ("x" * 63, (True, {"x" * 63})),
    ],
)
def test_conditions(condition: str, expected: tuple[bool, set[str]]) -> None:
    assert parse_condition(condition) == expected


@pytest.mark.parametrize(
    "condition",
    [
        *("", "!", "!!a", "in()", "in(a", "a)", "in(a,)", "in(a,,b)", "in (a)", "notin(a)"),
        *("-a", "a-", "a b", "a\n", "ä", "x" * 64),
    ],
)
def test_what_is_no_condition_is_refused_with_what_is(condition: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_condition(condition)
    assert str(refusal.value) == f"{condition!r} is not a label condition; write a, !a, in(a, b) or !in(a, b)"


@pytest.mark.parametrize(
    ("condition", "of_a", "of_b", "of_none"),
    [
        ("a", True, False, False),
        ("!a", False, True, True),
        ("in(a, c)", True, False, False),
        ("!in(a, c)", False, True, True),
    ],
)
def test_a_node_without_the_label_meets_only_the_negative_forms(
    condition: str, of_a: bool, of_b: bool, of_none: bool
) -> None:
    found = [meets(labels, "k", condition) for labels in ({"k": "a"}, {"k": "b"}, {"other": "a"})]
    assert found == [of_a, of_b, of_none]
