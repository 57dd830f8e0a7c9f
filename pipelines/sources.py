"""Files of documents -> rows, as a Ray Data stream; what cannot be read becomes a row with the reason.

In: a file or folder, local or any URL that fsspec opens. Out: rows of `ROWS`, in the order of the paths, with `reason` null and a
text, or a reason and no text. One bad file, line or row never stops the stream. Knows nothing of models and stores.

    .txt .text .md .markdown   one document, named by its path below the folder; title: Markdown's first heading
    .jsonl .ndjson .parquet    a document a line or row, of the fields `text`, `id` or `name` (else path#row, from 0), `title`

Hidden files (a leading dot) are left out. Files of a local folder are opened only where they really lie inside it: links that
lead out are rejected. Cost: the driver holds the list of files, about 200 bytes each; a task one text file or one batch of rows.
"""

import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from fsspec.implementations.local import LocalFileSystem

from core.documents import nfc

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
"""source_bytes: of the source that this row stands for; they add up to its size, blank lines aside. read_at: Unix time in s."""

PIECE_FILES, PIECE_BYTES = 64, 4 * 2**20
BLOCK_ROWS, BLOCK_BYTES = 256, 4 * 2**20
_LINK_OUT, _LINK_TO_FOLDER = "a link that leaves the folder", "a link to a folder: its files are read in place"
_HEADING = re.compile(r"#{1,6}[ \t]+(.*?)[ \t]*#*[ \t]*")


class File(NamedTuple):
    """A file of the source; `name` is its path below the folder. `reason` is why it will not be read, "" where it will."""

    name: str
    path: str
    size_bytes: int
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """The files under a URL, with the tenant and collection that their documents belong to."""

    root: str
    files: tuple[File, ...]
    tenant: str
    collection: str
    max_document_bytes: int

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class _Read(NamedTuple):
    """What one file, line or row gave: a text, or a reason."""

    name: str
    title: str
    text: str | None
    reason: str | None
    source_bytes: int


def open_source(url: str, tenant: str, collection: str, max_document_bytes: int = 16 * 2**20) -> Source:
    """Lists a file or folder. Raises `ValueError` where there is nothing."""
    fs, root = fsspec.core.url_to_fs(url)
    if isinstance(fs, LocalFileSystem):
        root = os.path.realpath(root)
    if fs.isdir(root):
        files = list(_local_files(root) if isinstance(fs, LocalFileSystem) else _remote_files(fs, root))
    elif fs.exists(root):
        files = [File(PurePosixPath(root).name, root, int(fs.size(root) or 0))]
        root = str(PurePosixPath(root).parent)
    else:
        raise ValueError(f"nothing at {url}: give a file or folder of text, Markdown, JSONL or Parquet")
    if not files:
        raise ValueError(f"no files under {url}: give a file or folder of text, Markdown, JSONL or Parquet")
    return Source(fs.unstrip_protocol(root), tuple(sorted(files)), tenant, collection, max_document_bytes)


def dataset(source: Source) -> "ray.data.Dataset":
    """The rows of a source, as a stream."""
    pieces = [{"files": [tuple(map(str, file)) for file in piece]} for piece in _pieces(source.files)]
    stream = ray.data.from_items(pieces, override_num_blocks=len(pieces))
    return stream.map_batches(partial(_read_pieces, source=replace(source, files=())), batch_size=1, batch_format="pyarrow")


