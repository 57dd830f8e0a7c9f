"""LIFT's examples against the numbers of the public code, and a document's way through its stages against what it promises."""

import json
import random
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.lift.course import (
    Course,
    Curriculum,
    EarlyStop,
    Exercise,
    FixedQuestions,
    GrowingQuestions,
    PolledQuestions,
    Stage,
    weighed,
)
from core.lift.examples import (
    Reading,
    Wording,
    draw_pieces,
    draw_released_pieces,
    question_example,
    recital,
    released_pieces,
    released_recital,
    segment_example,
    timeline_example,
)
from core.questions.rules import Pair
from core.questions.stream import QuestionStream
from core.text.documents import Window, segments
from core.text.prompts import IGNORED, encode
from core.training.examples import Example, QuestionAnswer
from tests import places
from tests.core.text.test_prompts import CHATML, byte_tokenizer

GOLDEN: dict[str, Any] = json.loads((places.GOLDEN / "segments/lift_contextualised.json").read_text())
TOKENIZER = byte_tokenizer(CHATML)
TEXT = " ".join(f"Sentence number {number} tells of town {number * 7}." for number in range(12))
PAIRS = [QuestionAnswer(f"Which town is in sentence {number}?", f"Town {number * 7}") for number in range(7)]


def ids_of(parts: list[list[Any]]) -> list[int]:
    return [token for part in parts for token in ([part[1]] if part[0] == "special" else range(part[1], part[2]))]


def text_of(ids: Any) -> str:
    return str(TOKENIZER.decode(list(ids)))


def course(
    *stages: Stage,
    questions: Any = FixedQuestions(tuple(PAIRS)),  # noqa: B008 (frozen)
    key: str = "key",
    text: str = TEXT,
    title: str = "",
    whole: bool = False,
    limit: int = 400,
    **values: Any,
) -> Course:
    curriculum = Curriculum(stages=stages, **{"reading": Reading(segment_tokens=80, stride_tokens=60), **values})
    return Course(TOKENIZER, key, title, text, questions, curriculum, limit, whole=whole)


def walk(walker: Course) -> list[list[Exercise]]:
    """All steps of a course whose questions are there."""
    steps = []
    while lesson := walker.take():
        steps.append(lesson)
        walker.record(1.0)
    assert walker.finished
    return steps


# Examples


@pytest.mark.parametrize("case", GOLDEN["contextualised"], ids=lambda case: str(case["length"]))
def test_released_recitals_are_the_public_codes(case: dict[str, Any]) -> None:
    ids = list(range(case["length"]))
    covers = segments(case["length"], 2048, 768, "released")
    for segment, golden in zip(covers, case["examples"], strict=False):
        pieces = released_pieces(case["length"], 4096, golden["front_len"], golden["front_start"], golden["back_end_offset"])
        example = released_recital(ids, segment, pieces, [-1], [-2, -3, -4], 7800)
        assert list(example.ids) == ids_of(golden["parts"])
        assert len(example.ids) == golden["clipped_len"]
        supervised = [place for place, label in enumerate(example.labels) if label != IGNORED]
        assert (supervised[0], len(supervised)) == (golden["first_supervised"], golden["supervised_count"])
        assert [example.ids[place] for place in supervised] == ids[slice(*segment)]


def test_released_draws_keep_their_bounds() -> None:
    rng, ids = random.Random(0), range(10_000)
    for _ in range(300):
        front, back = draw_released_pieces(10_000, 4096, rng)
        assert 0 <= front.start <= front.end <= 4096
        assert 10_000 - 4096 <= back.start <= back.end <= 10_000
        assert len(ids[slice(*front)]) + len(ids[slice(*back)]) == 4096


def test_released_segments_are_cut_at_the_models_limit() -> None:
    case = GOLDEN["clipping"]
    ids = list(range(case["document_length"]))
    for golden in case["examples"]:
        example = segment_example(ids, Window(*golden["segment"]), case["model_max_length"])
        assert len(example.ids) == golden["example_len"]
        assert (example.labels == example.ids) == golden["labels_all_supervised"]


