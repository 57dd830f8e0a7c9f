"""The reference world: invented documents, questions about them, and the one right answer to each.

In: (seed, split, level, index). Out: a `WorldDocument`, a function of these four alone, so any worker makes any document by
itself. A document is a fact sheet or a small story about one entity and what it is linked to (level 1: 5 to 12 statements), or
about two or three entities of one kind that share all their attributes with different values (level 2: 10 to 15 statements),
so that a question's name must be bound to its fact. Two attributes of one document never take values of one class. Statements
end with their value, after the name and the words that say what it is a value of. Questions use other words than the text.

What the splits promise: train, validation and test share no name, hence no pair of entity and value; one half of the grid of
question frames and phrases (its parts all seen, their combination not) is left for validation and test, and flagged. Values
are drawn uniformly from classes of 24 or more, so that nobody without the document does better than 1/24 (`chance`).

It knows nothing of tokens, models or prompts. Cost: about 0.1 ms a document, 0.5 kB of text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, PositiveInt

from core.config import Section, digest
from pipelines.world import lexicon
from pipelines.world.lexicon import Attribute, Kind, Link

WORLD_VERSION = "imprint-world-1"

Split = Literal["train", "validation", "test"]
Level = Literal[1, 2]
Phrasing = Literal["seen", "held_out"]

LEVELS: tuple[Level, ...] = (1, 2)
NAME_TENTHS: dict[Split, range] = {"train": range(0, 7), "validation": range(7, 8), "test": range(8, 10)}


class WorldSpec(Section):
    """Which documents: numbers 0 to `count` - 1 of a seed, split and level."""

    seed: NonNegativeInt = 0
    split: Split = "train"
    level: Level = 1
    count: PositiveInt = 1000


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its gold `answer` and all `answers` that count as right.

    `facts` says how many statements must be joined; `chance` is the best exact match without the document, 1 / |value class|.
    """

    question: str
    answer: str
    answers: tuple[str, ...]
    facts: int
    phrasing: Phrasing
    attribute: str
    chance: float


@dataclass(frozen=True, slots=True)
class WorldDocument:
    """A document and its questions; `title` is the name of its entity, or the names of its entities."""

    id: str
    title: str
    text: str
    questions: tuple[Question, ...]


def generate(spec: WorldSpec) -> Iterator[WorldDocument]:
    """The documents of a spec in order."""
    return (document(spec.seed, spec.split, spec.level, index) for index in range(spec.count))


def document(seed: int, split: Split, level: Level, index: int) -> WorldDocument:
    """Document number `index`: the same in every process, whichever others are made."""
    key = f"{WORLD_VERSION}/{seed}/{split}/{level}/{index}"
    random = Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]))
    kind = random.choice(lexicon.KINDS)
    if level == 1:
        entity_count, link_count = 1, random.randint(1, 2)
        attribute_count = random.randint(5, 12) - 2 * link_count
        attribute_count = max(attribute_count, 3)
        one_fact_count = random.randint(3, 6)
    else:
        entity_count, link_count = random.randint(2, 3), 1
        attribute_count = 3 if entity_count == 3 else random.randint(3, 4)
        one_fact_count = random.randint(3, 5)
    topics = _draw_topics(random, kind, attribute_count, link_count)
    names = _draw_names(random, split, entity_count * (1 + link_count))
    entities, seconds = names[:entity_count], names[entity_count:]

    statements: list[str] = []
    one_fact: list[tuple[Attribute | Link, str, str]] = []
    two_facts: list[tuple[Attribute | Link, str, str]] = []
    used: set[str] = set()
    for entity in entities:
        for topic in topics:
            value = random.choice(lexicon.VALUES[topic.values])
            while value in used:
                value = random.choice(lexicon.VALUES[topic.values])
            used.add(value)
            if isinstance(topic, Link):
                second = seconds.pop()
                statements.append(random.choice(topic.relations).format(n=entity, s=second))
                statements.append(random.choice(topic.statements).format(s=second, v=value))
                two_facts.append((topic, entity, value))
            else:
                statements.append(random.choice(topic.statements).format(n=entity, v=value))
                one_fact.append((topic, entity, value))
    random.shuffle(statements)

    asked = random.sample(one_fact, min(one_fact_count, len(one_fact))) + random.sample(two_facts, min(2, len(two_facts)))
    random.shuffle(asked)
    held_out_next = random.random() < 0.5
    questions: list[Question] = []
    for topic, entity, value in asked:
        phrasing: Phrasing = "held_out" if split != "train" and held_out_next else "seen"
        held_out_next = not held_out_next
        wording = random.choice(_grid(topic.phrases)[phrasing]).format(n=entity)
        facts = 2 if isinstance(topic, Link) else 1
        chance_level = 1 / len(lexicon.VALUES[topic.values])
        questions.append(Question(wording, value, (value,), facts, phrasing, f"{kind.name}.{topic.name}", chance_level))

    title = " and ".join([", ".join(entities[:-1]), entities[-1]]) if entity_count > 1 else entities[0]
    what = kind.singular if entity_count == 1 else f"{('two', 'three')[entity_count - 2]} {kind.plural}"
    text = _fact_sheet(random, what, title, statements) if random.random() < 0.5 else _story(random, what, title, statements)
    return WorldDocument(f"{split}-{level}-{seed}-{index:06d}", title, text, tuple(questions))


