"""Files of many documents, as people and other programs write them."""

import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus import json_values, sources
from pipelines.corpus.reading import Reading
from tests.pdf_files import pdf


def rows_of(path: Path, reading: Reading | None = None) -> list[dict[str, Any]]:
    source = sources.open_source(str(path), "acme", "docs", reading)
    rows = [row for table in sources.read(source) for row in table.to_pylist()]
    assert sum(row["source_bytes"] for row in rows) == source.size_bytes
    assert all((row["text"] is None) != (row["reason"] is None) for row in rows)
    return rows


def documents(path: Path, reading: Reading | None = None) -> dict[str, tuple[str, str]]:
    """Titles and texts by name, where nothing was rejected."""
    rows = rows_of(path, reading)
    assert [row["reason"] for row in rows if row["reason"]] == []
    return {row["name"]: (row["title"], row["text"]) for row in rows}


def outcomes(path: Path, reading: Reading | None = None) -> list[str]:
    """The text or the reason of each row."""
    return [row["text"] or row["reason"] for row in rows_of(path, reading)]


def begin_alike(found: list[str], expected: list[str]) -> bool:
    return len(found) == len(expected) and all(each.startswith(start) for each, start in zip(found, expected, strict=True))


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


ARRAYS = {
    "string": pa.array(["One.", None, "Three."]),
    "large_string": pa.array(["One.", None, "Three."], pa.large_string()),
    "string_view": pa.array(["One.", None, "Three."], pa.string_view()),
    "binary": pa.array([b"One.", None, b"Three."]),
    "large_binary": pa.array([b"One.", None, b"Three."], pa.large_binary()),
    "binary_view": pa.array([b"One.", None, b"Three."], pa.binary_view()),
    "dictionary": pa.array(["One.", None, "Three."]).dictionary_encode(),
    "categorical": pa.Array.from_pandas(pd.Categorical(["One.", None, "Three."])),
    "chunked dictionary": pa.chunked_array(
        [pa.array(["One.", None]).dictionary_encode(), pa.array(["Three."]).dictionary_encode()]
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_text_of_every_type_of_column_is_read(tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({"text": ARRAYS[kind]}), tmp_path / "a.parquet")
    assert outcomes(tmp_path) == ["One.", "no text: `text` is null", "Three."]


UUIDS = uuid.UUID(int=7), uuid.UUID(int=2**127)
PLAIN: dict[str, tuple[Any, Any]] = {
    "integer": (pa.array([7, None, 0]), ["7", None, "0"]),
    "double": (pa.array([7.0, None, 0.5]), ["7", None, "0.5"]),
    "float": (pa.array([7.0, None, 0.1], pa.float32()), ["7", None, "0.1"]),
    "half float": (pa.array(np.array([7, np.nan, 0.1], np.float16)), ["7", None, "0.1"]),
    "large double": (pa.array([2.0**60, float("nan"), 1e300]), ["1.152921504606847e+18", None, "1e+300"]),
    "bool": (pa.array([True, None, False]), ["true", None, "false"]),
    "decimal": (pa.array([decimal.Decimal("7.00"), None, decimal.Decimal("0.50")]), ["7", None, "0.50"]),
    "binary": (pa.array([b"seven", b"", "né".encode()]), ["seven", None, "né"]),
    "date": (pa.array([datetime.date(2024, 5, 6), None, datetime.date(1, 1, 1)]), ["2024-05-06", None, "0001-01-01"]),
    "timestamp": (pa.array([0, None, 1], pa.timestamp("ms")), ["1970-01-01T00:00:00", None, "1970-01-01T00:00:00.001000"]),
    "nanoseconds": (pa.array([0, None, 1], pa.timestamp("ns", "UTC")), [
        "1970-01-01T00:00:00+00:00", None, "1970-01-01T00:00:00.000000001+00:00",
    ]),
    "uuid": (pa.array([UUIDS[0].bytes, None, UUIDS[1].bytes], pa.uuid()), [str(UUIDS[0]), None, str(UUIDS[1])]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_names_and_titles_of_plain_types_are_their_usual_text(tmp_path: Path, kind: str) -> None:
    column, expected = PLAIN[kind]
    pq.write_table(pa.table({"id": column, "title": column, "text": ["One.", "Two.", "Three."]}), tmp_path / "a.parquet")
    names = [value or f"a.parquet#{place}" for place, value in enumerate(expected)]
    titles = [value or "" for value in expected]
    assert documents(tmp_path) == dict(zip(names, zip(titles, ["One.", "Two.", "Three."], strict=True), strict=True))


def test_names_in_json_are_their_usual_text(tmp_path: Path) -> None:
    ids = [7, "7b", 0, 8.0, 1.5, True, None, "", 10**30]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": each, "title": each, "text": "x"}) for each in ids))
    expected = ["7", "7b", "0", "8", "1.5", "true", "a.jsonl#6", "a.jsonl#7", str(10**30)]
    assert list(documents(tmp_path)) == expected


def test_what_is_nested_or_no_text_says_so(tmp_path: Path) -> None:
    rows = [
        {"text": ["a", "b"]}, {"text": {"a": 1}}, {"text": 5}, {"title": ["t"], "text": "x"}, {"id": {"a": 1}, "text": "x"},
        {"data": [{"paragraphs": []}], "version": 1}, {"body": "x", "id": "named"}, {}, ["a"], "a",
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = rows_of(tmp_path)
    assert [row["reason"] for row in found] == [
        "no text: `text` is an array; give one text a document",
        "no text: `text` is an object; give one text a document",
        "no text: `text` is int; give one text a document",
        "the title is an array: give text, a number or a date",
        "the name is an object: give text, a number or a date",
        "no text: the documents seem to be in `data`; write that array alone, an object with `text` a document",
        "no text: of body, id name the text's with `--set reading.text_field=NAME`",
        "no text: of no fields name the text's with `--set reading.text_field=NAME`",
        "not a JSON object: an array; give an object with `text` a document",
        "not a JSON object: str; give an object with `text` a document",
    ]
    assert found[6]["name"] == "named"


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b'{"\\ud800": 1}'), ("a.csv", b"\x80,b\n"), ("a.json", b'[{"\\udfff": [{}]}]')]
)
def test_a_reason_may_speak_of_what_is_no_text(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert [each.partition(":")[0] for each in outcomes(tmp_path)] == ["no column text" if name == "a.csv" else "no text"]


def two_columns_of_a_name() -> pa.Table:
    return pa.Table.from_arrays([pa.array(["One."]), pa.array(["Two."])], ["text", "text"])


def in_year_ten_thousand() -> pa.Table:
    """A date that Python has no type for, between two that it has."""
    days = pa.array([0, 3_000_000, 1], pa.int32()).cast(pa.date32())
    return pa.table({"id": days, "text": ["One.", "Two.", "Three."]})


def not_utf8() -> pa.Table:
    buffers = [None, pa.py_buffer(np.array([0, 4, 5], np.int32).tobytes()), pa.py_buffer(b"One.\xff")]
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 2, buffers)})


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (two_columns_of_a_name(), ["2 columns named text: rename all but one"]),
        (in_year_ten_thousand(), ["One.", "cannot be read: OverflowError date value out of range", "Three."]),
        (not_utf8(), ["One.", "not UTF-8: byte 0 of a field"]),
        (pa.table({"id": [b"\xff"], "text": ["x"]}), ["not UTF-8: byte 0 of a field"]),
        (pa.table({"body": ["x"]}), ["no column text: of body name the text's with `--set reading.text_field=NAME`"]),
        (pa.table({"text": pa.array([], pa.string())}), ["empty"]),
    ],
)
def test_what_cannot_be_read_is_a_reject_and_stops_nothing(tmp_path: Path, table: pa.Table, expected: list[str]) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("After.")
    assert outcomes(tmp_path) == [*expected, "After."]


