"""Which of a document's adapters answers: one rule for servers, for what is lifted, and for listings.

In: the live adapter rows of one content that a server could run (made for its base, of its kind and rank). Out: the row that
answers, or why none does, in words that a client may read. Knows nothing of models and storage.

An adapter that was measured by questions (`core.writing.question_gate`) and passed goes before those that were not; among equals
the one whose commit landed last answers, whatever clocks its writers had. What is withheld never answers. An adapter for one of
several windows knows a part of its document only, and does not answer for all of it.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from core.store.manifest import AdapterRow, NewAdapter

NO_ADAPTER = "no adapter for this content and base yet"
IN_CONTEXT = "in_context"
"""What an adapter was measured against where no adapter answered: the base with the text in context."""


class Choice(NamedTuple):
    """The adapter that answers; else None, and why."""

    row: AdapterRow | None
    reason: str | None = None


def choose(rows: Iterable[AdapterRow]) -> Choice:
    """What answers, of the adapters for one content."""
    series: defaultdict[tuple[str, str], list[AdapterRow]] = defaultdict(list)
    for row in rows:
        series[row.producer_fingerprint, row.encoding].append(row)
    if not series:
        return Choice(None, NO_ADAPTER)
    passed = [group for group in series.values() if not any(row.withheld for row in group)]
    whole = [row for group in passed if len({row.window for row in group}) == 1 for row in group]
    if whole:
        return Choice(max(whole, key=_precedence))
    if passed:
        windows = {row.window for row in max(passed, key=lambda group: max(map(_precedence, group)))}
        return Choice(None, f"its adapters cover {len(windows)} windows")
    return Choice(None, why_withheld(newest(row for group in series.values() for row in group if row.withheld)))


def newest(rows: Iterable[AdapterRow]) -> AdapterRow:
    """The row whose commit landed last; of one commit, the one that was made last."""
    return max(rows, key=_landed)


def why_withheld(row: AdapterRow | NewAdapter) -> str:
    """Why a withheld adapter does not answer, by its own figures."""
    if row.questions is None:
        return "its adapter is withheld: it does not give its document's text back better than no adapter, or another's"
    if row.quality is None or row.readable is None or row.standing_quality is None:
        return f"its adapter is withheld: only {row.questions} questions could be asked to measure it"
    beside = "the text in context" if row.standing == IN_CONTEXT else "the adapter that answers now"
    better = row.quality > row.standing_quality if row.standing != IN_CONTEXT else row.quality >= row.standing_quality
    if not (better and row.quality > 0):
        return (
            f"its adapter is withheld: it answers {row.quality:.0%} of {row.questions} questions on its document, "
            f"and {beside} answers {row.standing_quality:.0%}"
        )
    return (
        f"its adapter is withheld: it could not be measured, for the base answers only {row.readable:.0%} of the {row.questions} "
        "questions even with their passages before it"
    )


def _landed(row: AdapterRow) -> tuple[object, ...]:
    return row.sequence, row.created, row.adapter_id


def _precedence(row: AdapterRow) -> tuple[object, ...]:
    return row.quality is not None, *_landed(row)
