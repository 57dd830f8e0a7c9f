"""What every kind of storage promises to a store, on files and over S3's protocol."""

import multiprocessing
import os
import pickle
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from core.store.errors import CorruptObject, MissingObject, StoreError
from core.store.objects import Objects, StorageError
from core.store.opening import open_objects
from core.store.s3_client import S3Settings
from core.store.s3_objects import S3Objects
from tests import s3
from tests.s3 import FaultProxy

PLACE = "stores of the Käserei/名前 +%20&?#1"
PART = 5 * 2**20
HOSTILE = [
    "../a",
    "shards/..",
    "shards/../a",
    "shards/a/b",
    "/shards/a",
    "shards//a",
    "shards/",
    "",
    ".",
    "shards/.a",
    "shards/a\n",
    "shards/a b",
    "shards/é",
    "shards/a\0",
    "..",
    "Shards/a",
    ".unfinished/a",
    "shards/" + "a" * 300,
    "shards\\a/b",
    "s3://b/a",
]


@pytest.fixture(params=s3.STORAGE)
def objects(request: pytest.FixtureRequest) -> Objects:
    if request.param == "file":
        return open_objects(request.getfixturevalue("tmp_path") / PLACE)
    return S3Objects(f"s3://{request.getfixturevalue(request.param)}/{PLACE}", S3Settings(part_bytes=PART))


def some_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def together(action: Callable[[int], object], threads: int) -> list[object]:
    """What `action` returns in each of several threads that start at once."""
    barrier = threading.Barrier(threads)

    def run(number: int) -> object:
        barrier.wait()
        return action(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def test_what_is_written_is_read(objects: Objects) -> None:
    assert not objects.exists("shards/a.bin") and list(objects.names("shards")) == []
    objects.write("shards/a.bin", iter([b"one ", b"", b"two"]))
    assert objects.exists("shards/a.bin") and objects.read("shards/a.bin") == b"one two"
    objects.write("shards/empty", [])
    assert objects.exists("shards/empty") and objects.read("shards/empty") == b""
    objects.replace("roots/newest", b"1")
    objects.replace("roots/newest", b"2")
    assert objects.read("roots/newest") == b"2"
    for _ in range(2):
        objects.remove("shards/a.bin")
    assert list(objects.names("shards")) == ["empty"] and not objects.exists("shards/a.bin")


def test_the_url_opens_the_same_objects(objects: Objects) -> None:
    objects.write("shards/a", [b"one"])
    for again in (open_objects(objects.url), pickle.loads(pickle.dumps(objects))):
        assert again.url == objects.url and again.read("shards/a") == b"one"
    assert PLACE in objects.url and "secret" not in objects.url and b"secret" not in pickle.dumps(objects)


@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 2 * PART + 7])
def test_large_objects_keep_every_byte(objects: Objects, size: int) -> None:
    data = some_bytes(size)
    objects.write("shards/large", (data[start : start + 3_000_000] for start in range(0, size, 3_000_000)))
    assert objects.read("shards/large") == data
    assert objects.read("shards/large", 3, size - 5) == data[3 : size - 2]
    ranges = [("shards/large", start, 100) for start in (0, size - 100, PART - 101, 50)] + [("shards/large", 1, size - 1)]
    assert objects.read_ranges(ranges) == [data[start : start + length] for _, start, length in ranges]


