"""The quality gate on the reference weights: own adapters pass, another's does not, and the server hears of it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.adapters.base_model import BaseModel, load_base
from core.adapters.lora import LoraWeights
from core.shine.hypernetwork import Hypernetwork
from core.shine.writer import HypernetworkWriter
from core.store.manifest import NewAdapter
from core.store.store import Store
from core.text.control import Ours
from core.text.documents import Document
from core.text.prompts import IGNORED, encode, prompt
from core.training.examples import Example, collate
from core.training.objectives import row_losses
from core.writing.gain import gain
from core.writing.quality_gate import Candidate, GateSettings, QualityGate, sampled
from core.writing.writer import WindowRule, Written
from pipelines.conversion.converter import Converter, prepare
from pipelines.conversion.receipts import WORST, Receipt, Summary
from pipelines.conversion.recipe import ConvertRecipe
from pipelines.corpus import sources
from pipelines.world.documents import WorldSpec, generate
from pipelines.world.reference import REFERENCE
from serve.resolver import ModeImpossible, Resolver

TEXTS = [document.text for document in generate(WorldSpec(seed=98, split="test", count=4))]
ALL, NONE = GateSettings(share=1.0), GateSettings(share=0)


@pytest.fixture(scope="module")
def hypernetwork() -> Hypernetwork:
    return Hypernetwork.load(REFERENCE / "hypernetwork", load_base(REFERENCE / "base"))


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(tenant="t", collection="c", name=f"{place}", text=text) for place, text in enumerate(texts)]


def adapters_of(writer: HypernetworkWriter, documents: list[Document]) -> list[NewAdapter]:
    outcomes = writer.write(documents)
    return [new for outcome in outcomes if isinstance(outcome, Written) for new in outcome.adapters]


def own_loss(base: BaseModel, outcome: Written, text: str) -> float:
    """Nats a token of a text that is asked for, under the document's adapter as stored."""
    assert base.tokenizer is not None
    asked, ids = prompt(base.tokenizer, [{"role": "user", "content": Ours("<RECON>")}]), encode(base.tokenizer, text)
    batch = collate([Example((), (*asked, *ids), (*[IGNORED] * len(asked), *ids))], pad_id=0)
    weights = outcome.weights()
    assert isinstance(weights, LoraWeights)
    return row_losses(base, batch, weights, torch.tensor([0])).item() / len(ids)


def test_own_adapters_pass_and_are_measured_as_stored(hypernetwork: Hypernetwork) -> None:
    documents = documents_of(TEXTS)
    outcomes = HypernetworkWriter(hypernetwork, "int4", gate=ALL).write(documents)
    plain = HypernetworkWriter(hypernetwork, "int4", gate=NONE).write(documents)
    for outcome, without, text in zip(outcomes, plain, TEXTS, strict=True):
        assert isinstance(outcome, Written) and isinstance(without, Written)
        [new], [same] = outcome.adapters, without.adapters
        assert (new.adapter_id, new.vector) == (same.adapter_id, same.vector) and same.withheld is same.matched_loss is None
        assert new.matched_loss == pytest.approx(own_loss(hypernetwork.base, outcome, text), rel=1e-4)
        assert new.shuffled_loss is not None and new.base_loss is not None
        assert new.matched_loss < new.base_loss < new.shuffled_loss and new.withheld is False


def test_an_adapter_that_knows_another_document_is_withheld(hypernetwork: Hypernetwork) -> None:
    documents = documents_of(TEXTS)
    adapters = adapters_of(HypernetworkWriter(hypernetwork, gate=NONE), documents)
    swapped = [replace(adapters[0], vector=adapters[1].vector), *adapters[1:]]
    assert hypernetwork.base.tokenizer is not None
    passages = [[encode(hypernetwork.base.tokenizer, text)] for text in TEXTS]
    gate = QualityGate(hypernetwork.base, ALL, 16, 4096)
    measured = gate.measured([Candidate(new, ids) for new, ids in zip(swapped, passages, strict=True)])
    assert [new.withheld for new in measured] == [True, False, False, False]
    saved = [gain(new.matched_loss, new.shuffled_loss, new.base_loss) for new in measured]
    assert saved[0] is not None and saved[0] < 0
    strict = QualityGate(hypernetwork.base, GateSettings(share=1.0, min_gain=50.0), 16, 4096)
    assert all(new.withheld for new in strict.measured([Candidate(adapters[1], passages[1])]))


