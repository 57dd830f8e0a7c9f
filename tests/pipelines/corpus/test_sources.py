import gzip
import io
import json
import os
import random
import string
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus import files, listing, sources
from pipelines.corpus.listing import list_files
from pipelines.corpus.reading import Reading
from tests.pdf_files import pdf
from tests.s3 import CUT_WITHIN, DENIED, INTERNAL_ERROR, SLOW_DOWN, Fault, FaultProxy

Compress = Callable[[bytes], bytes]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def rows_of(url: str, reading: Reading | None = None) -> list[dict[str, Any]]:
    source = sources.open_source(url, "acme", "docs", reading)
    return [row for table in sources.read(source) for row in table.to_pylist()]


def texts_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["name"]: row["text"] for row in rows if row["reason"] is None}


def reasons_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["name"]: row["reason"].partition(":")[0] for row in rows if row["reason"]}


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_formats(folder: Path) -> dict[str, str]:
    """A file of every format. Returns the texts by name."""
    folder.mkdir()
    (folder / "a.txt").write_text("Text.")
    (folder / "b.md").write_text("# Title\nMarkdown.")
    (folder / "c.html").write_text("<title>Page</title><p>HTML.")
    (folder / "d.pdf").write_bytes(pdf(["PDF."], "Paper"))
    (folder / "e.jsonl").write_bytes(lines("Line."))
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(lines("Zipped.")) + gzip.compress(lines("Twice.")))
    (folder / "g.ndjson.zst").write_bytes(zstd(lines("Packed.")))
    pq.write_table(pa.table({"text": ["Row."]}), folder / "h.parquet")
    (folder / "i.json").write_bytes(b'[{"text": "Element."}]')
    (folder / "j.csv").write_bytes(b"text,title\r\nCell.,\r\n")
    (folder / "k.txt.gz").write_bytes(gzip.compress(b"Small."))
    return {
        "a.txt": "Text.", "b.md": "# Title\nMarkdown.", "c.html": "HTML.", "d.pdf": "PDF.", "e.jsonl#0": "Line.",
        "f.jsonl.gz#0": "Zipped.", "f.jsonl.gz#1": "Twice.", "g.ndjson.zst#0": "Packed.", "h.parquet#0": "Row.",
        "i.json#0": "Element.", "j.csv#0": "Cell.", "k.txt.gz": "Small.",
    }  # fmt: skip


def test_every_format_is_read_here_and_by_ray_alike(ray_local: Any, tmp_path: Path) -> None:
    expected = write_formats(tmp_path / "corpus")
    rows = rows_of(str(tmp_path / "corpus"))
    assert texts_of(rows) == expected and reasons_of(rows) == {}
    assert {row["name"]: row["title"] for row in rows if row["title"]} == {"b.md": "Title", "c.html": "Page", "d.pdf": "Paper"}
    source = sources.open_source(str(tmp_path / "corpus"), "acme", "docs")
    assert source.size_bytes == sum(path.stat().st_size for path in (tmp_path / "corpus").iterdir())
    context = ray_local.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ray_local.data.DataContext.current(context):
        streamed = sources.dataset(source).take_all()
    assert [row | {"read_at": 0} for row in streamed] == [row | {"read_at": 0} for row in rows]
    assert sum(row["source_bytes"] for row in rows) == source.size_bytes


def test_more_files_than_are_counted_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "COUNTED_FILES", 20)
    for number in range(21):
        (tmp_path / f"{number:02}.txt").write_text(f"{number}")
    source = sources.open_source(str(tmp_path), "t", "c")
    assert source.size_bytes is None
    assert [row["text"] for table in sources.read(source) for row in table.to_pylist()] == [str(number) for number in range(21)]


