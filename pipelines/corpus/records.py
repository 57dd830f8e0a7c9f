"""What a file holds: one document, or one a value, line or row. Every file, line and row gives a text or a reason; none is lost.

    .txt .md .html .pdf and such (core.text.parsing)    one document, by the file's name
    .json                                               a document, or an array of them
    .jsonl .ndjson                                      a document a line, as a JSON object
    .csv .tsv                                           a document a row below the header
    .parquet                                            a document a row

All but Parquet also as .gz and .zst. Fields of lines and rows: `text`, `title`, and `id` or else `name` (else file#row, from 0),
or those that `Reading` names. In: a `File`. Out: `Read`s whose sizes add up to the file's, and never an exception.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import PurePosixPath

import fsspec

from core.text.parsing import SUFFIXES, Kind, Parser, Reject, kind_of
from pipelines.corpus.files import UNKNOWN_SIZE, File, buffered, fetch, is_local, open_file, refusal, suffixes, unreadable
from pipelines.corpus.reading import Read, Reading, attempt
from pipelines.corpus.rows import READERS

FETCHED_FILES, FETCHED_BYTES, FETCHED_UNKNOWN = 256, 4 * 2**20, 16
"""What is fetched at the same time: files and their bytes, or files of sizes that are not known."""
FORMATS = (*SUFFIXES, *READERS)
"""Suffixes of all that is read."""


def read_files(files: Iterable[File], parser: Parser, reading: Reading) -> Iterator[Iterator[Read]]:
    """What each of several files holds, in turn. Documents that lie elsewhere than on a local disk are fetched some at a time."""
    limit = reading.max_document_bytes
    for (_, together), group in groupby(files, key=partial(_fetched_with, limit=limit)):
        if not together:
            yield from (read_file(file, parser, reading) for file in group)
            continue
        for run in runs(group, FETCHED_FILES, FETCHED_BYTES, FETCHED_BYTES // FETCHED_UNKNOWN):
            fetched = attempt(partial(fetch, run, limit))
            for file, data in zip(run, [fetched] * len(run) if isinstance(fetched, Exception) else fetched, strict=True):
                yield read_file(file, parser, reading, data)


def is_whole(file: File) -> bool:
    """Whether a file is one document, which is read whole."""
    return not file.reason and _kind(file.name) is not None


def has_rows(file: File) -> bool:
    """Whether a file holds documents as values, lines or rows."""
    form, compression = suffixes(file.name)
    return not file.reason and form in READERS and not (compression and form == ".parquet")


def _kind(name: str) -> Kind | None:
    path = PurePosixPath(name)
    return kind_of(path.stem if suffixes(name)[1] else name)


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
    """What a file holds. data: its first bytes, one more than the limit at most, or why there are none; None if not yet read.

    The last one is held back, to be given what the others have left of the file's size.
    """
    reads = _whole(file, parser, reading, data) if is_whole(file) else _rows(file, reading)
    nothing = Read(file.name, "", None, "empty", 0)
    told, held, begun = 0, nothing, False
    while (found := attempt(partial(next, reads, None))) is not None:
        if begun:
            told += held.source_bytes
            yield held
        begun, held = True, nothing._replace(reason=unreadable(found)) if isinstance(found, Exception) else found
    yield held._replace(source_bytes=max(file.size_bytes - told, 0) if file.size_bytes >= 0 else held.source_bytes)


def _whole(file: File, parser: Parser, reading: Reading, data: bytes | Exception | None) -> Iterator[Read]:
    read, limit = Read(file.name, "", None, None, 0), reading.max_document_bytes
    kind, (_, compression) = _kind(file.name), suffixes(file.name)
    assert kind is not None
    large = read._replace(reason=f"too large: more than {limit} bytes")
    if reason := refusal(file):
        yield read._replace(reason=reason)
        return
    if isinstance(data, Exception):
        raise data
    if file.size_bytes > limit or len(data or b"") > limit:
        yield large._replace(source_bytes=len(data or b""))
        return
    with open_file(file) if data is None else nullcontext(io.BytesIO(data)) as stream:
        source = buffered(stream, compression) if compression else stream  # held: Arrow closes the stream when it lets go
        content = source.read(limit + 1)
        read = read._replace(source_bytes=stream.tell())
    if len(content) > limit:
        yield large._replace(source_bytes=read.source_bytes)
        return
    parsed = parser.parse(kind, content)
    if isinstance(parsed, Reject):
        yield read._replace(reason=parsed.reason)
    else:
        yield read._replace(title=parsed.title, text=parsed.text)


def _rows(file: File, reading: Reading) -> Iterator[Read]:
    form, compression = suffixes(file.name)
    if reason := refusal(file):
        yield Read(file.name, "", None, reason, 0)
    elif not has_rows(file):
        what = form + compression or "no suffix, rename it to .txt or whatever it is"
        yield Read(file.name, "", None, f"no reader for this kind of file: {what}", 0)
    else:
        with open_file(file) as stream:
            yield from READERS[form](stream, file, compression, reading)
