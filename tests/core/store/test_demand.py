"""Demand: what servers count is what a store says, over processes, days, edits and faults of the storage."""

import asyncio
import json
import logging
import shutil
import threading
from datetime import date, timedelta
from pathlib import Path

import pytest

from core.store.demand import KEPT_DAYS, DemandCounter, read_demand
from core.store.errors import CorruptObject
from core.store.opening import open_objects
from core.store.store import Store
from tests.serving import ask, chat, make_document, make_world, serving
from tests.stores import store_with_one

TODAY = date(2026, 3, 1)
A, B = ("t", "c", "a"), ("t", "c", "b/é")


def files(path: Path) -> list[Path]:
    return sorted((path / "demand").glob("*"))


def counted(times: dict[tuple[str, str, str], int], most_documents: int = 100) -> DemandCounter:
    counter = DemandCounter(most_documents)
    for key, count in times.items():
        for _ in range(count):
            counter.count(key)
    return counter


def test_counts_add_up_over_processes_and_writes(tmp_path: Path) -> None:
    store, _ = store_with_one(tmp_path)
    before = store.sequence
    assert store.demand() == {}
    first, second = counted({A: 3, B: 1}), counted({A: 2})
    for counter in (first, second, first):
        store.write_demand(counter)
    assert store.demand() == {A: 5, B: 1}
    first.count(B)
    store.write_demand(first)
    assert Store.open(tmp_path).demand() == {A: 5, B: 2} and store.demand()["t", "c", "never"] == 0
    assert len(files(tmp_path)) == 2 and not store.refresh() and store.sequence == before


def test_nothing_is_written_where_nothing_was_counted(tmp_path: Path) -> None:
    objects = open_objects(tmp_path)
    counter = DemandCounter()
    counter.write(objects)
    assert not (tmp_path / "demand").exists()
    counter.count(A)
    counter.write(objects)
    [file] = files(tmp_path)
    written = file.stat().st_mtime_ns
    counter.write(objects)
    assert file.stat().st_mtime_ns == written


def test_a_day_has_its_own_object_and_old_days_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.store.demand._today", lambda: TODAY)
    objects = open_objects(tmp_path)
    counter = counted({A: 1})
    for days in range(KEPT_DAYS + 5):
        counter.write(objects, TODAY + timedelta(days=days))
        counter.count(A)
    last = TODAY + timedelta(days=KEPT_DAYS + 4)
    counter.write(objects, last)
    assert [file.name[:8] for file in files(tmp_path)] == [f"{last - timedelta(days=n):%Y%m%d}" for n in range(KEPT_DAYS)][::-1]
    assert read_demand(objects, last) == {A: KEPT_DAYS}
    assert read_demand(objects, last + timedelta(days=10)) == {A: KEPT_DAYS - 10}
    assert read_demand(objects, last + timedelta(days=KEPT_DAYS)) == {}


def test_the_least_demanded_are_forgotten_beyond_the_limit(tmp_path: Path) -> None:
    """The object stays bounded, whoever asks for what; the most demanded keep their exact counts."""
    counter = counted({A: 50, B: 40}, most_documents=10)
    for number in range(1000):
        counter.count(("t", "c", f"once {number}"))
    objects = open_objects(tmp_path)
    counter.write(objects)
    demand = read_demand(objects)
    assert (demand[A], demand[B]) == (50, 40) and len(demand) <= 10
    [file] = files(tmp_path)
    assert json.loads(file.read_text())["forgotten"] == 1090 - demand.total()
    with pytest.raises(ValueError, match="give 2 or more"):
        DemandCounter(1)


def test_a_fault_of_the_storage_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.store.demand._today", lambda: TODAY)
    objects, counter = open_objects(tmp_path / "store"), counted({A: 2})
    counter.write(objects)
    counter.count(A)
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").write_text("a file where the store was")
    for days in (0, 1, 2):
        with pytest.raises(OSError):
            counter.write(objects, TODAY + timedelta(days=days))
        counter.count(B)
    (tmp_path / "store").unlink()
    counter.write(objects, TODAY + timedelta(days=2))
    assert read_demand(objects, TODAY + timedelta(days=2)) == {A: 3, B: 3}
    assert len(files(tmp_path / "store")) == 3


def test_threads_count_while_another_writes(tmp_path: Path) -> None:
    objects, counter = open_objects(tmp_path), DemandCounter()

    def ask_often() -> None:
        for _ in range(2000):
            counter.count(A)

    threads = [threading.Thread(target=ask_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        counter.write(objects)
    counter.write(objects)
    assert read_demand(objects) == {A: 8000}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "\xff", '{"asked": [["t", "c", "a", 0]]}', '{"asked": [["t", "c", 1, 1]]}', '{"format_version": 2, "asked": []}'],
)
def test_an_object_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    objects = open_objects(tmp_path)
    counted({A: 1}).write(objects)
    [file] = files(tmp_path)
    for stranger in ("notes.txt", "99999999-" + "0" * 32 + ".json", file.name + ".tmp"):
        (tmp_path / "demand" / stranger).write_text("not ours")
    assert read_demand(objects) == {A: 1}
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(CorruptObject, match=file.name):
        read_demand(objects)


def test_a_server_counts_requests_by_document(tmp_path: Path) -> None:
    world = make_world(tmp_path / "store", ["d0", "d1"])
    world.store.put([make_document("d0", "Another collection's.", collection="other"), make_document("bare", "No adapter.")])

    async def main() -> None:
        async with serving(world, demand_write_s=0.05) as (client, _):
            for model in ("base:d0", "base:d0", "base:other/d0", "base:bare", "base"):
                await chat(client, model)
            for turned_away in (ask("base:none"), ask("base", imprint={"mode": "adapter"})):
                assert (await client.post("/v1/chat/completions", json=turned_away)).status_code in (400, 404)
            deadline = asyncio.get_running_loop().time() + 10
            while world.store.demand().total() < 4:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.02)
        async with serving(world) as (client, _):
            await asyncio.gather(*(chat(client, "base:d1") for _ in range(3)))
        async with serving(world, demand_write_s=0) as (client, _):
            await chat(client, "base:d1")

    asyncio.run(main())
    expected = {("c", "d0"): 2, ("other", "d0"): 1, ("c", "bare"): 1, ("c", "d1"): 3}
    assert world.store.demand() == {("t", *key): times for key, times in expected.items()}


def test_no_request_fails_for_its_counts_sake(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = make_world(tmp_path / "store", ["d0"])
    (tmp_path / "store" / "demand").write_text("a file in the folder's place")

    async def main() -> None:
        async with serving(world, demand_write_s=0.02) as (client, service):
            await chat(client, "base:d0")
            await asyncio.sleep(0.1)
            await chat(client, "base:d0")
            assert service.engine.ready
            (tmp_path / "store" / "demand").unlink()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert "could not be written, and will be tried again" in caplog.text
    assert world.store.demand() == {("t", "c", "d0"): 2}