def chance(questions: Sequence[Question]) -> float:
    """The expected exact match of the best guesser that sees the questions but no document: the mean of 1 / |value class|.

    Values are uniform in their class and independent of the question's words, so no guesser does better.
    """
    if not questions:
        raise ValueError("chance of no questions: give at least one")
    return sum(question.chance for question in questions) / len(questions)


def _fact_sheet(random: Random, what: str, title: str, statements: Sequence[str]) -> str:
    heading = random.choice(lexicon.TITLES).format(what=what, names=title)
    return "\n".join([heading, *(f"- {statement}" for statement in statements)])


def _story(random: Random, what: str, title: str, statements: Sequence[str]) -> str:
    """One or two paragraphs; each starts with a sentence that carries no fact, so that no name starts a line."""
    sentences = [random.choice(lexicon.OPENINGS).format(what=what, names=title)]
    turn = len(statements) // 2 if len(statements) >= 8 and random.random() < 0.5 else None
    for position, statement in enumerate(statements):
        if position == turn:
            sentences.append("\n" + random.choice(lexicon.SECOND_PARAGRAPHS))
        sentences.append(statement)
        if random.random() < 0.2:
            sentences.append(random.choice(lexicon.CONNECTIVES))
    return " ".join(sentences).replace(" \n", "\n")


@cache
def _grid(phrases: tuple[str, ...]) -> dict[Phrasing, tuple[str, ...]]:
    """Every frame with every phrase, split as the colours of a checkerboard: parts in both halves, combinations in one."""
    halves: dict[Phrasing, list[str]] = {"seen": [], "held_out": []}
    for row, frame in enumerate(lexicon.FRAMES):
        for column, phrase in enumerate(phrases):
            halves["held_out" if (row + column) % 2 else "seen"].append(frame.replace("{p}", phrase))
    return {half: tuple(questions) for half, questions in halves.items()}


def initials() -> tuple[str, ...]:
    """First syllables of names."""
    return tuple(onset + rime for row, onset in enumerate(lexicon.NAME_ONSETS) for rime in lexicon.NAME_RIMES[row % 2])


def finals() -> tuple[str, ...]:
    """Second halves of names."""
    return tuple(start + end for start in lexicon.FINAL_STARTS for end in lexicon.FINAL_ENDS)


@cache
def names_of(split: Split) -> tuple[tuple[str, str], ...]:
    """The (initial, final) pairs whose names belong to a split, by a hash of the name."""
    tenths = NAME_TENTHS[split]
    return tuple(
        (initial, final)
        for initial in initials()
        for final in finals()
        if int.from_bytes(hashlib.sha256((WORLD_VERSION + initial + final).encode()).digest()[:4]) % 10 in tenths
    )


