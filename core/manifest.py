"""What a store says of its contents: producers, adapter ids, rows, manifest parts, and the root.

In and out: plain records, and their bytes (rows as Parquet, the root as canonical JSON). Knows nothing of files: whoever reads
bytes passes in the name that errors should speak of. Cost: about 5 us a row.

A `Root` is one version of a store: the parts that hold its rows, and the producers and specs that these rows name. Parts hold
document rows or adapter rows, sorted by key, so that row-group statistics narrow a lookup.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from core.adapter import AdapterSpec
from core.codec import Encoding, encode, encoded_bytes
from core.config import digest
from core.documents import Window, clean_name

FORMAT_VERSION = 2
_HASH = re.compile(r"[0-9a-f]{64}")


class StoreError(ValueError):
    """A store that cannot be read or written as asked; the message names the object."""


class CorruptObject(StoreError):
    """An object whose bytes are not those that were written."""


def blob_hash(data: bytes) -> str:
    """BLAKE2b with 32 bytes (hex): names bytes, where an adapter id names a derivation. About 1 GB/s."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


class MissingObject(StoreError):
    """An object that a root or a row names and that is not there: lost, or collected since that root was read."""


class Producer(BaseModel):
    """What writes adapters: a method, the weights it uses, and the settings that change what it writes.

    `weights` is the fingerprint of the hypernetwork or starting adapter. `config` holds the base with tokenizer, quantisation and
    chat template, the normaliser and whatever else bears identity; nothing that belongs to one document, for a store keeps its
    producers in the root.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(min_length=1)
    weights: str
    config: dict[str, JsonValue]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all three."""
        return digest(self.model_dump(mode="json"))

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def adapter_id(tenant: str, content_hash: str, window: Window, producer: Producer, spec: AdapterSpec, encoding: Encoding) -> str:
    """SHA-256 (hex) that names a derivation: whoever knows the parts knows which adapter should answer."""
    return digest(
        {
            "tenant": tenant,
            "content_hash": content_hash,
            "window": list(window),
            "producer": producer.fingerprint,
            "spec": spec.fingerprint,
            "encoding": encoding,
        }
    )


class Location(NamedTuple):
    """Bytes `[offset, offset + length)` of a shard, with their `blob_hash`."""

    shard: str
    offset: int
    length: int
    blob_hash: str


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """A name's content as of a commit; the row of the highest sequence holds. A deleted row is a tombstone without text."""

    tenant: str
    collection: str
    name: str
    title: str
    content_hash: str
    shard: str
    offset: int
    length: int
    blob_hash: str
    sequence: int
    created: datetime
    deleted: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.tenant, self.collection, self.name


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """An adapter for the tokens of a window of some content; what was not measured is None, an absent `parent` too.

    quality: share of the document's own questions that it answers as stored (`core.lift_writing.recall`); quality_lost: what
    cutting it to the serving rank took from that. error: relative error of the cut, or of composing windows, as
    `core.lora.recompress` measures it.
    """

    adapter_id: str
    tenant: str
    content_hash: str
    window_start: int
    window_end: int
    producer_fingerprint: str
    spec_fingerprint: str
    encoding: Encoding
    shard: str
    offset: int
    length: int
    blob_hash: str
    tokens: int
    rank: int
    created: datetime
    quality: float | None = None
    quality_lost: float | None = None
    error: float | None = None
    parent: str | None = None

    @property
    def key(self) -> str:
        return self.adapter_id

    @property
    def window(self) -> Window:
        return Window(self.window_start, self.window_end)


