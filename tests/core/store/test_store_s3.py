"""A store in a bucket, over a proxy that counts requests and makes some of them fail."""

import threading
from collections.abc import Callable

import pytest
import torch

from core.store.s3_client import S3Settings
from core.store.s3_objects import S3Objects
from core.store.store import Store
from tests import s3
from tests.s3 import FaultProxy
from tests.stores import SPEC, adapter, document, vector

QUICK = S3Settings(attempts=8, first_pause_s=0.001, longest_pause_s=0.02, timeout_s=5, part_bytes=5 * 2**20)


@pytest.fixture
def url(bucket: str) -> str:
    return f"s3://{bucket}/a store"


def opened(url: str) -> Store:
    store = Store(S3Objects(url, QUICK), shard_bytes=4096)
    store.refresh()
    return store


@s3.EVERY_SERVER
def test_a_store_in_a_bucket_round_trips(url: str) -> None:
    store, one = Store.open(url, create=True), document("Its own text.", name="a/b:c 日本")
    [row] = store.put([one], [adapter(one)]).adapters
    for each in (store, Store.open(store.url)):
        found = each.find_document("tenant", "c", one.name)
        assert found is not None and each.get_text(found) == one.text and torch.equal(each.get_vector(row), vector())
        assert each.delete_document("tenant", "c", one.name) is (each is store)


@s3.EVERY_SERVER
def test_requests_are_few(url: str, proxy: FaultProxy) -> None:
    store = Store.open(url, create=True)
    wide = SPEC.with_rank(2**17)
    big = adapter(document("big"), spec=wide, vector=torch.zeros(wide.numel))
    rows = store.put([document(f"{number}", name=f"{number}") for number in range(9)], [big, adapter(document("small"))]).adapters

    def requests(action: Callable[[], object]) -> list[str]:
        proxy.reset()
        action()
        return sorted(each.method for each in proxy.asked)

    readers: list[Store] = []
    assert requests(lambda: readers.append(Store.open(url))) == ["GET"] * 3, "the hint, a listing, a root"
    reader = readers[0]
    assert requests(lambda: reader.find_document("tenant", "c", "3")) == ["GET"]
    assert requests(lambda: reader.find_document("tenant", "c", "5")) == []
    assert requests(lambda: reader.get_bytes(rows[1])) == ["GET"]
    assert wide.numel * 4 > 2**24 and len(requests(lambda: reader.get_bytes(rows[0]))) == -(-wide.numel * 4 // 2**24)


@s3.EVERY_SERVER
def test_writers_lose_nothing_while_requests_fail(url: str, proxy: FaultProxy) -> None:
    opened_first = Store.open(url, create=True)
    proxy.reset(rate=0.05, seed=3)
    stores, failures = [opened(url), opened(url)], list[BaseException]()

    def write(writer: int) -> None:
        try:
            for number in range(6):
                one, shared = (
                    document(f"{writer} {number}", name=f"{writer}-{number}"),
                    document("shared", name=f"shared-{number}"),
                )
                stores[writer % 2].put([one, shared], [adapter(one, number), adapter(shared, writer)])
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and proxy.faults
    proxy.reset()
    opened_first.refresh()
    for store in (*stores, opened_first, Store.open(url)):
        store.refresh()
        assert store.stats() == store.stats("tenant") and store.stats()[2:4] == (30, 25)
        for writer in range(4):
            for number in range(6):
                [row] = store.find_adapters("tenant", document(f"{writer} {number}").content_hash)
                assert torch.equal(store.get_vector(row), vector(number))
