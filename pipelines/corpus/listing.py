"""A source's URL -> its files, one at a time: a file, a folder, a pattern or a listing file, of any size.

    docs/report.pdf   s3://bucket/docs/   file:///srv/docs   s3://bucket/docs/2024-*/**/*.html   @urls.txt   @s3://bucket/list.parquet

In: a path or URL. Out: `File`s, in an order that is the same in every run: that of the paths, or the listing's. `@` stands before
a listing file (or a folder or pattern of them), for buckets that are too large to list: text with a URL or an absolute path a
line, or Parquet with the column `url`, or `bucket` and `key` as in an S3 inventory, and perhaps `size`. Names are paths below the
folder, that of a pattern being what stands before its first wildcard, or the URLs of a listing.

Hidden files (a leading dot) are left out of folders and patterns. Knows nothing of formats but those two. Holds one page of a
bucket (1,000 objects); of a local tree the names of the folders that it is in, 100 bytes each; of a listing 64 KB.
Cost: a request in 1,000 objects on S3; 60,000 local files or 240,000 listed URLs a second.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from pipelines.corpus.files import (
    LINK_OUT,
    LINK_TO_FOLDER,
    UNKNOWN_SIZE,
    File,
    buffered,
    filesystem,
    inside,
    is_local,
    open_file,
    os_errors,
    printable,
    suffixes,
    unreadable,
)

LISTING = "@"
LONGEST_URL_BYTES = 4096
LISTING_ROWS, PAGE_OBJECTS = 4096, 1000
_WILDCARD = re.compile(r"[*?\[]")


def absolute(url: str) -> str:
    """The same files from any working directory. Raises `ValueError` for an empty path, which would be that directory itself."""
    if not (fsspec.core.split_protocol(url.removeprefix(LISTING))[1] or "").strip():
        raise ValueError(f"the source {url!r} is empty: give a file, a folder, a pattern, or @ and a file that lists URLs")
    if url.startswith(LISTING):
        return LISTING + absolute(url.removeprefix(LISTING))
    return os.path.abspath(str(filesystem(url)._strip_protocol(url))) if is_local(url) else url


def list_files(url: str) -> Iterator[File]:
    """The files that a URL stands for. Raises `ValueError` where there is nothing, and `OSError` where that cannot be told."""
    url = absolute(url)
    if url.startswith(LISTING):
        return chain.from_iterable(map(_listed, list_files(url.removeprefix(LISTING))))
    with os_errors():
        return _found(url)


def _found(url: str) -> Iterator[File]:
    fs, local = filesystem(url), is_local(url)
    given = str(fs._strip_protocol(url))
    path = os.path.realpath(given) if local else given
    fs.invalidate_cache()
    if fs.isfile(path) or (local and os.path.exists(path) and not os.path.isdir(path)):
        if local:
            return iter([_local_file(path, os.path.dirname(path))._replace(name=printable(os.path.basename(given)))])
        return iter([File(PurePosixPath(path).name, str(fs.unstrip_protocol(path)), int(fs.size(path) or 0))])
    if fs.isdir(path):
        return _walk(fs, path, local)
    if wildcard := _WILDCARD.search(path):
        folder = path[: path.rindex("/", 0, wildcard.start())] if "/" in path[: wildcard.start()] else ""
        pattern = path[len(folder) :].lstrip("/")
        matches = re.compile(glob_translate(pattern)).match
        depth = None if "**" in pattern else pattern.count("/")
        return _matching(_walk(fs, folder, local, depth, path[len(folder) : wildcard.start()].lstrip("/")), matches)
    raise ValueError(f"nothing at {url}: give a file, a folder, a pattern, or @ and a file that lists URLs")


def _matching(files: Iterator[File], matches: Callable[[str], Any]) -> Iterator[File]:
    return (file for file in files if matches(file.name))


def _walk(fs: fsspec.AbstractFileSystem, root: str, local: bool, depth: int | None = None, start: str = "") -> Iterator[File]:
    """Files below a folder, whose names begin with `start`; depth: how many folders below it are looked into, None for all."""
    if local:
        return _local_files(root, depth)
    visible = _remote_files(fs, root) if not hasattr(fs, "call_s3") else _s3_files(fs, root, start)
    return (file for file in visible if not any(part.startswith(".") for part in file.name.split("/")))


def _local_files(root: str, depth: int | None) -> Iterator[File]:
    """In the order of the paths: a folder stands where its name with a slash does."""
    stack = [iter(_entries(root, root))]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
        elif isinstance(found, File):
            yield found
        elif depth is None or len(stack) <= depth:
            stack.append(iter(_entries(found, root)))


def _entries(folder: str, root: str) -> Iterator[str | File]:
    """What a folder holds: folders as their paths, all else as files."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name + "/" * e.is_dir(follow_symlinks=False) for e in entries if not e.name.startswith(".")]
    except OSError as error:
        yield File(printable(os.path.relpath(folder, root)), folder, 0, root, unreadable(error))
        return
    for name in sorted(names):
        path = os.path.join(folder, name)
        yield path.rstrip("/") if name.endswith("/") else _local_file(path, root)


