"""Objects under a prefix of a file system or a bucket: all that a store needs of storage.

In: names `folder/file` below the prefix, bytes. Out: bytes. `core.store.opening` takes the kind from the URL: a path, `file://`
or `s3://` (`core.store.s3_objects`). Knows nothing of what the objects mean.

Whichever kind it is: an object is on disk when the call that wrote it returns, whole; whoever reads or lists sees all of it or
none of it; listings are complete and in order. Names are letters, digits, `.`, `_` and `-`, so none leads out of the prefix.

Errors: `MissingObject` and `CorruptObject` speak of what is stored and will be the same next time. `OSError` speaks of storage
that did not do what was asked: the same call may succeed later.

Cost on files: a write flushes twice, and fills `.unfinished/` before its name appears.
"""

import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from core.store.errors import CorruptObject, MissingObject, StoreError

_FOLDER = re.compile(r"[a-z][a-z0-9-]{0,62}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_UNFINISHED = ".unfinished"


class StorageError(OSError):
    """Storage that did not do what was asked, though asked often enough; names the object and the last cause."""


class Listed(NamedTuple):
    """An object of a folder: the name within it, its bytes, and when it was written by the storage's clock."""

    name: str
    size: int
    modified: datetime


class Objects(ABC):
    """The objects under `url`, which opens them again in any process and holds no credentials.

    Any number of threads and processes may use the same objects; an instance can be pickled.
    """

    url: str

    @abstractmethod
    def listing(self, folder: str, after: str = "") -> Iterator[Listed]:
        """The objects of a folder whose name is greater than `after`, by name; none where there is no such folder.

        Reads a page of names at a time. Files whose names no object can have are left out.
        """

    def names(self, folder: str, after: str = "") -> Iterator[str]:
        """The names in `listing`."""
        return (each.name for each in self.listing(folder, after))

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """An object, or a range of it; `MissingObject` where there is none, `CorruptObject` where the range is not in it."""

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Several ranges (name, offset, length), in their order; errors as of `read`."""
        return [self.read(*each) for each in ranges]

    @abstractmethod
    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """A new object, under a name that nobody else uses; none if `chunks` raises. Holds a bounded part of it in memory."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """A new object under a name that others want too: for one of them only. False for the others.

        `data` must be unlike that of the others: where an answer was lost, who was first is known by what is there. An
        `OSError` leaves open whether the object was made.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Makes the object or takes its place. Of writers at the same time, either may be the last."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Takes an object away; nothing where there is none. A bucket that keeps versions keeps its bytes."""

    @abstractmethod
    def erase(self, name: str) -> None:
        """Takes an object away with every earlier version that a bucket has kept, also of one that was removed before."""

    @abstractmethod
    def erase_earlier(self, folder: str) -> int:
        """Takes away what a bucket has kept of a folder's objects that were removed or replaced, which no reader can see.

        Says how many versions and marks of deletion that were.
        """

    @abstractmethod
    def remove_unfinished(self, before: datetime) -> int:
        """Takes away what writers that were killed had begun before a moment; says how many objects it would have been."""


def checked_folder(folder: str) -> str:
    if not _FOLDER.fullmatch(folder):
        raise StoreError(f"{folder[:100]!r} is not the name of a folder: small letters, digits and '-'")
    return folder


def checked_name(name: str) -> str:
    if not is_name(name):
        raise StoreError(f"{name[:100]!r} is not the name of an object: folder/file, of letters, digits, '.', '_' and '-'")
    return name


def is_name(name: str) -> bool:
    folder, _, file = name.partition("/")
    return _FOLDER.fullmatch(folder) is not None and is_file_name(file)


def is_file_name(file: str) -> bool:
    return _FILE.fullmatch(file) is not None


def missing(name: str, url: str) -> MissingObject:
    return MissingObject(f"{name} is missing from {url}")


def cut_short(name: str, size: int, offset: int, length: int | None) -> CorruptObject:
    end = size if length is None else offset + length
    return CorruptObject(f"{name} has {size} bytes and is cut short: bytes {offset} to {end} were asked for")


class FileObjects(Objects):
    """The objects under an absolute path of a local or network file system that has hard links."""

    def __init__(self, path: str) -> None:
        self.url = f"file://{path}"
        self._root = Path(path)

    def listing(self, folder: str, after: str = "") -> Iterator[Listed]:
        for name in self.names(folder, after):
            with suppress(FileNotFoundError):
                stat = (self._root / folder / name).stat()
                yield Listed(name, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def names(self, folder: str, after: str = "") -> Iterator[str]:
        try:
            found = os.listdir(self._root / checked_folder(folder))
        except FileNotFoundError:
            return
        yield from sorted(name for name in found if name > after and is_file_name(name))

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            with self._path(name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                end = size if length is None else offset + length
                if not 0 <= offset <= end <= size:
                    raise cut_short(name, size, offset, length)
                file.seek(offset)
                return file.read(end - offset)
        except FileNotFoundError:
            raise missing(name, self.url) from None

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        with self._unfinished(name, chunks) as path:
            os.rename(path, self._path(name))

    def create(self, name: str, data: bytes) -> bool:
        try:
            with self._unfinished(name, [data]) as path:
                os.link(path, self._path(name))
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        self.write(name, [data])

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def erase(self, name: str) -> None:
        self.remove(name)

    def erase_earlier(self, folder: str) -> int:
        return 0

    def remove_unfinished(self, before: datetime) -> int:
        removed = 0
        for path in (self._root / _UNFINISHED).glob("*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()
                    removed += 1
        return removed

    def _path(self, name: str) -> Path:
        return self._root / checked_name(name)

    @contextmanager
    def _unfinished(self, name: str, chunks: Iterable[bytes]) -> Iterator[Path]:
        """A file with these bytes, flushed, to be given its name; the folder is flushed then, and the file gone."""
        folder, path = self._path(name).parent, self._root / _UNFINISHED / uuid.uuid4().hex
        for each in (folder, path.parent):
            if not each.is_dir():
                each.mkdir(parents=True, exist_ok=True)
                _flush_folder(self._root)
        try:
            with path.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)
        _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
