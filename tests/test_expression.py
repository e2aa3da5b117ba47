"""Conditions over metadata: what they mean, and that they are nothing more."""

import pytest

from data_prep.catalog import FiltersConfig
from data_prep.expression import Unknown, names_in, parse_condition, value_of

FACTS = {"aesthetic": 5.5, "watermark": 0.1, "lang": "en", "odd-name": 3, "safe": True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aesthetic >= 5 and watermark < 0.5", True),
        ("aesthetic > 6 or lang == 'en'", True),
        ("not safe", False),
        ("lang in ['de', 'fr']", False),
        ("lang not in ('de', 'fr')", True),
        ("0 < watermark < 0.05", False),
        ("(aesthetic - 5) * 2 + -watermark / 0.1 == 0", True),
        ('row["odd-name"] == 3', True),
        ("missing is None", True),
        ("missing is not None and missing > 3", False),
        ("missing == 'x'", False),
    ],
)
def test_a_condition_means_what_python_would_mean(text, expected):
    assert value_of(parse_condition(text), FACTS) is expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("missing > 3", "missing is missing"),
        ("3 < missing + 1", "missing is missing"),
        ("lang > 3", "not supported"),
        ("lang + 1 > 0", "lang is no number"),
        ("1 / (watermark - 0.1) > 0", "division by zero"),
        ("3 in aesthetic", "not iterable"),
    ],
)
def test_what_cannot_be_decided_says_why(text, why):
    with pytest.raises(Unknown, match=why):
        value_of(parse_condition(text), FACTS)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "aesthetic.real",
        "[x for x in row]",
        "lambda: 1",
        "2 ** 99999999",
        "'a' % 3",
        "f'{lang}'",
        "lang[0]",
        "row[lang]",
        "(x := 3)",
        "aesthetic >=",
        "b'x' == lang",
        "(" * 500,
    ],
)
def test_nothing_else_is_allowed(text):
    with pytest.raises(ValueError, match=r"not allowed|not an expression"):
        FiltersConfig(where=text)


def test_the_names_that_a_condition_reads_are_known():
    assert names_in(parse_condition('a > 1 and row["b c"] in [a, d]')) == ["a", "a", "d", "b c"]