def _local_file(path: str, root: str) -> File:
    """What is not a folder; a name that no text can hold is not opened, and stands there with escapes."""
    name = os.path.relpath(path, root)
    if printable(name) != name:
        return File(printable(name), printable(path), 0, root, "the file's name is not UTF-8")
    if os.path.isdir(path):
        return File(name, path, 0, root, LINK_TO_FOLDER if inside(path, root) else LINK_OUT)
    try:
        return File(name, path, os.path.getsize(path), root)
    except OSError as error:  # a link to nothing, or gone since the folder was read
        return File(name, path, 0, root, unreadable(error))


def _remote_files(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[File]:
    """Folder by folder."""
    for _, folders, files in fs.walk(root, detail=True):
        for info in sorted(files.values(), key=lambda info: str(info["name"])):
            path = str(info["name"])
            yield File(str(PurePosixPath(path).relative_to(root)), str(fs.unstrip_protocol(path)), int(info.get("size") or 0))
        for name in sorted(folders):
            folders[name] = folders.pop(name)


def _s3_files(fs: Any, root: str, start: str) -> Iterator[File]:
    """Page by page, which fsspec's own `find` and `walk` do not: they hold a whole listing."""
    bucket, key, _ = fs.split_path(root)
    folder = f"{key}/" if key else ""
    place: dict[str, str] = {}
    while True:
        with os_errors():
            page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=folder + start, MaxKeys=PAGE_OBJECTS, **place)
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):
                yield File(entry["Key"].removeprefix(folder), f"s3://{bucket}/{entry['Key']}", int(entry["Size"]))
        if not page.get("IsTruncated"):
            return
        place = {"ContinuationToken": page["NextContinuationToken"]}


def _listed(listing: File) -> Iterator[File]:
    """The files that a listing file names, one a line or row; what is no URL among them has the reason."""
    form, compression = suffixes(listing.name)
    with open_file(listing) as stream:
        if form == ".parquet":
            yield from _listed_rows(stream, listing)
            return
        lines = buffered(stream, compression)
        number = 0
        while line := lines.readline(LONGEST_URL_BYTES + 1):
            number += 1
            whole = len(line) <= LONGEST_URL_BYTES or line.endswith(b"\n")
            while not line.endswith(b"\n") and (rest := lines.readline(LONGEST_URL_BYTES)):
                line = line[:LONGEST_URL_BYTES] + rest[-1:]
            try:
                url = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                url, whole = line.decode(errors="backslashreplace").strip(), False
            if url:
                yield _named(url if whole else "", UNKNOWN_SIZE, f"{listing.name}#{number - 1}")


def _listed_rows(stream: Any, listing: File) -> Iterator[File]:
    try:
        table = pq.ParquetFile(stream)
        names = table.schema_arrow.names
        where = ["url"] if "url" in names else ["bucket", "key"]
        if not set(where) <= set(names):
            raise ValueError(f"the listing {listing.name} has the columns {', '.join(names)}: give `url`, or `bucket` and `key`")
        sizes = next((name for name in ("size", "size_bytes") if name in names), None)
        number = 0
        for batch in table.iter_batches(LISTING_ROWS, columns=[*where, *([sizes] if sizes else [])]):
            for row in batch.to_pylist():
                parts = [row[name] for name in where]
                known = all(isinstance(part, str) and part for part in parts)
                url = "" if not known else parts[0] if len(parts) == 1 else f"s3://{parts[0]}/{parts[1]}"
                size = row[sizes] if sizes and isinstance(row[sizes], int) else UNKNOWN_SIZE
                yield _named(url, size, f"{listing.name}#{number}")
                number += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"the listing {listing.name} is not Parquet: {error}") from None


def _named(url: str, size_bytes: int, place: str) -> File:
    """The file that a listing names by its URL; `place` names what is none."""
    protocol, path = fsspec.core.split_protocol(url)
    if not url or len(url.encode()) > LONGEST_URL_BYTES or (protocol is None and not os.path.isabs(path)):
        return File(place, "", 0, "", "not a URL: give scheme://... or an absolute path, 4096 bytes at most")
    if (protocol or "file") not in _known_schemes():
        return File(url, "", 0, "", f"not a URL: scheme {protocol} is not known")
    return File(url, url, size_bytes)


@lru_cache(maxsize=1)
def _known_schemes() -> frozenset[str]:
    return frozenset(fsspec.available_protocols())
