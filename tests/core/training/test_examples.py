"""Examples against the numbers of the released SHINE collators, and batches against what they promise."""

import json
import random
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.text.prompts import IGNORED, Limits
from core.training.examples import (
    Example,
    QuestionAnswer,
    collate,
    composed_example,
    in_context_example,
    multi_turn_example,
    question_examples,
)
from core.training.pretraining import Pretraining, completion, packing, pretraining_example, reconstruction, shortened
from tests import places

GOLDEN: dict[str, Any] = json.loads((places.GOLDEN / "segments/shine_pretrain_examples.json").read_text())
CASES = GOLDEN["cases"]
HARBOUR, DOCTOR = CASES["recon_group_of_two"]["batch"][0]["textlist"]
QAS = [QuestionAnswer("Who ?", "Doctor Ansa Rill"), QuestionAnswer("question ?", "in 1874")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The golden file's word-level tokenizer, under ChatML."""
    model = Tokenizer(models.WordLevel(GOLDEN["vocab"], unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(GOLDEN["split_pattern"]), "isolated")
    model.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token=GOLDEN["pad_token"])
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def limits_of(case: dict[str, Any]) -> Limits:
    return Limits(context_tokens=case["context_max_length"], conversation_tokens=case["conversation_max_length"])


def unpadded(golden: dict[str, Any]) -> Example:
    """A golden example without its (left) padding."""
    context, conversation = sum(golden["evidence_attention_mask"]), sum(golden["input_attention_mask"])
    return Example(
        tuple(golden["evidence_ids"][-context:]),
        tuple(golden["input_ids"][-conversation:]),
        tuple(golden["labels"][-conversation:]),
    )


def spans(example: Example) -> list[list[int]]:
    """Supervised [start, end)."""
    edges = [False, *(label != IGNORED for label in example.labels), False]
    starts = [place for place, (before, here) in enumerate(pairwise(edges)) if here and not before]
    ends = [place for place, (before, here) in enumerate(pairwise(edges)) if before and not here]
    return [list(span) for span in zip(starts, ends, strict=True)]


SINGLE = [name for name in CASES if name not in ("recon_group_of_two", "ift_two_turns")]


@pytest.mark.parametrize("name", SINGLE)
def test_golden_single_texts(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    case = CASES[name]
    for entry, golden in zip(case["batch"], case["examples"], strict=True):
        text = entry["text"] if "text" in entry else entry["textlist"][0]
        if case["completion_freq"]:
            example = completion(tokenizer, text, case["ratio"][0], limits_of(case))
        else:
            example = reconstruction(tokenizer, text, limits_of(case))
        assert example == unpadded(golden)
        pad = len(golden["input_ids"]) - len(example.ids)
        assert [[start + pad, end + pad] for start, end in spans(example)] == golden["supervised_spans"]
        share = case["ratio"][0]
        pretraining = Pretraining(completion_frequency=case["completion_freq"], removed_share_min=share, removed_share_max=share)
        drawn = pretraining_example(tokenizer, [text], random.Random(0), limits_of(case), pretraining=pretraining)
        assert drawn == example


def test_golden_group_is_one_of_the_orders(tokenizer: PreTrainedTokenizerFast) -> None:
    case = CASES["recon_group_of_two"]
    pretraining = Pretraining(completion_frequency=0)
    made = {
        pretraining_example(tokenizer, [HARBOUR, DOCTOR], random.Random(seed), limits_of(case), pretraining=pretraining)
        for seed in range(40)
    }
    assert len(made) == 4, "two orders of contexts times two orders of turns"
    golden = unpadded(case["examples"][0])
    assert golden in made
    pad = len(case["examples"][0]["input_ids"]) - len(golden.ids)
    assert [[start + pad, end + pad] for start, end in spans(golden)] == case["examples"][0]["supervised_spans"]


def test_golden_questions_as_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    case = CASES["ift_two_turns"]
    example = multi_turn_example(tokenizer, case["batch"][0]["evidence"], QAS, limits_of(case))
    assert example == unpadded(case["examples"][0])


def test_golden_masks_and_context_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    for case in CASES.values():
        examples = [unpadded(golden) for golden in case["examples"]]
        batch = collate(examples, GOLDEN["special_ids"]["<|endoftext|>"])
        width = batch.context_ids_BT.shape[1]
        for row, golden in enumerate(case["examples"]):
            assert batch.context_ids_BT[row].tolist() == golden["evidence_ids"][-width:]
            assert batch.context_mask_BT[row].tolist() == golden["evidence_attention_mask"][-width:]
            assert int(batch.mask_BT[row].sum()) == sum(golden["input_attention_mask"])


def test_golden_completion_split() -> None:
    for case in GOLDEN["completion_split"]:
        words = [f"w{i}" for i in range(case["words"])]
        kept = shortened(" ".join(words), case["removed_ratio"]).split()
        assert kept == words[: case["kept_words"]], case
    white = GOLDEN["completion_whitespace"]
    assert shortened(white["text"], white["removed_ratio"]) == white["kept"]


@pytest.mark.parametrize("case", GOLDEN["packing"], ids=lambda case: f"{len(case['token_lengths'])}x{case['max_len']}")
def test_golden_packing(case: dict[str, Any]) -> None:
    costs = [length + case["overhead_per_text"] for length in case["token_lengths"]]
    groups = packing(costs, case["max_len"], case["open_bins"])
    assert groups == case["groups"]


@given(costs=st.lists(st.integers(0, 130), max_size=60), max_length=st.integers(12, 100), open_bins=st.integers(1, 8))
def test_packing_loses_nothing_and_respects_the_limit(costs: list[int], max_length: int, open_bins: int) -> None:
    groups = packing(costs, max_length, open_bins)
    assert sorted(text for group in groups for text in group) == list(range(len(costs)))
    for group in groups:
        assert len(group) == 1 or sum(costs[text] for text in group) <= max_length


def test_packing_wants_a_bin() -> None:
    with pytest.raises(ValueError, match="give 1 or more"):
        packing([1], 10, open_bins=0)


def test_draws_follow_the_frequency_and_the_shares(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(7)
    texts = [" ".join(["ships"] * 50)] * 400
    kept = []
    for text in texts:
        example = pretraining_example(tokenizer, [text], rng)
        words = (len(example.context_ids) + 1) // 2
        asked = GOLDEN["special_ids"]["<COMP>" if words < 50 else "<RECON>"]
        assert asked in example.ids
        kept.append(words)
    removed = [50 - words for words in kept if words < 50]
    assert 160 <= len(removed) <= 240
    assert (min(removed), max(removed)) == (5, 15)


def test_a_seed_decides_an_example(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [HARBOUR, DOCTOR, HARBOUR]
    first = pretraining_example(tokenizer, texts, random.Random(3))
    assert first == pretraining_example(tokenizer, texts, random.Random(3))
    assert first != pretraining_example(tokenizer, texts, random.Random(4))


def test_a_group_names_its_texts_in_context_and_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    example = pretraining_example(tokenizer, [HARBOUR, DOCTOR], random.Random(0), pretraining=Pretraining(completion_frequency=1))
    assert example.context_ids.count(GOLDEN["special_ids"]["<|endoftext|>"]) == 1
    assert len(spans(example)) == 2
    supervised = {tokenizer.decode(example.labels[start : end - 2]) for start, end in spans(example)}
    assert supervised == {tokenizer.decode(tokenizer.encode(text)) for text in (HARBOUR, DOCTOR)}
    with pytest.raises(ValueError, match="at least one text"):
        pretraining_example(tokenizer, [], random.Random(0))


def test_questions_of_a_document_share_its_context(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [
        *question_examples(tokenizer, HARBOUR, QAS),
        *question_examples(tokenizer, DOCTOR, QAS[:1]),
        in_context_example(tokenizer, HARBOUR, QAS),
    ]
    batch = collate(examples, pad_id=1)
    assert batch.documents == 2
    assert batch.index_B.tolist() == [0, 0, 1, -1]
    assert batch.tokens == sum(example.tokens for example in examples) == 7 + 5 + 7 + 7 + 5


def test_contexts_read_in_windows_are_rows_that_stand_together(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = multi_turn_example(tokenizer, DOCTOR, QAS)
    parts = composed_example(tokenizer, f"{HARBOUR}\n\n{DOCTOR}", QAS, 20)
    assert parts.windows == [parts.context_ids[:end][start:] for start, end in pairwise([0, *accumulate(parts.window_sizes)])]
    assert len(parts.windows) > 2 and max(map(len, parts.windows)) <= 20
    assert (parts.ids, parts.labels) == (whole.ids, whole.labels)
    batch = collate([parts, whole, parts], pad_id=1)
    assert (batch.documents, batch.windows, batch.index_B.tolist()) == (2, (len(parts.windows), 1), [0, 1, 0])
    rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(batch.context_ids_BT, batch.context_mask_BT, strict=True)]
    assert rows == [*parts.windows, whole.context_ids]


def test_in_context_the_document_stands_in_the_first_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    example = in_context_example(tokenizer, HARBOUR, QAS)
    assert example.context_ids == ()
    text = tokenizer.encode(HARBOUR) + tokenizer.encode("\n\n") + tokenizer.encode(QAS[0].question)
    assert list(example.ids[3 : 3 + len(text)]) == text
    assert len(spans(example)) == 2
    cut = in_context_example(tokenizer, HARBOUR, QAS, Limits(context_tokens=5, conversation_tokens=100))
    assert len(cut.ids) == len(example.ids) - len(tokenizer.encode(HARBOUR)) + 5
    assert in_context_example(tokenizer, HARBOUR, QAS, Limits(context_tokens=5, conversation_tokens=9)).tokens == 0
    with pytest.raises(ValueError, match="at least one question"):
        in_context_example(tokenizer, HARBOUR, [])


def test_a_batch_of_bare_conversations_has_no_contexts(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate([in_context_example(tokenizer, HARBOUR, QAS)], pad_id=1)
    assert batch.documents == 0
    assert batch.context_ids_BT.shape == (0, 0)
    moved = batch.to("meta")
    assert moved.ids_BT.device.type == "meta"
    assert moved.targets_2T.device.type == "meta"
    assert moved.index_B.device.type == "cpu", "whoever attaches adapters looks into it"
    with pytest.raises(ValueError, match="at least one example"):
        collate([], pad_id=0)


def test_pretraining_shares_are_checked() -> None:
    with pytest.raises(ValueError, match="removed_share_min is above"):
        Pretraining(removed_share_min=0.4)


token_lists = st.lists(st.integers(0, 9), max_size=9).map(tuple)
any_example = st.builds(
    lambda context_ids, rows: Example(context_ids, tuple(i for i, _ in rows), tuple(i if s else IGNORED for i, s in rows)),
    token_lists,
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=9),
)


@settings(max_examples=60, deadline=None)
@given(examples=st.lists(any_example, min_size=1, max_size=6), multiple=st.integers(1, 8))
def test_collate_keeps_every_token_and_only_pads(examples: list[Example], multiple: int) -> None:
    batch = collate(examples, pad_id=5, pad_to_multiple=multiple)
    assert batch.ids_BT.shape == batch.mask_BT.shape == batch.labels_BT.shape
    assert batch.context_ids_BT.shape == batch.context_mask_BT.shape
    assert batch.ids_BT.shape[1] % multiple == batch.context_ids_BT.shape[1] % multiple == 0
    assert batch.documents == len({example.context_ids for example in examples} - {()})
    assert batch.tokens == sum(example.tokens for example in examples)
    targets = [(row, place) for row, each in enumerate(examples) for place, i in enumerate(each.labels[1:]) if i != IGNORED]
    assert list(map(tuple, batch.targets_2T.T.tolist())) == targets
    for row, example in enumerate(examples):
        length = len(example.ids)
        assert batch.ids_BT[row, :length].tolist() == list(example.ids)
        assert batch.labels_BT[row, :length].tolist() == list(example.labels)
        assert batch.mask_BT[row].tolist() == [1] * length + [0] * (batch.ids_BT.shape[1] - length)
        assert (batch.ids_BT[row, length:] == 5).all()
        assert (batch.labels_BT[row, length:] == IGNORED).all()
        context = int(batch.index_B[row])
        assert (context == -1) == (not example.context_ids)
        if context >= 0:
            used = len(example.context_ids)
            width = batch.context_ids_BT.shape[1]
            assert batch.context_ids_BT[context, width - used :].tolist() == list(example.context_ids)
            assert batch.context_mask_BT[context].tolist() == [0] * (width - used) + [1] * used
    assert all(tensor.dtype == torch.int64 for tensor in (batch.ids_BT, batch.context_ids_BT, batch.labels_BT, batch.index_B))