def test_ranges(objects: Objects) -> None:
    data = some_bytes(1000)
    objects.write("shards/a", [data])
    objects.write("shards/b", [data[::-1]])
    assert objects.read("shards/a", 10, 20) == data[10:30]
    assert objects.read("shards/a", 990) == data[990:]
    assert objects.read("shards/a", 1000) == objects.read("shards/a", 1000, 0) == objects.read("shards/a", 5, 0) == b""
    ranges = [("shards/b", 0, 1000), ("shards/a", 999, 1), ("shards/a", 0, 0), ("shards/b", 5, 5)]
    assert objects.read_ranges(ranges) == [data[::-1], data[999:], b"", data[::-1][5:10]]
    assert objects.read_ranges([]) == []


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 2), (0, -1), (0, 11), (10, 1), (11, 0), (11, None), (0, 2**62), (2**62, 2**62)]
)
def test_a_range_outside_is_told_from_a_missing_object(objects: Objects, offset: int, length: int | None) -> None:
    objects.write("shards/a", [bytes(10)])
    objects.write("shards/empty", [])
    with pytest.raises(CorruptObject, match=rf"^shards/a has 10 bytes and is cut short: bytes {offset} to"):
        objects.read("shards/a", offset, length)
    with pytest.raises(CorruptObject, match="shards/empty has 0 bytes"):
        objects.read("shards/empty", offset, length)
    with pytest.raises(MissingObject, match=rf"^shards/b is missing from {re.escape(objects.url)}$"):
        objects.read("shards/b", offset, length)


def test_one_fault_fails_all_ranges(objects: Objects) -> None:
    objects.write("shards/a", [bytes(10)])
    with pytest.raises(MissingObject, match="shards/b"):
        objects.read_ranges([("shards/a", 0, 5), ("shards/b", 0, 5), ("shards/a", 5, 5)])
    with pytest.raises(CorruptObject, match="shards/a has 10 bytes"):
        objects.read_ranges([("shards/a", 0, 5), ("shards/a", 8, 5)])


def test_names_come_in_order_from_anywhere(objects: Objects, proxy: FaultProxy) -> None:
    before = datetime.now(UTC) - timedelta(seconds=5)
    written = [f"{number:04}-{'xyz'[number % 3]}.json" for number in range(40)] + ["A.json", "a.json", "Z"]
    random.Random(1).shuffle(written)
    for name in written:
        objects.create(f"roots/{name}", name.encode())
    objects.write("rootsandmore/0", [b""])
    objects.write("root/0", [b""])
    proxy.reset(page_names=7)
    assert list(objects.names("roots")) == sorted(written)
    assert list(objects.names("roots", after="0037-y.json")) == ["0038-z.json", "0039-x.json", "A.json", "Z", "a.json"]
    assert list(objects.names("roots", after="0037")) == ["0037-y.json", *list(objects.names("roots", after="0037-y.json"))]
    assert list(objects.names("roots", after="b")) == [] == list(objects.names("nothing"))
    assert [(name, size) for name, size, _ in objects.listing("roots")] == [(name, len(name)) for name in sorted(written)]
    assert all(before < modified < before + timedelta(minutes=5) for _, _, modified in objects.listing("roots"))


@pytest.mark.slow
def test_more_names_than_a_page(objects: Objects) -> None:
    names = [f"{number:05}" for number in range(2003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: objects.replace(f"demand/{name}", b"x"), names))
    assert list(objects.names("demand")) == names
    assert list(objects.names("demand", after="00001")) == names[2:]


def test_exactly_one_of_many_creates(objects: Objects) -> None:
    def create(name: str, number: int) -> bool:
        return objects.create(name, b"from %d" % number)

    for name in ("roots/1", "roots/2", "roots/3"):
        won = together(partial(create, name), 16)
        assert won.count(True) == 1
        assert objects.read(name) == b"from %d" % won.index(True)
    assert not objects.create("roots/1", b"later") and objects.read("roots/1") != b"later"


def test_a_writer_that_fails_leaves_nothing(objects: Objects) -> None:
    def broken(size: int) -> Iterator[bytes]:
        yield bytes(size)
        raise KeyError("the test's own")

    for size in (10, 3 * PART):
        with pytest.raises(KeyError):
            objects.write("shards/a", broken(size))
    assert not objects.exists("shards/a") and list(objects.names("shards")) == []
    assert objects.remove_unfinished(datetime.now(UTC) + timedelta(hours=1)) == 0