@dataclass(frozen=True, eq=False, kw_only=True)
class NewAdapter:
    """An adapter to put: `vector` is flat_N under `spec`, or its bytes in `encoding`."""

    tenant: str
    content_hash: str
    window: Window
    producer: Producer
    spec: AdapterSpec
    encoding: Encoding
    vector: Tensor | bytes
    tokens: int
    quality: float | None = None
    quality_lost: float | None = None
    error: float | None = None
    parent: str | None = None

    @property
    def adapter_id(self) -> str:
        return adapter_id(self.tenant, self.content_hash, self.window, self.producer, self.spec, self.encoding)

    def row(self, location: Location, created: datetime) -> AdapterRow:
        """Its manifest row, once its blob has a place."""
        return AdapterRow(
            adapter_id=self.adapter_id,
            tenant=self.tenant,
            content_hash=self.content_hash,
            window_start=self.window.start,
            window_end=self.window.end,
            producer_fingerprint=self.producer.fingerprint,
            spec_fingerprint=self.spec.fingerprint,
            encoding=self.encoding,
            **location._asdict(),
            tokens=self.tokens,
            rank=self.spec.rank,
            created=created,
            quality=self.quality,
            quality_lost=self.quality_lost,
            error=self.error,
            parent=self.parent,
        )

    def blob(self) -> bytes:
        """The vector's bytes; raises `ValueError` where tenant, hash, window or vector are not what they should be."""
        if clean_name("tenant", self.tenant) != self.tenant or not _HASH.fullmatch(self.content_hash):
            raise ValueError("an adapter names its tenant and content hash as its document does: take both from the document")
        if not 0 <= self.window.start < self.window.end:
            raise ValueError(f"window {tuple(self.window)} is empty or negative: give the token range that the adapter is for")
        data = self.vector if isinstance(self.vector, bytes) else encode(self.vector, self.encoding)
        if len(data) != (expected := encoded_bytes(self.spec.numel, self.encoding)):
            raise ValueError(f"the vector has {len(data)} bytes, but its spec has {expected} in {self.encoding}")
        return data


Row = DocumentRow | AdapterRow
PartKind = Literal["documents", "adapters"]

_CREATED = pa.timestamp("us", tz="UTC")


def _schema(fields: dict[str, pa.DataType], optional: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in optional) for name, kind in fields.items()])


_LOCATION = {"shard": pa.string(), "offset": pa.int64(), "length": pa.int64(), "blob_hash": pa.string()}
DOCUMENT_SCHEMA = _schema(
    dict.fromkeys(["tenant", "collection", "name", "title", "content_hash"], pa.string())
    | _LOCATION
    | {"sequence": pa.int64(), "created": _CREATED, "deleted": pa.bool_()}
)
ADAPTER_SCHEMA = _schema(
    dict.fromkeys(["adapter_id", "tenant", "content_hash"], pa.string())
    | dict.fromkeys(["window_start", "window_end"], pa.int64())
    | dict.fromkeys(["producer_fingerprint", "spec_fingerprint", "encoding"], pa.string())
    | _LOCATION
    | {"tokens": pa.int64(), "rank": pa.int64(), "created": _CREATED}
    | dict.fromkeys(["quality", "quality_lost", "error"], pa.float64())
    | {"parent": pa.string()},
    optional=("quality", "quality_lost", "error", "parent"),
)
_SCHEMAS: dict[PartKind, pa.Schema] = {"documents": DOCUMENT_SCHEMA, "adapters": ADAPTER_SCHEMA}
_ORDERS: dict[PartKind, list[tuple[str, str]]] = {
    "documents": [(name, "ascending") for name in ("tenant", "collection", "name", "sequence")],
    "adapters": [("adapter_id", "ascending")],
}


def rows_to_parquet(kind: PartKind, rows: Sequence[Row]) -> bytes:
    """A manifest part with these rows, sorted by key."""
    schema = _SCHEMAS[kind]
    return _table_to_parquet(kind, pa.table({name: [getattr(row, name) for row in rows] for name in schema.names}, schema=schema))


def rows_from_parquet(kind: PartKind, data: bytes, name: str) -> list[Row]:
    """The rows of a part; `CorruptObject` speaking of `name` where the bytes are no such part."""
    columns = [column.to_pylist() for column in _table_from_parquet(kind, data, name).columns]
    for field, column in zip(_SCHEMAS[kind], columns, strict=True):
        if field.name in _REPEATED:
            column[:] = map(sys.intern, column)
    row_type: type[Row] = DocumentRow if kind == "documents" else AdapterRow
    return [row_type(*values) for values in zip(*columns, strict=True)]