def test_fields_are_as_the_settings_name_them(tmp_path: Path) -> None:
    row = {"body": "Text.", "head": "Title", "key": 7, "id": "other", "text": "no"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
    reading = Reading(text_field="body", title_field="head", name_field="key")
    found = rows_of(str(tmp_path), reading)
    assert [(each["name"], each["title"], each["text"]) for each in found] == [("7", "Title", "Text.")] * 2
    assert reasons_of(rows_of(f"{tmp_path}/b.parquet", Reading(text_field="none"))) == {"b.parquet": "no column none"}


def test_lines_in_utf_16(tmp_path: Path) -> None:
    long = json.dumps({"text": "y" * 300})
    (tmp_path / "a.jsonl").write_bytes(
        '{"text": "a\u2028é"}\n{"text": "日本"}\n{long}\nno\n'.replace("{long}", long).encode("utf-16")
    )
    rows = rows_of(str(tmp_path), Reading(max_document_bytes=200))
    assert texts_of(rows) == {"a.jsonl#0": "a\u2028é", "a.jsonl#1": "日本"}
    assert reasons_of(rows) == {"a.jsonl#2": "too large", "a.jsonl#3": "not JSON"}
    assert sum(row["source_bytes"] for row in rows) == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_compressed_file_gives_what_came_before_its_fault(tmp_path: Path, suffix: str, compress: Compress) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.ascii_letters, k=200)) for _ in range(2000)]
    path = tmp_path / f"a.jsonl.{suffix}"
    data = compress(lines(*texts))
    path.write_bytes(data[:-100])
    rows = rows_of(str(tmp_path))
    read = list(texts_of(rows).values())
    assert 0 < len(read) < 2000 and read == texts[: len(read)]
    assert reasons_of(rows) == {path.name: "cannot be read"}
    assert sum(row["source_bytes"] for row in rows) == len(data) - 100
    path.write_bytes(b"not compressed at all")
    assert reasons_of(rows_of(str(tmp_path))) == {path.name: "cannot be read"}


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_compressed_file_cannot_grow_without_end(
    tmp_path: Path, suffix: str, compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FREE_BYTES", 2**20)
    bomb = compress(lines("good") + b" " * 64 * 2**20)
    assert len(bomb) < 70_000
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(bomb)
    rows = rows_of(str(tmp_path), Reading(max_document_bytes=10_000))
    assert texts_of(rows) == {f"a.jsonl.{suffix}#0": "good"}
    assert [row["reason"] for row in rows[1:]] == ["cannot be read: more than 250 times as large once decompressed"]


def write_tree(root: Path) -> list[str]:
    """Returns the names that a listing has, sorted."""
    names = ["a.txt", "a/b.txt", "a/b/c.txt", "a-b.txt", "b/1.md", "b/10.txt", "b/2.txt", "b/[x].txt"]
    for name in [*names, ".hidden.txt", "a/.hidden/d.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"The text of {name}")
    return sorted(names)


@pytest.mark.parametrize("as_url", [str, "file://{}".format])
def test_files_come_in_the_order_of_their_paths(tmp_path: Path, as_url: Callable[[str], str]) -> None:
    names = write_tree(tmp_path)
    assert [file.name for file in list_files(as_url(str(tmp_path)))] == names
    assert texts_of(rows_of(as_url(str(tmp_path)))) == {name: f"The text of {name}" for name in names}


PATTERNS = {
    "/*.txt": ["a-b.txt", "a.txt"],
    "/**/*.txt": ["a-b.txt", "a.txt", "a/b.txt", "a/b/c.txt", "b/10.txt", "b/2.txt", "b/[x].txt"],
    "/b/?.*": ["1.md", "2.txt"],
    "/b/[12]*": ["1.md", "10.txt", "2.txt"],
    "/*/b*": ["a/b.txt"],
    "/b/[x].txt": ["[x].txt"],
    "/a/*": ["b.txt"],
    "/no*": [],
}


@pytest.mark.parametrize(("pattern", "names"), PATTERNS.items())
def test_patterns(tmp_path: Path, pattern: str, names: list[str]) -> None:
    write_tree(tmp_path)
    assert [file.name for file in list_files(f"{tmp_path}{pattern}")] == names


def test_a_folder_that_may_not_be_read_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path)
    scan = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    assert reasons_of(rows_of(str(tmp_path))) == {"a": "cannot be read"}


def test_a_file_that_vanishes_while_it_is_listed_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path)
    size = os.path.getsize

    def getsize(path: str) -> int:
        if path.endswith("b.txt"):
            os.unlink(path)
        return size(path)

    monkeypatch.setattr(os.path, "getsize", getsize)
    unread = {file.name: file.reason for file in list_files(str(tmp_path)) if file.reason}
    assert unread == dict.fromkeys(["a-b.txt", "a/b.txt"], "cannot be read: No such file or directory")


def test_a_listing_may_name_what_no_package_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("Text.")
    (tmp_path / "list").write_text(f"sftp://host/a.txt\n{tmp_path}/a.txt\n")
    monkeypatch.setitem(sys.modules, "paramiko", None)
    rows = rows_of(f"@{tmp_path}/list")
    assert reasons_of(rows) == {"sftp://host/a.txt": "cannot be read"} and texts_of(rows) == {f"{tmp_path}/a.txt": "Text."}


