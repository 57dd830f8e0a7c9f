"""Objects in a bucket of S3, or of a server that speaks its protocol: AWS, Ceph, MinIO, moto.

In: `s3://bucket/prefix`, the prefix as it is, blanks and Unicode included. Credentials, region, endpoint (`AWS_ENDPOINT_URL`,
path-style unless `addressing_style = virtual`) come from AWS' own chain: environment, profile, instance role. Knows nothing of
what the objects mean. Needs GetObject, PutObject, DeleteObject, ListBucket (without it, what is missing is denied instead) and
AbortMultipartUpload; `erase` and `erase_earlier` also ListBucketVersions and DeleteObjectVersion, `remove_unfinished`
ListBucketMultipartUploads.

An exclusive `create` is one PUT with `If-None-Match: *`, the only conditional write that AWS, Ceph and moto all enforce: Ceph
ignores it when a multipart upload is completed. A lost answer is asked again, and a refusal is settled by reading what is there.
Ceph 16 enforces it only in buckets without versions, some servers nowhere. So each `S3Objects` creates its first object twice,
and the second must be refused: else two writers would lose each other's commits, and `StoreError` says so.

Requests are tried again as `core.store.s3_client` says. Uploads carry their MD5, which AWS and Ceph check. Nothing is asked by
HEAD: its errors have no body, so expired credentials would have no name.

Cost: one GET for 16 MB of a range, one PUT for an object up to 16 MB, one more request than parts for a larger one;
`PARTS_IN_FLIGHT` parts of it are in memory. 25 ms of hashing for 16 MB.
"""

import hashlib
import re
from base64 import b64encode
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import datetime
from itertools import chain
from typing import Any

from botocore.exceptions import ClientError

from core.store.errors import MissingObject, StoreError
from core.store.objects import (
    Listed,
    Objects,
    StorageError,
    checked_folder,
    checked_name,
    cut_short,
    is_file_name,
    is_name,
    missing,
)
from core.store.s3_client import S3Client, S3Settings, status

PARTS_IN_FLIGHT = 4
MOST_PARTS = 10_000
_UNCHECKED_PARTS = 64

_URL = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^\x00-\x1f]*))?")
_ABSENT, _REFUSED, _OUTSIDE = 404, 412, 416