_REPEATED = ("tenant", "collection", "producer_fingerprint", "spec_fingerprint", "encoding", "shard")


def merge_parquet(kind: PartKind, parts: Sequence[tuple[bytes, str]]) -> bytes:
    """One part with the rows of several, given as (bytes, name)."""
    return _table_to_parquet(kind, pa.concat_tables([_table_from_parquet(kind, data, name) for data, name in parts]))


def _table_to_parquet(kind: PartKind, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table.sort_by(_ORDERS[kind]), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _table_from_parquet(kind: PartKind, data: bytes, name: str) -> pa.Table:
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise CorruptObject(f"{name} is not Parquet: {error}") from None
    if not table.schema.equals(_SCHEMAS[kind]):
        raise CorruptObject(f"{name} does not hold {kind}: its columns are {', '.join(table.schema.names)[:500]}")
    return table


class Part(BaseModel):
    """A manifest part as its root lists it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[0-9a-f]{32}\.parquet$")
    kind: PartKind
    rows: int = Field(ge=1)
    checksum: str = Field(pattern=r"^[0-9a-f]{64}$")


class Root(BaseModel):
    """One version of a store. Sequences count up from 1; 0 is a store before its first version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    sequence: int = Field(default=0, ge=0, lt=10**20)
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    parts: tuple[Part, ...] = ()
    producers: dict[str, Producer] = {}
    specs: dict[str, dict[str, JsonValue]] = {}
    checksum: str = ""

    def next(
        self, parts: Sequence[Part], producers: dict[str, Producer] | None = None, specs: dict[str, AdapterSpec] | None = None
    ) -> "Root":
        """The version after this one: with these parts, and with these producers and specs added."""
        return Root(
            sequence=self.sequence + 1,
            parts=tuple(parts),
            producers=self.producers | (producers or {}),
            specs=self.specs | {fingerprint: spec.to_json() for fingerprint, spec in (specs or {}).items()},
        )

    def to_bytes(self) -> bytes:
        """Canonical JSON that carries the checksum of its own other fields."""
        values = self.model_dump(mode="json", exclude={"checksum"})
        return json.dumps(values | {"checksum": digest(values)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Root":
        """Reads what `to_bytes` wrote, byte by byte; else `CorruptObject`, or `StoreError` for another format version."""
        try:
            version = _Versioned.model_validate_json(data).format_version
            if version != FORMAT_VERSION:
                raise StoreError(
                    f"{name} has format version {version}, and this Imprint reads version {FORMAT_VERSION}: "
                    f"open the store with an Imprint that reads format version {version}"
                )
            root = cls.model_validate_json(data)
        except ValidationError as error:
            raise CorruptObject(f"{name} is not a root of a store: {error.errors()[0]['msg']}") from None
        if root.to_bytes() != data:
            raise CorruptObject(f"{name} is damaged: its checksum does not hold")
        for fingerprint, producer in root.producers.items():
            if producer.fingerprint != fingerprint:
                raise CorruptObject(f"{name} names a producer {fingerprint} whose fingerprint is {producer.fingerprint}")
        return root

    def spec(self, fingerprint: str) -> AdapterSpec:
        """The spec of that fingerprint; `StoreError` where there is none, or another under its name."""
        if fingerprint not in self.specs:
            raise StoreError(f"root {self.sequence} knows no spec {fingerprint}")
        spec = AdapterSpec.from_json(self.specs[fingerprint])
        if spec.fingerprint != fingerprint:
            raise CorruptObject(f"root {self.sequence} names a spec {fingerprint} whose fingerprint is {spec.fingerprint}")
        return spec


class _Versioned(BaseModel):
    format_version: int