class UniqueNames:
    """A Ray Data stage, one actor: of rows with one name, those after the first become rejects. Holds about 100 bytes a name."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, rows: pa.Table) -> pa.Table:
        reasons = rows["reason"].to_pylist()
        for place, name in enumerate(map(nfc, rows["name"].to_pylist())):
            if reasons[place] is None and name in self._seen:
                reasons[place] = "name taken by an earlier document"
            elif reasons[place] is None:
                self._seen.add(name)
        return rows.set_column(rows.schema.get_field_index("reason"), ROWS.field("reason"), pa.array(reasons, pa.string()))


def read(source: Source) -> Iterator[pa.Table]:
    """The rows of a source, read in this process, in tables of at most `BLOCK_ROWS` rows."""
    fs, root = fsspec.core.url_to_fs(source.root)
    rows: list[tuple[Any, ...]] = []
    held = 0
    for file in source.files:
        read_at = time.time()
        for name, title, text, reason, size in _read_file(fs, root, file, source.max_document_bytes):
            rows.append((source.tenant, source.collection, _printable(name), title, text, reason, size, read_at))
            held += len(text or "")
            if len(rows) >= BLOCK_ROWS or held >= BLOCK_BYTES:
                yield _table(rows)
                rows, held = [], 0
    if rows:
        yield _table(rows)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), ROWS, strict=True)], schema=ROWS)


def _read_pieces(batch: pa.Table, source: Source) -> Iterator[pa.Table]:
    for piece in batch["files"].to_pylist():
        files = tuple(File(name, path, int(size), reason) for name, path, size, reason in piece)
        yield from read(replace(source, files=files))


def _pieces(files: tuple[File, ...]) -> Iterator[list[File]]:
    """Runs of files that one task reads: small ones together, large ones alone."""
    piece: list[File] = []
    for file in files:
        if piece and (len(piece) == PIECE_FILES or sum(f.size_bytes for f in piece) + file.size_bytes > PIECE_BYTES):
            yield piece
            piece = []
        piece.append(file)
    yield piece


def _local_files(root: str) -> Iterator[File]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names + [name for name in folders if os.path.islink(os.path.join(folder, name))]):
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            below = _printable(os.path.relpath(path, root))
            if below != os.path.relpath(path, root):
                yield File(below, below, 0, "the file's name is not UTF-8")
            elif os.path.isdir(path):
                yield File(below, path, 0, _LINK_TO_FOLDER if _inside(path, root) else _LINK_OUT)
            else:
                yield File(below, path, os.path.getsize(path) if os.path.exists(path) else 0)


def _remote_files(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[File]:
    for path, info in fs.find(root, detail=True).items():
        below = PurePosixPath(path).relative_to(root)
        if not any(part.startswith(".") for part in below.parts):
            yield File(str(below), path, int(info.get("size") or 0))


def _inside(path: str, root: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), root]) == root


def _read_file(fs: fsspec.AbstractFileSystem, root: str, file: File, limit: int) -> Iterator[_Read]:
    """What a file holds; the sizes add up to the file's."""
    reject = _Read(file.name, "", None, file.reason, file.size_bytes)
    suffix = PurePosixPath(file.name).suffix.lower()
    if not file.reason and isinstance(fs, LocalFileSystem):
        reject = reject._replace(reason=_refusal(file.path, root))
    if not reject.reason and suffix not in _READERS:
        reject = reject._replace(reason=f"no reader for this kind of file: {suffix or 'no suffix'}")
    if reject.reason:
        yield reject
        return
    found, told = False, 0
    try:
        with fs.open(os.path.realpath(file.path) if isinstance(fs, LocalFileSystem) else file.path, "rb") as stream:
            for row in _READERS[suffix](stream, file, limit):
                found, told = True, told + row.source_bytes
                yield row
    except (OSError, pa.ArrowException) as error:
        yield reject._replace(reason=f"cannot be read: {_printable(str(error))[:300]}", source_bytes=file.size_bytes - told)
        return
    if not found:
        yield reject._replace(reason="empty")


def _refusal(path: str, root: str) -> str:
    """Why a local path must not be opened; "" where it may."""
    if not _inside(path, root):
        return _LINK_OUT
    try:
        return "" if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _text(stream: IO[bytes], file: File, limit: int) -> Iterator[_Read]:
    read = _Read(file.name, "", None, None, file.size_bytes)
    data = stream.read(limit + 1)
    if len(data) > limit:
        yield read._replace(reason=f"too large: more than {limit} bytes")
    elif b"\0" in data:
        yield read._replace(reason="binary")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield read._replace(reason=f"not UTF-8: byte {error.start}")
        else:
            yield read._replace(text=text) if text.strip() else read._replace(reason="empty")


