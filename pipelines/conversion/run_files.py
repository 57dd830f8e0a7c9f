"""What a conversion leaves for people to read: each document's receipt, beside the store.

    <store>.runs/<time>-<8 hex digits>/receipts/000000.parquet    what became of each document, in the source's order
                                       rejects/000000.jsonl       of those, the rejected ones: name and reason
                                       near/000000.parquet        group and name of documents that are nearly the same
                                       about/started.json         source and resolved recipe
                                       about/finished.json        the counts; there once the run is complete

In: receipts as they come. Out: files of up to `FILE_RECEIPTS` receipts or `FILE_S` seconds, each whole or not there, on whatever
the store is on. Nothing reads them to decide what is converted: the store itself is that record. A run that is killed keeps the
files written by then; what it committed after the last of them is `unchanged` in the next run's.

Receipts name documents and outlive what `imprint store rm` erases: a run's folder may be deleted at any time. Holds the
receipts of one file, some 5 MB. About 120 bytes a document.
"""

import io
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.store.errors import MissingObject
from core.store.opening import open_objects
from pipelines.conversion.near_duplicates import Groups
from pipelines.conversion.receipts import WORST, Near, Receipt, to_table

FILE_RECEIPTS, FILE_S = 10_000, 60.0


class RunFiles:
    """The files of one run; `url` is their folder."""

    def __init__(self, store_url: str, about: Mapping[str, Any]) -> None:
        scheme, _, place = store_url.partition("://")
        runs = f"{store_url}.runs" if scheme == "file" or "/" in place else f"{store_url}/runs"
        self._objects = open_objects(f"{runs}/{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}")
        self._receipts: list[Receipt] = []
        self._files, self._flushed = 0, time.monotonic()
        self._write("about/started.json", json.dumps(about, indent=2))

    @property
    def url(self) -> str:
        """A path where the store is on files."""
        return self._objects.url.removeprefix("file://")

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Takes receipts, and writes a file of them now and then. `OSError` where storage fails."""
        self._receipts += receipts
        if len(self._receipts) >= FILE_RECEIPTS or time.monotonic() - self._flushed >= FILE_S:
            self.flush()

    def flush(self) -> None:
        """Writes what has come since the last file."""
        if self._receipts:
            parquet = io.BytesIO()
            pq.write_table(to_table(self._receipts).drop_columns("sketch"), parquet, compression="zstd")
            self._objects.write(_receipts(self._files), [parquet.getvalue()])
            rejects = [{"name": each.name, "reason": each.reason} for each in self._receipts if each.status == "rejected"]
            if rejects:
                self._write(f"rejects/{self._files:06}.jsonl", "".join(json.dumps(row) + "\n" for row in rejects))
            self._files += 1
        self._receipts, self._flushed = [], time.monotonic()

    def write_near(self, groups: Groups) -> Near:
        """Writes who is in which group; reads the names of all documents again, which are in the order of the groups' own."""
        self.flush()
        first: dict[int, str] = {}
        place = files = 0
        for number in range(self._files):
            names = pq.read_table(pa.BufferReader(self._objects.read(_receipts(number))), columns=["name"])["name"]
            of = groups.of[place : place + len(names)]
            place += len(names)
            inside = np.flatnonzero(of >= 0)
            if len(inside):
                table = pa.table({"group": of[inside], "name": names.take(inside)})
                for group, name in zip(*table.to_pydict().values(), strict=True):
                    if group < WORST:
                        first.setdefault(group, name)
                parquet = io.BytesIO()
                pq.write_table(table, parquet, compression="zstd")
                self._objects.write(f"near/{files:06}.parquet", [parquet.getvalue()])
                files += 1
        return Near(groups.documents, len(groups.sizes), [(groups.sizes[group], name) for group, name in sorted(first.items())])

    def finish(self, about: Mapping[str, Any]) -> None:
        """Says that the run is complete, after the last receipts."""
        self.flush()
        self._write("about/finished.json", json.dumps(about, indent=2))

    def _write(self, name: str, text: str) -> None:
        self._objects.write(name, [text.encode()])


def read_run(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a finished run says of itself: `started.json` and `finished.json`. Raises `ValueError` for any other folder."""
    try:
        objects = open_objects(url)
        started, finished = (json.loads(objects.read(f"about/{name}.json")) for name in ("started", "finished"))
    except MissingObject as error:
        raise ValueError(f"{url} is no folder of a run that has finished, as `imprint convert` names it: {error}") from None
    except OSError as error:
        raise ValueError(f"{url} cannot be read: {error}") from None
    return started, finished


def _receipts(number: int) -> str:
    return f"receipts/{number:06}.parquet"
