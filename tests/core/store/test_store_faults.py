"""Damage and forgery in a store: each is detected, with an error that names the object."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import digest
from core.store.errors import CorruptObject, MissingObject, StoreError
from core.store.manifest import blob_hash
from core.store.roots import FORMAT_VERSION, Root
from core.store.store import Store
from tests.stores import SPEC, document, flip, store_with_one, the_file


def read_all(store: Store) -> None:
    for kind in ("documents", "adapters"):
        list(store.tables(kind))
    rows = store.list_documents("tenant").rows
    assert [store.get_text(row) for row in rows] == ["Its own text."]
    [adapter] = store.find_adapters("tenant", rows[0].content_hash)
    store.get_vector(adapter)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["manifest/*", "roots/*2.json"]), st.floats(0, 1, exclude_max=True))
def test_a_flipped_byte_of_part_or_root_is_detected(tmp_path_factory: pytest.TempPathFactory, pattern: str, where: float) -> None:
    path = tmp_path_factory.mktemp("store")
    store_with_one(path)
    file = the_file(path, pattern)
    flip(file, int(where * file.stat().st_size))
    with pytest.raises(StoreError, match=re.escape(file.name)):
        read_all(Store.open(path))


def test_a_flipped_byte_of_a_blob_is_detected(tmp_path: Path) -> None:
    store, one = store_with_one(tmp_path)
    text_row, [vector_row] = store.find_document("tenant", "c", "name"), store.find_adapters("tenant", one.content_hash)
    assert text_row is not None
    file = the_file(tmp_path, "shards/*")
    for row, read in ((text_row, store.get_text), (vector_row, store.get_vector)):
        for at in (row.offset, row.offset + row.length // 2, row.offset + row.length - 1):
            flip(file, at)
            with pytest.raises(CorruptObject, match=f"shards/{file.name} is damaged between bytes {row.offset} and"):
                read(row)
            flip(file, at)
        read(row)


def test_a_truncated_or_missing_object_is_detected(tmp_path: Path) -> None:
    store, one = store_with_one(tmp_path)
    [row] = store.find_adapters("tenant", one.content_hash)
    shard = the_file(tmp_path, "shards/*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptObject, match=f"shards/{shard.name} has .* cut short"):
        store.get_vector(row)
    shard.unlink()
    with pytest.raises(MissingObject, match=f"shards/{shard.name} is missing"):
        store.get_vector(row)
    part = the_file(tmp_path, "manifest/*")
    part.unlink()
    assert store.find_adapters("tenant", one.content_hash) == [row], "what was read stays"
    with pytest.raises(MissingObject, match=f"manifest/{part.name} is missing"):
        read_all(Store.open(tmp_path))


def test_a_refresh_that_fails_keeps_the_version(tmp_path: Path) -> None:
    writer, one = store_with_one(tmp_path)
    reader = Store.open(tmp_path)
    writer.put([document("other", name="other")])
    flip(the_file(tmp_path, "roots/*.json"), 5)
    with pytest.raises(StoreError, match=r"roots/0+3\.json"):
        reader.refresh()
    row = reader.find_document("tenant", "c", "name")
    assert reader.sequence == 2 and row is not None and reader.get_text(row) == one.text


def seal(values: dict[str, object]) -> bytes:
    values = {key: value for key, value in values.items() if key != "checksum"}
    return json.dumps(values | {"checksum": digest(values)}, sort_keys=True, separators=(",", ":")).encode()


def forge(path: Path, change: Callable[[dict], object]) -> None:
    file = the_file(path, "roots/*.json")
    values = json.loads(file.read_bytes())
    change(values)
    file.write_bytes(seal(values))


def test_an_unknown_format_says_which_version_reads_it(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    forge(tmp_path, lambda root: root.update(format_version=FORMAT_VERSION + 1, something="new"))
    known, newer = FORMAT_VERSION, FORMAT_VERSION + 1
    with pytest.raises(
        ValueError, match=rf"roots/0+2\.json has format version {newer}, and this Imprint reads version {known}.*version {newer}"
    ):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: root["parts"][0].update(name="../../" + root["parts"][0]["name"]),
        lambda root: root["parts"][0].update(name=root["parts"][0]["name"] + "\n"),
        lambda root: root["parts"][0].update(kind="adapters"),
        lambda root: root["parts"][0].update(rows=7),
        lambda root: root["parts"][0].update(rows=-1),
        lambda root: root["producers"].update({"0" * 64: next(iter(root["producers"].values()))}),
        lambda root: root.update(sequence=7),
        lambda root: root.update(sequence=-(10**30)),
        lambda root: root.update(extra=1),
        lambda root: root.pop("parts"),
        lambda root: root.clear(),
    ],
)
def test_forged_roots_are_refused(tmp_path: Path, change: Callable[[dict], object]) -> None:
    store_with_one(tmp_path)
    forge(tmp_path, change)
    with pytest.raises(StoreError):
        read_all(Store.open(tmp_path))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format_version":1' + b"0" * 5000 + b"}"])
def test_roots_of_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(StoreError, match="roots/1"):
        Root.from_bytes(data, "roots/1")


def test_a_spec_under_anothers_fingerprint_is_refused(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    forge(tmp_path, lambda root: root["specs"].update({SPEC.fingerprint: SPEC.with_rank(3).to_json()}))
    with pytest.raises(StoreError, match="fingerprint"):
        Store.open(tmp_path).spec(SPEC.fingerprint)
    with pytest.raises(StoreError, match="knows no spec 00"):
        Store.open(tmp_path).spec("0" * 64)


@pytest.mark.parametrize(
    "shard", ["../secret.bin", "/etc/passwd", "..", "", "a.bin", "0" * 32 + ".bin\n", "0" * 32 + ".bin/../x"]
)
def test_hostile_shard_names_are_refused(tmp_path: Path, shard: str) -> None:
    store, one = store_with_one(tmp_path)
    (tmp_path / "secret.bin").write_bytes(b"secret")
    [row] = store.find_adapters("tenant", one.content_hash)
    hostile = replace(row, shard=shard, offset=0, length=6, blob_hash=blob_hash(b"secret"))
    with pytest.raises(CorruptObject, match="is not the name of a shard"):
        store.get_bytes(hostile)


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, -1), (0, 2**62), (2**62, 2**62), (10**6, 0)])
def test_hostile_ranges_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    store, one = store_with_one(tmp_path)
    [row] = store.find_adapters("tenant", one.content_hash)
    with pytest.raises(CorruptObject, match="cut short"):
        store.get_bytes(replace(row, offset=offset, length=length))