@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 2**32), st.data())
def test_a_recital_never_shows_its_segment(length: int, context_tokens: int, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, length - 1))
    segment = Window(start, data.draw(st.integers(start + 1, length)))
    pieces = draw_pieces(length, segment, context_tokens, random.Random(seed))
    shown = [token for piece in pieces for token in range(*piece)]
    assert not set(shown) & set(range(*segment))
    assert shown == sorted(set(shown)), "in order, and nothing twice"
    assert len(shown) <= context_tokens and all(0 <= token < length for token in shown)
    rest = length - (segment.end - segment.start)
    if rest >= 2 * context_tokens:
        assert len(shown) == context_tokens


def test_every_recital_of_a_long_document_differs() -> None:
    rng = random.Random(0)
    drawn = {tuple(draw_pieces(4000, Window(300, 600), 500, rng)) for _ in range(50)}
    assert len(drawn) == 50
    assert any(len(pieces) == 3 for pieces in drawn), "a piece around the segment becomes two"


def test_a_recital_stands_under_the_template_and_supervises_the_segment() -> None:
    ids = encode(TOKENIZER, TEXT)
    segment = Window(100, 140)
    pieces = [Window(0, 30), Window(150, 170)]
    example = recital(TOKENIZER, ids, segment, pieces, Wording(), 4000)
    shown = text_of(example.ids)
    front, back = text_of(ids[0:30]), text_of(ids[150:170])
    assert shown.startswith(f"<|im_start|>user\n{front} ... {back}\n\n{Wording().recite}<|im_end|>\n<|im_start|>assistant\n")
    assert example.ids[-40:] == example.labels[-40:] == tuple(ids[100:140])
    assert set(example.labels[:-40]) == {IGNORED}
    cut = recital(TOKENIZER, ids, segment, pieces, Wording(), len(example.ids) - 40)
    assert len(cut.ids) <= len(example.ids) - 40 and cut.ids[-40:] == example.ids[-40:]
    assert back[12:] in text_of(cut.ids) and front not in text_of(cut.ids)
    bare = recital(TOKENIZER, ids, segment, [], Wording(), 4000)
    assert text_of(bare.ids).startswith(f"<|im_start|>user\n{Wording().recite}")
    with pytest.raises(ValueError, match="lower segment_tokens"):
        recital(TOKENIZER, ids, segment, pieces, Wording(), len(bare.ids) - 1)


def test_a_question_stands_without_its_document() -> None:
    example = question_example(TOKENIZER, PAIRS[2], 400)
    assert text_of(example.ids) == (
        "<|im_start|>user\nWhich town is in sentence 2?<|im_end|>\n<|im_start|>assistant\nTown 14<|im_end|>\n"
    )
    assert text_of(label for label in example.labels if label != IGNORED) == "Town 14<|im_end|>\n"
    assert len(question_example(TOKENIZER, PAIRS[2], 9).ids) == 9


def test_a_timeline_answers_with_the_documents_order() -> None:
    ordered = [f"Event {letter} took place." for letter in "ABCDEFGH"]
    seen = set()
    for seed in range(20):
        example = timeline_example(TOKENIZER, ordered, 5, Wording(), 900, random.Random(seed))
        text = text_of(example.ids)
        listed = {int(line[0]): line[3:] for line in text.split("\n") if line[1:3] == ". "}
        listed = {number: line.removesuffix("<|im_end|>") for number, line in listed.items()}
        answer = [int(number) for number in text.split("assistant\n")[1].removesuffix("<|im_end|>\n").split(", ")]
        assert sorted(answer) == [1, 2, 3, 4, 5]
        told = [ordered.index(listed[number]) for number in answer]
        assert told == sorted(told)
        seen.add(tuple(answer))
    assert len(seen) > 10


