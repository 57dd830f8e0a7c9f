"""What became of each document of a conversion: receipts, as the actors send them, and their sum, as people read it.

Knows nothing of how documents are converted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import pyarrow as pa

Status = Literal["converted", "shared", "unchanged", "rejected"]


class Receipt(NamedTuple):
    """What became of one document. `bytes` are those of new adapters, `error` and `lost` those of `Written`.

    converted: new adapters. shared: stored, with adapters that another document of this content has. unchanged: all was there.
    rejected: `reason` says why; the text is stored nevertheless where there is one (it can answer in context).
    """

    name: str
    content_hash: str | None
    status: Status
    reason: str | None
    adapter_ids: list[str]
    shard: str | None
    bytes: int
    tokens: int
    error: float
    lost: int
    quality: float | None
    quality_lost: float | None
    source_bytes: int
    read_at: float


RECEIPTS = pa.schema(
    [
        ("name", pa.string()),
        ("content_hash", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("adapter_ids", pa.list_(pa.string())),
        ("shard", pa.string()),
        ("bytes", pa.int64()),
        ("tokens", pa.int64()),
        ("error", pa.float64()),
        ("lost", pa.int64()),
        ("quality", pa.float64()),
        ("quality_lost", pa.float64()),
        ("source_bytes", pa.int64()),
        ("read_at", pa.float64()),
    ]
)


@dataclass
class Summary:
    """Counts of one conversion. Rates leave out start-up: they count from the first file that was opened."""

    rejects_path: Path
    documents: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    composed: int = 0
    worst_error: float = 0.0
    lost: int = 0
    qualities: list[float] = field(default_factory=list)
    qualities_lost: list[float] = field(default_factory=list)
    start_s: float = 0.0
    convert_s: float = 0.0

    @property
    def documents_per_s(self) -> float:
        """All documents, skipped ones too, by time."""
        return self.documents.total() / self.convert_s if self.convert_s else 0.0

    @property
    def bytes_per_adapter(self) -> float:
        return self.adapter_bytes / self.adapters if self.adapters else 0.0

    def add(self, receipt: Receipt) -> None:
        self.documents[receipt.status] += 1
        if receipt.reason:
            self.reasons[receipt.reason.partition(":")[0]] += 1
        if receipt.status == "converted":
            self.tokens += receipt.tokens
            self.adapters += len(receipt.adapter_ids)
            self.adapter_bytes += receipt.bytes
            self.composed += receipt.error > 0
            self.worst_error = max(self.worst_error, receipt.error)
            self.lost += receipt.lost
            self.qualities += [] if receipt.quality is None else [receipt.quality]
            self.qualities_lost += [] if receipt.quality_lost is None else [receipt.quality_lost]

    def lines(self) -> list[str]:
        """The summary as people read it."""
        counts = ", ".join(f"{self.documents[status]:,} {status}" for status in ("converted", "shared", "unchanged", "rejected"))
        lines = [
            f"{self.documents.total():,} documents: {counts}",
            f"{self.documents_per_s:,.1f} documents/s over {self.convert_s:,.1f} s, after {self.start_s:,.1f} s of start-up",
            f"{self.adapters:,} adapters of {self.tokens:,} tokens, {self.bytes_per_adapter:,.0f} bytes each",
        ]
        if self.composed:
            lines.append(f"{self.composed:,} composed or cut to the serving rank, relative error {self.worst_error:.2f} at most")
        if self.qualities:
            cut = f", {fmean(self.qualities_lost):.3f} lost by the cut in rank" if self.qualities_lost else ""
            lines.append(f"quality {fmean(self.qualities):.3f} of 1 on the documents' own questions{cut}")
        if self.lost:
            lines.append(f"{self.lost:,} passages without questions, as the endpoint failed on them")
        lines += [f"  {count:,} {reason}" for reason, count in self.reasons.most_common()]
        if self.documents["rejected"]:
            lines.append(f"rejects: {self.rejects_path}")
        return lines


def receipt_of(row: dict[str, Any], status: Status, reason: str | None, **values: Any) -> Receipt:
    """The receipt of a row of `sources.ROWS`; `values` where it became a document."""
    absent: dict[str, Any] = {
        "content_hash": None, "adapter_ids": [], "shard": None, "bytes": 0, "tokens": 0,
        "error": 0.0, "lost": 0, "quality": None, "quality_lost": None,
    }  # fmt: skip
    where = {"name": row["name"], "source_bytes": row["source_bytes"], "read_at": row["read_at"]}
    return Receipt(status=status, reason=reason, **where, **(absent | values))


def to_table(done: Sequence[Receipt]) -> pa.Table:
    """Receipts as a table of `RECEIPTS`."""
    return pa.Table.from_pylist([receipt._asdict() for receipt in done], RECEIPTS)
