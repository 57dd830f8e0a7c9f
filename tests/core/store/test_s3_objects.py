"""Objects in buckets when the network and the server fail, over a proxy that makes them fail."""

import logging
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from core.store.errors import MissingObject, StoreError
from core.store.objects import StorageError
from core.store.s3_client import S3Settings
from core.store.s3_objects import PARTS_IN_FLIGHT, S3Objects
from core.store.store import Store
from tests import s3
from tests.s3 import Fault, FaultProxy

PART = 5 * 2**20
QUICK = S3Settings(attempts=5, first_pause_s=0.001, longest_pause_s=0.01, timeout_s=5, part_bytes=PART)


@pytest.fixture
def objects(bucket: str) -> S3Objects:
    return S3Objects(f"s3://{bucket}/a store", QUICK)


def methods(proxy: FaultProxy) -> Counter[str]:
    return Counter(each.method for each in proxy.asked)


@s3.EVERY_SERVER
@pytest.mark.parametrize("fault", s3.PASSING, ids=lambda fault: f"{fault.kind}-{fault.status or fault.sent}-{fault.applied}")
def test_a_passing_fault_is_not_noticed(objects: S3Objects, proxy: FaultProxy, fault: Fault) -> None:
    data = random.Random(0).randbytes(PART + 5)
    calls: list[tuple[str, Callable[[], object], object]] = [
        ("PUT", lambda: objects.write("shards/a", [b"one"]), None),
        ("PUT", lambda: objects.replace("shards/a", b"two"), None),
        ("PUT", lambda: objects.create("roots/1", b"mine"), True),
        ("PUT", lambda: objects.create("roots/1", b"another's"), False),
        ("GET", lambda: objects.read("shards/a"), b"two"),
        ("GET", lambda: objects.read("shards/a", 1, 2), b"wo"),
        ("GET", lambda: objects.exists("shards/a"), True),
        ("GET", lambda: objects.exists("shards/b"), False),
        ("GET", lambda: list(objects.names("shards")), ["a"]),
        ("DELETE", lambda: objects.remove("shards/a"), None),
        ("DELETE", lambda: objects.erase("roots/1"), None),
        ("POST", lambda: objects.write("shards/c", [data]), None),
        ("PUT", lambda: objects.write("shards/d", [data]), None),
        ("GET", lambda: objects.read("shards/d", 0, len(data)) == data == objects.read("shards/c"), True),
    ]
    for method, call, expected in calls:
        proxy.reset()
        proxy.script(method, fault)
        assert call() == expected
        assert proxy.faults == [fault]
    assert list(objects.names("shards")) == ["c", "d"] and list(objects.names("roots")) == []


@s3.EVERY_SERVER
@pytest.mark.parametrize("lost", [s3.CUT_AFTER, s3.INTERNAL_ERROR_APPLIED])
def test_a_lost_answer_to_create_is_settled_by_what_is_there(objects: S3Objects, proxy: FaultProxy, lost: Fault) -> None:
    proxy.script("PUT", lost)
    assert objects.create("roots/1", b"mine")
    proxy.script("PUT", lost, lost, lost)
    assert not objects.create("roots/1", b"another's") and objects.read("roots/1") == b"mine"
    proxy.reset()
    proxy.script("PUT", lost)
    proxy.script("GET", lost, s3.CUT_WITHIN, s3.SLOW_DOWN)
    assert objects.create("roots/2", b"mine")
    assert methods(proxy) == {"PUT": 2, "GET": 4}


@s3.EVERY_SERVER
def test_a_create_that_nobody_answers_says_so(objects: S3Objects, proxy: FaultProxy) -> None:
    proxy.script("PUT", *[s3.CUT_AFTER] * QUICK.attempts)
    with pytest.raises(StorageError, match=r"roots/1 of s3://bucket-\d+/a store: ConnectionClosedError \(5 attempts\)"):
        objects.create("roots/1", b"mine")
    assert objects.read("roots/1") == b"mine"


