"""Which kind of objects a URL names."""

import re
from pathlib import Path

from core.store.objects import FileObjects, Objects

_FILE = re.compile(r"file:(//)?")


def open_objects(url: str | Path) -> Objects:
    """The objects under a path, a `file://` or an `s3://` URL, without looking at them.

    A path is made absolute, and `~` is the home folder. Raises `ValueError` for an empty path and for any other scheme.
    """
    scheme = re.match(r"([A-Za-z][\w+.-]*):/", str(url))
    if scheme is None or scheme[1] == "file":
        path = _FILE.sub("", str(url), count=1) if scheme else str(url)
        if not path.strip():
            raise ValueError("the store's path is empty: give a path, a file:// or an s3:// URL")
        return FileObjects(str(Path(path).expanduser().absolute()))
    if scheme[1] == "s3":
        from core.store.s3_objects import S3Objects  # botocore takes a quarter of a second, which stores on files need not pay

        return S3Objects(str(url))
    raise ValueError(f"a store on {scheme[1]}:// is not supported: give a path, a file:// or an s3:// URL")
