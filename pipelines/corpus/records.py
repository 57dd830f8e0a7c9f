"""What a file holds: one document, or one a line or row. Every file, line and row gives a text or a reason; none is lost.

    .txt .md .html .pdf and such (core.text.parsing)    one document, by the file's name
    .jsonl .ndjson, also .gz and .zst              a document a line, as a JSON object
    .parquet                                       a document a row

Fields of lines and rows: `text`, `title`, and `id` or else `name` (else file#row, from 0), or those that `Reading` names. In: a
`File`. Out: `Read`s whose sizes add up to the file's. JSON is UTF-8, or UTF-16 where a mark says so.

Arrow reads Parquet in this process, some rows at a time: unlike HTML and PDF it has no limits of its own.
"""

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from core.text.parsing import SUFFIXES, ParseLimits, Parser, Reject, kind_of
from pipelines.corpus.files import (
    COMPRESSIONS,
    UNKNOWN_SIZE,
    File,
    buffered,
    fetch,
    is_local,
    open_file,
    refusal,
    suffixes,
    unreadable,
)

BATCH_ROWS, BATCH_BYTES = 256, 4 * 2**20
FETCHED_FILES, FETCHED_BYTES, FETCHED_UNKNOWN = 256, 4 * 2**20, 16
"""What is fetched at the same time: files and their bytes, or files of sizes that are not known."""


class Reading(ParseLimits):
    """How a source is read: the limits of one document, the fields of lines and rows. name_field: None is `id`, else `name`."""

    text_field: str = "text"
    title_field: str = "title"
    name_field: str | None = None

    @property
    def name_fields(self) -> tuple[str, ...]:
        return ("id", "name") if self.name_field is None else (self.name_field,)


class Read(NamedTuple):
    """What one file, line or row gave: a text, or a reason. source_bytes: its share of the file's size."""

    name: str
    title: str
    text: str | None
    reason: str | None
    source_bytes: int


