"""Manifest parts: rows of one kind as Parquet, sorted by key, in row groups that can be read and checked one by one.

In: rows, or tables of rows. Out: the bytes of a part and how a root lists it (`core.store.roots.Part`); from bytes, a `Footer`,
and the `Rows` of a row group. Knows nothing of storage: whoever reads bytes brings them here before using them.

Every byte is checked before Parquet sees it. The root has the hash of the footer, and the footer, among Parquet's own key-value
metadata, has the place, hash and key range of each row group; so a look-up reads a footer and a row group, and trusts both.
Other tools read a part as the Parquet it is.

A row's key is the three fields that name it, joined by NUL, which none of them may hold: keys sort as their fields do, in
Python and in Arrow. Sequences are stored relative to the part's, so that a part is written before its version is known.

Cost: 130 bytes a row on disk and 450 in memory; a row group of 2,048 rows is read in 3 ms, 65,536 rows are written in 0.1 s.
"""

import io
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, ValidationError

from core.store.errors import CorruptObject
from core.store.manifest import AdapterRow, DocumentRow, PartKind, Row, blob_hash
from core.store.roots import Part

GROUP_ROWS = 2048
PART_ROWS = 65_536
_MAX_GROUP_BYTES = 2**28
_GROUPS = b"imprint.groups"
_FAULTS = (pa.ArrowException, OSError, ValueError, OverflowError)
"""What Arrow raises for bytes and values that make no sense."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CREATED = pa.timestamp("us", tz="UTC")
_LOCATION = {"shard": pa.string(), "offset": pa.int64(), "length": pa.int64(), "blob_hash": pa.string()}
_MEASURED = ("quality", "quality_lost", "readable", "standing_quality", "error", "matched_loss", "shuffled_loss", "base_loss")


def _schema(fields: dict[str, pa.DataType], optional: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in optional) for name, kind in fields.items()])


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
    | dict.fromkeys(_MEASURED, pa.float64())
    | {"questions": pa.int64(), "standing": pa.string(), "withheld": pa.bool_(), "parent": pa.string()}
    | {"sequence": pa.int64(), "deleted": pa.bool_()},
    optional=(*_MEASURED, "questions", "standing", "withheld", "parent"),
)
SCHEMAS: dict[PartKind, pa.Schema] = {"documents": DOCUMENT_SCHEMA, "adapters": ADAPTER_SCHEMA}
_KEYS: dict[PartKind, list[str]] = {
    "documents": ["tenant", "collection", "name"],
    "adapters": ["tenant", "content_hash", "adapter_id"],
}
_REPEATED: dict[PartKind, list[str]] = {
    "documents": ["tenant", "collection", "shard"],
    "adapters": ["tenant", "producer_fingerprint", "spec_fingerprint", "encoding", "shard"],
}
"""Columns of few values: held as dictionaries, on disk and in memory."""


_TRUE = pa.Array.from_buffers(pa.bool_(), 1, [None, pa.py_buffer(b"\1")])
"""From a buffer: where Arrow is given a Python value or asked for one in NumPy, it imports pandas (40 MB, 0.4 s)."""


def joined(*fields: str) -> str:
    """The key of these fields, or what keys that begin with them begin with."""
    return "\0".join(fields)


class Rows:
    """Rows of one kind in memory, ascending by key: `keys`, and all columns in `table`. `nbytes` of both."""

    def __init__(self, kind: PartKind, table: pa.Table, keys: pa.StringArray | None = None) -> None:
        self.kind = kind
        self.table = table
        self.keys: pa.StringArray = _keys_of(kind, table) if keys is None else keys

    @cached_property
    def nbytes(self) -> int:
        return int(self.table.nbytes + self.keys.nbytes)

    def __len__(self) -> int:
        return len(self.keys)

    def slice(self, start: int, end: int) -> "Rows":
        return Rows(self.kind, self.table.slice(start, end - start), self.keys.slice(start, end - start))

    def filter(self, kept: pa.BooleanArray) -> "Rows":
        return Rows(self.kind, self.table.filter(kept), self.keys.filter(kept))

    def take(self, places: Sequence[int]) -> "list[Row]":
        """The rows at these places, as records."""
        chosen = self.table if len(places) == len(self) else self.table.take(_int64s(np.asarray(places, np.int64)))
        row_type: type[Row] = DocumentRow if self.kind == "documents" else AdapterRow
        try:
            return [row_type(*values) for values in zip(*map(_values, chosen.columns), strict=True)]
        except _FAULTS as error:
            raise CorruptObject(f"the manifest holds a row that cannot be read: {error}") from None

    @property
    def live(self) -> "Rows":
        """Those that are not deleted."""
        deleted = self.table["deleted"].combine_chunks()
        return self.filter(pc.invert(deleted)) if deleted.true_count else self


def rows_to_tables(kind: PartKind, rows: Sequence[Row]) -> Iterator[Rows]:
    """New rows as they go into parts: sorted, at most `PART_ROWS` each."""
    ordered = sorted(rows, key=lambda row: joined(*row.key))
    schema = SCHEMAS[kind]
    for start in range(0, len(ordered), PART_ROWS):
        some = ordered[start : start + PART_ROWS]
        yield Rows(kind, pa.table({name: [getattr(row, name) for row in some] for name in schema.names}, schema=schema))


def merged(pieces: Sequence[Rows]) -> Rows:
    """One of several, in order; of the rows of one key, that of the highest sequence."""
    if len(pieces) == 1:
        return pieces[0]
    table = pa.concat_tables([piece.table for piece in pieces]).combine_chunks()
    keys = pa.concat_arrays([piece.keys for piece in pieces])
    by = pa.table({"key": keys, "sequence": table["sequence"]})
    order = pc.sort_indices(by, [("key", "ascending"), ("sequence", "descending")])
    keys, table = keys.take(order), table.take(order)
    newest = pa.concat_arrays([_TRUE, pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1))])
    both = Rows(pieces[0].kind, table, keys)
    return both if newest.false_count == 0 else both.filter(newest)


class Group(NamedTuple):
    """A row group: its bytes `[offset, offset + length)` of the part, their hash, and its lowest and highest key."""

    offset: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1, le=2**20)]
    checksum: str
    first: str
    last: str


_GROUP_LIST = TypeAdapter(tuple[Group, ...])


@dataclass(frozen=True)
class Footer:
    """What a part's footer says. `firsts` and `lasts` are the groups' keys."""

    metadata: pq.FileMetaData
    groups: tuple[Group, ...]
    firsts: list[str]
    lasts: list[str]

    @property
    def nbytes(self) -> int:
        """About."""
        return 8 * int(self.metadata.serialized_size) + 1000 * len(self.groups)


def encode_part(rows: Rows, level: int) -> tuple[Part, bytes]:
    """The part of these rows, and how a root lists it (its sequence is that of its oldest row)."""
    kind, schema, table = rows.kind, SCHEMAS[rows.kind], rows.table
    sequence = pc.min(table["sequence"]).as_py()
    relative = pc.subtract(table["sequence"], sequence)
    table = table.set_column(schema.get_field_index("sequence"), "sequence", relative).cast(schema)
    sink, groups = io.BytesIO(), list[Group]()
    with pq.ParquetWriter(
        sink, schema, compression="zstd", use_dictionary=_REPEATED[kind], write_statistics=_KEYS[kind]
    ) as writer:
        for start in range(0, len(rows), GROUP_ROWS):
            some, offset = table.slice(start, GROUP_ROWS), groups[-1].offset + groups[-1].length if groups else 0
            writer.write_table(some, row_group_size=GROUP_ROWS)
            with sink.getbuffer() as written:
                data = bytes(written[offset:])
            first, last = rows.keys[start].as_py(), rows.keys[start + len(some) - 1].as_py()
            groups.append(Group(offset, len(data), len(some), blob_hash(data), first, last))
        writer.add_key_value_metadata({_GROUPS.decode(): _GROUP_LIST.dump_json(tuple(groups)).decode()})
    data = sink.getvalue()
    footer_bytes = len(data) - groups[-1].offset - groups[-1].length
    part = Part(
        name=f"{uuid.uuid4().hex}.parquet",
        kind=kind,
        level=level,
        rows=len(rows),
        deleted=table["deleted"].combine_chunks().true_count,
        bytes=len(data),
        footer_bytes=footer_bytes,
        checksum=blob_hash(data[-footer_bytes:]),
        first=groups[0].first,
        last=groups[-1].last,
        sequence=sequence,
    )
    return part, data


def decode_footer(part: Part, data: bytes) -> Footer:
    """A part's footer, from its last `footer_bytes`; `CorruptObject` where they are not what the root and the part say."""
    name = part.object_name
    if blob_hash(data) != part.checksum:
        raise CorruptObject(f"{name} is damaged: the hash of its footer is not the one that the root says")
    try:
        metadata = pq.read_metadata(pa.BufferReader(data))
        groups = _GROUP_LIST.validate_json((metadata.metadata or {}).get(_GROUPS, b""))
        schema = metadata.schema.to_arrow_schema()
    except ValidationError:
        raise CorruptObject(f"{name} does not say where its row groups lie") from None
    except _FAULTS as error:
        raise CorruptObject(f"{name} is not Parquet: {error}") from None
    if not schema.equals(SCHEMAS[part.kind]):
        raise CorruptObject(f"{name} does not hold {part.kind}: its columns are {', '.join(schema.names)[:500]}")
    found = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if (
        [group.rows for group in groups] != [group.num_rows for group in found]
        or [group.offset for group in groups] != [0, *accumulate(group.length for group in groups)][:-1]
        or sum(group.length for group in groups) != part.bytes - part.footer_bytes
        or sum(group.rows for group in groups) != part.rows
        or max(group.total_byte_size for group in found) > _MAX_GROUP_BYTES
        or (groups[0].first, groups[-1].last) != (part.first, part.last)
    ):
        raise CorruptObject(f"{name} is not the part that its root lists")
    return Footer(metadata, groups, [group.first for group in groups], [group.last for group in groups])


