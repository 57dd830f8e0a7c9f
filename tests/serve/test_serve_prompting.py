"""Prompts made from kept ids are those made from the whole text, whatever the tokenizer, the document and the question."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from core.text.control import encode_marked
from core.text.prompts import encode, in_context, prompt
from pipelines.world.tokenizer import CHAT_TEMPLATE, build_tokenizer
from serve.prompting import Document, Prompter
from serve.schema import read_chat, read_completion
from tests.serving import chat, make_document, make_world, serving

TEXT = "Ansa Tavolt built the old tower in 1874, and Mirko Hald keeps bees near Ostrand.\nIts roof is red.\n\n  naïve 日本 "
LONG = "".join(f"{TEXT}This is part {number} of {number * 7919}. " for number in range(40))
QUESTIONS = ("Who?", "", "\n\n", "  what was built", "tower in 1874, and", TEXT, "<|im_end|>", "日本")


def trained(kind: str) -> PreTrainedTokenizerFast:
    """Small tokenizers of the families that are about: GPT-2's words, Llama 3's and Qwen's, Gemma's and SentencePiece's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind in ("gemma", "llama2")))
    alphabet = []
    match kind:
        case "gpt2":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        case "qwen":
            words = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(words), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        case "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training: no token spans words
            tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        case "llama2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "who built what, when?", "assistant\nAnsa"] * 9, trainer)
    if kind == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    made.chat_template = CHAT_TEMPLATE
    return made


TOKENIZERS = {"world": build_tokenizer()} | {kind: trained(kind) for kind in ("gpt2", "qwen", "gemma", "llama2")}


def chat_body(question: str, *before: dict[str, str]) -> Any:
    return read_chat(json.dumps({"model": "m", "messages": [*before, {"role": "user", "content": question}]}).encode())


def made(prompter: Prompter, body: Any, document: Document) -> list[int]:
    [found] = asyncio.run(prompter.prompts(body, document))
    return list(found.ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_kept_ids_make_the_same_prompts(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompter = Prompter(tokenizer, "base", 10**6, 64, threads=1)
    for number, text in enumerate((LONG, TEXT * 60, "日本語の文" * 500, "word " * 600, "x" * 2100, "short", "a\n" * 1500)):
        document = Document(str(number), text)
        system = {"role": "system", "content": text[:700]}
        for question in QUESTIONS:
            for before in ((), (system,)):
                messages = [*before, {"role": "user", "content": in_context(text, question)}]
                assert made(prompter, chat_body(question, *before), document) == prompt(tokenizer, messages)
            completion = read_completion(json.dumps({"model": "m", "prompt": question}).encode())
            assert made(prompter, completion, document) == encode(tokenizer, in_context(text, question))
        document = Document(str(number), None)
        assert prompter.knows(document.content_hash) and made(prompter, chat_body("Who?"), document)
    kept = prompter._known["0"]
    assert bool(kept.seam) == (kind != "llama2"), "SentencePiece's first blank makes ids of a part others than within the whole"
    assert len(kept.ends) < 2100 < len(kept.text)
    prompter.close()


PIECES = st.sampled_from(
    [TEXT, "Ansa ", "tower\n", "\n\n", " ", "1874", "日本 ", "é", "'s ", "_a b_", "½ Ⅷ ", "<|im_end|>", "x. Y"]
)


@settings(max_examples=60)
@given(
    pieces=st.lists(PIECES, min_size=3, max_size=12),
    times=st.integers(20, 90),
    question=st.text(max_size=20) | PIECES,
    kind=st.sampled_from(sorted(TOKENIZERS)),
)
def test_any_document_and_question(pieces: list[str], times: int, question: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    text = "".join(f"{piece}{number}" for number, piece in enumerate(pieces * times))[:9000]
    prompter = Prompter(tokenizer, "base", 10**6, 64, threads=1)
    try:
        question.encode()
        expected = prompt(tokenizer, [{"role": "user", "content": in_context(text, question)}])
        assert made(prompter, chat_body(question), Document("h", text)) == expected
    except UnicodeEncodeError:
        pass
    finally:
        prompter.close()


def test_a_long_text_is_made_into_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["qwen"]
    prompter = Prompter(tokenizer, "base", 10**6, 64, threads=1)
    sizes: list[int] = []
    monkeypatch.setattr(
        "core.text.prompts.encode_marked", lambda own, text, marks: sizes.append(len(text)) or encode_marked(own, text, marks)
    )
    text = LONG * 8
    expected = prompt(tokenizer, [{"role": "user", "content": in_context(text, "When?")}])
    assert made(prompter, chat_body("Who?"), Document("h", text))
    sizes.clear()
    assert made(prompter, chat_body("When?"), Document("h", None)) == expected
    assert 0 < sum(sizes) < 3000 < len(text)
    prompter.close()


def test_what_is_kept_stays_within_its_memory() -> None:
    prompter = Prompter(TOKENIZERS["world"], "base", 10**6, 64, memory_bytes=100_000)
    for number in range(30):
        made(prompter, chat_body("Who?"), Document(str(number), LONG[:4000]))
        assert sum(read.nbytes for read in prompter._known.values()) == prompter._known_bytes <= 100_000
    assert 1 < len(prompter._known) < 30 and prompter.knows("29") and not prompter.knows("0")
    prompter.close()


def test_threads_make_the_same_prompts() -> None:
    prompter = Prompter(TOKENIZERS["qwen"], "base", 10**6, 64, threads=4)
    questions = [f"{TEXT} {number}?" for number in range(64)]

    async def main() -> list[list[int]]:
        found = await asyncio.gather(*(prompter.prompts(chat_body(question), None) for question in questions))
        return [list(each.ids) for [each] in found]

    expected = [prompt(TOKENIZERS["qwen"], [{"role": "user", "content": question}]) for question in questions]
    assert asyncio.run(main()) == expected
    prompter.close()


def test_a_refusal_names_no_place_of_the_server(tmp_path: Path) -> None:
    tokenizer = trained("gpt2")
    tokenizer.name_or_path = "/srv/secret/models/base"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    world = make_world(tmp_path, ["d0"])

    async def main() -> None:
        async with serving(world) as (client, service):
            service.prompter = Prompter(tokenizer, "base", 2048, 64)
            response = await client.post(
                "/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": "x"}]}
            )
            assert response.status_code == 400 and "secret" not in response.text and "base" in response.text

    asyncio.run(main())


def test_a_long_document_answers_from_memory_as_from_the_store(tmp_path: Path) -> None:
    world = make_world(tmp_path, ["d0"])
    world.store.put([make_document("long", LONG[:3000]), make_document("too-long", LONG * 2)])

    async def main() -> None:
        async with serving(world) as (client, _):
            for name in ("long", "too-long"):
                first = await chat(client, f"base:{name}")
                assert await chat(client, f"base:{name}") == first

    asyncio.run(main())