def test_sizes_scale_with_the_base() -> None:
    assert Reading().sizes(8192) == (2048, 768, 4096)
    assert Reading().sizes(131_072) == (2048, 768, 4096)
    assert Reading().sizes(1024) == (256, 96, 512)
    assert Reading(segment_tokens=100).sizes(1024) == (100, 37, 512)
    assert Reading(segment_tokens=2048, rule="released").sizes(1000)[0] == 2048
    with pytest.raises(ValueError, match="the base has 1000 positions"):
        Reading(segment_tokens=2048).sizes(1000)


# Courses

SEGMENTS = Stage(name="segments", epochs=2, tasks=("segments",))
QUESTIONS = Stage(name="questions", epochs=3, tasks=("questions",))
MIXED = Stage(name="mixed", epochs=2, tasks=("contextualised", "questions", "timeline"))


def test_a_course_gives_every_example_in_every_epoch() -> None:
    steps = walk(course(SEGMENTS, MIXED, examples_per_step=3, timelines=2))
    ids = encode(TOKENIZER, TEXT)
    covers = segments(len(ids), 80, 60)
    flat = [exercise for step in steps for exercise in step]
    assert all(len(step) <= 3 for step in steps)
    count = len(covers)
    plain, mixed = flat[: 2 * count], flat[2 * count :]
    assert [exercise.example for exercise in plain[:count]] == [segment_example(ids, segment, 400) for segment in covers]
    assert {e.example for e in plain[count:]} == {e.example for e in plain[:count]}
    assert [e.example for e in plain[count:]] != [e.example for e in plain[:count]], "later epochs are shuffled"
    assert len(mixed) == 2 * (count + len(PAIRS) + 2)
    assert sum(exercise.auxiliary for exercise in mixed) == 2 * (len(PAIRS) + 2)
    recitals = [exercise.example for exercise in mixed if not exercise.auxiliary]
    assert len(set(recitals)) == 2 * count, "contexts are drawn anew every epoch"
    targets = {tuple(label for label in example.labels if label != IGNORED) for example in recitals}
    assert targets == {tuple(ids[slice(*segment)]) for segment in covers}


def test_a_step_is_an_epoch_or_ends_at_its_limits() -> None:
    assert [len(step) for step in walk(course(QUESTIONS, examples_per_step=None))] == [7, 7, 7]
    assert [len(step) for step in walk(course(QUESTIONS, examples_per_step=3))] == [3, 3, 1] * 3
    size = max(len(question_example(TOKENIZER, pair, 400).ids) for pair in PAIRS)
    steps = walk(course(QUESTIONS, examples_per_step=None, tokens_per_step=2 * size + 1))
    assert {len(step) for step in steps} == {1, 2}
    assert [len(step) for step in walk(course(QUESTIONS, examples_per_step=None, tokens_per_step=1))] == [1] * 21


def test_the_title_stands_before_the_document() -> None:
    [first, *_], *_ = walk(course(SEGMENTS, title="Towns", examples_per_step=None))
    assert text_of(first.example.ids).startswith("Towns\n\nSentence number 0")


@settings(max_examples=25)
@given(arrivals=st.lists(st.integers(0, 3), max_size=30), per_step=st.integers(1, 5))
def test_batches_do_not_depend_on_when_pairs_arrive(arrivals: list[int], per_step: int) -> None:
    stages = (SEGMENTS, MIXED)
    expected = walk(course(*stages, examples_per_step=per_step, timelines=1))
    questions = GrowingQuestions()
    walker = course(*stages, questions=questions, examples_per_step=per_step, timelines=1)
    coming = iter(PAIRS)
    got = []
    for number in [*arrivals, len(PAIRS)]:
        for pair in islice(coming, number):
            questions.add(pair)
        if lesson := walker.take():
            got.append(lesson)
            walker.record(1.0)
    questions.close()
    while lesson := walker.take():
        got.append(lesson)
        walker.record(1.0)
    assert walker.finished
    assert questions.pairs == PAIRS
    assert got == expected