def decode_group(part: Part, footer: Footer, number: int, data: bytes) -> Rows:
    """The rows of a row group, from its bytes; `CorruptObject` where they are not what the footer says."""
    group = footer.groups[number]
    where = f"{part.object_name}, row group {number},"
    if blob_hash(data) != group.checksum:
        raise CorruptObject(f"{where} is damaged: its hash is not the one that the footer says")
    whole = np.zeros(part.bytes, np.uint8)  # Parquet's offsets count from the part's beginning; untouched pages take no memory
    whole[group.offset : group.offset + group.length] = np.frombuffer(data, np.uint8)
    schema = SCHEMAS[part.kind]
    try:
        file = pq.ParquetFile(
            pa.BufferReader(pa.py_buffer(whole)), metadata=footer.metadata, read_dictionary=_REPEATED[part.kind]
        )
        table = file.read_row_group(number, use_threads=False).combine_chunks()
        table.validate(full=True)
        nulls = [name for name in schema.names if table[name].null_count and not schema.field(name).nullable]
        sequence = pc.add_checked(table["sequence"], _int64s(np.full(len(table), part.sequence)))
        rows = Rows(part.kind, table.set_column(schema.get_field_index("sequence"), "sequence", sequence))
    except _FAULTS as error:
        raise CorruptObject(f"{where} is not Parquet: {error}") from None
    keys = rows.keys
    if (
        nulls
        or len(rows) != group.rows
        or (keys[0].as_py(), keys[-1].as_py()) != (group.first, group.last)
        or not pc.all(pc.less(keys.slice(0, len(keys) - 1), keys.slice(1)), min_count=0).as_py()
    ):
        raise CorruptObject(f"{where} does not hold the rows that the footer says")
    return rows


def _values(column: pa.ChunkedArray) -> list[Any]:
    """As Python objects. Arrow makes those of dictionaries and of times one by one, at 5 and 15 us each."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    if pa.types.is_timestamp(column.type):
        return [_EPOCH + timedelta(microseconds=since) for since in column.cast(pa.int64()).to_pylist()]
    values: list[Any] = column.to_pylist()
    return values


def _keys_of(kind: PartKind, table: pa.Table) -> pa.StringArray:
    fields = [table[name].cast(pa.string()) for name in _KEYS[kind]]
    ends = pa.py_buffer(np.arange(len(table) + 1, dtype=np.int32))
    separators = pa.StringArray.from_buffers(len(table), ends, pa.py_buffer(bytes(len(table))))
    return pc.binary_join_element_wise(*fields, separators).combine_chunks()


def _int64s(values: np.ndarray) -> pa.Int64Array:
    """Of int64, without copying and without pandas."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])