def test_windows_are_measured_each_on_its_own_text_or_all_under_one_adapter(hypernetwork: Hypernetwork) -> None:
    long, short = documents_of(["\n\n".join(TEXTS[:3]), TEXTS[3]])
    parts = HypernetworkWriter(hypernetwork, rule=WindowRule(max_tokens=160, long_documents="windows"), gate=ALL)
    whole = HypernetworkWriter(hypernetwork, rule=WindowRule(max_tokens=160), gate=ALL)
    each, [composed, _] = adapters_of(parts, [long, short]), adapters_of(whole, [long, short])
    own = [new for new in each if new.content_hash == long.content_hash]
    assert len(own) >= 2 and all(new.matched_loss is not None and new.withheld is False for new in own)
    assert composed.matched_loss is not None and composed.matched_loss > max(new.matched_loss or 0.0 for new in own)
    tokens = sum(new.tokens for new in own)
    expected = sum((new.base_loss or 0.0) * new.tokens for new in own) / tokens
    assert composed.base_loss == pytest.approx(expected, rel=1e-4), "the same passages, whoever is asked"


def test_a_document_alone_is_compared_with_the_last_one_and_the_first_with_none(hypernetwork: Hypernetwork) -> None:
    writer, documents = HypernetworkWriter(hypernetwork, gate=ALL), documents_of(TEXTS)
    [first], [again], [second] = (adapters_of(writer, [documents[place]]) for place in (0, 0, 1))
    assert first.shuffled_loss is None and first.withheld is False
    assert again.shuffled_loss is None, "its own adapter is no other's"
    assert second.shuffled_loss is not None and second.withheld is False


@given(st.floats(0, 1), st.floats(0, 1))
def test_shares_are_nested_and_of_their_size(one: float, other: float) -> None:
    hashes = [f"{number * 2**54:016x}" + "0" * 48 for number in range(1024)]
    picked = [[sampled(each, share) for each in hashes] for share in sorted((one, other))]
    assert all(large or not small for small, large in zip(*picked, strict=True))
    assert sum(picked[0]) == math.ceil(min(one, other) * 1024)


def test_what_cannot_be_compared_never_passes() -> None:
    assert gain(None, 1.0, 1.0) is None and gain(1.0, None, 3.0) == 2.0 and gain(1.0, 2.0, math.nan) == 1.0
    assert all(math.isnan(gain(*losses) or 0.0) for losses in ((math.nan, 1.0, 1.0), (1.0, None, math.nan)))


