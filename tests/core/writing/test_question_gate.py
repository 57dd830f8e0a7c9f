"""The question gate on the reference weights: what answers as well as the text in context passes, and nothing worse does."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.adapters.base_model import BaseModel, load_base
from core.adapters.lora import LoraWeights
from core.shine.hypernetwork import Hypernetwork
from core.shine.writer import HypernetworkWriter
from core.store.answering import IN_CONTEXT
from core.store.manifest import NewAdapter
from core.store.store import Store
from core.text.documents import Document
from core.writing.quality_gate import GateSettings
from core.writing.question_gate import Probe, QuestionGate, QuestionGateSettings
from core.writing.writer import Written
from pipelines.conversion.converter import Converter, prepare
from pipelines.conversion.recipe import ConvertRecipe
from pipelines.corpus import sources
from pipelines.world.documents import WorldDocument, WorldSpec, generate
from pipelines.world.reference import REFERENCE
from serve.resolver import Resolver

SHOWN = [*generate(WorldSpec(seed=96, split="test", count=3))]
SETTINGS = QuestionGateSettings(min_questions=2)


@pytest.fixture(scope="module")
def hypernetwork() -> Hypernetwork:
    return Hypernetwork.load(REFERENCE / "hypernetwork", load_base(REFERENCE / "base"))


@pytest.fixture(scope="module")
def adapters(hypernetwork: Hypernetwork) -> list[NewAdapter]:
    documents = [Document(tenant="t", collection="c", name=each.id, text=each.text) for each in SHOWN]
    outcomes = HypernetworkWriter(hypernetwork, gate=GateSettings(share=0)).write(documents)
    return [outcome.adapters[0] for outcome in outcomes if isinstance(outcome, Written)]


def probes_of(document: WorldDocument) -> list[Probe]:
    return [Probe(each.question, each.answer, 0, len(document.text)) for each in document.questions]


def weights(base: BaseModel, new: NewAdapter) -> LoraWeights:
    made = Written((new,)).weights()
    assert isinstance(made, LoraWeights)
    return made.to(base.device)


def test_an_adapter_that_knows_its_document_answers_and_anothers_does_not(
    hypernetwork: Hypernetwork, adapters: list[NewAdapter]
) -> None:
    gate, probes, text = QuestionGate(hypernetwork.base, SETTINGS), probes_of(SHOWN[0]), SHOWN[0].text
    own = gate.judged(adapters[0], text, probes)
    assert (own.withheld, own.standing, own.questions) == (False, IN_CONTEXT, len(probes))
    assert own.quality == own.standing_quality == own.readable == 1.0
    swapped = gate.judged(replace(adapters[0], vector=adapters[1].vector), text, probes)
    assert swapped.withheld and swapped.quality is not None and swapped.quality < 0.5 and swapped.standing_quality == 1.0


def test_an_adapter_must_beat_the_one_that_stands(hypernetwork: Hypernetwork, adapters: list[NewAdapter]) -> None:
    base, probes, text = hypernetwork.base, probes_of(SHOWN[0]), SHOWN[0].text
    gate = QuestionGate(base, SETTINGS)
    good, bad = weights(base, adapters[0]), weights(base, adapters[1])
    better = gate.judged(adapters[0], text, probes, bad, "b" * 64)
    assert (better.withheld, better.standing) == (False, "b" * 64)
    assert (better.standing_quality or 0.0) < (better.quality or 0.0)
    equal = gate.judged(adapters[0], text, probes, good, "a" * 64)
    assert equal.withheld and equal.quality == equal.standing_quality == 1.0, "no better than what answers now"
    cut = gate.judged(adapters[0], text, probes, uncut=bad)
    assert cut.quality_lost == pytest.approx((better.standing_quality or 0.0) - 1.0)


def test_questions_that_nobody_can_read_measure_nothing(hypernetwork: Hypernetwork, adapters: list[NewAdapter]) -> None:
    gate, text = QuestionGate(hypernetwork.base, SETTINGS), SHOWN[0].text
    gaps = [Probe(f"____ {number} ____ ?", each.answer, 0, 9) for number, each in enumerate(SHOWN[0].questions)]
    unread = gate.judged(adapters[0], text, gaps)
    assert unread.withheld and (unread.readable or 0.0) < SETTINGS.min_readable
    few = gate.judged(adapters[0], text, probes_of(SHOWN[0])[:1])
    assert few.withheld and (few.questions, few.quality) == (1, None)
    off = QuestionGate(hypernetwork.base, QuestionGateSettings(questions=0)).judged(adapters[0], text, gaps)
    assert off == adapters[0] or (off.withheld, off.questions) == (None, None)


def test_a_long_document_is_shown_as_a_server_shows_it(hypernetwork: Hypernetwork, adapters: list[NewAdapter]) -> None:
    """Cut in the middle, the text in context answers little; with its passage before it the base answers all."""
    filler = " ".join(document.text for document in generate(WorldSpec(seed=95, split="test", count=40)))
    half = len(filler) // 2
    text = f"{filler[:half]} {SHOWN[0].text} {filler[half:]}"
    start = text.index(SHOWN[0].text)
    probes = [probe._replace(start=start, end=start + len(SHOWN[0].text)) for probe in probes_of(SHOWN[0])]
    found = QuestionGate(hypernetwork.base, SETTINGS).judged(adapters[0], text, probes)
    assert (found.readable or 0.0) > (found.standing_quality or 0.0)
    assert found.quality == 1.0 and found.withheld is False


def test_lifting_leaves_no_document_answering_worse(hypernetwork: Hypernetwork, tmp_path: Path) -> None:
    """Rules write gaps, and the reference base was never asked for gaps: what they train must not take over."""
    corpus, base = tmp_path / "corpus", hypernetwork.base
    corpus.mkdir()
    for number, document in enumerate(SHOWN[:2]):
        (corpus / f"{number}.txt").write_text(document.text)
    assert base.tokenizer is not None
    [read] = sources.read(sources.open_source(str(corpus), "t", "c"))
    store, shared = (
        Store.open(tmp_path / "store", create=True),
        {"base": str(REFERENCE / "base"), "tenant": "t", "collection": "c"},
    )
    generated = ConvertRecipe.model_validate({**shared, "hypernetwork": str(REFERENCE / "hypernetwork")})
    lifted = ConvertRecipe.model_validate({**shared, "method": "lift", "lift": {"preset": "v4_fast"}})
    resolver = Resolver(store, "t", "c", "base", base.fingerprint)
    answering = []
    for recipe in (generated, lifted):
        receipts = Converter(store.url, recipe)(prepare(read, base.tokenizer)).to_pylist()
        store.refresh()
        answering.append([resolver.resolve(f"base:{number}.txt").adapter for number in range(2)])
    assert answering[0] == answering[1] and all(answering[0])
    assert all(each["status"] == "converted" and "is withheld: " in each["withheld"] for each in receipts)
    assert all(len(store.find_adapters("t", each["content_hash"])) == 2 for each in receipts), "kept, though it does not answer"