def test_columns_that_are_not_read_may_be_of_any_kind(tmp_path: Path) -> None:
    other = pa.Table.from_arrays([pa.array(["One."]), pa.array([1]), pa.array([[{"a": 2}]])], ["text", "x", "x"])
    pq.write_table(other, tmp_path / "a.parquet")
    assert outcomes(tmp_path) == ["One."]


def test_an_exception_that_nobody_foresaw_is_the_files_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.html", "c.txt"):
        (tmp_path / name).write_text("<p>Text.")

    def parse(parser: Any, kind: str, data: bytes) -> Any:
        raise ZeroDivisionError("foreign code")

    monkeypatch.setattr("core.text.parsing.Parser._ask", parse)
    assert outcomes(tmp_path) == ["<p>Text.", "cannot be read: ZeroDivisionError foreign code", "<p>Text."]


JSON: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "one object": ('{"text": "One.", "title": "T"}', {"a.json": ("T", "One.")}),
    "one object with a name": ('\ufeff\n{"id": 5, "text": "One."}\n', {"5": ("", "One.")}),
    "indented": (json.dumps({"text": "One.", "more": [{"a": "]"}]}, indent=2), {"a.json": ("", "One.")}),
    "array": ('[{"text": "a, [b"}, {"id": "x", "text": "\\"}"}]', {"a.json#0": ("", "a, [b"), "x": ("", '"}')}),
    "array of one": ('[\n  {"text": "One."}\n]\n', {"a.json#0": ("", "One.")}),
    "lines": ('{"text": "One."}\n{"text": "Two."}\n', {"a.json#0": ("", "One."), "a.json#1": ("", "Two.")}),
    "indented objects": ('{\n"text": "One."\n}\n{\n"text": "Two."\n}', {"a.json#0": ("", "One."), "a.json#1": ("", "Two.")}),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("kind", JSON)