def read_files(files: Iterable[File], parser: Parser, reading: Reading) -> Iterator[Iterator[Read]]:
    """What each of several files holds, in turn. Documents that lie elsewhere than on a local disk are fetched some at a time."""
    limit = reading.max_document_bytes
    for (_, together), group in groupby(files, key=partial(_fetched_with, limit=limit)):
        if not together:
            yield from (read_file(file, parser, reading) for file in group)
            continue
        for run in runs(group, FETCHED_FILES, FETCHED_BYTES, FETCHED_BYTES // FETCHED_UNKNOWN):
            for file, data in zip(run, fetch(run, limit), strict=True):
                yield read_file(file, parser, reading, data)


def is_whole(file: File) -> bool:
    """Whether a file is one document, which is read whole."""
    return not file.reason and kind_of(file.name) is not None


def _fetched_with(file: File, limit: int) -> tuple[str, bool]:
    """Whether a file is fetched at the same time as its neighbours, and of which file system they must be."""
    together = is_whole(file) and file.size_bytes <= limit and not is_local(file.url)
    return str(fsspec.core.split_protocol(file.url)[0]), together


def runs(files: Iterable[File], most_files: int, most_bytes: int, unknown_bytes: int) -> Iterator[list[File]]:
    """Neighbours together, up to a number and a size; unknown_bytes: what one counts for whose size is not known."""
    run: list[File] = []
    run_bytes = 0
    for file in files:
        size = unknown_bytes if file.size_bytes == UNKNOWN_SIZE else file.size_bytes
        if run and (len(run) == most_files or run_bytes + size > most_bytes):
            yield run
            run, run_bytes = [], 0
        run.append(file)
        run_bytes += size
    if run:
        yield run


def read_file(file: File, parser: Parser, reading: Reading, data: bytes | Exception | None = None) -> Iterator[Read]:
    """What a file holds. data: its first bytes, one more than the limit at most, or why there are none; None if not yet read."""
    size = max(file.size_bytes, 0)
    reject = Read(file.name, "", None, None, size)
    (form, compression), kind = suffixes(file.name), kind_of(file.name)
    if reason := refusal(file):
        yield reject._replace(reason=reason)
    elif kind is None and (form not in _RECORDS or (compression and form == ".parquet")):
        yield reject._replace(reason=f"no reader for this kind of file: {form + compression or 'no suffix'}")
    elif kind is not None:
        limit = reading.max_document_bytes
        try:
            if file.size_bytes > limit:
                data = b""
            elif data is None:
                with open_file(file) as stream:
                    data = stream.read(limit + 1)
            elif isinstance(data, Exception):
                raise data
        except OSError as error:
            yield reject._replace(reason=unreadable(error))
            return
        if max(file.size_bytes, len(data)) > limit:
            yield reject._replace(reason=f"too large: more than {limit} bytes", source_bytes=max(size, len(data)))
            return
        size = len(data) if file.size_bytes == UNKNOWN_SIZE else size
        parsed = parser.parse(kind, data)
        if isinstance(parsed, Reject):
            yield reject._replace(reason=parsed.reason, source_bytes=size)
        else:
            yield Read(file.name, parsed.title, parsed.text, None, size)
    else:
        yield from _records(file, form, compression, reading)


def _records(file: File, form: str, compression: str, reading: Reading) -> Iterator[Read]:
    """Rows of a file that holds many; one is held back, to be given what the others have left of the file's size."""
    told, held = 0, None
    rest = Read(file.name, "", None, "empty", 0)
    try:
        with open_file(file) as stream:
            for read in _RECORDS[form](stream, file, compression, reading):
                if held is not None:
                    told += held.source_bytes
                    yield held
                held = read
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        rest = rest._replace(reason=unreadable(error))
        if held is not None:
            told += held.source_bytes
            yield held
        held = None
    last = held or rest
    yield last._replace(source_bytes=max(file.size_bytes - told, 0) if file.size_bytes >= 0 else last.source_bytes)


def _jsonl(stream: IO[bytes], file: File, compression: str, reading: Reading) -> Iterator[Read]:
    """A document a line; blank lines are counted and left out. A line's share is what was read of the file since the last."""
    limit, number, told = reading.max_document_bytes, -1, 0
    for line, whole in _lines(buffered(stream, compression), limit):
        number += 1
        here = stream.tell()
        read = Read(f"{file.name}#{number}", "", None, None, here - told)
        if not whole:
            told = here
            yield read._replace(reason=f"too large: more than {limit} bytes")
        elif line.strip():
            told = here
            try:
                yield _document(json.loads(line.decode("utf-8-sig")), read, reading)
            except UnicodeDecodeError as error:
                yield read._replace(reason=f"not UTF-8: byte {error.start} of the line")
            except (ValueError, RecursionError) as error:
                yield read._replace(reason=f"not JSON: {str(error)[:200]}")


def _lines(stream: io.BufferedReader, limit: int) -> Iterator[tuple[bytes, bool]]:
    """Lines in UTF-8, and whether that is all of one: of a line above the limit the rest is passed over."""
    if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        text = io.TextIOWrapper(stream, "utf-16", "replace", newline="\n")
        return _lines_by(lambda size: text.readline(size).encode(), limit)
    return _lines_by(stream.readline, limit)


def _lines_by(readline: Callable[[int], bytes], limit: int) -> Iterator[tuple[bytes, bool]]:
    while line := readline(limit + 1):
        whole, ended = len(line) <= limit, line.endswith(b"\n")
        while not whole and not ended:
            more = readline(limit)
            ended = not more or more.endswith(b"\n")
        yield line, whole


def _parquet(stream: IO[bytes], file: File, compression: str, reading: Reading) -> Iterator[Read]:
    """A document a row."""
    table = pq.ParquetFile(stream, buffer_size=2**20)
    known = table.schema_arrow.names
    if reading.text_field not in known:
        yield Read(file.name, "", None, f"no column {reading.text_field}", 0)
        return
    columns = [name for name in dict.fromkeys((*reading.name_fields, reading.title_field, reading.text_field)) if name in known]
    rows = table.metadata.num_rows
    number, told = 0, 0
    for batch in table.iter_batches(batch_size=_batch_rows(table.metadata), columns=columns):
        for row in range(len(batch)):
            size = max(file.size_bytes, 0) * (number + 1) // rows - told
            read = Read(f"{file.name}#{number}", "", None, None, size)
            number, told = number + 1, told + size
            try:
                yield _document({name: batch[name][row].as_py() for name in columns}, read, reading)
            except UnicodeDecodeError as error:
                yield read._replace(reason=f"not UTF-8: byte {error.start} of a field")


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows that are `BATCH_BYTES` together where the file's rows are largest."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(largest, 1)))


def _document(fields: Any, read: Read, reading: Reading) -> Read:
    if not isinstance(fields, dict):
        return read._replace(reason="not a JSON object")
    name = next((fields[key] for key in reading.name_fields if fields.get(key) not in (None, "")), read.name)
    if isinstance(name, bool) or not isinstance(name, str | int):
        return read._replace(reason="the name is neither text nor a whole number")
    title, text = fields.get(reading.title_field) or "", fields.get(reading.text_field)
    if not isinstance(title, str) or not isinstance(text, str):
        return read._replace(name=str(name), reason="no text" if isinstance(title, str) else "the title is not text")
    read = read._replace(name=str(name))
    try:
        size = max(len(value.encode()) for value in (read.name, title, text))
    except UnicodeEncodeError:
        return read._replace(reason="not Unicode: half a surrogate pair")
    if size > reading.max_document_bytes:
        return read._replace(reason=f"too large: more than {reading.max_document_bytes} bytes")
    return read._replace(title=title, text=text) if text.strip() else read._replace(reason="empty")


_RECORDS: dict[str, Callable[[IO[bytes], File, str, Reading], Iterator[Read]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}
FORMATS = (*SUFFIXES, *_RECORDS, *(f".jsonl{suffix}" for suffix in COMPRESSIONS))
"""Suffixes of all that is read."""