def test_an_error_of_a_file_systems_own_is_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/own/a.txt": b"One.", "/own/b.txt": b"Two.", "/own/c.jsonl": lines("Three.")})
    opened = memory._open

    def forbidding(path: str, **kwargs: Any) -> Any:
        if "b" in path:
            raise LookupError("403")
        return opened(path, **kwargs)

    monkeypatch.setattr(memory, "_open", forbidding)
    urls = [f"memory://own/{name}" for name in ("a.txt", "b.txt", "c.jsonl")]
    (tmp_path / "list").write_text("\n".join(urls))
    rows = rows_of(f"@{tmp_path}/list")
    assert texts_of(rows) == {urls[0]: "One.", f"{urls[2]}#0": "Three."} and reasons_of(rows) == {urls[1]: "cannot be read"}


@pytest.mark.parametrize("url", ["", " ", "@", "@ ", "file://", "s3://", "@s3://"])
def test_an_empty_source_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the source .* is empty: give a file"):
        sources.open_source(url, "t", "c")
    with pytest.raises(ValueError, match=r"the source .* is empty: give a file"):
        list(list_files(url))


def write_cache(hub: Path) -> Path:
    """A repository of a Hugging Face cache, whose files are links. Returns the folder of its snapshot."""
    snapshot = hub / "datasets--acme--docs" / "snapshots" / "abc"
    (snapshot / "data").mkdir(parents=True)
    blobs = hub / "datasets--acme--docs" / "blobs"
    blobs.mkdir()
    (blobs / "1f2e").write_bytes(lines("Linked."))
    pq.write_table(pa.table({"text": ["Deeper."]}), blobs / "3c4d")
    (snapshot / "train.jsonl").symlink_to("../../blobs/1f2e")
    (snapshot / "data" / "train.parquet").symlink_to("../../../blobs/3c4d")
    (snapshot / "absolute.jsonl").symlink_to(blobs / "1f2e")
    return snapshot


def test_files_of_a_hugging_face_cache_are_read(tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path / "hub")
    texts = {"train.jsonl#0": "Linked.", "data/train.parquet#0": "Deeper.", "absolute.jsonl#0": "Linked."}
    rows = rows_of(str(snapshot))
    assert texts_of(rows) == texts and reasons_of(rows) == {}
    assert texts_of(rows_of(f"{snapshot}/train.jsonl")) == {"train.jsonl#0": "Linked."}
    assert texts_of(rows_of(f"{snapshot}/**/*.parquet")) == {"data/train.parquet#0": "Deeper."}
    assert texts_of(rows_of(str(snapshot / "data"))) == {"train.parquet#0": "Deeper."}
    (tmp_path / "notes").symlink_to(snapshot)
    assert texts_of(rows_of(str(tmp_path / "notes"))) == texts


def test_no_link_leads_out_of_a_cache_or_looks_like_one(tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path / "hub")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "datasets--acme--docs" / "blobs" / "deep").mkdir()
    places = {
        "outside.txt": tmp_path / "secret.txt",
        "other.txt": tmp_path / "hub" / "blobs" / "5e6f",
        "beside.txt": tmp_path / "hub" / "datasets--acme--docs" / "refs.txt",
        "through.txt": tmp_path / "hub" / "datasets--acme--docs" / "blobs" / "link",
        "deep.txt": tmp_path / "hub" / "datasets--acme--docs" / "blobs" / "deep" / "1f",
    }
    for name, place in places.items():
        if name != "through.txt":
            place.write_text("A secret.")
        (snapshot / name).symlink_to(place)
    places["through.txt"].symlink_to(tmp_path / "secret.txt")
    (snapshot / "blobs").symlink_to(tmp_path / "blobs")
    rows = rows_of(str(snapshot))
    assert reasons_of(rows) == dict.fromkeys([*places, "blobs"], "a link that leaves the folder")
    assert all("copy the file" in row["reason"] for row in rows if row["reason"])
    assert len(texts_of(rows)) == 3
    (tmp_path / "corpus" / "snapshots").mkdir(parents=True)
    (tmp_path / "corpus" / "blobs").symlink_to(tmp_path / "blobs")
    (tmp_path / "blobs" / "7a8b").write_text("A secret.")
    (tmp_path / "corpus" / "snapshots" / "a.txt").symlink_to("../blobs/7a8b")
    assert texts_of(rows_of(str(tmp_path / "corpus"))) == {}


