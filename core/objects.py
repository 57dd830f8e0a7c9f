"""Objects under a prefix of a local file system: all that a store needs of storage, so that another kind can take its place.

In: names `folder/file` below the prefix, bytes. Out: bytes. A write is on disk when it returns, and nothing is seen half-written.
Knows nothing of what the objects mean, save that a new object is made once and never edited. Cost: two flushes a write.
"""

import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

import fsspec

from core.manifest import CorruptObject, MissingObject


class Objects:
    """The objects under a path or a `file://` URL; `ValueError` for any other scheme."""

    def __init__(self, url: str | Path) -> None:
        scheme = re.match(r"([A-Za-z][\w+.-]*):/", str(url))
        if scheme and scheme[1] != "file":
            raise ValueError(f"{url}: a store on {scheme[1]}:// is not supported; give a path or a file:// URL")
        self._fs = fsspec.filesystem("file")
        self.prefix = str(self._fs._strip_protocol(str(url)))

    def make_folders(self, folders: Iterable[str]) -> None:
        for folder in folders:
            self._fs.makedirs(self._path(folder), exist_ok=True)

    def exists(self, name: str) -> bool:
        return bool(self._fs.exists(self._path(name)))

    def names(self, folder: str) -> list[str]:
        """Files of a folder, in no order; none where there is no such folder."""
        if not self._fs.isdir(self._path(folder)):
            return []
        return [os.path.basename(path) for path in self._fs.ls(self._path(folder), detail=False)]

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """An object, or a range of it; `MissingObject` where there is none, `CorruptObject` where the range is not in it."""
        try:
            size = self._fs.size(self._path(name))
            end = size if length is None else offset + length
            if not 0 <= offset <= end <= size:
                raise CorruptObject(f"{name} has {size} bytes and is cut short: bytes {offset} to {end} were asked for")
            return bytes(self._fs.cat_file(self._path(name), start=offset, end=end))
        except FileNotFoundError:
            raise MissingObject(f"{name} is missing from {self.prefix}") from None

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """A new object under a name that nobody else uses."""
        temporary = self._write_temporary(name, chunks)
        os.rename(temporary, self._path(name))
        self._flush_folder(name)

    def create(self, name: str, data: bytes) -> bool:
        """A new object under a name that others want too: whole, and for one of them only. False for the others."""
        temporary = self._write_temporary(name, [data])
        try:
            os.link(temporary, self._path(name))
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        self._flush_folder(name)
        return True

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _write_temporary(self, name: str, chunks: Iterable[bytes]) -> str:
        path = self._path(f"{name}.{uuid.uuid4().hex}.tmp")
        try:
            with self._fs.open(path, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            Path(path).unlink(missing_ok=True)
            raise
        return path

    def _flush_folder(self, name: str) -> None:
        folder = os.open(os.path.dirname(self._path(name)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