@s3.EVERY_SERVER
@pytest.mark.parametrize("lost", [s3.CUT_AFTER, s3.INTERNAL_ERROR_APPLIED])
def test_a_lost_answer_to_the_end_of_an_upload(objects: S3Objects, proxy: FaultProxy, lost: Fault) -> None:
    proxy.script("POST", None, lost)
    objects.write("shards/a", [bytes(PART + 1)])
    assert objects.read("shards/a") == bytes(PART + 1) and proxy.faults == [lost]


@s3.EVERY_SERVER
def test_an_upload_that_fails_is_aborted(objects: S3Objects, proxy: FaultProxy, s3_admin: Any, bucket: str) -> None:
    proxy.script("PUT", None, *[s3.SLOW_DOWN] * 10 * QUICK.attempts)
    with pytest.raises(StorageError, match=r"shards/a of .*: 503 SlowDown"):
        objects.write("shards/a", [bytes(PART)] * 8)
    assert not objects.exists("shards/a") and "Uploads" not in s3_admin.list_multipart_uploads(Bucket=bucket)


@s3.EVERY_SERVER
def test_uploads_of_killed_writers_are_taken_away(objects: S3Objects, s3_admin: Any, bucket: str) -> None:
    others = ["a store/no object", "another store/shards/a"]
    for key in ("a store/shards/a", "a store/shards/b", *others):
        s3_admin.create_multipart_upload(Bucket=bucket, Key=key)
    assert objects.remove_unfinished(datetime(2000, 1, 1, tzinfo=UTC)) == 0
    assert objects.remove_unfinished(datetime.now(UTC) + timedelta(hours=1)) == 2
    assert sorted(each["Key"] for each in s3_admin.list_multipart_uploads(Bucket=bucket)["Uploads"]) == others


@s3.EVERY_SERVER
def test_an_upload_holds_few_parts(objects: S3Objects, proxy: FaultProxy) -> None:
    """A slow server slows the source down: parts wait for each other instead of gathering."""
    proxy.script("PUT", *[Fault("delay", delay_s=0.05)] * 20)
    ahead: list[int] = []

    def source() -> Any:
        for number in range(8):
            ahead.append(number + 1 - len([each for each in proxy.asked if "partNumber" in each.path]))
            yield bytes(PART)

    objects.write("shards/a", source())
    assert max(ahead) <= PARTS_IN_FLIGHT + 2


