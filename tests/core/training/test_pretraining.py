"""Packing counts what tokenizer and template really make of a text: no token is lost, whatever is packed."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from core.text.prompts import IGNORED, Limits, Turn, encode, render
from core.training.examples import Example
from core.training.pretraining import Packer, Pretraining

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "with a system prompt": (
        "<|im_start|>system\nYou are a helpful assistant made of many words.<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "trimming, dearer later": (
        "{% for m in messages %}{% if not loop.first and m.role == 'user' %}And then, some time later:\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
RECONSTRUCT = Pretraining(completion_frequency=0.0)


def byte_level(template: str) -> PreTrainedTokenizerFast:
    """Pieces of bytes, with merges across what a text and a template join; `<RECON>` is plain text to it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>", "<|im_end|>"]
    )
    made.train_from_iterator(["the harbour and the ships of the town. \n\n" * 9, "<RECON><COMP>"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: byte_level(template) for name, template in TEMPLATES.items()}
SENTENCES = st.sampled_from(["The harbour has ships. ", "Ä 漢字 🚢.\n\n", "x" * 40, " \n", "a", "Seven towns! "])
TEXTS = st.lists(
    st.one_of(st.text(min_size=1, max_size=50), st.lists(SENTENCES, min_size=1, max_size=30).map("".join)), max_size=12
)


def answers(example: Example) -> list[tuple[int, ...]]:
    """The supervised runs of a conversation."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tuple(run) for run in runs if run]


def parted(example: Example, separator: int) -> list[tuple[int, ...]]:
    """The context's texts."""
    parts: list[list[int]] = [[]]
    for token in example.context_ids:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return list(map(tuple, parts))


def answer_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    _, labels = render(tokenizer, [Turn("<RECON>", text)])
    return tuple(label for label in labels if label != IGNORED)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40)
@given(texts=TEXTS, group=st.sampled_from([0, 150, 180, 300]), room=st.integers(150, 320), seed=st.integers(0, 9))
def test_nothing_that_is_packed_is_lost(template: str, texts: list[str], group: int, room: int, seed: int) -> None:
    tokenizer = TOKENIZERS[template]
    limits = Limits(context_tokens=room, conversation_tokens=room + 30)
    packer = Packer(tokenizer, group, limits, pretraining=RECONSTRUCT)
    parts = [packer.passages(text) for text in texts if text.strip()]
    for text, passages in zip([text for text in texts if text.strip()], parts, strict=True):
        assert "".join("".join(part.text for part in passages).split()) == "".join(text.split())
    flat = [part for passages in parts for part in passages]
    examples = packer.examples(flat, random.Random(seed))
    most = (min(group, room), min(group, room + 30)) if group else (room, room + 30)
    assert all(len(example.context_ids) <= most[0] and len(example.ids) <= most[1] for example in examples)
    assert Counter(a for example in examples for a in answers(example)) == Counter(
        answer_ids(tokenizer, part.text) for part in flat
    )
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert Counter(part for example in examples for part in parted(example, separator)) == Counter(
        tuple(encode(tokenizer, part.text)) for part in flat
    )
    if not group:
        assert len(examples) == len(flat)


def test_groups_are_filled(template: str = "chatml") -> None:
    """Sixty texts of about 40 tokens in groups of 200: each group has no room for another text."""
    tokenizer = TOKENIZERS[template]
    rng = random.Random(0)
    texts = [" ".join(rng.choice(["harbour", "ships", "town", "the"]) for _ in range(rng.randint(8, 16))) for _ in range(60)]
    packer = Packer(tokenizer, 200, pretraining=RECONSTRUCT)
    parts = [part for text in texts for part in packer.passages(text)]
    examples = packer.examples(parts, random.Random(0))
    used = sorted(len(example.ids) for example in examples)
    assert len(parts) == 60 and used[-1] <= 200
    assert sum(used) / len(used) > 150 and len(examples) < 25


def test_a_text_that_fits_is_one_passage_and_a_long_one_is_cut_at_sentences() -> None:
    tokenizer = TOKENIZERS["chatml"]
    packer = Packer(tokenizer, limits=Limits(context_tokens=60, conversation_tokens=150))
    short = "The harbour has ships."
    assert [part.text for part in packer.passages(short)] == [short]
    long = "The harbour of the town has ships. " * 9
    parts = [part.text for part in packer.passages(long)]
    assert len(parts) > 1 and "".join(parts) == long
    assert all(part.strip().endswith("ships.") for part in parts)


def test_completion_is_asked_for_in_full() -> None:
    tokenizer = TOKENIZERS["chatml"]
    packer = Packer(tokenizer, 200, pretraining=Pretraining(completion_frequency=1.0))
    texts = [f"The town number {number} has ships of its own and a harbour." for number in range(20)]
    parts = [part for text in texts for part in packer.passages(text)]
    examples = packer.examples(parts, random.Random(0))
    assert sorted(a for example in examples for a in answers(example)) == sorted(answer_ids(tokenizer, text) for text in texts)
    assert all(len(example.ids) <= 200 for example in examples)


@pytest.mark.parametrize(("text", "limits"), [("ships", Limits(conversation_tokens=5)), ("🚢" * 9, Limits(context_tokens=1))])
def test_limits_without_room_are_refused(text: str, limits: Limits) -> None:
    with pytest.raises(ValueError, match="raise"):
        Packer(TOKENIZERS["chatml"], limits=limits).passages(text)