def test_json_of_every_layout_is_read(tmp_path: Path, kind: str, encoding: str) -> None:
    text, expected = JSON[kind]
    (tmp_path / "a.json").write_bytes(text.removeprefix("\ufeff" * (encoding == "utf-16")).encode(encoding))
    assert documents(tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["empty"]),
        (" [ ] ", ["empty"]),
        ('[{"text": "One."}, {"text": nope}, {"text": "Three."}]', ["One.", "not JSON", "Three."]),
        ('[{"text": "One."}, 5, "x", {"text": "Four."}]', ["One.", "not a JSON object", "not a JSON object", "Four."]),
        ('[{"text": "One."}, {"text": "Tw', ["One.", "not JSON: the file ends within a value"]),
        ('[{"text": "One."},', ["One.", "not JSON: the file ends within a value"]),
        ('[{"text": "One."}, {"text": "' + "x" * 500_000 + '"}, {"text": "Three."}]', ["One.", "too large", "Three."]),
        ('{"text": "One."} and {"text": "Two."}', ["One.", "not JSON"]),
        ('{"data": [{"title": "x", "paragraphs": [{"context": "y"}]}]}', ["no text: the documents seem to be in `data`"]),
        ("nothing of the kind", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
    ],
)
def test_json_that_is_damaged_harms_no_other_document(tmp_path: Path, text: str, expected: list[str]) -> None:
    (tmp_path / "a.json").write_text(text)
    found = outcomes(tmp_path, Reading(max_document_bytes=200_000))
    assert begin_alike(found, expected), found


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\[]{},: é', max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\', max_size=2), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.lists(st.dictionaries(st.text("ab", max_size=1), VALUES, max_size=2), max_size=4), st.integers(1, 9), st.data())
def test_an_array_falls_into_its_elements_wherever_it_is_cut(elements: list[Any], chunk: int, data: st.DataObject) -> None:
    indent = data.draw(st.sampled_from([None, 1]))
    array = json.dumps(elements, indent=indent, ensure_ascii=False).encode()
    assert [json.loads(value) for value, _, _ in cut(array, chunk)] == elements
    lines = "\n".join(json.dumps(each, indent=indent) for each in elements).encode()
    assert [json.loads(value) for value, _, _ in cut(lines, chunk)] == elements


def cut(text: bytes, chunk: int) -> list[tuple[bytes, bool, bool]]:
    """The values of a text that is read a few bytes at a time."""
    stream = io.BytesIO(text)
    return list(json_values.values(lambda size: stream.read(chunk), 10_000))