@s3.EVERY_SERVER
def test_faults_at_five_percent_lose_nothing(objects: S3Objects, proxy: FaultProxy) -> None:
    proxy.reset(rate=0.05, seed=3)

    def work(number: int) -> None:
        data = random.Random(number).randbytes(200)
        objects.write(f"shards/{number:03}", [data])
        assert objects.create(f"roots/{number:03}", data)
        assert not objects.create(f"roots/{number:03}", data[::-1])
        assert objects.read(f"shards/{number:03}", 10, 50) == data[10:60] and objects.read(f"roots/{number:03}") == data
        objects.remove(f"shards/{number:03}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(60)))
    assert list(objects.names("shards")) == [] and list(objects.names("roots")) == [f"{number:03}" for number in range(60)]
    assert len(set(proxy.faults)) > 4
    assert 0.02 < len(proxy.faults) / len(proxy.asked) < 0.08


@s3.EVERY_SERVER
def test_a_server_that_stays_away_is_named(objects: S3Objects, proxy: FaultProxy) -> None:
    proxy.reset(rate=1)
    proxy.script("GET", *[s3.SLOW_DOWN] * QUICK.attempts)
    with pytest.raises(
        StorageError, match=r"shards/a of s3://bucket-\d+/a store: 503 SlowDown: a fault of the test \(5 attempts\)"
    ):
        objects.read("shards/a")
    proxy.reset()
    proxy.script("GET", *[Fault("delay", delay_s=0.3)] * 2)
    impatient = S3Objects(objects.url, QUICK.model_copy(update={"attempts": 2, "timeout_s": 0.1}))
    with pytest.raises(StorageError, match=r"shards/ of .*: ReadTimeoutError \(2 attempts\)"):
        list(impatient.names("shards"))


@s3.EVERY_SERVER
def test_what_waiting_does_not_mend_is_not_tried_again(objects: S3Objects, proxy: FaultProxy) -> None:
    proxy.script("GET", s3.DENIED)
    with pytest.raises(StorageError, match=r"shards/a of .*: 403 AccessDenied: a fault of the test$"):
        objects.read("shards/a")
    assert len(proxy.asked) == 1
    with pytest.raises(StorageError, match="404 NoSuchBucket"):
        S3Objects("s3://no-such-bucket/x", QUICK).read("shards/a")
    with pytest.raises(StorageError, match="404 NoSuchBucket"):
        S3Objects("s3://no-such-bucket/x", QUICK).create("roots/1", b"")


@s3.EVERY_SERVER
def test_expired_credentials(
    objects: S3Objects, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Credentials are read anew once: a profile or role may have been renewed. Then it is said what to do."""
    caplog.set_level(logging.DEBUG, "core.store.s3_client")
    objects.write("shards/a", [b"one"])
    for method, call in (("GET", lambda: objects.exists("shards/a")), ("PUT", lambda: objects.create("roots/1", b"mine"))):
        proxy.script(method, s3.EXPIRED)
        assert call()
    proxy.script("GET", s3.EXPIRED, s3.EXPIRED)
    with pytest.raises(
        StorageError, match=r"shards/a of .*: the credentials have expired \(400 ExpiredToken.*renew them"
    ) as failed:
        objects.read("shards/a")
    assert objects.read("shards/a") == b"one"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match=r"no credentials \(NoCredentialsError\): set AWS_PROFILE"):
        S3Objects(objects.url, QUICK).read("shards/a")
    secret = s3.environment("")["AWS_SECRET_ACCESS_KEY"]
    assert secret not in caplog.text + repr(failed.value) and "asking again" in caplog.text


def test_renewed_credentials_are_used(
    objects: S3Objects, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def renew(key: str) -> None:
        file.write_text(f"[work]\naws_access_key_id = {key}\naws_secret_access_key = not-a-secret-of-anyone\n")

    file = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "work")
    with pytest.raises(StorageError, match=r"a store: The config profile \(work\) could not be found"):
        S3Objects(objects.url, QUICK)
    renew("first")
    objects = S3Objects(objects.url, QUICK)
    assert not objects.exists("shards/a")
    renew("second")
    proxy.script("GET", None, s3.EXPIRED)
    assert not objects.exists("shards/a") and not objects.exists("shards/a") and not objects.exists("shards/a")
    assert [each.access_key for each in proxy.asked] == ["first", "first", "first", "second", "second"]


@s3.EVERY_SERVER
def test_an_endpoint_that_is_no_url(objects: S3Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "user:hunter2@somewhere")
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL is not a URL such as") as refused:
        S3Objects(objects.url, QUICK)
    assert "hunter2" not in str(refused.value)


@s3.EVERY_SERVER
def test_requests_are_few(objects: S3Objects, proxy: FaultProxy) -> None:
    """The numbers that the module states: what costs time and money is counted."""

    def asked(call: Callable[[], object]) -> dict[str, int]:
        proxy.reset()
        call()
        return dict(methods(proxy))

    size = 3 * PART
    assert asked(lambda: objects.write("shards/a", [bytes(1000)] * 100)) == {"PUT": 1}
    assert asked(lambda: objects.write("shards/b", [bytes(size)])) == {"POST": 2, "PUT": 3}
    assert asked(lambda: objects.create("roots/0", b"mine")) == {"PUT": 2}, "once: is it refused to create it again?"
    assert asked(lambda: objects.create("roots/1", b"mine")) == {"PUT": 1}
    assert asked(lambda: objects.create("roots/1", b"another's")) == {"PUT": 1, "GET": 1}
    assert asked(lambda: objects.read("shards/a")) == {"GET": 1}
    assert asked(lambda: objects.read("shards/b", 5, PART)) == {"GET": 1}
    assert asked(lambda: objects.read("shards/b", 5, PART + 1)) == {"GET": 2}
    assert asked(lambda: objects.read_ranges([("shards/b", 0, size), ("shards/a", 0, 5)])) == {"GET": 4}
    assert asked(lambda: objects.exists("shards/a")) == asked(lambda: list(objects.names("shards"))) == {"GET": 1}
    assert asked(lambda: objects.remove("shards/a")) == {"DELETE": 1}


@s3.EVERY_SERVER
def test_ranges_are_read_in_parallel(objects: S3Objects, proxy: FaultProxy) -> None:
    objects.write("shards/a", [bytes(1000)])
    proxy.script("GET", *[Fault("delay", delay_s=0.2)] * 16)
    begun = datetime.now(UTC)
    assert objects.read_ranges([("shards/a", start, 10) for start in range(16)]) == [bytes(10)] * 16
    assert datetime.now(UTC) - begun < timedelta(seconds=1.6)


@s3.EVERY_SERVER
def test_a_versioned_bucket_keeps_nothing_that_is_erased(objects: S3Objects, s3_admin: Any, bucket: str) -> None:
    s3_admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for data in (b"one", b"two"):
        for name in ("shards/a", "shards/ab"):
            objects.replace(name, data)
    objects.remove("shards/a")
    objects.remove("shards/a")

    def kept() -> list[tuple[str, str]]:
        page = s3_admin.list_object_versions(Bucket=bucket)
        return sorted((each["Key"], kind) for kind in ("Versions", "DeleteMarkers") for each in page.get(kind, ()))

    assert Counter(kept())["a store/shards/a", "Versions"] == 2 and not objects.exists("shards/a")
    objects.erase("shards/a")
    assert kept() == [("a store/shards/ab", "Versions")] * 2
    objects.replace("shards/a", b"three")
    assert objects.read("shards/a") == b"three"
    with pytest.raises(MissingObject):
        objects.read("shards/b")


def test_a_server_without_conditional_writes_is_refused(objects: S3Objects, proxy: FaultProxy) -> None:
    proxy.reset(careless=True)
    with pytest.raises(StoreError, match=r"roots/1 of .*: the server ignores `If-None-Match: \*`: take another server"):
        objects.create("roots/1", b"mine")
    with pytest.raises(StoreError, match="lose each other's commits"):
        Store.open(objects.url, create=True)
    assert list(objects.names("roots")) == []


def test_versions_that_are_switched_on_later_are_looked_at_anew(
    objects: S3Objects, proxy: FaultProxy, s3_admin: Any, bucket: str
) -> None:
    assert objects.create("roots/1", b"one")
    s3_admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    proxy.reset(careless=True)
    with pytest.raises(StoreError, match=r"roots/2 of .* keeps versions \(as Ceph does\): suspend its versioning"):
        objects.create("roots/2", b"two")
    proxy.reset()
    assert [each["Key"] for each in s3_admin.list_object_versions(Bucket=bucket)["Versions"]] == ["a store/roots/1"]
    assert objects.create("roots/3", b"three") and objects.create("roots/4", b"four")
    assert methods(proxy) == {"PUT": 3}


@s3.EVERY_SERVER
def test_parts_of_16_mb(objects: S3Objects, proxy: FaultProxy) -> None:
    size = 2**24
    again = S3Objects(objects.url)
    again.write("shards/a", [bytes(size)])
    again.write("shards/b", [bytes(size + 1)])
    assert len(again.read("shards/a", 0, size)) == size and len(again.read("shards/b", 0, size + 1)) == size + 1
    ranges = [each.range for each in proxy.asked if each.method == "GET"]
    assert sorted(map(str, ranges)) == ["bytes=0-16777215"] * 2 + ["bytes=16777216-16777216"]
    assert methods(proxy) == {"PUT": 3, "POST": 2, "GET": 3}
