"""Selections: what they mean, what they refuse, and that nothing in them runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.planning.selection import parse_selection

COLUMNS = ("quality", "demand", "tokens")
ROW = {"quality": 0.5, "demand": 120.0, "tokens": 1000.0}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("quality < 0.8 or demand > 100", True),
        ("quality > 0.8 or demand > 1e3", False),
        ("quality >= .5 and demand != 120", False),
        ("not (quality > 0.8) and tokens == 1000", True),
        ("0.4<quality and quality<=0.5", True),
        ("demand > 1 or quality > 1 and tokens > 9999", True),
        ("(demand > 1 or quality > 1) and tokens > 9999", False),
        ("not not demand > -5", True),
        ("demand > tokens", False),
    ],
)
def test_an_expression_means_what_it_says(text: str, meant: bool) -> None:
    assert parse_selection(text, COLUMNS).matches(ROW) is meant


def test_an_unknown_figure_selects_nothing_by_itself() -> None:
    unknown = {**ROW, "quality": None}
    for text in ("quality < 0.8", "not quality < 0.8", "quality < 0.8 and demand > 100", "not (quality < 0.8 and demand > 100)"):
        assert not parse_selection(text, COLUMNS).matches(unknown), text
    assert parse_selection("quality < 0.8 or demand > 100", COLUMNS).matches(unknown)
    assert parse_selection("not (quality < 0.8 and demand > 500)", COLUMNS).matches(unknown)
    assert not parse_selection("quality != 0", COLUMNS).matches({**ROW, "quality": math.nan})


def test_a_selection_names_its_columns() -> None:
    assert parse_selection("quality < 1 or demand > quality", COLUMNS).columns == {"quality", "demand"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "character 1: expected a number or one of demand, quality, tokens"),
        ("quality", "expected one of < <="),
        ("quality < 0.8 or", "character 17"),
        ("quality < 0.8 demand", "expected 'and', 'or' or the end, found 'demand'"),
        ("(quality < 0.8", "expected ')'"),
        ("speed > 1", "no figure is called 'speed'"),
        ("quality < 0.8; import os", "character 14: cannot read ';'"),
        ("__import__('os') < 1", "character 12: cannot read"),
        ("quality = 1", "expected one of"),
        ("quality < 1x", "cannot read '1'"),
        ("not " * 200 + "quality < 1", "nested more than"),
    ],
)
def test_what_cannot_be_read_is_said_where(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_selection(text, COLUMNS)
    assert said in str(error.value)


@given(st.text(alphabet="qualitydemand <>=!()andornot.0123 ;_\n", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        selection = parse_selection(text, COLUMNS)
    except ValueError:
        return
    assert selection.matches(ROW) in (True, False)
