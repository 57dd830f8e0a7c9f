"""Borders among tokens, and windows that end at them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.text.documents import Window, windows, windows_at_borders
from core.text.prompts import encode
from core.text.tokens import Tokens, read
from pipelines.world.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
TEXT = """# Title

First sentence is here. Second one, Dr. Who said. 東京です。そう。

- item one
- item two

The end. Or not."""


def pieces(tokens: Tokens, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[tuple[str, bool]]:
    """The text from border to border, and whether a paragraph begins there."""
    places = [0, *tokens.sentences, len(tokens.ids)]
    return [(tokenizer.decode(tokens.ids[start:end]), start in tokens.paragraphs) for start, end in pairwise(places)]


def test_borders_stand_before_sentences_and_what_introduces_them() -> None:
    assert pieces(read(TOKENIZER, TEXT)) == [
        ("# Title\n\n", False),
        ("First sentence is here.", True),
        (" Second one, Dr. Who said. ", False),
        ("東京です。", False),
        ("そう。\n\n", False),
        ("- item one\n", True),
        ("- item two\n\n", False),
        ("The end. ", True),
        ("Or not.", False),
    ]


def test_a_token_across_a_border_belongs_to_what_stands_before_or_hides_it() -> None:
    vocabulary = {"[UNK]": 0, "One": 1, ".\n\n": 2, "Two": 3, ". Three": 4, ".": 5, " Four": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\.\n\n|\. Three| Four|\."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokens = read(fast, "One.\n\nTwo. Three. Four.")
    assert tokens.ids == [1, 2, 3, 4, 5, 6, 5]
    assert (tokens.sentences, tokens.paragraphs) == ([2, 5], [2])


@given(st.text(st.sampled_from("ab.! \n東。é#-1")))
def test_borders_rise_within_the_text_and_the_ids_are_the_plain_ones(text: str) -> None:
    tokens = read(TOKENIZER, text)
    assert tokens.ids == encode(TOKENIZER, text)
    assert list(tokens.sentences) == sorted(set(tokens.sentences) & set(range(1, len(tokens.ids))))
    assert set(tokens.paragraphs) <= set(tokens.sentences)
    assert "".join(piece for piece, _ in pieces(tokens)) == text


BORDERS = st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=40)


@given(BORDERS, st.integers(1, 40), st.integers(1, 60), st.data())
def test_windows_cover_and_end_at_borders_wherever_one_is_within_reach(
    lengths: list[tuple[int, bool]], last: int, limit: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, limit - 1))
    sentences, paragraphs, length = [], [], 0
    for sentence, ends_paragraph in lengths:
        length += sentence
        sentences.append(length)
        paragraphs += [length] if ends_paragraph else []
    length += last
    covers = windows_at_borders(length, limit, overlap, sentences, paragraphs)
    assert (covers[0].start, covers[-1].end) == (0, length)
    assert all(0 < window.end - window.start <= limit for window in covers)
    before = 0
    for window, after in pairwise(covers):
        assert window.start < after.start <= window.end < after.end
        assert window.end - after.start <= overlap
        within_reach = [border for border in sentences if before < border <= before + limit]
        assert window.end in within_reach or not within_reach, "cut within a sentence that would have fitted"
        assert after.start in sentences or window.end not in sentences, "what is shared begins within a sentence"
        before = window.end
    assert covers == windows_at_borders(length, limit, overlap, sentences, paragraphs)


@given(st.integers(0, 3000), st.integers(1, 300), st.data())
def test_without_borders_cuts_are_even_and_share_the_whole_overlap(length: int, limit: int, data: st.DataObject) -> None:
    assert windows_at_borders(length, limit) == windows(length, limit)
    overlap = data.draw(st.integers(0, limit - 1))
    covers = windows_at_borders(length, limit, overlap)
    assert [window.end for window in covers[:1]] == [window.end for window in windows(length, limit, overlap)[:1]]
    assert all(before.end - after.start == overlap for before, after in pairwise(covers[:-1]))


@pytest.mark.parametrize(
    ("sentences", "paragraphs", "overlap", "covers"),
    [
        ([45, 52, 70], [], 0, [(0, 52), (52, 100)]),  # the sentence nearest to the even cut at 50
        ([45, 52, 60], [60], 0, [(0, 60), (60, 100)]),  # a paragraph before it
        ([45, 52, 70], [70], 0, [(0, 52), (52, 100)]),  # unless that is further away than a quarter of a window
        ([20, 95], [], 0, [(0, 20), (20, 95), (95, 100)]),  # whole sentences, whatever it takes
        ([40, 50], [], 10, [(0, 50), (40, 100)]),  # the last sentence is shared
        ([35, 50], [], 10, [(0, 50), (50, 100)]),  # one that is larger than the overlap is not
        ([10, 15, 30], [], 10, [(0, 30), (30, 100)]),
        ([50], [], 0, [(0, 50), (50, 100)]),
        ([], [], 0, [(0, 50), (50, 100)]),
    ],
)
def test_where_cuts_fall(sentences: list[int], paragraphs: list[int], overlap: int, covers: list[tuple[int, int]]) -> None:
    assert windows_at_borders(100, 75, overlap, sentences, paragraphs) == [Window(*cover) for cover in covers]


@pytest.mark.parametrize(("length", "limit", "overlap"), [(-1, 4, 0), (4, 0, 0), (4, 4, 4)])
def test_impossible_windows_are_refused(length: int, limit: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=r"is -1|limit is"):
        windows_at_borders(length, limit, overlap)


def test_a_long_text_is_cut_in_linear_time() -> None:
    sentences = list(range(20, 2_000_000, 20))
    assert len(windows_at_borders(2_000_000, 1000, 50, sentences, sentences[::7])) < 2_500