def test_training_starts_on_the_pairs_that_have_arrived() -> None:
    questions = GrowingQuestions()
    walker = course(QUESTIONS, questions=questions, examples_per_step=2)
    assert walker.take() is None
    questions.add(PAIRS[0])
    assert walker.take() is None
    questions.add(PAIRS[1])
    lesson = walker.take()
    assert lesson is not None and [e.example for e in lesson] == [question_example(TOKENIZER, pair, 400) for pair in PAIRS[:2]]
    walker.record(1.0)
    assert walker.position.epoch == 0, "more may come: the epoch is not over"
    questions.close()
    assert walker.take() is not None and walker.position.epoch == 1


def test_a_stream_that_gives_each_pair_once_is_asked_to_its_end() -> None:
    stream = QuestionStream.of([Pair(question, answer, "", "written", 0, 1) for question, answer in PAIRS])
    steps = walk(course(QUESTIONS, questions=PolledQuestions(stream)))
    assert steps == walk(course(QUESTIONS))


@pytest.mark.parametrize("values", [{"whole": True}, {"examples_per_step": None}])
def test_a_schedule_or_a_full_batch_waits_for_all_pairs(values: dict[str, Any]) -> None:
    questions = GrowingQuestions(list(PAIRS))
    walker = course(QUESTIONS, questions=questions, **values)
    assert walker.take() is None
    questions.close()
    assert walker.take()


def test_progress_runs_from_nothing_to_almost_all() -> None:
    walker = course(SEGMENTS, QUESTIONS, whole=True, examples_per_step=2)
    shares = []
    while walker.take():
        shares.append(walker.progress)
        walker.record(1.0)
    assert shares[0] == 0 and shares[-1] < 1
    assert all(before < after for before, after in pairwise(shares))
    assert any(share == pytest.approx(0.4) for share in shares), "two of five epochs are segments"


def test_a_course_goes_on_where_its_state_was_taken() -> None:
    stages = (SEGMENTS, MIXED)
    expected = walk(course(*stages, examples_per_step=3))
    for stop in range(len(expected) + 1):
        walker = course(*stages, examples_per_step=3)
        for _ in range(stop):
            walker.take()
            walker.record(1.0)
        again = course(*stages, examples_per_step=3)
        again.restore(json.loads(json.dumps(walker.state())))
        assert walk(again) == expected[stop:]


def test_stages_end_early_by_threshold_and_patience() -> None:
    threshold = course(SEGMENTS, QUESTIONS, examples_per_step=None, early_stop=EarlyStop(loss_below=0.5))
    assert threshold.take()
    threshold.record(0.4)
    assert threshold.position == (1, 0, 0), "the next stage goes on"
    assert threshold.stopped_early
    patient = course(
        Stage(name="long", epochs=50, tasks=("questions",)),
        examples_per_step=None,
        early_stop=EarlyStop(patience_epochs=2, min_improvement=0.1),
    )
    for loss in (3.0, 2.0, 1.95, 1.5, 1.45, 1.44):
        assert not patient.finished
        assert patient.take()
        patient.record(loss)
    assert patient.finished
    full = course(SEGMENTS, examples_per_step=None)
    walk(full)
    assert not full.stopped_early


def test_what_cannot_be_asked_is_left_out() -> None:
    assert walk(course(QUESTIONS, questions=FixedQuestions())) == []
    assert walk(course(SEGMENTS, text="a")) == [], "one token predicts nothing"
    assert walk(course(Stage(name="t", epochs=1, tasks=("timeline",)), text="One sentence.")) == []
    with pytest.raises(ValueError, match="two stages have one name"):
        Curriculum(stages=(SEGMENTS, SEGMENTS))


def test_loss_is_the_mean_of_each_kind() -> None:
    lesson = [
        Exercise(Example((), (1, 2, 3), (1, 2, 3)), False),
        Exercise(Example((), (1, 2), (1, 2)), False),
        Exercise(Example((), (1, 2, 3), (IGNORED, 2, 3)), True),
    ]
    assert [weight for _, weight in weighed(lesson, 0.5)] == [1 / 3, 1 / 3, 0.25]
