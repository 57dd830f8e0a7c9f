"""Upkeep of a store on files and on S3: erasure to the last byte, collection, compaction, and writers beside them."""

import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import core.store.upkeep.moving
import core.store.versions
from core.store.demand import DemandCounter
from core.store.errors import MissingObject, StoreError
from core.store.objects import Objects
from core.store.opening import open_objects
from core.store.part_reader import CACHE_BYTES
from core.store.roots import Roots
from core.store.store import Store
from core.store.upkeep.collection import collect
from core.store.upkeep.compaction import compact
from core.store.upkeep.erasure import Target, erase, matching
from core.store.upkeep.verification import verify
from core.store.versions import MIN_GRACE_S, Versions
from core.text.documents import Document
from tests import s3
from tests.stores import adapter, document, vector

FOLDERS = ("shards", "manifest", "roots", "demand")


class Kept:
    """A store on files or on S3, and every byte that is left of it."""

    def __init__(self, url: str, bytes_left: Callable[[], Iterator[tuple[str, bytes]]]) -> None:
        self.url = url
        self._bytes_left = bytes_left
        self.store = Store.open(url, create=True)

    def opened(self) -> tuple[Objects, Versions]:
        objects = open_objects(self.url)
        versions = Versions(objects, CACHE_BYTES)
        versions.refresh()
        return objects, versions

    def holding(self, *secrets: str) -> list[str]:
        """What still holds any of these, by name; Parquet's pages are looked into as well."""
        found = []
        for name, data in self._bytes_left():
            data += _unpacked(name, data)
            found += [name for secret in secrets if secret.encode() in data]
        return sorted(set(found))


def _unpacked(name: str, data: bytes) -> bytes:
    if not name.endswith(".parquet"):
        return b""
    import io

    import pyarrow.parquet as pq

    return str(pq.read_table(io.BytesIO(data)).to_pydict()).encode()


