"""What a model sees: the same ids in training and at inference, under the templates of several families."""

import json
import string

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from core.text.prompts import (
    IGNORED,
    Instructions,
    Limits,
    Turn,
    clean_answer,
    cut_text,
    encode,
    encode_context,
    head_tail,
    in_context,
    prompt,
    render,
)
from tests.places import GOLDEN

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3: an empty think block in the generation prompt and in the last answer, none in past answers.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{{ bos_token if loop.first else '' }}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
TINY = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
HOSTILE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Your answer: {% endif %}"
)
REWRITING = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content if loop.last or m.role == 'user' else '(an old answer)' }}|\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "llama": LLAMA, "tiny": TINY}
ENDS = {"chatml": "<|im_end|>\n", "thinking": "<|im_end|>\n", "llama": "<|eot|>", "tiny": "<|im_end|>\n"}
TURNS = [Turn("Who opened the harbour?", "Ansa Rill"), Turn("Rill<|im_end|>, when?", "when"), Turn("Say when", "Ansa Rill")]


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges would reach over the places where pieces meet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["assistant\nAnsa Rill", "assistant Ansa", "\n\nAnsa Rill", "who, when?"] * 50, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|im_end|>")
    made.chat_template = template
    return made


def messages_of(turns: list[Turn]) -> list[dict[str, str]]:
    roles = [({"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}) for turn in turns]
    return [message for pair in roles for message in pair]


def supervised_texts(tokenizer: PreTrainedTokenizerFast, ids: list[int], labels: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for place, label in enumerate(labels):
        if label != IGNORED:
            assert label == ids[place]
            if place == 0 or labels[place - 1] == IGNORED:
                runs.append([])
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("family", TEMPLATES)
def test_every_answer_and_its_end_mark_is_supervised_and_nothing_else(family: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[family])
    ids, labels = render(tokenizer, TURNS)
    blank = " " if family == "tiny" else ""
    assert supervised_texts(tokenizer, ids, labels) == [blank + turn.assistant + ENDS[family] for turn in TURNS]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_inference_sees_what_training_saw(family: str, turns: int) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[family])
    ids, labels = render(tokenizer, TURNS[:turns])
    asked = prompt(tokenizer, messages_of(TURNS[:turns])[:-1])
    assert ids[: len(asked)] == asked
    assert labels[len(asked) - 1] == IGNORED
    assert labels[len(asked) :] == ids[len(asked) :]


@pytest.mark.parametrize("family", ["chatml", "llama", "tiny"])
def test_the_text_is_the_template_s_own(family: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[family])
    ids, _ = render(tokenizer, TURNS)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages_of(TURNS), tokenize=False)


def test_a_past_answer_keeps_its_think_block() -> None:
    tokenizer = byte_tokenizer(THINKING)
    ids, _ = render(tokenizer, TURNS)
    assert tokenizer.decode(ids) == "".join(
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{answer}<|im_end|>\n"
        for user, answer in TURNS
    )


def test_an_empty_past_answer_is_found_under_a_template_that_rewrites_the_past() -> None:
    tokenizer = byte_tokenizer(THINKING)
    ids, labels = render(tokenizer, [Turn("a", ""), Turn("b", "c")])
    assert tokenizer.decode(ids).count("<|im_start|>user") == 2
    assert supervised_texts(tokenizer, ids, labels) == ["<|im_end|>\n", "c<|im_end|>\n"]


def test_a_system_message_leads_the_prompt() -> None:
    tokenizer = byte_tokenizer(CHATML)
    ids = prompt(tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}])
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == text


def test_templates_that_are_not_prefix_consistent_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not prefix-consistent.*opens the assistant message"):
        render(byte_tokenizer(HOSTILE), TURNS[:1])
    rewriting = byte_tokenizer(REWRITING)
    render(rewriting, TURNS[:1])
    with pytest.raises(ValueError, match=r"not prefix-consistent.*one conversation per question"):
        render(rewriting, TURNS[:2])


def test_what_cannot_be_a_prompt_is_refused_with_advice() -> None:
    tokenizer = byte_tokenizer(CHATML)
    for messages, advice in [
        ([], "at least one message"),
        ([{"role": "teacher", "content": "x"}], "system, user, assistant, tool"),
        ([{"content": "x"}], "system, user, assistant"),
        ([{"role": "user", "content": None}], "give a string"),
        (messages_of(TURNS), "end with the message"),
    ]:
        with pytest.raises(ValueError, match=advice):
            prompt(tokenizer, messages)
    with pytest.raises(ValueError, match="at least one turn"):
        render(tokenizer, [])
    with pytest.raises(ValueError, match=r"has no chat template.*set tokenizer.chat_template"):
        render(byte_tokenizer(None), TURNS)
    refusing = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="refuses this conversation: roles must alternate"):
        prompt(refusing, [{"role": "user", "content": "x"}])


def test_a_context_is_raw_text_cut_on_the_right() -> None:
    tokenizer = byte_tokenizer(CHATML)
    text = "Ansa Rill wrote nine books."
    ids = encode(tokenizer, text)
    assert encode_context(tokenizer, text, Limits()) == ids
    assert encode_context(tokenizer, text, Limits(context_tokens=5)) == ids[:5]
    assert tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="document is empty"):
        encode_context(tokenizer, "", Limits())


def test_cut_text_keeps_what_the_context_keeps() -> None:
    tokenizer = byte_tokenizer(CHATML)
    text = "Ansa Rill wrote " + string.ascii_letters
    for tokens in (1, 7, 20, 500):
        limits = Limits(context_tokens=tokens)
        cut = cut_text(tokenizer, text, limits)
        assert cut == tokenizer.decode(encode_context(tokenizer, text, limits))
    assert cut_text(tokenizer, "Zürich", Limits(context_tokens=2)) == "Zü"  # the limit falls between the two bytes of ü
    assert cut_text(tokenizer, text, Limits(context_tokens=500)) == text


def test_head_tail_matches_lift() -> None:
    for case in json.loads((GOLDEN / "segments/lift_contextualised.json").read_text())["head_tail_truncation"]:
        expected = []
        for part in case["parts"]:
            expected += [-1] if part[0] == "special" else range(part[1], part[2])
        cut = head_tail(range(case["length"]), case["model_max_length"], [-1])
        assert cut == expected
        assert len(cut) == case["total"]
    with pytest.raises(ValueError, match="raise the limit"):
        head_tail(range(9), 4, [-1, -2, -3])


def test_small_texts() -> None:
    assert in_context("The text.", "Who?") == "The text.\n\nWho?"
    assert clean_answer(" Ansa Rill\n") == "Ansa Rill"
    assert (Instructions().reconstruct, Instructions().complete) == ("<RECON>", "<COMP>")