def test_no_name_leads_out_of_the_prefix(objects: Objects) -> None:
    calls: list[Callable[[str], object]] = [
        objects.exists,
        objects.read,
        lambda name: objects.read_ranges([(name, 0, 1)]),
        lambda name: objects.write(name, [b""]),
        lambda name: objects.write(name, [bytes(PART)] * 2),
        lambda name: objects.create(name, b""),
        lambda name: objects.replace(name, b""),
        objects.remove,
        objects.erase,
    ]
    for name, call in product([*HOSTILE, "a"], calls):
        with pytest.raises(StoreError, match="is not the name of an object"):
            call(name)
    for name in HOSTILE:
        with pytest.raises(StoreError, match="is not the name of a folder"):
            list(objects.names(name))


def test_a_forked_process_reads_and_writes(objects: Objects) -> None:
    objects.write("shards/a", [b"one"])
    assert objects.read_ranges([("shards/a", 0, 1), ("shards/a", 1, 2)]) == [b"o", b"ne"]

    def child() -> None:
        [first, rest] = objects.read_ranges([("shards/a", 0, 1), ("shards/a", 1, 2)])
        objects.write("shards/b", [first, rest])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and objects.read("shards/b") == b"one"


def test_erase(objects: Objects) -> None:
    for name in ("shards/a", "shards/ab"):
        objects.write(name, [name.encode()])
    objects.erase("shards/a")
    objects.erase("shards/never")
    assert list(objects.names("shards")) == ["ab"] and objects.read("shards/ab") == b"shards/ab"


def test_files_of_killed_writers_are_taken_away(tmp_path: Path) -> None:
    objects = open_objects(tmp_path)

    def killed() -> Iterator[bytes]:
        yield b"begun"
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=objects.write, args=("shards/a", killed()))
    process.start()
    process.join(60)
    assert process.exitcode == 9 and not objects.exists("shards/a")
    assert objects.remove_unfinished(datetime.now(UTC) - timedelta(minutes=1)) == 0
    assert objects.remove_unfinished(datetime.now(UTC) + timedelta(seconds=1)) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_stranger_files_are_no_objects(tmp_path: Path) -> None:
    objects = open_objects(tmp_path)
    objects.write("shards/a", [b""])
    for name in (".nfs0001", "a b", "é"):
        (tmp_path / "shards" / name).touch()
    assert list(objects.names("shards")) == ["a"]


@pytest.mark.parametrize("url", ["gs://b/x", "http://user:secret@host/x", "hdfs:/x"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=rf"^a store on {url.partition(':')[0]}:// is not supported") as refused:
        open_objects(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///a",
        "s3:/b/a",
        "s3://b",
        "s3://key:secret@bucket/a",
        "s3://bucket/a/../b",
        "s3://bucket/a//b",
        "s3://bucket/.",
        "s3://bucket/a\nb",
        "s3://bucket:80/a",
        "s3://../a",
    ],
)
def test_urls_that_are_none_of_s3_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="an S3 URL is s3://bucket/prefix") as refused:
        open_objects(url)
    assert "key:secret" not in str(refused.value)


def test_a_store_may_be_the_whole_bucket(bucket: str) -> None:
    for url in (f"s3://{bucket}", f"s3://{bucket}/"):
        objects = open_objects(url)
        objects.replace("shards/a", b"one")
        assert objects.url == f"s3://{bucket}" and list(objects.names("shards")) == ["a"]


def test_an_endpoint_that_is_not_there(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:1")
    objects = S3Objects(f"s3://{bucket}/x", S3Settings(attempts=2, first_pause_s=0))
    with pytest.raises(StorageError, match=rf"shards/a of s3://{bucket}/x: EndpointConnectionError \(2 attempts\)") as failed:
        objects.read("shards/a")
    assert "hunter2" not in str(failed.value)


def test_pauses_grow_and_stay_bounded(bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    objects = S3Objects(f"s3://{bucket}/x", S3Settings(attempts=6, first_pause_s=1, longest_pause_s=5))
    with pytest.raises(StorageError):
        objects.exists("shards/a")
    assert pauses == [1, 2, 4, 5, 5]
