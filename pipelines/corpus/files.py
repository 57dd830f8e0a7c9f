"""One file of a source, opened: where it lies, whether it may be read, and its bytes as a stream, decompressed where it must be.

In: a `File`, whose URL any of fsspec's file systems opens (`s3://` with AWS' own chain of credentials; `s3fs` retries what
passes). Out: streams of bytes. A file below a local folder is opened only where it really lies inside it, or inside the same
repository of a Hugging Face cache: other links are refused. Knows nothing of formats.
"""

import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath, PurePosixPath
from typing import IO, NamedTuple

import fsspec
import pyarrow as pa
from fsspec.asyn import AsyncFileSystem

from core.text.decoding import Refused

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LINK_OUT = "a link that leaves the folder: copy the file to its place, or give the folder that it lies in"
LINK_TO_FOLDER = "a link to a folder: its files are read in place"
UNKNOWN_SIZE = -1
BUFFER_BYTES = 64 * 2**10

_FREE_BYTES, _HIGHEST_RATIO = 64 * 2**20, 250


class File(NamedTuple):
    """A file of a source; `name` is its path below the source's folder, or the URL that a listing file gave.

    size_bytes: `UNKNOWN_SIZE` where nobody has said it. root: the local folder that it must lie in, "" where there is none.
    reason: why it will not be read, "" where it will.
    """

    name: str
    url: str
    size_bytes: int
    root: str = ""
    reason: str = ""


def filesystem(url: str) -> fsspec.AbstractFileSystem:
    """The file system of a URL, or the local one. Raises `ValueError` for a scheme that is not known."""
    protocol, _ = fsspec.core.split_protocol(url)
    try:
        return fsspec.filesystem(protocol or "file")
    except ImportError as error:
        raise ValueError(f"{url} needs a package that is missing: {error}") from None


def is_local(url: str) -> bool:
    return fsspec.core.split_protocol(url)[0] in (None, "file", "local")


def inside(path: str, root: str) -> bool:
    """Whether a path, its links followed, lies in a folder whose own path has none."""
    return os.path.commonpath([os.path.realpath(path), root]) == root


def _inside_cache(path: str) -> bool:
    """Whether a path is a link from `snapshots` to a file in `blobs` of one repository of a Hugging Face cache."""
    blobs = os.path.dirname(os.path.realpath(path))
    snapshots = (folder for folder in PurePath(path).parents if folder.name == "snapshots")
    return any(os.path.join(folder.parent, "blobs") == blobs for folder in snapshots)


def refusal(file: File) -> str:
    """Why a file must not be opened; "" where it may."""
    if file.reason or not is_local(file.url):
        return file.reason
    path = _path(file.url)
    if file.root and not inside(path, file.root) and not _inside_cache(path):
        return LINK_OUT
    try:
        return "" if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"
    except (OSError, ValueError) as error:
        return unreadable(error)


def _path(url: str) -> str:
    return str(filesystem(url)._strip_protocol(url))


def unreadable(error: Exception) -> str:
    """The reason that an error on opening or reading is."""
    if isinstance(error, Refused):
        return str(error)
    said = getattr(error, "strerror", None) or str(error)
    if not said or not isinstance(error, OSError | ValueError | pa.ArrowException):
        said = f"{type(error).__name__} {said}"
    return f"cannot be read: {printable(' '.join(said.split()))[:300]}"


def suffixes(name: str) -> tuple[str, str]:
    """The suffix of the format and that of the compression, "" where it has none: `a.jsonl.gz` has `.jsonl` and `.gz`."""
    path = PurePosixPath(name.lower())
    return (PurePosixPath(path.stem).suffix, path.suffix) if path.suffix in COMPRESSIONS else (path.suffix, "")


@contextmanager
def open_file(file: File) -> Iterator[IO[bytes]]:
    """A file's bytes, as they lie there."""
    target = os.path.realpath(_path(file.url)) if is_local(file.url) else file.url
    with os_errors(), filesystem(file.url).open(target, "rb") as stream:
        yield stream


def buffered(stream: IO[bytes], suffix: str) -> io.BufferedReader:
    """The bytes of a stream, or those behind it where it is compressed as `suffix` says; then Arrow closes the stream with this.

    Reading raises `OSError` where what is compressed is damaged, cut short, or grows beyond 64 MB and 250 times what was read.
    """
    return io.BufferedReader(_Decompressed(stream, COMPRESSIONS[suffix]) if suffix else _Plain(stream), BUFFER_BYTES)


class _Plain(io.RawIOBase):
    """What `io.BufferedReader` wants of a stream, which fsspec's do not all have."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Decompressed(_Plain):
    def __init__(self, stream: IO[bytes], codec: str) -> None:
        super().__init__(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec))
        self._compressed, self._grown = stream, 0

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        read = super().readinto(buffer)
        self._grown += read
        if self._grown > _FREE_BYTES + _HIGHEST_RATIO * self._compressed.tell():
            raise OSError(f"more than {_HIGHEST_RATIO} times as large once decompressed")
        return read


def fetch(files: Sequence[File], limit: int) -> "list[bytes | Exception | None]":
    """At most `limit` + 1 bytes of each of several files of one file system that is not local, fetched at the same time.

    An error in a file's place is that file's own; None stands where the file system fetches one file at a time.
    """
    fs = filesystem(files[0].url)
    if not isinstance(fs, AsyncFileSystem):
        return [None] * len(files)
    found = fs.cat_ranges([file.url for file in files], 0, limit + 1, on_error="return")
    return [_settled(fs, file, data) for file, data in zip(files, found, strict=True)]


def _settled(fs: fsspec.AbstractFileSystem, file: File, data: bytes | Exception) -> bytes | Exception:
    """A range of an empty object is an error on S3."""
    if isinstance(data, bytes | FileNotFoundError | PermissionError):
        return data
    try:
        with os_errors():
            return b"" if fs.size(file.url) == 0 else data
    except OSError as error:
        return error


@contextmanager
def os_errors() -> Iterator[None]:
    """What S3 raises beside its answers (no credentials, no connection, one that is cut again and again), as `OSError`."""
    try:
        yield
    except _s3_errors() as error:
        raise error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}") from None


def _s3_errors() -> tuple[type[BaseException], ...]:
    from botocore.exceptions import BotoCoreError
    from s3fs.core import S3_RETRYABLE_ERRORS

    return BotoCoreError, *S3_RETRYABLE_ERRORS


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