def test_a_listing_names_files_anywhere(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    fsspec.filesystem("memory").pipe({"/far/a.txt": b"Far away.", "/far/b.html": b"<p>And further."})
    good = [f"{tmp_path}/tree/a.txt", "memory://far/a.txt", "memory://far/b.html", f"file://{tmp_path}/tree/b/[x].txt"]
    bad = {
        "memory://far/none.txt": "cannot be read",
        f"{tmp_path}/tree": "not a regular file",
        f"{tmp_path}/gone.txt": "cannot be read",
        "gopher://far/a.txt": "not a URL",
    }
    expected = dict(zip(good, ["The text of a.txt", "Far away.", "And further.", "The text of b/[x].txt"], strict=True))
    listed = "\r\n".join(["\ufeff" + good[0], "", *good[1:], *bad, "relative.txt", "/" + "x" * 5000, "end.txt"]).encode()
    (tmp_path / "list").write_bytes(listed + b"\n\xff\n")
    (tmp_path / "list.gz").write_bytes(gzip.compress(listed + b"\n\xff\n"))
    for name in ("list", "list.gz"):
        rows = rows_of(f"@{tmp_path}/{name}")
        assert texts_of(rows) == expected and [row["name"] for row in rows[:4]] == good
        wrong = {f"{name}#{number}": "not a URL" for number in (9, 10, 11, 12)}
        assert reasons_of(rows) == bad | wrong
    assert sources.open_source(f"@{tmp_path}/list", "t", "c").size_bytes is None
    columns: dict[str, list[Any]] = {"url": [*good, None], "size": [17, 9, 15, 25, 0]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    rows = rows_of(f"@{tmp_path}/list.parq*")
    assert texts_of(rows) == expected and reasons_of(rows) == {"list.parquet#4": "not a URL"}
    assert sources.open_source(f"@{tmp_path}/list.parquet", "t", "c").size_bytes == 66


@pytest.mark.parametrize("content", [b"PAR1 and no more", None])
def test_a_listing_that_is_none_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"other": ["x"]}), buffer)
    (tmp_path / "list.parquet").write_bytes(content or buffer.getvalue())
    with pytest.raises(ValueError, match=r"list\.parquet"):
        sources.open_source(f"@{tmp_path}/list.parquet", "t", "c")
    with pytest.raises(ValueError, match="nothing at"):
        sources.open_source(f"@{tmp_path}/absent", "t", "c")