@pytest.fixture(params=s3.STORAGE)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    if request.param == "file":
        return Kept(str(tmp_path), lambda: ((str(file), file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()))
    bucket, admin = request.getfixturevalue(request.param), s3.admin(os.environ["AWS_ENDPOINT_URL"])
    if request.param != "ceph_bucket":  # which would lose commits
        admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    return Kept(f"s3://{bucket}/a store", lambda: _versions_of(admin, bucket))


def _versions_of(admin: Any, bucket: str) -> Iterator[tuple[str, bytes]]:
    for page in admin.get_paginator("list_object_versions").paginate(Bucket=bucket):
        for each in page.get("Versions", ()):
            answer = admin.get_object(Bucket=bucket, Key=each["Key"], VersionId=each["VersionId"])
            yield each["Key"], answer["Body"].read()
        for mark in page.get("DeleteMarkers", ()):
            yield mark["Key"], b""


def secret(number: int, **names: str) -> Document:
    return document(
        f"The secret text {number} of a person.", title=f"Hidden title {number}", **{"name": f"secret-{number}", **names}
    )


def faults(kept: Kept) -> list[str]:
    return verify(open_objects(kept.url)).faults


def test_erasure_leaves_no_byte_of_a_document(kept: Kept) -> None:
    first, second, other = secret(1), secret(2), document("Something public.", name="public", title="Public title")
    kept.store.put([first, other], [adapter(first, 1), adapter(other, 2)])
    kept.store.put([secret(3, name="secret-1")])  # an edit: the first text is superseded
    kept.store.put([second], [adapter(second, 3)])
    counter = DemandCounter()
    for one in (first, other):
        counter.count((one.tenant, one.collection, one.name))
    kept.store.write_demand(counter)
    secrets = ("secret-1", first.text, first.title, "secret text 3", "Hidden title 3", first.content_hash, secret(3).content_hash)
    assert kept.holding(*secrets)
    objects, versions = kept.opened()
    assert matching(versions.index, Target("tenant", "c", "secret-1")) == 1
    erased = erase(objects, versions, Target("tenant", "c", "secret-1"), hurry=True)
    assert (erased.documents, erased.adapters, erased.shards) == (1, 1, 1)
    assert kept.holding(*secrets, kept_adapter_hash(first)) == []
    kept.store.refresh()
    assert kept.store.find_document("tenant", "c", "secret-1") is None
    assert kept.store.demand() == {("tenant", "c", "public"): 1}
    assert kept.store.stats()[2:4] == (2, 2) == tuple(Store.open(kept.url).stats("tenant")[2:4])
    for one, seed in ((second, 3), (other, 2)):
        row = kept.store.find_document("tenant", "c", one.name)
        assert row is not None and kept.store.get_text(row) == one.text and row.title == one.title
        [found] = kept.store.find_adapters("tenant", one.content_hash)
        assert torch.equal(kept.store.get_vector(found), vector(seed))
    assert faults(kept) == []


def kept_adapter_hash(of: Document) -> str:
    return adapter(of).adapter_id


def test_erasure_by_prefix_collection_and_tenant(kept: Kept) -> None:
    everyone = [
        secret(number, tenant=tenant, collection=collection, name=f"{folder}/{number}")
        for number, (tenant, collection, folder) in enumerate(
            (tenant, collection, folder) for tenant in ("t", "u") for collection in ("c", "d") for folder in ("in", "out")
        )
    ]
    kept.store.put(everyone, [adapter(one, number) for number, one in enumerate(everyone)])
    targets = [(Target("t", "c", prefix="in"), 7), (Target("t", prefix="in"), 6), (Target("t", "d"), 5), (Target("t"), 4)]
    for target, left in targets:
        objects, versions = kept.opened()
        erase(objects, versions, target, hurry=True)
        opened = Store.open(kept.url)
        assert opened.stats()[2:4] == (left, left)
    assert kept.holding(*(text for one in everyone[:4] for text in (one.text, one.title, one.content_hash))) == []
    assert faults(kept) == []


def test_an_adapter_of_content_that_another_document_has_stays(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    one, same, foreign = document("same", name="a"), document("same", name="b"), document("same", tenant="other", name="c")
    store.put([one, same, foreign], [adapter(one, 1), adapter(foreign, 2)])
    kept = Kept(str(tmp_path), lambda: iter(()))
    assert erase(*kept.opened(), Target("tenant", "c", "a"), hurry=True).adapters == 0
    store.refresh()
    [row] = store.find_adapters("tenant", one.content_hash)
    assert torch.equal(store.get_vector(row), vector(1))
    assert erase(*kept.opened(), Target("tenant", "c", "b"), hurry=True).adapters == 1
    store.refresh()
    assert store.find_adapters("tenant", one.content_hash) == []
    assert len(store.find_adapters("other", one.content_hash)) == 1
    assert store.stats().adapters == 1 and faults(kept) == []


def test_without_hurry_the_bytes_go_once_the_grace_period_is_over(kept: Kept) -> None:
    kept.store.put([secret(1), document("public", name="public")])
    reader = Store.open(kept.url)
    row = reader.find_document("tenant", "c", "public")
    assert row is not None
    objects, versions = kept.opened()
    erase(objects, versions, Target("tenant", "c", "secret-1"))
    assert kept.holding("secret-1")
    assert reader.get_text(row) == "public", "who reads an older version goes on"
    assert collect(objects, versions).roots == [], "all is younger than the grace period"
    later = datetime.now(UTC) + timedelta(days=2)
    assert collect(objects, versions, now=later).shards
    assert kept.holding("secret-1", secret(1).text, secret(1).title) == []
    assert reader.get_text(row) == "public", "its shard was collected: it is looked up again"
    assert faults(kept) == []


def test_erasure_that_was_interrupted_is_finished_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(str(tmp_path), lambda: ((str(file), file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()))
    one = secret(1)
    kept.store.put([one, document("public", name="public")], [adapter(one)])
    for step in ("manifest", "shards", "demand", "old versions"):

        def stop(now: str, at: str = step) -> None:
            if now == at:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            erase(*kept.opened(), Target("tenant", "c", "secret-1"), progress=stop)
        assert Store.open(tmp_path).find_document("tenant", "c", "secret-1") is None
    erase(*kept.opened(), Target("tenant", "c", "secret-1"), hurry=True)
    assert kept.holding("secret-1", one.text, one.content_hash) == [] and faults(kept) == []


def test_a_document_put_after_its_erasure_stays(tmp_path: Path) -> None:
    kept = Kept(str(tmp_path), lambda: iter(()))
    kept.store.put([secret(1)], [adapter(secret(1))])

    def put_again(step: str) -> None:
        if step == "shards":
            Store.open(tmp_path).put([secret(1)], [adapter(secret(1), 5)])

    erase(*kept.opened(), Target("tenant", "c", "secret-1"), hurry=True, progress=put_again)
    opened = Store.open(tmp_path)
    row = opened.find_document("tenant", "c", "secret-1")
    assert row is not None and opened.get_text(row) == secret(1).text
    [found] = opened.find_adapters("tenant", row.content_hash)
    assert torch.equal(opened.get_vector(found), vector(5)) and faults(kept) == []


def test_collection_takes_orphans_and_old_roots_and_nothing_else(kept: Kept) -> None:
    for number in range(3):
        kept.store.put([document(f"text {number}", name=str(number))])
    kept.store.write_demand(_counted(("tenant", "c", "1")))
    objects, versions = kept.opened()
    orphans = ["shards/" + "a" * 32 + ".bin", "manifest/" + "b" * 32 + ".parquet"]
    for name in orphans:
        objects.write(name, [b"left by a killed writer"])
    now = datetime.now(UTC)
    assert collect(objects, versions).young == 2, "a slow writer may be about to name them"
    assert all(map(objects.exists, orphans))
    later = now + timedelta(seconds=MIN_GRACE_S + 60)
    planned = collect(objects, versions, MIN_GRACE_S, dry_run=True, now=later)
    assert all(map(objects.exists, orphans)) and len(planned.roots) == 3
    done = collect(objects, versions, MIN_GRACE_S, now=later)
    assert (done.roots, done.parts, done.shards) == (planned.roots, planned.parts, planned.shards)
    assert [*done.shards, *done.parts] == orphans and not any(map(objects.exists, orphans))
    assert [sequence for sequence, _ in Roots(objects).standing()] == [4]
    again = collect(objects, versions, MIN_GRACE_S, now=later)
    assert (again.roots, again.parts, again.shards, again.young) == ([], [], [], 0)
    assert [Store.open(kept.url).get_text(row) for row in kept.store.list_documents("tenant").rows] == [
        "text 0",
        "text 1",
        "text 2",
    ]
    assert kept.store.demand() and kept.store.put([document("more", name="more")]).sequence == 5
    assert faults(kept) == []
    with pytest.raises(ValueError, match="too short"):
        collect(objects, versions, MIN_GRACE_S - 1)


def _counted(*keys: tuple[str, str, str]) -> DemandCounter:
    counter = DemandCounter()
    for key in keys:
        counter.count(key)
    return counter


def test_unfinished_writes_go_after_the_grace_period(tmp_path: Path) -> None:
    kept = Kept(str(tmp_path), lambda: iter(()))
    (tmp_path / ".unfinished").mkdir(exist_ok=True)
    for name, age_s in (("old", 2 * MIN_GRACE_S), ("young", 60)):
        file = tmp_path / ".unfinished" / name
        file.write_bytes(b"half")
        os.utime(file, (file.stat().st_mtime - age_s,) * 2)
    assert collect(*kept.opened(), MIN_GRACE_S).unfinished == 1
    assert [file.name for file in (tmp_path / ".unfinished").iterdir()] == ["young"]


def test_a_put_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(str(tmp_path), lambda: iter(()))
    kept.store.put([document("first", name="first")])

    def slow() -> Iterator[Document]:
        yield document("second", name="second")
        monkeypatch.setattr(core.store.versions, "LONGEST_CHANGE_S", -1)

    with pytest.raises(StoreError, match="took more than"):
        kept.store.put(slow())
    monkeypatch.undo()
    assert Store.open(tmp_path).stats().documents == 1
    later = datetime.now(UTC) + timedelta(days=2)
    assert len(collect(*kept.opened(), now=later).shards) == 1, "what it wrote is orphaned"
    assert kept.store.put([document("second", name="second")]).new_documents == 1
    assert faults(kept) == []


def test_a_writer_on_a_version_whose_roots_were_erased_loses_nothing(tmp_path: Path) -> None:
    """The name of an erased root stays, so that no stale writer takes it for the next version."""
    kept = Kept(str(tmp_path), lambda: iter(()))
    kept.store.put([secret(1)])
    objects, stale = kept.opened()
    erase(*kept.opened(), Target("tenant", "c", "secret-1"), hurry=True)
    here = stale.index.root.sequence
    assert Roots(objects).create(stale.index.root.next([])) is False
    with pytest.raises(MissingObject, match="was erased"):
        Roots(objects).read(here)
    stale.commit(lambda index: index.root.next(index.root.parts))
    assert stale.index.root.sequence == Store.open(tmp_path).sequence > here + 1


def test_compaction_makes_few_full_shards_and_parts_of_many_small_ones(kept: Kept) -> None:
    documents = [document(f"text {number}", name=str(number)) for number in range(6)]
    for number, one in enumerate(documents):
        kept.store.put([one], [adapter(one, number)])
    kept.store.put([document("text 0, edited", name="0")])
    rows = {row.name: row for row in kept.store.list_documents("tenant").rows}
    objects, versions = kept.opened()
    done = compact(objects, versions)
    assert (done.shards_before, done.shards_after) == (7, 1) and done.parts_after == 2 < done.parts_before
    opened = Store.open(kept.url)
    assert opened.stats()[2:] == kept.store.stats()[2:]
    for row in opened.list_documents("tenant").rows:
        before = rows[row.name]
        assert (row.sequence, row.created, row.blob_hash) == (before.sequence, before.created, before.blob_hash)
        assert kept.store.get_text(before) == opened.get_text(row)
    collect(objects, versions, now=datetime.now(UTC) + timedelta(days=2))
    assert len(list(objects.names("shards"))) == 1 and len(list(objects.names("manifest"))) == 2
    for number, one in enumerate(documents):
        [row] = kept.store.find_adapters("tenant", one.content_hash)
        assert torch.equal(kept.store.get_vector(row), vector(number)), "a reader of the older version looks again"
    again = compact(objects, versions)
    assert again.shards_before == again.shards_after == 1 and again.moved_bytes == 0
    assert faults(kept) == []


def test_compaction_moves_in_rounds_and_empties_dead_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(str(tmp_path), lambda: iter(()))
    for number in range(5):
        kept.store.put([document("x" * 500, name="mostly dead"), document(f"text {number}", name=f"{number}")])
        kept.store.put([document("y" * 500, name="mostly dead")])
    monkeypatch.setattr(core.store.upkeep.moving, "ROUND_BLOBS", 2)
    done = compact(*kept.opened())
    assert done.shards_before > done.shards_after == 3
    opened = Store.open(tmp_path)
    texts = {row.name: opened.get_text(row) for row in opened.list_documents("tenant").rows}
    assert texts == {"mostly dead": "y" * 500} | {f"{number}": f"text {number}" for number in range(5)}
    assert faults(kept) == []


def test_a_copy_of_what_was_erased_meanwhile_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(str(tmp_path), lambda: ((str(file), file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()))
    for number in range(3):
        kept.store.put([secret(number)])
    write, left = core.store.upkeep.moving.write_blobs, [True]

    def slow(*arguments: Any) -> Any:
        written = write(*arguments)
        if left and left.pop():
            erase(*kept.opened(), Target("tenant", "c", "secret-1"), hurry=True)
        return written

    monkeypatch.setattr(core.store.upkeep.moving, "write_blobs", slow)
    assert compact(*kept.opened()).shards_after == 1
    assert kept.holding(secret(1).text, "secret-1") == [], "neither in the shard that compaction wrote, nor anywhere"
    assert Store.open(tmp_path).stats().documents == 2 and faults(kept) == []


def test_writers_beside_upkeep_lose_nothing(kept: Kept) -> None:
    kept.store.put([secret(number) for number in range(4)])
    failed: list[BaseException] = []

    def write(writer: int) -> None:
        try:
            store = Store.open(kept.url)
            for number in range(6):
                one = document(f"text {writer}-{number}", name=f"{writer}-{number}")
                store.put([one], [adapter(one, number)])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    number = 0
    while any(thread.is_alive() for thread in threads) or number < 4:
        objects, versions = kept.opened()
        if number < 4:
            erase(objects, versions, Target("tenant", "c", f"secret-{number}"), hurry=True)
        compact(objects, versions)
        collect(objects, versions, MIN_GRACE_S)
        number += 1
    for thread in threads:
        thread.join()
    assert failed == []
    opened = Store.open(kept.url)
    rows = opened.list_documents("tenant").rows
    assert {opened.get_text(row) for row in rows} == {f"text {writer}-{number}" for writer in range(3) for number in range(6)}
    assert len(opened.find_adapters_of([("tenant", row.content_hash) for row in rows])) == 18 == opened.stats().adapters
    assert faults(kept) == [] and kept.holding(*(secret(number).text for number in range(4))) == []