class S3Objects(Objects):
    """The objects under `s3://bucket/prefix`; `ValueError` for anything else."""

    def __init__(self, url: str, settings: S3Settings | None = None) -> None:
        match = _URL.fullmatch(url)
        prefix = (match[2] or "").strip("/") if match else ""
        if match is None or (prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/"))):
            raise ValueError(
                "an S3 URL is s3://bucket/prefix, without empty parts, '.' or '..'; credentials and endpoint are no part of it: "
                "they come from the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL) or from an instance role"
            )
        self._bucket, self._prefix = match[1], f"{prefix}/" if prefix else ""
        self._settings = settings or S3Settings()
        self.url = f"s3://{self._bucket}/{prefix}".rstrip("/")
        self._client = S3Client(self.url, self._bucket, self._settings)
        self._enforced = set[bool]()

    def __reduce__(self) -> tuple[type["S3Objects"], tuple[str, S3Settings]]:
        return S3Objects, (self.url, self._settings)

    def listing(self, folder: str, after: str = "") -> Iterator[Listed]:
        start = f"{self._prefix}{checked_folder(folder)}/"
        place: dict[str, Any] = {"StartAfter": start + after} if after else {}
        while True:
            page = self._client.call("list_objects_v2", f"{folder}/", Prefix=start, **place)
            for each in page.get("Contents", ()):
                if is_file_name(name := each["Key"].removeprefix(start)):
                    yield Listed(name, each["Size"], each["LastModified"])
            if not page["IsTruncated"]:
                return
            place = {"ContinuationToken": page["NextContinuationToken"]}

    def exists(self, name: str) -> bool:
        try:
            self._size(name)
        except MissingObject:
            return False
        return True

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """As `Objects.read`; without a length in one GET, however large the object is."""
        if length is None and not offset:
            return self._get(name)[0]
        if length is None:
            length = self._size_around(name, offset, 0) - offset
        return self.read_ranges([(name, offset, length)])[0]

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """As `Objects.read_ranges`; one GET for each range, or for each 16 MB of it, `connections` at a time."""
        part_bytes = self._settings.part_bytes
        pieces, counts = list[tuple[str, int, int]](), list[int]()
        for name, offset, length in ranges:
            if offset < 0 or not 0 < length <= _UNCHECKED_PARTS * part_bytes:
                self._size_around(name, offset, length)
            starts = range(offset, offset + length, part_bytes)
            pieces += [(name, start, min(part_bytes, offset + length - start)) for start in starts]
            counts.append(len(starts))
        few = len(pieces) < 2
        found = map(self._get_piece, pieces) if few else self._client.pool.map(self._get_piece, pieces)
        return [b"".join([next(found) for _ in range(count)]) for count in counts]

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        checked_name(name)
        parts = _parts(chunks, self._settings.part_bytes)
        first, second = next(parts, b""), next(parts, None)
        if second is None:
            self._put(name, first)
        else:
            self._upload(name, chain([first, second], parts))

    def create(self, name: str, data: bytes) -> bool:
        for _ in range(self._settings.attempts):
            try:
                self._check_enforced(name, data, self._put(name, data, IfNoneMatch="*"))
                return True
            except ClientError:
                with suppress(MissingObject):  # removed since
                    return self.read(name) == data
        raise self._client.failed(name, "it is refused as existing, and does not exist")

    def replace(self, name: str, data: bytes) -> None:
        self._put(name, data)

    def remove(self, name: str) -> None:
        self._delete(name)

    def erase(self, name: str) -> None:
        before: list[str] = []
        while versions := self._versions(name):
            if versions == before:
                raise self._client.failed(name, f"{len(versions)} versions of it cannot be deleted")
            for version in versions:
                self._delete(name, VersionId=version)
            before = versions

    def erase_earlier(self, folder: str) -> int:
        start = f"{self._prefix}{checked_folder(folder)}/"
        hidden, marks = list[tuple[str, str]](), list[tuple[str, str]]()
        place: dict[str, Any] = {}
        while True:
            page = self._client.call("list_object_versions", f"earlier versions in {folder}/", Prefix=start, **place)
            for kind in ("Versions", "DeleteMarkers"):
                for each in page.get(kind, ()):
                    where = each["Key"].removeprefix(self._prefix), each["VersionId"]
                    if not is_name(where[0]):
                        continue
                    if not each["IsLatest"]:
                        hidden.append(where)
                    elif kind == "DeleteMarkers":
                        marks.append(where)
            if not page["IsTruncated"]:
                break
            place = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}
        for some in (hidden, marks):  # a mark goes last: without it, what it hides would be seen again
            list(self._client.pool.map(lambda where: self._delete(where[0], VersionId=where[1]), some))
        return len(hidden) + len(marks)

    def remove_unfinished(self, before: datetime) -> int:
        removed, place = 0, dict[str, Any]()
        while True:
            page = self._client.call("list_multipart_uploads", "unfinished uploads", Prefix=self._prefix, **place)
            for each in page.get("Uploads", ()):
                name = each["Key"].removeprefix(self._prefix)
                if each["Initiated"] < before and each["Key"].startswith(self._prefix) and is_name(name):
                    self._abort(name, each["UploadId"])
                    removed += 1
            if not page["IsTruncated"]:
                return removed
            place = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _get(self, name: str, byte_range: str | None = None) -> tuple[bytes, int]:
        """An object or a range of it, as far as it goes, and the size of the whole. Raises `ClientError` for a range outside."""
        wanted = {} if byte_range is None else {"Range": f"bytes={byte_range}"}

        def request(s3: Any) -> tuple[bytes, int]:
            answer = s3.get_object(Bucket=self._bucket, Key=self._key(name), **wanted)
            data = answer["Body"].read()
            return data, int(answer["ContentRange"].rpartition("/")[2]) if "ContentRange" in answer else len(data)

        try:
            return self._client.ask(name, request, (_ABSENT, _OUTSIDE))
        except ClientError as error:
            if status(error) == _ABSENT:
                raise missing(name, self.url) from None
            raise

    def _get_piece(self, piece: tuple[str, int, int]) -> bytes:
        name, offset, length = piece
        try:
            data, size = self._get(name, f"{offset}-{offset + length - 1}")
        except ClientError:
            data, size = b"", self._size(name)
        if len(data) != length:
            raise cut_short(name, size, offset, length)
        return data

    def _size(self, name: str) -> int:
        try:
            return self._get(name, "0-0")[1]
        except ClientError:  # an empty object has no first byte
            return 0

    def _size_around(self, name: str, offset: int, length: int) -> int:
        """The size of an object that has this range."""
        size = self._size(name)
        if not 0 <= offset <= offset + length <= size:
            raise cut_short(name, size, offset, length)
        return size

    def _check_enforced(self, name: str, data: bytes, made: dict[str, Any]) -> None:
        """Creates again what was just created, unless such a bucket (with versions or without) has refused that before.

        `StoreError` where it is not refused. Then both versions that were made here are deleted; in a bucket without versions,
        whatever has the name by then.
        """
        keeps_versions = "VersionId" in made
        if keeps_versions in self._enforced:
            return
        try:
            again = self._put(name, data, IfNoneMatch="*")
        except ClientError:
            self._enforced.add(keeps_versions)
            return
        for answer in (made, again):
            with suppress(StorageError):  # the refusal matters more than a failed clean-up
                self._delete(name, **{"VersionId": answer["VersionId"]} if keeps_versions else {})
        where = " in a bucket that keeps versions (as Ceph does): suspend its versioning, or take" if keeps_versions else ": take"
        raise StoreError(
            f"{name} of {self.url}: the server ignores `If-None-Match: *`{where} another server; "
            f"without it, writers at the same time lose each other's commits"
        )

    def _put(self, name: str, data: bytes, **condition: str) -> Any:
        """One PUT. Raises `ClientError` where the condition does not hold."""
        answers = (_REFUSED,) if condition else ()
        return self._client.call("put_object", name, answers, Key=self._key(name), Body=data, ContentMD5=_md5(data), **condition)

    def _upload(self, name: str, parts: Iterable[bytes]) -> None:
        """A multipart upload, which makes the object when it is completed and not before."""
        upload = self._client.call("create_multipart_upload", name, Key=self._key(name))["UploadId"]
        target = {"Key": self._key(name), "UploadId": upload}

        def send(number: int, part: bytes) -> dict[str, Any]:
            answer = self._client.call("upload_part", name, **target, PartNumber=number, Body=part, ContentMD5=_md5(part))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        running, sent, size = deque[Future[dict[str, Any]]](), list[dict[str, Any]](), 0
        try:
            for number, part in enumerate(parts, 1):
                if number > MOST_PARTS:
                    raise ValueError(f"{name} is too large: S3 takes {MOST_PARTS} parts of {self._settings.part_bytes} bytes")
                size += len(part)
                if len(running) == PARTS_IN_FLIGHT:
                    sent.append(running.popleft().result())
                running.append(self._client.pool.submit(send, number, part))
            sent += [future.result() for future in running]
            self._complete(name, upload, sent, size)
        except BaseException:
            for future in running:
                future.cancel()
            wait(running)
            with suppress(StorageError):
                self._abort(name, upload)
            raise

    def _complete(self, name: str, upload: str, sent: list[dict[str, Any]], size: int) -> None:
        values = {"Key": self._key(name), "UploadId": upload, "MultipartUpload": {"Parts": sent}}
        try:
            self._client.call("complete_multipart_upload", name, (_ABSENT,), **values)
        except ClientError:
            with suppress(MissingObject):
                if self._size(name) == size:  # it was completed, and that answer lost
                    return
            raise self._client.failed(name, "its upload was taken away before it was complete") from None

    def _abort(self, name: str, upload: str) -> None:
        with suppress(ClientError):
            self._client.call("abort_multipart_upload", name, (_ABSENT,), Key=self._prefix + name, UploadId=upload)

    def _delete(self, name: str, **version: str) -> None:
        with suppress(ClientError):
            self._client.call("delete_object", name, (_ABSENT,), Key=self._key(name), **version)

    def _versions(self, name: str) -> list[str]:
        """Up to 1,000 versions and delete markers of an object."""
        key = self._key(name)
        page = self._client.call("list_object_versions", name, Prefix=key)
        return [each["VersionId"] for each in (*page.get("Versions", ()), *page.get("DeleteMarkers", ())) if each["Key"] == key]

    def _key(self, name: str) -> str:
        return self._prefix + checked_name(name)


def _parts(chunks: Iterable[bytes], part_bytes: int) -> Iterator[bytes]:
    """The same bytes in parts of that size; the last is shorter."""
    held, size = list[memoryview](), 0
    for chunk in chunks:
        rest = memoryview(chunk)
        while size + len(rest) >= part_bytes:
            cut = part_bytes - size
            yield b"".join([*held, rest[:cut]])
            held, size, rest = [], 0, rest[cut:]
        if rest:
            held.append(rest)
            size += len(rest)
    if held:
        yield b"".join(held)


def _md5(data: bytes) -> str:
    return b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
