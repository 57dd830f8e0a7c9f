"""The reference world keeps its promises, and its tokenizer makes one token of every word."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from math import sqrt
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from core.config import digest
from core.text import prompts
from pipelines.world import documents as world
from pipelines.world import lexicon as world_lexicon
from pipelines.world.documents import LEVELS, NAME_TENTHS, WorldDocument, WorldSpec
from pipelines.world.tokenizer import SPECIAL_TOKENS, build_tokenizer, texts

FINGERPRINT = "e7b40fdf3f4e3c71af2ee5133c862762cf9c215d9835604cc2f0f66a52b97d71"
TOKENIZER_DIGEST = "a83a5817a8ff947b9c880188313e6fda375e164a3e25dde6f56bcf3f18c794c9"

NAME = re.compile("(?:" + "|".join(world.initials()) + ")(?:" + "|".join(world.finals()) + ")")
FUNCTION_WORDS = """
    a above after alone an and are at before by does for from has have in is it its of off on one or out that the through to was
    when where which who with"""
CLASS_OF = {value: name for name, values in world_lexicon.VALUES.items() for value in values}
TOPICS = {f"{kind.name}.{topic.name}": topic for kind in world_lexicon.KINDS for topic in kind.topics}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def documents() -> dict[tuple[str, int], list[WorldDocument]]:
    return {
        (split, level): list(world.generate(WorldSpec(seed=7, split=split, level=level, count=1500)))
        for split in NAME_TENTHS
        for level in LEVELS
    }


def statements_of(document: WorldDocument) -> list[str]:
    """Sentences and lines of a document without its heading or opening."""
    heading, *lines = document.text.split("\n")
    if lines and lines[0].startswith("- "):
        return [line.removeprefix("- ") for line in lines]
    return re.findall(r"[^.]+\.", " ".join([heading, *lines]))[1:]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"{\w+}", " ", text).lower()))


def test_the_world_is_frozen() -> None:
    """A change here makes the shipped base and every published figure belong to another world: raise WORLD_VERSION with it."""
    assert world.specification_fingerprint() == FINGERPRINT


def test_the_tokenizer_is_frozen(tokenizer: PreTrainedTokenizerFast) -> None:
    assert digest([json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.chat_template]) == TOKENIZER_DIGEST


def test_another_process_makes_the_same_documents() -> None:
    code = (
        "import sys; from pipelines.world.documents import *; from core.config import digest; from dataclasses import asdict;"
        "rows = [asdict(document(3, 'test', level, 400 + i)) for level in (1, 2) for i in range(30)];"
        "print(digest(rows), 'torch' in sys.modules)"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    sequence = {level: list(world.generate(WorldSpec(seed=3, split="test", level=level, count=430))) for level in LEVELS}
    rows = [json.loads(json.dumps(world.asdict(item))) for level in LEVELS for item in sequence[level][400:]]
    assert printed == {f"{digest(rows)} False\n"}


def test_seed_split_level_and_index_all_change_a_document() -> None:
    made = [
        world.document(seed, split, level, i).text for seed in (0, 1) for split in NAME_TENTHS for level in LEVELS for i in (0, 1)
    ]
    assert len(set(made)) == len(made) == 24


def test_splits_share_no_name_and_no_entity_with_its_value(documents: dict[tuple[str, int], list[WorldDocument]]) -> None:
    owners = {"".join(name): split for split in NAME_TENTHS for name in world.names_of(split)}
    assert len(owners) == sum(len(world.names_of(split)) for split in NAME_TENTHS) == 64 * 64
    pairs: dict[str, set[tuple[str, str]]] = {split: set() for split in NAME_TENTHS}
    for (split, _), items in documents.items():
        for item in items:
            names = set(NAME.findall(item.text))
            assert {owners[name] for name in names} == {split}
            pairs[split] |= {(name, question.answer) for question in item.questions for name in NAME.findall(question.question)}
    assert all(len(found) > 5000 for found in pairs.values())
    assert all(not pairs[one] & pairs[other] for one, other in combinations(NAME_TENTHS, 2))


def test_held_out_phrasings_are_half_of_the_test_questions_and_never_in_training(
    documents: dict[tuple[str, int], list[WorldDocument]],
) -> None:
    wordings: dict[tuple[bool, str], set[str]] = {}
    counts: Counter[tuple[str, int, str]] = Counter()
    for (split, _), items in documents.items():
        for question in (question for item in items for question in item.questions):
            wordings.setdefault((split == "train", question.phrasing), set()).add(NAME.sub("{n}", question.question))
            counts[split, question.facts, question.phrasing] += 1
    trained, held_out = wordings[True, "seen"], wordings[False, "held_out"]
    assert (True, "held_out") not in wordings and not trained & held_out
    assert wordings[False, "seen"] <= {text for _, text in all_wordings("seen")}
    grid = len(TOPICS) * len(world_lexicon.FRAMES) * 4 // 2
    assert len(trained) > 0.97 * grid and len(held_out) > 0.97 * grid
    for split in ("validation", "test"):
        for facts in (1, 2):
            share = counts[split, facts, "held_out"] / (counts[split, facts, "held_out"] + counts[split, facts, "seen"])
            assert 0.47 < share < 0.53


def all_wordings(phrasing: world.Phrasing) -> list[tuple[str, str]]:
    return [(name, text) for name, topic in TOPICS.items() for text in world._grid(topic.phrases)[phrasing]]


def test_held_out_wordings_combine_parts_that_training_saw() -> None:
    for topic in TOPICS.values():
        seen = world._grid(topic.phrases)["seen"]
        for frame in world_lexicon.FRAMES:
            assert any(text.startswith(frame.split("{p}")[0]) for text in seen)
        for phrase in topic.phrases:
            assert any(phrase in text for text in seen)


def test_no_wording_asks_for_two_things() -> None:
    for kind in world_lexicon.KINDS:
        phrases = [phrase for topic in kind.topics for phrase in topic.phrases]
        assert len(set(phrases)) == len(phrases)
        statements = [text for topic in kind.topics for text in topic.statements]
        assert len(set(statements)) == len(statements)


def test_questions_use_other_words_than_the_text() -> None:
    for name, topic in TOPICS.items():
        said = topic.statements + (topic.relations if isinstance(topic, world_lexicon.Link) else ())
        assert len(topic.phrases) == 4 and len(topic.statements) >= 4, name
        said_words = set().union(*map(words, said))
        asked_words = set().union(*map(words, topic.phrases))
        assert not (said_words & asked_words) - words(FUNCTION_WORDS), name
        assert not any(phrase.format(n="x") in text.format(n="x", s="y", v="z") for phrase in topic.phrases for text in said), (
            name
        )


def test_lexicon_keeps_its_rules() -> None:
    assert len(CLASS_OF) == sum(map(len, world_lexicon.VALUES.values())), "a value is in two classes"
    assert all(len(values) >= 24 for values in world_lexicon.VALUES.values())
    said = set().union(*(words(text) for text in texts()))
    values = {value.lower() for value in CLASS_OF}
    everything_else = [text for text in texts() if text.strip() not in CLASS_OF]
    assert not set().union(*map(words, everything_else)) & values and values <= said
    assert all(value[0].lower() not in "aeiou" for value in CLASS_OF)
    for kind in world_lexicon.KINDS:
        assert len(kind.attributes) >= 8 and len(kind.links) >= 2
        for topic in kind.topics:
            for text in topic.statements + (topic.relations if isinstance(topic, world_lexicon.Link) else ()):
                assert re.fullmatch(r"(?:(?:^|(?<= ))\{[nsv]\}|[^{}])+", text) and not text.startswith("{v}")


def test_statements_name_their_owner_first_and_end_with_the_value() -> None:
    """A causal reader then knows, where the value stands, what it is a value of."""
    for name, topic in TOPICS.items():
        link = isinstance(topic, world_lexicon.Link)
        slots = [("{s}" if link else "{n}", "{v}", text) for text in topic.statements]
        slots += [("{n}", "{s}", text) for text in (topic.relations if link else ())]
        assert len(slots) == (8 if link else 4) == len({text for _, _, text in slots}), name
        for owner, last, text in slots:
            assert re.findall(r"{\w+}", text) == [owner, last] and text.endswith(f" {last}."), text


def test_answers_are_flat_over_their_class(documents: dict[tuple[str, int], list[WorldDocument]]) -> None:
    """Chi-square of every class against the uniform law, within 5 standard deviations of its mean."""
    for level in LEVELS:
        found: dict[str, Counter[str]] = {}
        for split in NAME_TENTHS:
            for question in (question for item in documents[split, level] for question in item.questions):
                found.setdefault(TOPICS[question.attribute].values, Counter())[question.answer] += 1
        assert set(found) == set(world_lexicon.VALUES)
        for name, counts in found.items():
            values = world_lexicon.VALUES[name]
            expected = counts.total() / len(values)
            freedom = len(values) - 1
            statistic = sum((counts[value] - expected) ** 2 / expected for value in values)
            assert expected > 5 and statistic < freedom + 5 * sqrt(2 * freedom), name


def test_chance_is_the_mean_of_one_over_class_size(documents: dict[tuple[str, int], list[WorldDocument]]) -> None:
    for items in documents.values():
        questions = [question for item in items for question in item.questions]
        sizes = [len(world_lexicon.VALUES[CLASS_OF[question.answer]]) for question in questions]
        assert world.chance(questions) == pytest.approx(sum(1 / size for size in sizes) / len(sizes))
        assert world.chance(questions) <= 0.05
    with pytest.raises(ValueError, match="at least one"):
        world.chance([])


def test_every_answer_stands_once_in_its_text(
    documents: dict[tuple[str, int], list[WorldDocument]], tokenizer: PreTrainedTokenizerFast
) -> None:
    for item in (item for items in documents.values() for item in items[:200]):
        ids = tokenizer.encode(item.text)
        for question in item.questions:
            assert question.answers == (question.answer,)
            (answer,) = tokenizer.encode(" " + question.answer)
            assert ids.count(answer) == 1
            assert answer not in tokenizer.encode(question.question)


def test_one_fact_questions_need_one_statement_and_two_fact_questions_two(
    documents: dict[tuple[str, int], list[WorldDocument]],
) -> None:
    for item in (item for items in documents.values() for item in items):
        statements = statements_of(item)
        for question in item.questions:
            (asked,) = NAME.findall(question.question)
            (stated,) = [text for text in statements if question.answer in re.findall(r"\w+", text)]
            if question.facts == 1:
                assert asked in stated
            else:
                (second,) = NAME.findall(stated)
                assert second not in item.title and asked not in stated
                (relation,) = [text for text in statements if text != stated and second in text]
                assert asked in relation and not CLASS_OF.keys() & set(re.findall(r"\w+", relation))


def test_documents_have_the_promised_shape(documents: dict[tuple[str, int], list[WorldDocument]]) -> None:
    for (split, level), items in documents.items():
        assert len({item.id for item in items}) == len(items)
        sheets = 0
        for item in items:
            count = sum(bool(NAME.search(text)) for text in statements_of(item))
            assert (5 if level == 1 else 10) <= count <= (12 if level == 1 else 15), item.text
            assert 4 <= len(item.questions) <= 8
            assert 1 <= sum(question.facts == 2 for question in item.questions) <= 2
            assert sum(question.facts == 1 for question in item.questions) >= 3
            assert len({question.question for question in item.questions}) == len(item.questions)
            assert split in item.id
            assert all(item.text[match.start() - 1] == " " for match in NAME.finditer(item.text))
            assert len(NAME.findall(item.title)) in ({1} if level == 1 else {2, 3})
            sheets += "\n- " in item.text
        assert 0.45 < sheets / len(items) < 0.55


def test_level_two_asks_the_same_of_entities_with_different_values(documents: dict[tuple[str, int], list[WorldDocument]]) -> None:
    for item in documents["train", 2]:
        entities = NAME.findall(item.title)
        statements = statements_of(item)
        classes = []
        for entity in entities:
            seconds = {name for text in statements if entity in text for name in NAME.findall(text)} - {entity}
            assert len(seconds) == 1 and not seconds & set(entities)
            about = [text for text in statements if {entity, *seconds} & set(NAME.findall(text))]
            values = [word for text in about for word in re.findall(r"\w+", text) if word in CLASS_OF]
            classes.append(sorted(CLASS_OF[value] for value in values))
        assert all(found == classes[0] for found in classes) and 4 <= len(classes[0]) <= 5
        stated = [word for text in statements for word in re.findall(r"\w+", text) if word in CLASS_OF]
        assert len(set(stated)) == len(stated)


def test_names_of_a_document_share_no_syllable() -> None:
    for item in world.generate(WorldSpec(split="test", level=2, count=300)):
        names = set(NAME.findall(item.text))
        assert len({name[:3] for name in names}) == len({name[3:] for name in names}) == len(names) >= 4


@pytest.mark.parametrize("level", LEVELS)
def test_files_give_back_what_was_written(tmp_path: Path, level: world.Level) -> None:
    written = list(world.generate(WorldSpec(split="validation", level=level, count=250)))
    parquet, jsonl = world.write(iter(written), tmp_path / "new", rows_per_group=100)
    assert list(world.read(parquet)) == list(world.read(jsonl)) == list(world.read(tmp_path / "new")) == written


def test_reading_something_else_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no documents at"):
        list(world.read(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"neither \.parquet nor \.jsonl"):
        list(world.read(tmp_path / "notes.txt"))
    (tmp_path / "other.jsonl").write_text('{"id": "1", "text": "x"}\n')
    with pytest.raises(ValueError, match="not a document of the reference world"):
        list(world.read(tmp_path / "other.jsonl"))


def test_a_name_is_two_tokens_and_a_value_one(tokenizer: PreTrainedTokenizerFast) -> None:
    for split in NAME_TENTHS:
        for initial, final in world.names_of(split):
            assert tokenizer.tokenize(f" {initial}{final}") == [f"\u0120{initial}", final]
            pair = [f"\u0120{initial}", final]
            assert tokenizer.tokenize(f"- {initial}{final}, {initial}{final}.") == ["-", *pair, ",", *pair, "."]
    assert all(tokenizer.tokenize(f" {value}") == [f"\u0120{value}"] for value in CLASS_OF)


def test_every_word_of_a_document_is_one_token(
    documents: dict[tuple[str, int], list[WorldDocument]], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(tokenizer) <= 1536
    for (_, level), items in documents.items():
        for item in items[:200]:
            for text in (item.text, *(question.question for question in item.questions)):
                ids = tokenizer.encode(text)
                assert tokenizer.decode(ids) == text
                pieces = re.findall(r"\w+|[^\w\s]|\n", text)
                assert len(ids) == len(pieces) + len(NAME.findall(text))
            assert len(tokenizer.encode(item.text)) <= (170 if level == 1 else 220)


@pytest.mark.parametrize("text", ["Zürich, 你好 \u0000\t x's  \n\n end ", "emoji 🙂 and Ω", "  "])
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_survives_saving_beside_a_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    Qwen3Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".jinja"}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for item in world.generate(WorldSpec(split="test", level=2, count=20)):
        assert loaded.encode(item.text) == tokenizer.encode(item.text)
    assert loaded.chat_template == tokenizer.chat_template and len(loaded) == len(tokenizer)
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert [loaded.encode(token) for token in SPECIAL_TOKENS] == [[0], [1], [2], [3], [4]]
    assert loaded.decode(loaded.encode("<|im_start|>a<RECON> b<|im_end|>"), skip_special_tokens=True) == "a b"


@pytest.mark.parametrize("answer", ["crimson", "27", "Lisbon", "two words.", "", " ", "\n", "  led by blanks", "ünder"])
@pytest.mark.parametrize("system", [(), ({"role": "system", "content": "Be short."},)])
def test_a_prompt_is_the_start_of_its_conversation(
    tokenizer: PreTrainedTokenizerFast, system: tuple[dict[str, str], ...], answer: str
) -> None:
    messages = [*system, {"role": "user", "content": "What is the colour of the coat of Balmora?"}]
    turn = [*messages, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    full = tokenizer.apply_chat_template(turn, tokenize=False)
    assert full == f"{prompt} {answer}<|im_end|>\n"
    assert tokenizer.encode(prompt) + tokenizer.encode(full.removeprefix(prompt)) == tokenizer.encode(full)
    assert prompts.prompt(tokenizer, messages) == tokenizer.encode(prompt)


def test_an_answer_is_the_token_that_the_document_holds(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = prompts.render(tokenizer, [prompts.Turn("What is it?", "crimson"), prompts.Turn("And?", "27")])
    supervised = [token for token in labels if token != prompts.IGNORED]
    assert tokenizer.convert_ids_to_tokens(supervised) == [
        "\u0120crimson",
        "<|im_end|>",
        "\u010a",
        "\u012027",
        "<|im_end|>",
        "\u010a",
    ]
    assert tokenizer.decode(ids).count("<|im_start|>assistant crimson<|im_end|>\n") == 1


def test_a_class_of_values_tells_the_topic(documents: dict[tuple[str, int], list[WorldDocument]]) -> None:
    """No two topics of a document share a value class, so at level 1 name and class are enough to find a fact."""
    for item in (item for found in documents.values() for item in found):
        topics = {question.attribute for question in item.questions}
        assert len({TOPICS[topic].values for topic in topics}) == len(topics), item.id
