"""What only a real server can show: Ceph's, under many writers at once, and killed while they write.

The tests of objects, stores, upkeep and killed conversions run on it too, where they are marked for it.
"""

import multiprocessing
import threading
import time
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from core.store.errors import StoreError
from core.store.objects import StorageError
from core.store.opening import open_objects
from core.store.s3_client import S3Settings
from core.store.s3_objects import S3Objects
from core.store.store import Store
from core.store.upkeep.verification import verify
from tests import ceph as ceph_module
from tests import s3
from tests.ceph import Ceph
from tests.core.store.test_store_stress import check_version, list_all, stress
from tests.stores import adapter, document, vector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RACES, RACERS = 250, 4
KILLED = ("radosgw", "ceph-osd", "radosgw", "ceph-mon", "radosgw", "ceph-osd", "radosgw", "radosgw")
PATIENT = S3Settings(attempts=200, first_pause_s=0.05, longest_pause_s=0.5)
HASTY = S3Settings(attempts=1, timeout_s=5)


@pytest.fixture
def url(ceph: Ceph, ceph_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for a store in a bucket of Ceph that is reached without the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", ceph.url)
    return f"s3://{ceph_bucket}/a store"


def race(url: str, racer: int, start: Barrier, won: "SimpleQueue[tuple[int, int]]") -> None:
    objects = S3Objects(url)
    for number in range(RACES):
        start.wait(60)
        if objects.create(f"roots/{number}", b"from %d" % racer):
            won.put((number, racer))


def test_exactly_one_of_many_processes_creates(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(RACERS), context.SimpleQueue()
    racers = [context.Process(target=race, args=(url, racer, start, won)) for racer in range(RACERS)]
    for each in racers:
        each.start()
    for each in racers:
        each.join()
        assert each.exitcode == 0
    winners = sorted(won.get() for _ in range(RACES))
    assert won.empty() and [number for number, _ in winners] == list(range(RACES))
    assert len({racer for _, racer in winners}) > 1
    objects = S3Objects(url)
    assert all(objects.read(f"roots/{number}") == b"from %d" % racer for number, racer in winners)


def test_eight_writers_lose_nothing(url: str) -> None:
    stress(url, commits=7)


class Writers:
    """Threads that commit a document at a time until told to stop, and what each was told became of it.

    Whoever is hasty takes the first error for an answer, and then does not know whether the commit was made.
    """

    def __init__(self, url: str) -> None:
        self.acknowledged: dict[str, int] = {}
        self.unknown: set[str] = set()
        self.failures: list[BaseException] = []
        self._url = url
        self._stop = threading.Event()
        writers = [threading.Thread(target=self._write, args=(number, HASTY if number % 2 else PATIENT)) for number in range(4)]
        self._threads = [*writers, threading.Thread(target=self._read)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        for _ in range(6000):
            if self.failures or len(self.acknowledged) >= count:
                return
            time.sleep(0.02)
        raise AssertionError(f"{len(self.acknowledged)} commits in 2 minutes, not {count}")

    def _write(self, writer: int, settings: S3Settings) -> None:
        try:
            store = Store(S3Objects(self._url, settings))
            while not self._refreshed(store):
                continue
            for number in range(10**6):
                if self._stop.is_set():
                    return
                one = document(f"text {writer} {number}", name=f"{writer}-{number}")
                try:
                    store.put([one], [adapter(one, number)])
                    self.acknowledged[one.name] = number
                except StorageError:
                    assert settings is HASTY
                    self.unknown.add(one.name)
                    self._stop.wait(0.1)
        except BaseException as error:
            self.failures.append(error)
            raise

    def _refreshed(self, store: Store) -> bool:
        try:
            return store.refresh()
        except StorageError:
            return False

    def _read(self) -> None:
        try:
            store = Store(S3Objects(self._url, PATIENT), cache_bytes=2**20)
            while not self._stop.is_set():
                if store.refresh():
                    check_version(store)
        except BaseException as error:
            self.failures.append(error)
            raise


def test_what_was_acknowledged_outlives_kills_of_the_server(ceph: Ceph, url: str) -> None:
    Store.open(url, create=True)
    with Writers(url) as writers:
        for daemon in KILLED:
            writers.wait_for(len(writers.acknowledged) + 20)
            ceph.kill(daemon)
            time.sleep(0.5)
            ceph.start(daemon)
        writers.wait_for(len(writers.acknowledged) + 20)
    assert writers.failures == [] and writers.unknown
    store = Store.open(url)
    check_version(store)
    rows = {row.name: row for row in list_all(store)}
    assert writers.acknowledged.keys() <= rows.keys() <= writers.acknowledged.keys() | writers.unknown
    for name, row in rows.items():
        writer, number = name.split("-")
        assert store.get_text(row) == f"text {writer} {number}"
        [found] = store.find_adapters("tenant", row.content_hash)
        assert torch.equal(store.get_vector(found), vector(int(number)))
    assert verify(open_objects(url)).faults == []


def test_a_bucket_that_keeps_versions_is_refused(url: str, ceph: Ceph) -> None:
    """Ceph lets every writer win there, so that all but one lose what they were told was committed."""
    store, one = Store.open(url, create=True), document("one")
    bucket, admin = url.split("/")[2], s3.admin(ceph.url)
    admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for _ in range(2):
        with pytest.raises(StoreError, match=r"ignores `If-None-Match: \*` in a bucket that keeps versions \(as Ceph does\)"):
            store.put([one], [adapter(one)])
    admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    store.put([one], [adapter(one)])
    assert Store.open(url).stats().documents == 1


def test_a_machine_without_the_packages_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceph_module, "UNPACKED", tmp_path / "ceph")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"These tests need Ceph: install ceph-mon, .*; apt-get is not there"):
        ceph_module.programs()
    assert list(tmp_path.iterdir()) == []
