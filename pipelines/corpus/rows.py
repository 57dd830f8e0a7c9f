"""Files of many documents: JSON, JSON lines, CSV, Parquet -> one `Read` a value, line or row.

Fields are those that `Reading` names. Names and titles may be of any plain type: bytes are UTF-8, a number or date has its usual
text (7.0 is 7), null is none. A damaged file raises, after the rows before the damage. Holds one document, of Parquet
`BATCH_BYTES`. JSON and CSV are UTF-8, or UTF-16 where a mark says so.

Arrow reads Parquet in this process, some rows at a time: unlike HTML and PDF it has no limits of its own.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import date, time
from decimal import Decimal
from functools import partial
from itertools import chain
from typing import IO, Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.text.decoding import Refused
from pipelines.corpus.files import File, buffered, suffixes
from pipelines.corpus.json_values import values
from pipelines.corpus.reading import Read, Reading, row

BATCH_ROWS, BATCH_BYTES = 256, 4 * 2**20
DELIMITERS = ",;\t|"
EXACT = 2**53
"""Whole numbers below it are exact in a float."""


def _json(stream: IO[bytes], file: File, compression: str, reading: Reading) -> Iterator[Read]:
    """A document a value: the elements of an array, or objects one after the other. A single object has the file's name."""
    limit, told = reading.max_document_bytes, 0
    held: tuple[bytes, bool] | None = None
    source = buffered(stream, compression)
    text = io.TextIOWrapper(source, "utf-16", "replace") if _is_utf16(source) else None
    read = source.read if text is None else lambda size: text.read(size).encode()
    for number, (value, whole, listed) in enumerate(values(read, limit)):
        if number == 0 and not listed:
            held = value, whole
        else:
            if held is not None:
                yield _value(*held, Read(f"{file.name}#0", "", None, None, told), reading)
                held = None
            here = stream.tell()
            yield _value(value, whole, Read(f"{file.name}#{number}", "", None, None, here - told), reading)
            told = here
    if held is not None:
        yield _value(*held, Read(file.name, "", None, None, stream.tell()), reading)


def _jsonl(stream: IO[bytes], file: File, compression: str, reading: Reading) -> Iterator[Read]:
    """A document a line; blank lines are counted and left out. A line's share is what was read of the file since the last."""
    number, told = -1, 0
    for line, whole in _lines(buffered(stream, compression), reading.max_document_bytes):
        number += 1
        if line.strip() or not whole:
            here = stream.tell()
            yield _value(line, whole, Read(f"{file.name}#{number}", "", None, None, here - told), reading)
            told = here