def _draw_topics(random: Random, kind: Kind, attribute_count: int, link_count: int) -> list[Attribute | Link]:
    """What a document tells: no two topics take their values from one class, so a name and a class of value tell a fact."""
    links = random.sample(kind.links, link_count)
    classes = {link.values for link in links}
    attributes: list[Attribute] = []
    for attribute in random.sample(kind.attributes, len(kind.attributes)):
        if attribute.values not in classes and len(attributes) < attribute_count:
            classes.add(attribute.values)
            attributes.append(attribute)
    return [*attributes, *links]


def _draw_names(random: Random, split: Split, count: int) -> list[str]:
    """Names of one document: no two share a syllable."""
    pool, names, taken = names_of(split), list[str](), set[str]()
    while len(names) < count:
        initial, final = random.choice(pool)
        if initial not in taken and final not in taken:
            taken.update((initial, final))
            names.append(initial + final)
    return names


def specification() -> dict[str, Any]:
    """Everything that defines the world as JSON values, with some of its documents, which stand for the code that draws."""
    samples = [
        asdict(document(seed=0, split=split, level=level, index=index))
        for split in NAME_TENTHS
        for level in LEVELS
        for index in range(20)
    ]
    return {
        "version": WORLD_VERSION,
        "values": lexicon.VALUES,
        "kinds": [_plain(kind) for kind in lexicon.KINDS],
        "frames": lexicon.FRAMES,
        "layouts": [lexicon.TITLES, lexicon.OPENINGS, lexicon.SECOND_PARAGRAPHS, lexicon.CONNECTIVES],
        "names": {split: ["".join(name) for name in names_of(split)] for split in NAME_TENTHS},
        "samples": samples,
    }


def _plain(kind: Kind) -> dict[str, Any]:
    topics = {group: [topic._asdict() for topic in getattr(kind, group)] for group in ("attributes", "links")}
    return {**kind._asdict(), **topics}


@cache
def specification_fingerprint() -> str:
    """SHA-256 (hex) of `specification`: a model card that names it names this world and no other."""
    return digest(specification())


_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        (
            "questions",
            pa.list_(
                pa.struct(
                    [
                        ("question", pa.string()),
                        ("answer", pa.string()),
                        ("answers", pa.list_(pa.string())),
                        ("facts", pa.int8()),
                        ("phrasing", pa.string()),
                        ("attribute", pa.string()),
                        ("chance", pa.float64()),
                    ]
                )
            ),
        ),
    ]
)


def write(documents: Iterable[WorldDocument], directory: Path, rows_per_group: int = 1000) -> tuple[Path, Path]:
    """Streams documents to `documents.parquet` and `documents.jsonl` (the same rows) and returns the two paths."""
    directory.mkdir(parents=True, exist_ok=True)
    parquet, jsonl = directory / "documents.parquet", directory / "documents.jsonl"
    rows = (asdict(item) for item in documents)
    with pq.ParquetWriter(parquet, _SCHEMA) as writer, jsonl.open("w", encoding="utf-8") as lines:
        while group := list(islice(rows, rows_per_group)):
            writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in group)
    return parquet, jsonl


def read(path: Path) -> Iterator[WorldDocument]:
    """Reads what `write` wrote: one of the two files, or their directory (then the Parquet file)."""
    if path.is_dir():
        path = path / "documents.parquet"
    if not path.is_file():
        raise ValueError(f"no documents at {path}: give a file or directory that `imprint world` wrote")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from (_document(json.loads(line)) for line in lines)
    elif path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from map(_document, batch.to_pylist())
    else:
        raise ValueError(f"{path} is neither .parquet nor .jsonl")


def _document(row: dict[str, Any]) -> WorldDocument:
    try:
        questions = tuple(Question(**{**question, "answers": tuple(question["answers"])}) for question in row["questions"])
        return WorldDocument(**{**row, "questions": questions})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a document of the reference world ({error!r}): give a file that `imprint world` wrote") from None
