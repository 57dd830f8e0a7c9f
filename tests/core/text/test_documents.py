import json
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.text.documents import MAX_BYTES, Document, Window, clean_name, content_hash, normalise, segments, windows
from tests.places import GOLDEN

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def document(text: str = "text", title: str = "", name: str = "name") -> Document:
    return Document(tenant="tenant", collection="collection", name=name, title=title, text=text)


def test_normal_form() -> None:
    assert normalise("e\u0301\r\nb \t\rc\0d\u3000\n\n  e\n \n") == "\u00e9\nb\nc d\n\n  e"


@given(TEXTS)
def test_normalising_is_idempotent(text: str) -> None:
    normal = normalise(text)
    assert normalise(normal) == normal
    assert unicodedata.is_normalized("NFC", normal)
    assert not set("\r\0") & set(normal)


def test_a_long_run_of_blanks_takes_linear_time() -> None:
    assert normalise("a" + " " * 2_000_000 + "b") == "a" + " " * 2_000_000 + "b"


def test_spellings_of_one_content_hash_alike() -> None:
    first = document("Caf\u00e9\nopen", "A title")
    second = document("Cafe\u0301 \r\nopen\n\n", " A\n title ", name="other")
    assert first.content_hash == second.content_hash
    assert (second.title, second.text) == ("A title", "Caf\u00e9\nopen")


def test_title_and_text_do_not_run_together() -> None:
    assert document("bc", "a").content_hash != document("c", "ab").content_hash
    assert content_hash("", "x") != content_hash("x", "")


def test_the_hash_is_pinned() -> None:
    assert content_hash("A title", "text") == "d986017a7fe2ea751e82ef3a5aea0a6f6a049040adcb07ed955787b79dfb3301"


@pytest.mark.parametrize("text", ["", " \n\t", "\0", "\r\n"])
def test_a_document_without_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"'name' has no text"):
        document(text)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'name'.*character 1"):
        document("a\ud800")


@pytest.mark.parametrize("name", ["a/b:c", "../../etc/passwd", "日本語 \u3000", "👩\u200d💻", "%2F", "x" * MAX_BYTES["name"]])
def test_any_printable_name_is_kept(name: str) -> None:
    assert document(name=name).name == name


def test_names_are_one_in_every_normal_form() -> None:
    assert document(name="Cafe\u0301").name == document(name="Caf\u00e9").name


@pytest.mark.parametrize("what", ["tenant", "collection", "name"])
@pytest.mark.parametrize("value", ["", "  ", "a\nb", "a\0", "\x7f", "a\u2028b", "\ud800", "x" * 2000])
def test_bad_names_are_refused(what: str, value: str) -> None:
    names = {"tenant": "t", "collection": "c", "name": "n"} | {what: value}
    with pytest.raises(ValueError, match=f"the {what} "):
        Document(**names, text="text")


def test_the_longest_name_counts_bytes() -> None:
    with pytest.raises(ValueError, match="129 bytes"):
        clean_name("tenant", "é" * 64 + "x")


@given(st.integers(0, 5000), st.integers(1, 300), st.data())
def test_windows_cover_exactly(length: int, limit: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, limit - 1))
    covers = windows(length, limit, overlap)
    if length == 0:
        assert covers == []
        return
    assert (covers[0].start, covers[-1].end) == (0, length)
    assert all(after.start == before.end - overlap for before, after in pairwise(covers))
    sizes = [window.end - window.start for window in covers]
    assert max(sizes) <= limit and max(sizes) - min(sizes) <= 1
    if len(covers) > 1:
        assert min(sizes) > overlap
        assert (len(covers) - 1) * (limit - overlap) + overlap < length, "fewer windows would do"


def test_windows_leave_no_small_tail() -> None:
    assert windows(1025, 1024) == [Window(0, 513), Window(513, 1025)]
    assert windows(1024, 1024, 1000) == [Window(0, 1024)]


@pytest.mark.parametrize(("length", "limit", "overlap"), [(-1, 4, 0), (4, 0, 0), (4, 4, 4), (4, 4, -1)])
def test_impossible_windows_are_refused(length: int, limit: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=r"is -1|limit is"):
        windows(length, limit, overlap)


def test_released_segments_are_the_public_codes() -> None:
    cases = json.loads((GOLDEN / "segments/lift_segments.json").read_text())["cases"]
    assert len(cases) == 13
    for case in cases:
        size, stride = case["len_segment"] * case["block_size"], case["len_offset"] * case["block_size"]
        covers = segments(case["length"], size, stride, "released")
        assert [list(segment) for segment in covers] == case["segments"]
        assert (len(covers), sum(end - start for start, end in covers)) == (case["count"], case["trained_tokens"])


@given(st.integers(0, 5000), st.integers(1, 300), st.data())
def test_exact_segments_end_at_the_last_token_and_each_brings_something_new(length: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    covers = segments(length, size, stride)
    released = segments(length, size, stride, "released")
    assert covers == released[: len(covers)]
    if length == 0:
        assert covers == []
        return
    assert (covers[0].start, covers[-1].end) == (0, length)
    assert all(after.start == before.start + stride <= before.end < after.end for before, after in pairwise(covers))
    assert all(end - start == size for start, end in covers[:-1])
    assert covers[-1].end - covers[-1].start > size - stride or len(covers) == 1


@pytest.mark.parametrize(("length", "size", "stride"), [(-1, 4, 2), (4, 4, 0), (4, 4, 5), (4, 0, 0)])
def test_impossible_segments_are_refused(length: int, size: int, stride: int) -> None:
    with pytest.raises(ValueError, match=r"length is -1|size is"):
        segments(length, size, stride)