def _value(value: bytes, whole: bool, read: Read, reading: Reading) -> Read:
    if not whole:
        return read._replace(reason=f"too large: more than {reading.max_document_bytes} bytes in one object")
    try:
        fields = json.loads(value.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return read._replace(reason=f"not UTF-8: byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return read._replace(reason=f"not JSON: {str(error)[:200]}")
    return row(read, partial(_document, fields, read, reading))


def _lines(stream: io.BufferedReader, limit: int) -> Iterator[tuple[bytes, bool]]:
    """Lines in UTF-8, and whether that is all of one: of a line above the limit the rest is passed over."""
    if _is_utf16(stream):
        text = io.TextIOWrapper(stream, "utf-16", "replace", newline="\n")
        return _lines_by(lambda size: text.readline(size).encode(), limit)
    return _lines_by(stream.readline, limit)


def _is_utf16(stream: io.BufferedReader) -> bool:
    return stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _lines_by(readline: Callable[[int], bytes], limit: int) -> Iterator[tuple[bytes, bool]]:
    while line := readline(limit + 1):
        whole, ended = len(line) <= limit, line.endswith(b"\n")
        while not whole and not ended:
            more = readline(limit)
            ended = not more or more.endswith(b"\n")
        yield line, whole


def _csv(stream: IO[bytes], file: File, compression: str, reading: Reading) -> Iterator[Read]:
    """A document a row below the header. Blank lines are neither counted nor read."""
    csv.field_size_limit(max(csv.field_size_limit(), reading.max_document_bytes))  # of the process, as the module has it
    source = buffered(stream, compression)
    encoding, errors = ("utf-16", "replace") if _is_utf16(source) else ("utf-8-sig", "surrogateescape")
    lines = _text_lines(io.TextIOWrapper(source, encoding, errors, newline=""), reading.max_document_bytes)
    first = next(lines, "")
    if first.startswith("sep="):  # Excel's own
        delimiter, first = first[4:5], next(lines, "")
    else:
        delimiter = "\t" if suffixes(file.name)[0] == ".tsv" else _delimiter(first, reading.text_field)
    table = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(table)]
    if header:
        _check_columns(header, reading)
    number = told = 0
    for fields, line in _records(table):
        here = stream.tell()
        read = Read(f"{file.name}#{number}", "", None, None, here - told)
        number, told = number + 1, here
        if isinstance(fields, csv.Error):
            yield read._replace(reason=f"not CSV: {fields} in line {line}; double the quotes that stand inside of quotes")
        elif len(fields) != len(header):
            quote = f"put text that holds {delimiter!r} or a line break into quotes"
            yield read._replace(reason=f"not CSV: {len(fields)} fields where the header has {len(header)}; {quote}")
        else:
            yield row(read, partial(_csv_document, dict(zip(header, fields, strict=True)), read, reading))


def _records(table: Any) -> Iterator[tuple[list[str] | csv.Error, int]]:
    """The fields of each record that has any, or what is wrong with it, and the line where it begins.

    Raises where an error spans lines: nobody knows where the record after it begins, and text would be taken for names.
    """
    while True:
        line = table.line_num + 1
        try:
            fields = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            if table.line_num != line or "limit" in str(error):
                raise Refused(f"not CSV: {error}, from line {line} on; double the quotes that stand inside of quotes") from None
            yield error, line
            continue
        if fields:
            yield fields, line


def _text_lines(text: io.TextIOWrapper, limit: int) -> Iterator[str]:
    """Raises `Refused` for a line above the limit."""
    while line := text.readline(limit + 1):
        if len(line) > limit and line[-1] not in "\r\n":
            raise Refused(f"too large: a line of more than {limit} characters")
        yield line


def _delimiter(header: str, text_field: str) -> str:
    return next((each for each in DELIMITERS if text_field in [name.strip(' "\r\n') for name in header.split(each)]), ",")


def _csv_document(fields: dict[str, str], read: Read, reading: Reading) -> Read:
    try:
        "".join(fields.values()).encode()
    except UnicodeEncodeError:
        return read._replace(reason="not UTF-8: save the file in UTF-8")
    return _document(fields, read, reading)


def _parquet(stream: IO[bytes], file: File, compression: str, reading: Reading) -> Iterator[Read]:
    """A document a row."""
    table = pq.ParquetFile(stream, buffer_size=2**20)
    known = table.schema_arrow.names
    columns = _check_columns(known, reading)
    rows = table.metadata.num_rows
    number, told = 0, 0
    for batch in table.iter_batches(batch_size=_batch_rows(table.metadata), columns=columns):
        for place in range(len(batch)):
            size = max(file.size_bytes, 0) * (number + 1) // rows - told
            read = Read(f"{file.name}#{number}", "", None, None, size)
            number, told = number + 1, told + size
            yield row(read, partial(_parquet_document, batch, place, read, reading))


def _check_columns(known: list[str], reading: Reading) -> list[str]:
    """Those columns of a table that are read. Raises `Refused` where they are not all there, or there twice."""
    if reading.text_field not in known:
        others = ", ".join(known)[:200]
        raise Refused(f"no column {reading.text_field}: of {others} name the text's with `--set reading.text_field=NAME`")
    columns = [name for name in dict.fromkeys((*reading.name_fields, reading.title_field, reading.text_field)) if name in known]
    for name in columns:
        if (count := known.count(name)) > 1:
            raise Refused(f"{count} columns named {name}: rename all but one")
    return columns


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows that are `BATCH_BYTES` together where the file's rows are largest."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(largest, 1)))


def _parquet_document(batch: pa.RecordBatch, place: int, read: Read, reading: Reading) -> Read:
    return _document({name: _scalar(batch[name][place]) for name in batch.schema.names}, read, reading)


def _scalar(scalar: pa.Scalar) -> Any:
    """A scalar as Python has it; a short float as the shortest text says it, as 0.1 rather than 0.10000000149."""
    value = scalar.as_py()
    if not isinstance(value, float) or scalar.type.bit_width == 64:
        return value
    return float(str((np.float16 if scalar.type.bit_width == 16 else np.float32)(value)))


def _document(fields: Any, read: Read, reading: Reading) -> Read:
    """The document of a row. Raises `Refused` for a name or title that is no plain value."""
    if not isinstance(fields, dict):
        return read._replace(reason=f"not a JSON object: {_kind(fields)}; give an object with `{reading.text_field}` a document")
    names = (_plain(fields.get(key), "name") for key in reading.name_fields)
    read = read._replace(name=next(filter(None, names), read.name))
    title, text = _plain(fields.get(reading.title_field), "title"), fields.get(reading.text_field)
    text = text.decode() if isinstance(text, bytes) else text
    if not isinstance(text, str):
        return read._replace(reason=f"no text: {_advice(fields, reading.text_field)}")
    try:
        size = max(len(value.encode()) for value in (read.name, title, text))
    except UnicodeEncodeError:
        return read._replace(reason="not Unicode: half a surrogate pair")
    if size > reading.max_document_bytes:
        return read._replace(reason=f"too large: more than {reading.max_document_bytes} bytes")
    return read._replace(title=title, text=text) if text.strip() else read._replace(reason="empty")


def _plain(value: Any, what: str) -> str:
    """The usual text of a plain value; "" for null, of which NaN is one to pandas. Raises `Refused` for any other."""
    if value is None or (isinstance(value, float | Decimal) and value != value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if abs(value) < EXACT and value.is_integer() else repr(value)
    if isinstance(value, Decimal):
        return f"{value:.0f}" if value == value.to_integral_value() else f"{value:f}"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, int | UUID):
        return str(value)
    raise Refused(f"the {what} is {_kind(value)}: give text, a number or a date")


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, dict) else "an array" if isinstance(value, list) else type(value).__name__


def _advice(fields: dict[str, Any], text_field: str) -> str:
    """What to do about an object that has no text."""
    if fields.get(text_field) is not None:
        return f"`{text_field}` is {_kind(fields[text_field])}; give one text a document"
    if text_field in fields:
        return f"`{text_field}` is null"
    for name, value in fields.items():
        if isinstance(value, list) and any(isinstance(each, dict) for each in value):
            return f"the documents seem to be in `{name}`; write that array alone, an object with `{text_field}` a document"
    return f"of {', '.join(fields)[:200] or 'no fields'} name the text's with `--set reading.text_field=NAME`"


READERS: dict[str, Callable[[IO[bytes], File, str, Reading], Iterator[Read]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
"""By suffix. All but Parquet, which is compressed in itself, may be compressed."""
