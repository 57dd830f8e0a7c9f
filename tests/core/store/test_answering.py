"""Which adapter answers: what passed, what landed last, and in what words nothing does."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from core.store.answering import IN_CONTEXT, NO_ADAPTER, choose, why_withheld
from core.store.manifest import AdapterRow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROW = AdapterRow(
    adapter_id="a",
    tenant="t",
    content_hash="c" * 64,
    window_start=0,
    window_end=9,
    producer_fingerprint="one",
    spec_fingerprint="s",
    encoding="bf16",
    shard="x",
    offset=0,
    length=1,
    blob_hash="b",
    tokens=9,
    rank=4,
    created=NOON,
    sequence=1,
)


def row(name: str, **values: object) -> AdapterRow:
    return replace(ROW, adapter_id=name, producer_fingerprint=name, **values)  # type: ignore[arg-type]


def chosen(*rows: AdapterRow) -> str | None:
    names = {None if (row := choose(order).row) is None else row.adapter_id for order in permutations(rows)}
    assert len(names) == 1, "the order of rows must not matter"
    return names.pop()


def test_what_landed_last_answers_whatever_the_clocks_say() -> None:
    early_clock = row("second", sequence=7, created=NOON - timedelta(hours=3))
    assert chosen(row("first", sequence=6, created=NOON), early_clock) == "second"
    assert chosen(row("a", sequence=7), row("b", sequence=7, created=NOON + timedelta(seconds=1))) == "b"


def test_an_adapter_measured_by_questions_is_not_displaced_by_one_that_was_not() -> None:
    lifted = row("lifted", quality=0.9, questions=20, withheld=False)
    assert chosen(lifted, row("generated", sequence=9)) == "lifted"
    assert chosen(lifted, row("better", sequence=9, quality=0.95, questions=20, withheld=False)) == "better"


def test_what_is_withheld_never_answers() -> None:
    worse = {"questions": 20, "quality": 0.1, "readable": 0.9, "standing": "a" * 64, "standing_quality": 0.95, "withheld": True}
    assert chosen(row("generated"), row("lifted", sequence=9, **worse)) == "generated"
    alone = choose([row("lifted", **worse)])
    assert alone.row is None and alone.reason == (
        "its adapter is withheld: it answers 10% of 20 questions on its document, and the adapter that answers now answers 95%"
    )
    in_context = row("lifted", **{**worse, "standing": IN_CONTEXT})
    assert "the text in context answers 95%" in why_withheld(in_context)
    unreadable = row("lifted", **{**worse, "quality": 0.3, "standing": IN_CONTEXT, "standing_quality": 0.1, "readable": 0.1})
    assert "the base answers only 10% of the 20 questions even with their passages before it" in why_withheld(unreadable)
    assert "only 2 questions could be asked" in why_withheld(row("lifted", questions=2, withheld=True))
    assert "does not give its document's text back" in why_withheld(row("generated", withheld=True))


def test_windows_do_not_answer_for_the_whole() -> None:
    halves = [replace(ROW, adapter_id=f"w{end}", window_start=end - 5, window_end=end, sequence=9) for end in (5, 10)]
    assert choose(halves).reason == "its adapters cover 2 windows"
    assert chosen(*halves, row("whole")) == "whole", "an earlier adapter of the whole document answers rather than none"
    assert choose([]).reason == NO_ADAPTER


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-5, 5), st.booleans()), min_size=1, max_size=6))
def test_the_last_to_land_of_those_that_may(landed: list[tuple[int, int, bool]]) -> None:
    rows = [
        row(f"{place}", sequence=sequence, created=NOON + timedelta(hours=hours), withheld=withheld)
        for place, (sequence, hours, withheld) in enumerate(landed)
    ]
    random.Random(0).shuffle(rows)
    found, able = choose(rows).row, [each for each in rows if not each.withheld]
    assert (found is None) == (not able)
    assert found is None or found.sequence == max(each.sequence for each in able)
