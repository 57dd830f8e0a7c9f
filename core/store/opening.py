"""Which kind of objects a URL names."""

import re
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from core.store.objects import FileObjects, Objects


def open_objects(url: str | Path) -> Objects:
    """The objects under a path, a `file://` or an `s3://` URL, without looking at them; `ValueError` for any other scheme."""
    scheme = re.match(r"([A-Za-z][\w+.-]*):/", str(url))
    if scheme is None or scheme[1] == "file":
        return FileObjects(str(LocalFileSystem._strip_protocol(str(url))))
    if scheme[1] == "s3":
        from core.store.s3_objects import S3Objects  # botocore takes a quarter of a second, which stores on files need not pay

        return S3Objects(str(url))
    raise ValueError(f"a store on {scheme[1]}:// is not supported: give a path, a file:// or an s3:// URL")