def test_conversion_marks_and_the_server_answers_in_context(hypernetwork: Hypernetwork, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    odd = " ".join(f"{number * 7919 % 9973:04}" for number in range(40))  # nothing that the reference hypernetwork can read
    for name, text in {"good": TEXTS[0], "other": TEXTS[1], "odd": odd}.items():
        (corpus / f"{name}.txt").write_text(text)
    base = hypernetwork.base
    assert base.tokenizer is not None
    [read] = sources.read(sources.open_source(str(corpus), "t", "c"))
    models: dict[str, Any] = {"base": str(REFERENCE / "base"), "hypernetwork": str(REFERENCE / "hypernetwork")}
    recipe = ConvertRecipe(**models, tenant="t", collection="c", gate=GateSettings(share=1.0, min_gain=0.3))
    store = Store.open(tmp_path / "store", create=True)
    tables = list(Converter(store.url, recipe).commits(prepare(read, base.tokenizer)))
    summary = Summary(tmp_path / "rejects")
    for table in tables:
        for row in table.to_pylist():
            summary.add(Receipt(**row))
    assert (summary.measured, summary.withheld) == (3, 1) and summary.worst[0][0] == "odd.txt"
    assert any("measured 3 of 3 new adapters: 2 may answer, 1 are withheld" in line for line in summary.lines())
    assert any(line.startswith("  odd.txt: its adapter is withheld") for line in summary.lines())
    again = Converter(store.url, recipe)(prepare(read, base.tokenizer))
    assert again["status"].to_pylist() == ["unchanged"] * 3
    store.refresh()
    resolver = Resolver(store, "t", "c", "base", base.fingerprint)
    assert [resolver.resolve(f"base:{name}.txt").source for name in ("good", "other")] == ["adapter"] * 2
    found = resolver.resolve("base:odd.txt")
    assert (found.source, found.adapter) == ("in_context", None) and found.to_json()["reason"] == found.reason
    assert (
        found.reason == "its adapter is withheld: it does not give its document's text back better than no adapter, or another's"
    )
    with pytest.raises(ModeImpossible, match="withheld"):
        found.in_mode("adapter")


def test_an_adapter_that_passed_answers_beside_one_that_did_not(hypernetwork: Hypernetwork, tmp_path: Path) -> None:
    """And of a document's windows none answers where one is withheld."""
    documents = documents_of(TEXTS[:2])
    [bf16, _], [int8, _] = (
        adapters_of(HypernetworkWriter(hypernetwork, encoding, gate=NONE), documents) for encoding in ("bf16", "int8")
    )
    half = [replace(bf16, content_hash=documents[1].content_hash, window=bf16.window._replace(end=end)) for end in (9, 10)]
    store = Store.open(tmp_path, create=True)
    store.put(documents, [replace(bf16, withheld=False), replace(half[0], withheld=True), half[1]])
    store.put([], [replace(int8, withheld=True)])
    resolver = Resolver(store, "t", "c", "base", hypernetwork.base.fingerprint)
    adapter = resolver.resolve("base:0").adapter
    assert adapter is not None and adapter.encoding == "bf16"
    assert "withheld" in (resolver.resolve("base:1").reason or "")


def test_the_summary_keeps_the_worst() -> None:
    summary = Summary(Path("rejects"))
    absent = dict.fromkeys(Receipt._fields)
    for place in range(100):
        saved = math.nan if place == 50 else place * 37 % 100 / 10
        values = {
            "name": f"{place}",
            "status": "converted",
            "adapter_ids": ["a"],
            "gain": saved,
            "withheld": None if saved >= 1 else "no good",
        }
        summary.add(Receipt(**{**absent, "bytes": 1, "tokens": 1, "error": 0.0, "lost": 0, **values}))  # type: ignore[arg-type]
    assert summary.measured == 100 and summary.withheld == 10 + (50 * 37 % 100 >= 10)
    assert len(summary.worst) == WORST and summary.worst[0] == ("50", -math.inf)
    assert [round(saved, 1) for _, saved in summary.worst[1:]] == [each / 10 for each in range(WORST - 1)]


def test_all_are_measured_until_a_run_of_them_has_passed_and_again_after_one_that_fails(hypernetwork: Hypernetwork) -> None:
    """Dodge's CSP-1: of documents that the hypernetwork knows a sample is measured, of others every one."""
    texts = [document.text for document in generate(WorldSpec(seed=97, split="test", count=9))]
    gate = GateSettings(share=1e-9, run=3)  # a share so small that it samples none
    writer = HypernetworkWriter(hypernetwork, max_rows=1, gate=gate)
    known = adapters_of(writer, documents_of(texts[:5]))
    assert sorted(new.withheld is None for new in known) == [False, False, False, True, True]
    strange = [" ".join(f"{(number + seed) * 7919 % 9973:04}" for number in range(40)) for seed in range(3)]
    strict = HypernetworkWriter(hypernetwork, max_rows=1, gate=gate.model_copy(update={"min_gain": 0.3}))
    assert [new.withheld for new in adapters_of(strict, documents_of(strange))] == [True] * 3
    after = adapters_of(strict, documents_of(texts[5:]))
    assert sorted(new.withheld is None for new in after) == [False, False, False, True]


def test_a_failure_in_the_sample_has_the_rest_of_its_batch_measured(hypernetwork: Hypernetwork) -> None:
    gate = QualityGate(hypernetwork.base, GateSettings(share=0.5, run=1, min_gain=0.3), 16, 4096)
    assert hypernetwork.base.tokenizer is not None
    plain = HypernetworkWriter(hypernetwork, gate=NONE)
    candidates = [
        Candidate(adapters_of(plain, documents_of([text]))[0], [encode(hypernetwork.base.tokenizer, text)])
        for text in (TEXTS[0], *(" ".join(f"{(number + seed) * 7919 % 9973:04}" for number in range(40)) for seed in range(6)))
    ]
    assert {sampled(each.adapter.content_hash, 0.5) for each in candidates[1:]} == {True, False}
    assert [new.withheld for new in gate.measured(candidates[:1])] == [False]
    assert [new.withheld for new in gate.measured(candidates[1:])] == [True] * 6


def test_a_conversion_that_measured_nothing_or_failed_says_so() -> None:
    absent = dict.fromkeys(Receipt._fields)
    values = {"name": "a", "status": "converted", "adapter_ids": ["a"], "bytes": 1, "tokens": 1, "error": 0.0, "lost": 0}
    quiet, bad = Summary(Path("runs")), Summary(Path("runs"))
    quiet.add(Receipt(**{**absent, **values}))  # type: ignore[arg-type]
    assert "no adapter was measured: nothing is known of how well they answer" in quiet.lines()
    bad.add(Receipt(**{**absent, **values, "gain": 0.0, "withheld": "its adapter is withheld"}))  # type: ignore[arg-type]
    assert any("not of the kind that the hypernetwork was trained on" in line for line in bad.lines())
    bad.by_reference_weights = True
    assert any("the shipped weights know the reference world alone" in line for line in bad.lines())
