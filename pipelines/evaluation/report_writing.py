"""What reports are written with: requirements, strict JSON, Markdown tables, files.

JSON is strict: a figure that does not exist (NaN) is null; in Markdown it is "none". Knows nothing of what is reported.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

from core.training.metrics import Interval

SPLIT_LABELS = {
    "all": "all",
    "one_fact": "one fact",
    "two_facts": "two facts",
    "seen": "seen phrasing",
    "held_out": "held-out phrasing",
}


@dataclass(frozen=True)
class Bar:
    """A requirement: `value` against `limit`."""

    name: str
    value: float
    relation: Literal[">=", "<="]
    limit: float

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Its values, and whether it passed."""
        return {**asdict(self), "passed": self.passed}


def strict(value: Any) -> Any:
    """Dataclasses and intervals as JSON values; a figure that is not finite becomes null."""
    if isinstance(value, Interval):
        return strict(value._asdict())
    if is_dataclass(value):
        return strict({name: getattr(value, name) for name in value.__dataclass_fields__})
    if isinstance(value, Mapping):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first hold numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def requirements(bars: Sequence[Bar]) -> str:
    """The table of what was wanted, and whether it was met."""
    met = {True: "yes", False: "**no**"}
    rows = [[bar.name, number(bar.value), f"{bar.relation} {bar.limit:g}", met[bar.passed]] for bar in bars]
    return table(["requirement", "measured", "wanted", "met"], rows)


def interval(value: Interval | None) -> str:
    """A mean with its interval."""
    return "none" if value is None else f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def number(value: float) -> str:
    """A count in full, or a figure with three decimals."""
    if not math.isfinite(value):
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def write_json(values: Any, path: Path) -> None:
    """Writes strict JSON values for people to read."""
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_json_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes a row a line."""
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
