"""A corpus -> rows, as a Ray Data stream; what cannot be read becomes a row with the reason.

In: a path or URL (`pipelines.corpus.listing` says which) of files (`pipelines.corpus.records` says which). Out: rows of `ROWS`,
in the order of the files, with `reason` null and a text, or a reason and no text. One bad file, line or row never stops the
stream. Knows nothing of models and stores.

One task lists, ahead of the tasks that read by a share of Ray's object store at most (100 bytes a file, 30 more in the driver).
A task reads a piece: up to `PIECE_FILES` files or `PIECE_BYTES`, or one larger file. Each process that reads has one parser, with
its worker where there are files for it (`core.text.parsing`).
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import ray

from core.text.documents import nfc
from core.text.parsing import Parser
from pipelines.corpus.files import UNKNOWN_SIZE, File, printable
from pipelines.corpus.listing import absolute, list_files
from pipelines.corpus.reading import Reading
from pipelines.corpus.records import FORMATS, read_files, runs
from pipelines.corpus.rows import BATCH_BYTES, BATCH_ROWS

ROWS = pa.schema(
    [
        pa.field("tenant", pa.string(), nullable=False),
        pa.field("collection", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.large_string()),
        pa.field("reason", pa.string()),
        pa.field("source_bytes", pa.int64(), nullable=False),
        pa.field("read_at", pa.float64(), nullable=False),
    ]
)
"""source_bytes: of the source that this row stands for; they add up to its size. read_at: Unix time in s."""

PIECE_FILES, PIECE_BYTES, BLOCK_BYTES = 256, 4 * 2**20, 2**20
COUNTED_FILES = 10_000


@dataclass(frozen=True)
class Source:
    """The files that a URL stands for, with the tenant and collection that their documents belong to.

    size_bytes: of all files; None where there are more than `COUNTED_FILES`, or a listing that says no sizes.
    """

    url: str
    tenant: str
    collection: str
    reading: Reading
    size_bytes: int | None


def open_source(url: str, tenant: str, collection: str, reading: Reading | None = None) -> Source:
    """Looks at the first files. Raises `ValueError` where there is nothing."""
    try:
        first = list(islice(list_files(url), COUNTED_FILES + 1))
    except OSError as error:
        raise ValueError(f"{url} cannot be listed: {error}") from None
    if not first:
        raise ValueError(f"no files under {url}: give files of {' '.join(FORMATS)}")
    known = len(first) <= COUNTED_FILES and all(file.size_bytes != UNKNOWN_SIZE for file in first)
    size_bytes = sum(file.size_bytes for file in first) if known else None
    return Source(absolute(url), tenant, collection, reading or Reading(), size_bytes)


def dataset(source: Source) -> "ray.data.Dataset":
    """The rows of a source, as a stream. Its blocks are small, so that reading begins while the listing goes on."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES
    with ray.data.DataContext.current(context):
        listing = ray.data.from_items([{"url": source.url}], override_num_blocks=1)
        pieces = listing.map_batches(_list_pieces, batch_size=1, batch_format="pyarrow", num_cpus=0)
        pieces = pieces.repartition(target_num_rows_per_block=1)
        return pieces.map_batches(partial(_read_pieces, source=source), batch_size=1, batch_format="pyarrow")


class UniqueNames:
    """One actor, for all rows: of those with one name and different content, the ones after the first become rejects.

    A row that comes again passes again, as Ray gives the rows of a lost node to the same actor once more. Holds about 250 bytes
    a name. Where the actor itself dies, it starts without any: then a later row may take the name.
    """

    def __init__(self) -> None:
        self._contents: dict[bytes, bytes] = {}

    def __call__(self, rows: pa.Table) -> pa.Table:
        reasons = rows["reason"].to_pylist()
        columns = (rows[column].to_pylist() for column in ("name", "title", "text"))
        for place, (name, title, text) in enumerate(zip(*columns, strict=True)):
            if reasons[place] is None:
                content = blake2b(f"{title}\0{text}".encode(), digest_size=16).digest()
                if self._contents.setdefault(blake2b(nfc(name).encode(), digest_size=16).digest(), content) != content:
                    reasons[place] = "name taken by an earlier document"
        return rows.set_column(rows.schema.get_field_index("reason"), ROWS.field("reason"), pa.array(reasons, pa.string()))


def read(source: Source) -> Iterator[pa.Table]:
    """The rows of a source, read in this process, in tables of at most `BATCH_ROWS` rows."""
    for piece in _pieces(list_files(source.url)):
        yield from _read_piece(piece, source)


def _list_pieces(batch: pa.Table) -> Iterator[pa.Table]:
    for url in batch["url"].to_pylist():
        for piece in _pieces(list_files(url)):
            yield pa.Table.from_pylist([{"files": [file._asdict() for file in piece]}], _PIECE)


_PIECE = pa.schema(
    [
        pa.field(
            "files",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("url", pa.string()),
                        ("size_bytes", pa.int64()),
                        ("root", pa.string()),
                        ("reason", pa.string()),
                    ]
                )
            ),
        )
    ]
)


def _read_pieces(batch: pa.Table, source: Source) -> Iterator[pa.Table]:
    for piece in batch["files"].to_pylist():
        yield from _read_piece([File(**file) for file in piece], source)


def _pieces(files: Iterable[File]) -> Iterator[list[File]]:
    """What one task reads: small files together, large ones alone."""
    return runs(files, PIECE_FILES, PIECE_BYTES, PIECE_BYTES // PIECE_FILES)


def _read_piece(piece: list[File], source: Source) -> Iterator[pa.Table]:
    rows: list[tuple[Any, ...]] = []
    held, read_at = 0, time.time()
    for name, title, text, reason, size in chain.from_iterable(read_files(piece, _parser(source.reading), source.reading)):
        said = None if reason is None else printable(reason)
        rows.append((source.tenant, source.collection, printable(name), title, text, said, size, read_at))
        held += len(text or "")
        if len(rows) >= BATCH_ROWS or held >= BATCH_BYTES:
            yield _table(rows)
            rows, held, read_at = [], 0, time.time()
    if rows:
        yield _table(rows)


@lru_cache(maxsize=1)
def _parser(reading: Reading) -> Parser:
    """The parser of this process."""
    return Parser(reading)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), ROWS, strict=True)], schema=ROWS)
