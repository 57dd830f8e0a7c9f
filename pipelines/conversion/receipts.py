"""What became of each document of a conversion: receipts, as the actors send them, and their sum, as people read it.

Knows nothing of how documents are converted.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa

WORST = 10
"""Documents that a summary lists as the gate's worst."""

Status = Literal["converted", "shared", "unchanged", "rejected"]


class Receipt(NamedTuple):
    """What became of one document. `bytes` are those of new adapters, `error` and `lost` those of `Written`.

    gain: what the quality gate measured (`core.writing.quality_gate.gain`), of the worst window; quality, quality_lost,
    standing_quality: what the question gate did (`AdapterRow`). withheld: why the adapter must not answer, if it must not.
    sketch: of `pipelines.conversion.near_duplicates`.

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
    standing_quality: float | None
    gain: float | None
    withheld: str | None
    sketch: list[int]
    source_bytes: int
    read_at: float


class Pruned(NamedTuple):
    """How many documents were deleted because the source has them no longer, or why none was."""

    documents: int = 0
    reason: str | None = None


class Near(NamedTuple):
    """Documents that are nearly the same as others, in how many groups; `largest`: (size, a name) of at most `WORST` groups."""

    documents: int
    groups: int
    largest: list[tuple[int, str]]


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
        ("standing_quality", pa.float64()),
        ("gain", pa.float64()),
        ("withheld", pa.string()),
        ("sketch", pa.list_(pa.int64())),
        ("source_bytes", pa.int64()),
        ("read_at", pa.float64()),
    ]
)


@dataclass
class Mean:
    """A mean, one number at a time; None is no number."""

    count: int = 0
    total: float = 0.0

    def add(self, number: float | None) -> None:
        if number is not None:
            self.count += 1
            self.total += number

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class Summary:
    """Counts of one conversion. Rates leave out start-up: they count from when there was an actor to make adapters.

    files: the folder of `pipelines.conversion.run_files`. pruned, near: None where they were not asked for.
    by_reference_weights: whether the shipped hypernetwork wrote the adapters. Its size is
    bounded, but for the names of the shards (100 bytes each).
    """

    files: str
    documents: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    shards: set[str] = field(default_factory=set)
    composed: int = 0
    worst_error: float = 0.0
    lost: int = 0
    quality: Mean = field(default_factory=Mean)
    quality_lost: Mean = field(default_factory=Mean)
    standing_quality: Mean = field(default_factory=Mean)
    gain: Mean = field(default_factory=Mean)
    measured: int = 0
    withheld: int = 0
    _withheld: list[tuple[str, str]] = field(default_factory=list)
    _worst: list[tuple[float, str]] = field(default_factory=list)
    start_s: float = 0.0
    convert_s: float = 0.0
    pruned: Pruned | None = None
    near: Near | None = None
    by_reference_weights: bool = False

    @property
    def documents_per_s(self) -> float:
        """All documents, skipped ones too, by time."""
        return self.documents.total() / self.convert_s if self.convert_s else 0.0

    @property
    def nothing_stands(self) -> bool:
        """Whether there were documents, and each was rejected."""
        return 0 < self.documents["rejected"] == self.documents.total()

    @property
    def bytes_per_adapter(self) -> float:
        return self.adapter_bytes / self.adapters if self.adapters else 0.0

    @property
    def worst(self) -> list[tuple[str, float]]:
        """Names and gains of at most `WORST` documents that the gate measured, the least first."""
        return [(name, -loss) for loss, name in sorted(self._worst, reverse=True)]

    def add(self, receipt: Receipt) -> None:
        self.documents[receipt.status] += 1
        if receipt.reason:
            self.reasons[receipt.reason.partition(":")[0]] += 1
        if receipt.status == "converted":
            self.tokens += receipt.tokens
            self.adapters += len(receipt.adapter_ids)
            self.adapter_bytes += receipt.bytes
            self.shards |= {receipt.shard} if receipt.shard else set()
            self.composed += receipt.error > 0
            self.worst_error = max(self.worst_error, receipt.error)
            self.lost += receipt.lost
            self.quality.add(receipt.quality)
            self.quality_lost.add(receipt.quality_lost)
            self.standing_quality.add(receipt.standing_quality)
            self._add_measured(receipt)

    def _add_measured(self, receipt: Receipt) -> None:
        self.measured += receipt.withheld is not None or receipt.quality is not None or receipt.gain is not None
        if receipt.withheld is not None:
            self.withheld += 1
            if len(self._withheld) < WORST:
                self._withheld.append((receipt.name, receipt.withheld))
        if receipt.gain is not None:
            gain = -math.inf if math.isnan(receipt.gain) else receipt.gain
            self.gain.add(gain if math.isfinite(gain) else 0.0)
            heapq.heappush(self._worst, (-gain, receipt.name))
            if len(self._worst) > WORST:
                heapq.heappop(self._worst)

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
        lines += self._how_good()
        if self.lost:
            lines.append(f"{self.lost:,} passages without questions, as the endpoint failed on them")
        lines += [f"  {count:,} {reason}" for reason, count in self.reasons.most_common()]
        if self.pruned is not None:
            unpruned = f"nothing was pruned: {self.pruned.reason}" if self.pruned.reason else None
            lines.append(unpruned or f"{self.pruned.documents:,} pruned: the source has them no longer")
        if self.near is not None and self.near.groups:
            counts = f"{self.near.documents:,} in {self.near.groups:,} groups"
            lines.append(f"near-duplicates, which keep their own adapters: {counts}, in {self.files}/near")
            lines += [f"  {size:,} like {name}" for size, name in self.near.largest]
        if self.documents["rejected"]:
            lines.append(f"rejects: {self.files}/rejects")
        return [*lines, f"receipts: {self.files}/receipts"]

    def _how_good(self) -> list[str]:
        """What the gates say of the new adapters, in plain words."""
        if not self.adapters:
            return []
        new = self.documents["converted"]
        if not self.measured:
            return ["no adapter was measured: nothing is known of how well they answer"]
        answer = self.measured - self.withheld
        lines = [f"measured {self.measured:,} of {new:,} new adapters: {answer:,} may answer, {self.withheld:,} are withheld"]
        if self.gain.count:
            lines.append(f"  on average they save {self.gain.value:.2f} nats a token of their documents' texts")
        if self.quality.count:
            cut = f"; the cut in rank took {self.quality_lost.value:.1%}" if self.quality_lost.count else ""
            lines.append(
                f"  they answer {self.quality.value:.0%} of questions that they were not trained on, "
                f"what answered before {self.standing_quality.value:.0%}{cut}"
            )
        if self.withheld:
            lines.append("  where one is withheld, what answered before it goes on: an earlier adapter, or the text in context")
            lines += [f"  {name}: {why}" for name, why in self._withheld]
        if self.by_reference_weights:
            lines.append("  the shipped weights know the reference world alone (`imprint world`), and no other documents")
        elif self.withheld * 2 > self.measured and self.gain.count:
            lines.append("  these documents are not of the kind that the hypernetwork was trained on")
        if self.withheld * 2 > self.measured and self.gain.count:
            lines.append("  for your own, train a hypernetwork on documents like them (`imprint train`), or import one")
        return lines

    def figures(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "documents": dict(self.documents),
            "reasons": dict(self.reasons),
            "adapters": self.adapters,
            "adapter_bytes": self.adapter_bytes,
            "tokens": self.tokens,
            "shards": len(self.shards),
            "measured": self.measured,
            "withheld": self.withheld,
            "start_s": round(self.start_s, 3),
            "convert_s": round(self.convert_s, 3),
            "pruned": None if self.pruned is None else self.pruned._asdict(),
            "near_duplicates": None if self.near is None else self.near._asdict(),
        }


def receipt_of(row: dict[str, Any], status: Status, reason: str | None, **values: Any) -> Receipt:
    """The receipt of a row of `sources.ROWS`; `values` where it became a document."""
    absent: dict[str, Any] = {
        "content_hash": None, "adapter_ids": [], "shard": None, "bytes": 0, "tokens": 0,
        "error": 0.0, "lost": 0, "quality": None, "quality_lost": None,
        "standing_quality": None, "gain": None, "withheld": None, "sketch": [],
    }  # fmt: skip
    where = {"name": row["name"], "source_bytes": row["source_bytes"], "read_at": row["read_at"]}
    return Receipt(status=status, reason=reason, **where, **(absent | values))


def to_table(done: Sequence[Receipt]) -> pa.Table:
    """Receipts as a table of `RECEIPTS`."""
    return pa.Table.from_pylist([receipt._asdict() for receipt in done], RECEIPTS)