TABLE = [["id", "text", "title"], ["a", 'A "quoted" text,\nof two lines;\tand a tab', "T"], ["007", "é", ""]]
READ = {"a": ("T", 'A "quoted" text,\nof two lines;\tand a tab'), "007": ("", "é")}


def written(delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting).writerows(TABLE)
    return text.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", written(",").encode()),
        ("a.csv", written(",", csv.QUOTE_ALL).encode()),
        ("a.csv", codecs.BOM_UTF8 + written(";").encode()),
        ("a.csv", b"sep=;\r\n" + written(";").encode()),
        ("a.csv", written("\t").encode("utf-16")),
        ("a.tsv", written("\t").encode()),
        ("a.TSV.gz", gzip.compress(written("\t").encode(), mtime=0)),
        ("a.csv.zst", zstd(written(",").encode())),
    ],
)
def test_tables_of_text_are_read(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert documents(tmp_path) == READ


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("id,text\n", ["empty"]),
        ("", ["empty"]),
        ("id,body\n1,x\n", ["no column text: of id, body name"]),
        ("text,text\nx,y\n", ["2 columns named text"]),
        (
            "id,text\n1,Hello, world\n2,Good\n\n3\n4,\n",
            ["not CSV: 3 fields where the header has 2", "Good", "not CSV: 1 fields", "empty"],
        ),
        ('id,text\n1,"a" b\n2,Good\n', ["not CSV: ',' expected after '\"'", "Good"]),
        ('id,text\n1,Good\n2,"never closed\n3,x\n', ["Good", "not CSV: unexpected end of data, from line 3 on"]),
        ("id,text\n1,caf\udce9\n2,Good\n", ["not UTF-8: save the file in UTF-8", "Good"]),
        ("id,text\n1,Good\n2," + "x" * 2000 + "\n3,y\n", ["Good", "too large: a line of more than 1000 characters"]),
        ("text\n" + "é" * 900 + "\nGood\n", ["too large: more than 1000 bytes", "Good"]),
    ],
)
def test_tables_that_are_damaged_lose_no_text_silently(tmp_path: Path, table: str, expected: list[str]) -> None:
    (tmp_path / "a.csv").write_bytes(table.encode(errors="surrogateescape"))
    found = outcomes(tmp_path, Reading(max_document_bytes=1000))
    assert begin_alike(found, expected), found


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(max_examples=200)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from([".csv", ".tsv"]))
def test_a_table_that_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], form: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"written{form}"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if form == ".tsv" else ",").writerows([("text", "title"), *cells])
    found = [(row["title"], row["text"]) for row in rows_of(path) if row["text"] is not None]
    assert found == [(title, text) for text, title in cells if text.strip()]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
def test_single_documents_may_be_compressed(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    contents = {
        "a.txt": b"Text.",
        "b.md": b"# Title\nMarkdown.",
        "c.html": b"<title>Page</title><p>HTML.",
        "d.pdf": pdf(["PDF."], "Paper"),
        "e.json": b'{"text": "Object."}',
    }
    for name, content in contents.items():
        (tmp_path / f"{name}{suffix}").write_bytes(compress(content))
    texts = [("", "Text."), ("Title", "# Title\nMarkdown."), ("Page", "HTML."), ("Paper", "PDF."), ("", "Object.")]
    assert documents(tmp_path) == dict(zip((f"{name}{suffix}" for name in contents), texts, strict=True))
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"x" * 1001))
    (tmp_path / f"b.md{suffix}").write_bytes(compress(b"x" * 500)[:-5])
    (tmp_path / f"c.html{suffix}").write_bytes(b"not compressed")
    found = outcomes(tmp_path, Reading(max_document_bytes=1000))[:3]
    assert [each.partition(":")[0] for each in found] == ["too large", "cannot be read", "cannot be read"]


def test_a_file_without_a_kind_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("x")
    (tmp_path / "a.parquet.gz").write_text("x")
    assert outcomes(tmp_path) == [
        "no reader for this kind of file: no suffix, rename it to .txt or whatever it is",
        "no reader for this kind of file: .parquet.gz",
    ]
