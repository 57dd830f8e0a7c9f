import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pipelines.world.tokenizer import build_tokenizer
from serve.text import AnswerText

TOKENIZER = build_tokenizer()
IDS = st.lists(st.one_of(st.integers(0, len(TOKENIZER) - 1), st.integers(5, 260)), max_size=40)


def pieces(ids: list[int], stops: tuple[str, ...] = (), strip: bool = False, tokenizer: object = TOKENIZER) -> list[str]:
    text = AnswerText(tokenizer, stops, strip)  # type: ignore[arg-type]
    out = []
    for token_id in ids:
        out.append(text.push(token_id))
        if text.stopped:
            return out
    return [*out, text.finish()]


@given(IDS)
def test_pieces_make_the_whole_answer(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert "".join(pieces(ids, strip=True)) == TOKENIZER.decode(ids, skip_special_tokens=True).strip()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@example("naïve 日本語 👩‍👩‍👧 end")
def test_no_piece_holds_half_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    out = pieces(ids)
    assert "".join(out) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in out)


def test_text_comes_at_once() -> None:
    ids = TOKENIZER.encode("The café opens", add_special_tokens=False)
    assert [bool(piece) for piece in pieces(ids)[:-1]].count(True) == len(ids) - 1
    assert pieces(ids)[-1] == ""


def test_rubbish_and_special_tokens_without_end_cost_little() -> None:
    continuation = TOKENIZER.encode("é", add_special_tokens=False)[-1]
    for token_id, expected in ((continuation, "\ufffd" * 5000), (TOKENIZER.all_special_ids[0], "")):
        text = AnswerText(TOKENIZER)
        assert "".join([text.push(token_id) for _ in range(5000)] + [text.finish()]) == expected
        assert len(text._ids) <= 64


def test_special_tokens_are_never_text() -> None:
    specials = TOKENIZER.all_special_ids
    ids = [specials[0], *TOKENIZER.encode(" red", add_special_tokens=False), *specials]
    assert "".join(pieces(ids)) == " red"


@given(st.text("ab c", max_size=40), st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_or_behind_it_is_given_out(text: str, stops: list[str]) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    letters = [TOKENIZER.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in text]
    for ids in (letters, TOKENIZER.encode(text, add_special_tokens=False)):
        assert TOKENIZER.decode(ids) == text
        assert "".join(pieces(ids, tuple(stops))) == expected


def test_stop_string_across_tokens() -> None:
    text = AnswerText(TOKENIZER, ("ed bl",))
    out = [text.push(token_id) for token_id in TOKENIZER.encode(" red blue green", add_special_tokens=False)]
    assert "".join(out) == " r" and text.stopped and text.finish() == ""


@pytest.mark.parametrize("text", ["é", "日本", "a 😀😀 b", "😀é日x😀"])
def test_byte_fallback(text: str) -> None:
    """Llama's way of spelling what is not in its vocabulary: a run of byte tokens is rubbish until it is whole."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "▁": 257, "a": 258, "b": 259, "x": 260}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids = fast.encode(text.replace(" ", "▁"), add_special_tokens=False)
    out = pieces(ids, tokenizer=fast)
    assert "".join(out) == text and not any("\ufffd" in piece for piece in out)
    rubbish = pieces([0xF0, 0x9F, 0x98, 0x80, *([0xFF] * 9), 260], tokenizer=fast)
    assert "".join(rubbish).startswith("😀") and "".join(rubbish).endswith("\ufffdx")