def test_a_listing_is_never_held(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("".join(f"/some/where/far/down/{number}.txt\n" for number in range(50_000)))
    listed = list_files(f"@{tmp_path}/list")
    assert [file.name for file in islice(listed, 2)] == ["/some/where/far/down/0.txt", "/some/where/far/down/1.txt"]
    tracemalloc.start()
    assert sum(1 for _ in listed) == 49_998
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def put(admin: Any, bucket: str, objects: dict[str, bytes]) -> None:
    for key, data in objects.items():
        admin.put_object(Bucket=bucket, Key=key, Body=data)


@pytest.fixture
def fresh_s3() -> Iterator[None]:
    """No connection that another test has opened, perhaps to another server."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.usefixtures("fresh_s3")
def test_a_bucket_is_read_page_by_page(bucket: str, s3_admin: Any, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "PAGE_OBJECTS", 10)
    texts = {f"docs/{number:04}.txt": f"Document {number}." for number in range(25)}
    put(s3_admin, bucket, {name: text.encode() for name, text in texts.items()})
    others = {
        "docs/deep/ü b#?.html": b"<p>Deep.",
        "docs/empty.txt": b"",
        "docs/folder/": b"",
        "docs/.no/a.txt": b"x",
        "else.txt": b"x",
    }
    put(s3_admin, bucket, others | {"docs/z.jsonl.gz": gzip.compress(lines("One.", "Two.")), "docs/big.txt": b"x" * 2000})
    reading = Reading(max_document_bytes=1000)

    proxy.reset()
    names = [file.name for file in list_files(f"s3://{bucket}/docs")]
    assert names == sorted(
        [*(name.removeprefix("docs/") for name in texts), "big.txt", "deep/ü b#?.html", "empty.txt", "z.jsonl.gz"]
    )
    assert len([asked for asked in proxy.asked if "max-keys=10&" in asked.path]) == 4

    rows = rows_of(f"s3://{bucket}/docs/", reading)
    expected = {name.removeprefix("docs/"): text for name, text in texts.items()}
    expected |= {"deep/ü b#?.html": "Deep.", "z.jsonl.gz#0": "One.", "z.jsonl.gz#1": "Two."}
    assert texts_of(rows) == expected
    assert reasons_of(rows) == {"empty.txt": "empty", "big.txt": "too large"}
    found = [file.name for file in list_files(f"s3://{bucket}/docs/001?.txt")]
    assert found == [f"{number:04}.txt" for number in range(10, 20)]

    inventory = {"bucket": [bucket] * 3, "key": ["docs/0001.txt", "docs/empty.txt", "docs/none.txt"], "size": [11, 0, 5]}
    pq.write_table(pa.table(inventory), buffer := io.BytesIO())
    put(s3_admin, bucket, {"list.parquet": buffer.getvalue()})
    rows = rows_of(f"@s3://{bucket}/list.parquet")
    assert texts_of(rows) == {f"s3://{bucket}/docs/0001.txt": "Document 1."}
    assert reasons_of(rows) == {f"s3://{bucket}/docs/empty.txt": "empty", f"s3://{bucket}/docs/none.txt": "cannot be read"}


@pytest.mark.usefixtures("fresh_s3")
def test_a_bucket_that_fails_now_and_then_is_read(bucket: str, s3_admin: Any, proxy: FaultProxy) -> None:
    put(s3_admin, bucket, {"a.txt": b"One.", "b.txt": b"Two.", "c.jsonl": lines("Three.")})
    proxy.script("GET", SLOW_DOWN, INTERNAL_ERROR, None, None, CUT_WITHIN, SLOW_DOWN)
    assert texts_of(rows_of(f"s3://{bucket}")) == {"a.txt": "One.", "b.txt": "Two.", "c.jsonl#0": "Three."}
    assert len(proxy.faults) == 4


@pytest.mark.usefixtures("fresh_s3")
@pytest.mark.parametrize("fault", [DENIED, CUT_WITHIN])
def test_objects_that_cannot_be_had_are_rejects(
    bucket: str, s3_admin: Any, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    put(s3_admin, bucket, {"a.txt": b"One.", "b.txt": b"Two.", "c.jsonl": lines("Three.")})
    urls = [f"s3://{bucket}/{name}" for name in ("a.txt", "c.jsonl", "b.txt")]
    (tmp_path / "list").write_text("\n".join(urls))
    proxy.script("GET", *[fault] * 11)
    rows = rows_of(f"@{tmp_path}/list")
    assert set(reasons_of(rows).values()) == {"cannot be read"} and urls[0] in reasons_of(rows)
    assert {**reasons_of(rows), **texts_of(rows)}.keys() == set(urls)


@pytest.mark.usefixtures("fresh_s3")
def test_a_bucket_that_cannot_be_listed_is_an_error(bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=r"cannot be listed.*credentials"):
        sources.open_source(f"s3://{bucket}/docs", "t", "c")


FORMATS = st.sampled_from([".jsonl", ".jsonl.gz", ".ndjson.zst", ".parquet", ".json", ".csv", ".tsv.zst", ".html.gz"])
GOOD = lines("One.", "é" * 30, "Three.")


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["One.", "é" * 30, "Three."], "id": [1, 2, 3]}), buffer)
    return buffer.getvalue()


TABLE = 'id,text\r\n1,One.\r\n2,"é, ""é""\n"\r\n'.encode()
WHOLE = {
    ".jsonl": GOOD,
    ".jsonl.gz": gzip.compress(GOOD),
    ".ndjson.zst": zstd(GOOD),
    ".parquet": parquet(),
    ".json": b"[" + b",\n".join(GOOD.splitlines()) + b"]",
    ".csv": TABLE,
    ".tsv.zst": zstd(TABLE.replace(b",", b"\t")),
    ".html.gz": gzip.compress(b"<table><tr><td>1<sup>2</sup><td>3</table>"),
}


@settings(max_examples=300)
@given(FORMATS, st.data())
def test_whatever_the_bytes_every_file_ends_in_rows(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    content = WHOLE[form]
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 20, len(content))))
    content = content[:start] + data.draw(st.binary(max_size=30)) + content[end:]
    path = tmp_path_factory.getbasetemp() / f"any{form}"
    path.write_bytes(content)
    rows = rows_of(str(path))
    assert rows and all((row["text"] is None) != (row["reason"] is None) for row in rows)
    assert sum(row["source_bytes"] for row in rows) == len(content)