def _markdown(stream: IO[bytes], file: File, limit: int) -> Iterator[_Read]:
    for read in _text(stream, file, limit):
        yield read._replace(title=_heading(read.text or ""))


def _heading(markdown: str) -> str:
    """The first heading outside of code fences, "" where there is none."""
    fence = ""
    for line in markdown.splitlines():
        mark = line.lstrip()[:3]
        if mark in ("```", "~~~") and fence in ("", mark):
            fence = "" if fence else mark
        elif not fence and (match := _HEADING.fullmatch(line)) and match[1]:
            return match[1]
    return ""


def _lines(stream: IO[bytes], file: File, limit: int) -> Iterator[_Read]:
    """A document a line; blank lines are counted and left out."""
    number = -1
    while line := stream.readline(limit + 1):
        number += 1
        read = _Read(f"{file.name}#{number}", "", None, None, len(line))
        if len(line) > limit:
            while not line.endswith(b"\n") and (line := stream.readline(limit)):
                read = read._replace(source_bytes=read.source_bytes + len(line))
            yield read._replace(reason=f"too large: more than {limit} bytes")
        elif line.strip():
            try:
                yield _document(json.loads(line.decode("utf-8-sig")), read, limit)
            except UnicodeDecodeError as error:
                yield read._replace(reason=f"not UTF-8: byte {error.start} of the line")
            except (ValueError, RecursionError) as error:
                yield read._replace(reason=f"not JSON: {str(error)[:200]}")


def _parquet(stream: IO[bytes], file: File, limit: int) -> Iterator[_Read]:
    """A document a row."""
    table = pq.ParquetFile(stream)
    columns = [name for name in ("id", "name", "title", "text") if name in table.schema_arrow.names]
    if "text" not in columns:
        yield _Read(file.name, "", None, "no column text", file.size_bytes)
        return
    number, told = 0, 0
    for batch in table.iter_batches(batch_size=BLOCK_ROWS, columns=columns):
        for row in range(len(batch)):
            size = file.size_bytes * (number + 1) // table.metadata.num_rows - told
            read = _Read(f"{file.name}#{number}", "", None, None, size)
            number, told = number + 1, told + size
            try:
                yield _document({name: batch[name][row].as_py() for name in columns}, read, limit)
            except UnicodeDecodeError as error:
                yield read._replace(reason=f"not UTF-8: byte {error.start} of a field")


def _document(fields: Any, read: _Read, limit: int) -> _Read:
    if not isinstance(fields, dict):
        return read._replace(reason="not a JSON object")
    name = next((fields[key] for key in ("id", "name") if fields.get(key) not in (None, "")), read.name)
    if isinstance(name, bool) or not isinstance(name, str | int):
        return read._replace(reason="the name is neither text nor a whole number")
    title, text = fields.get("title") or "", fields.get("text")
    if not isinstance(title, str) or not isinstance(text, str):
        return read._replace(name=str(name), reason="no text" if isinstance(title, str) else "the title is not text")
    read = read._replace(name=str(name))
    try:
        size = max(len(value.encode()) for value in (read.name, title, text))
    except UnicodeEncodeError:
        return read._replace(reason="not Unicode: half a surrogate pair")
    if size > limit:
        return read._replace(reason=f"too large: more than {limit} bytes")
    return read._replace(title=title, text=text) if text.strip() else read._replace(reason="empty")


_READERS: dict[str, Callable[[IO[bytes], File, int], Iterator[_Read]]] = {
    ".txt": _text,
    ".text": _text,
    ".md": _markdown,
    ".markdown": _markdown,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".parquet": _parquet,
}


def _printable(text: str) -> str:
    """The text with what UTF-8 cannot hold written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
