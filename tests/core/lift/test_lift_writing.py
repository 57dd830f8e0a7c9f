"""Documents lifted by the writer: what is stored, what it follows from, how it goes on, and what a failing endpoint costs."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from core.adapters import files as adapter_files
from core.adapters.base_model import BaseModel
from core.adapters.deltas import changes_anything
from core.adapters.gated_memory import GatedMemory, initial, weights_of
from core.adapters.lora import LoraWeights, compose, recompress
from core.adapters.weights import AdapterWeights
from core.config import load
from core.lift.course import FixedQuestions
from core.lift.question_source import PROBES, AskedQuestions
from core.lift.settings import PRESETS
from core.lift.trainer import Job, train
from core.lift.writer import LiftRecipe, LiftWriter
from core.questions.rules import Pair, Passage, write_by_rules
from core.questions.stream import QuestionStream
from core.shine.hypernetwork import Hypernetwork
from core.store.answering import IN_CONTEXT
from core.store.store import Store
from core.text.documents import Document
from core.text.prompts import encode
from core.text.tokens import Tokens, read
from core.training.examples import QuestionAnswer, question_answers
from core.writing.question_gate import Probe, QuestionGate, QuestionGateSettings
from core.writing.writer import Outcome, Rejected, Standing, Written
from tests.core.questions.test_question_endpoint import completion, endpoint, good_reply, serving
from tests.core.shine.test_adapter_writing import HYPERNETWORK
from tests.core.text.test_prompts import CHATML, byte_tokenizer
from tests.models import SHAPE, random_adapters
from tests.questions import document

TEXTS = (
    "The harbour of Rill opened in 1874. Ansa Tavolt built the old tower beside it. Every evening a bell rings twice.",
    "Mirko Hald keeps bees near Ostrand. He sells honey in glass jars. The market opens on Friday.",
    "Lena Voss painted the ceiling of Brunn. It took eleven years.",
)


@cache
def base_of(dtype: torch.dtype = torch.float32) -> BaseModel:
    shape = {**SHAPE, "vocab_size": 400, "num_hidden_layers": 2, "max_position_embeddings": 512}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, head_dim=12, tie_word_embeddings=True))
    return BaseModel(model.to(dtype), byte_tokenizer(CHATML))


def recipe_of(kind: str = "lora", epochs: int = 2, learning_rate: float = 1e-2, **values: Any) -> LiftRecipe:
    adapter = {"kind": kind} if kind == "gated_memory" else {"kind": kind, "rank": 4, "scale": 1.0}
    stages = [{"name": "questions", "epochs": epochs, "tasks": ["questions"]}]
    settings = {"adapter": adapter, "optimiser": {"learning_rate": learning_rate}, "curriculum": {"stages": stages}}
    return LiftRecipe.model_validate({"settings": settings, **values})


def documents_of(texts: tuple[str, ...] = TEXTS, tenant: str = "t") -> list[Document]:
    return [document(text, name=f"d{number}", tenant=tenant) for number, text in enumerate(texts)]


def stored(outcome: Outcome) -> AdapterWeights:
    assert isinstance(outcome, Written), outcome
    assert len(outcome.adapters) == 1
    return outcome.weights()


def blobs(outcomes: list[Outcome]) -> list[bytes]:
    assert all(isinstance(outcome, Written) for outcome in outcomes), outcomes
    return [outcome.adapters[0].blob() for outcome in outcomes if isinstance(outcome, Written)]


def pairs_of(one: Document) -> list[QuestionAnswer]:
    return question_answers(write_by_rules(one))


@pytest.mark.parametrize("kind", ["lora", "pissa", "gated_memory"])
def test_adapters_are_lifts_and_land_in_the_store(kind: str, tmp_path: Path) -> None:
    base, recipe = base_of(), recipe_of(kind, serving_rank=3)
    writer, documents = LiftWriter(base, recipe, "fp32"), documents_of()
    outcomes = writer.write(documents)
    jobs = [Job(one.content_hash, one.text, questions=FixedQuestions(tuple(pairs_of(one)))) for one in documents]
    trained = {result.key: result.weights for result in train(base, jobs, recipe.settings)}
    store = Store.open(tmp_path, create=True)
    rows = store.put(documents, [outcome.adapters[0] for outcome in outcomes if isinstance(outcome, Written)]).adapters
    for one, outcome, row in zip(documents, outcomes, rows, strict=True):
        whole, weights = trained[one.content_hash], stored(outcome)
        assert whole is not None and isinstance(outcome, Written)
        tokens = len(encode(base.tokenizer, one.text))
        assert [row.adapter_id] == writer.adapter_ids(one, read(base.tokenizer, one.text))
        assert (row.window, row.tokens) == ((0, tokens), tokens)
        assert outcome.lost == 0
        if isinstance(whole, LoraWeights):
            cut, error_B = recompress(whole, 3)
            assert outcome.error == row.error == pytest.approx(error_B.item(), rel=1e-2) and row.rank == writer.spec.rank == 3
            for site in ("q", "down"):
                (a, b), (c, d) = weights.factors(1, site), cut.factors(1, site)
                torch.testing.assert_close(a @ b, c @ d, rtol=1e-2, atol=1e-4)
        else:
            torch.testing.assert_close(weights.flat_BN, whole.flat_BN, rtol=1e-3, atol=1e-4)
            assert (outcome.error, row.error, row.quality_lost) == (0.0, None, None)
        found = store.find_adapters("t", one.content_hash, writer.producer.fingerprint)
        assert found == [row] and torch.equal(store.get_vector(row), weights.flat_BN[0])
        assert type(weights_of(store.spec(row.spec_fingerprint), weights.flat_BN)) is type(whole)


def test_a_document_is_learnt() -> None:
    base = base_of()
    [one] = documents_of(TEXTS[2:])
    [outcome] = LiftWriter(base, recipe_of(epochs=60, learning_rate=2e-2, serving_rank=None)).write([one])
    trained = [Probe(pair.question, pair.answer, 0, 0) for pair in pairs_of(one)]
    gate = QuestionGate(base, QuestionGateSettings())
    assert gate.answered(trained, stored(outcome)) == 1.0 and gate.answered(trained) == 0.0
    assert gate.answered([trained[0], trained[0]._replace(answer="No")], stored(outcome)) == 0.5


def test_nothing_answers_that_the_base_could_not_be_asked() -> None:
    """A random base reads nothing: what it learnt by heart is not taken for an answer, whatever its share."""
    base, documents = base_of(), documents_of()
    standing = Standing("a" * 64, random_adapters(base, 1))
    writer = LiftWriter(base, recipe_of(gate={"min_questions": 2}))
    outcomes = dict(writer.write_each(documents, standing=lambda one: standing if one is documents[0] else None))
    for place, outcome in outcomes.items():
        assert isinstance(outcome, Written)
        [new] = outcome.adapters
        assert new.withheld and new.questions and new.readable == 0.0 and new.quality is not None
        assert new.standing == ("a" * 64 if place == 0 else IN_CONTEXT)
    [unmeasured] = LiftWriter(base, recipe_of(gate={"questions": 0})).write(documents[:1])
    assert isinstance(unmeasured, Written) and (unmeasured.adapters[0].withheld, unmeasured.adapters[0].quality) == (None, None)


def test_the_fourth_pair_of_a_passage_is_held_out_of_training() -> None:
    passages = [Passage(0, 10 * number, 10 * number + 9) for number in range(40)]
    stream = QuestionStream(passages)
    asked = AskedQuestions(stream, max_lost_share=0.5)
    for number, passage in enumerate(passages):
        count = 3 if number == 2 else 6
        stream._settle(
            number, [Pair(f"{number}.{each}?", "a", "a", "written", passage.start, passage.end) for each in range(count)]
        )
    trained = [pair.question for pair in asked.ready()]
    held_out = [probe.question for probe in asked.probes]
    assert held_out == [f"{number}.3?" for number in range(0, 40, 2) if number != 2] and len(held_out) <= PROBES
    assert asked.finished and not set(held_out) & set(trained)
    assert len(trained) + len(held_out) == 40 * 6 - 3


def test_equal_content_gives_equal_bytes_in_any_company() -> None:
    base = base_of(torch.float64)
    together = LiftWriter(base, recipe_of()).write(documents_of())
    alone = [LiftWriter(base, recipe_of(run={"slots": 1})).write([one])[0] for one in documents_of(tenant="another")]
    twice = LiftWriter(base, recipe_of()).write([documents_of()[0], *documents_of(tenant="another")[:1]])
    assert blobs(together) == blobs(alone) and len(set(blobs(together))) == 3
    assert blobs(twice) == blobs(together[:1]) * 2
    ids = {new.adapter_id for outcome in (*together, *alone) if isinstance(outcome, Written) for new in outcome.adapters}
    assert len(ids) == 6


def test_a_failing_document_is_rejected_alone() -> None:
    base = base_of()
    nothing, empty, good = document("Hm.", name="a"), document("x", name="b"), documents_of()[0]
    writer = LiftWriter(base, recipe_of(run={"slots": 2}))
    outcomes = writer.write([nothing, empty, good], [read(base.tokenizer, text) for text in ("Hm.", "", good.text)])
    assert [outcome.reason.partition(":")[0] for outcome in outcomes if isinstance(outcome, Rejected)] == [
        "not lifted",
        "no tokens",
    ]
    assert "no question" in str(outcomes[0]) and writer.adapter_ids(empty, Tokens([])) == []
    assert blobs(outcomes[2:]) == blobs(LiftWriter(base, recipe_of(run={"slots": 2})).write([good]))


def steps_of(base: BaseModel) -> Iterator[list[int]]:
    """Counts passes of the base while it is open."""
    counted: list[int] = []
    hook = base.decoder.register_forward_pre_hook(lambda *_: counted.append(1))
    yield counted
    hook.remove()


@pytest.mark.parametrize("save_s", [0.0, 1e9])
def test_what_was_in_training_goes_on_and_ends_as_uninterrupted(save_s: float, tmp_path: Path) -> None:
    base, documents = base_of(torch.float64), documents_of()
    values = {"slots": 3}
    expected = blobs(LiftWriter(base, recipe_of(run=values)).write(documents))
    recipe = recipe_of(run={**values, "scratch": str(tmp_path), "save_s": save_s})
    begun = LiftWriter(base, recipe).write_each(documents)
    first, outcome = next(begun)
    begun.close()
    states = {path.stem for path in (tmp_path / "states").iterdir()}
    writer = LiftWriter(base, recipe)
    ids = [writer.adapter_ids(one, read(base.tokenizer, one.text))[0] for one in documents]
    rest = [place for place in range(3) if place != first]
    assert {ids[place] for place in rest} <= states and blobs([outcome]) == [expected[first]]
    counting = steps_of(base)
    counted = next(counting)
    resumed = writer.write([documents[place] for place in rest])
    passes = len(counted)
    writer.settled(ids)
    assert blobs(resumed) == [expected[place] for place in rest]
    assert not list((tmp_path / "states").iterdir())
    LiftWriter(base, recipe).write([documents[place] for place in rest])
    assert 0 < passes < len(counted) - passes
    next(counting, None)


def test_an_unreadable_state_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, [one] = base_of(), documents_of(TEXTS[2:])
    writer = LiftWriter(base, recipe_of(run={"scratch": str(tmp_path)}))
    [named] = writer.adapter_ids(one, read(base.tokenizer, one.text))
    (tmp_path / "states" / f"{named}.safetensors").write_bytes(b"nothing of the kind")
    assert blobs(writer.write([one])) == blobs(LiftWriter(base, recipe_of()).write([one]))
    assert "starts anew" in caplog.text


# What an adapter follows from


def test_the_producer_bears_what_changes_an_adapter_and_no_more() -> None:
    base = base_of()

    def of(*, hypernetwork: Hypernetwork | None = None, **values: Any) -> str:
        on = base if hypernetwork is None else hypernetwork.base
        with LiftWriter(on, recipe_of(**values), hypernetwork=hypernetwork) as writer:
            return writer.producer.fingerprint

    same = of()
    assert of(run={"slots": 3}, serving_rank=7) == of(serving_rank=None) == same
    no_questions = [{"name": "segments", "epochs": 1, "tasks": ["segments"]}]
    settings = recipe_of().settings.model_dump() | {"curriculum": {"stages": no_questions}}
    quiet = [LiftRecipe(settings=settings, questions={"rules": {"pairs": number}}) for number in (1, 2)]
    assert len({LiftWriter(base, each).producer.fingerprint for each in quiet}) == 1
    others = {
        of(epochs=3),
        of(serving_rank=2),
        of(questions={"rules": {"pairs": 1}}),
        of(questions={"endpoint": {"model": "m"}}),
        of(questions={"endpoint": {"model": "m", "run": {"in_flight": 3, "url": "http://elsewhere/v1"}}}),
        of(questions={"endpoint": {"model": "n"}}),
        of(hypernetwork=HYPERNETWORK),
    }
    assert len({same, *others}) == 7
    assert LiftWriter(base).producer.config["base"] == base.fingerprint


def test_recipes_begin_at_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('preset = "v4_fast"\n[settings.optimiser]\nwarmup_steps = 3\n')
    fast = PRESETS["v4_fast"]
    read = load(LiftRecipe, path, ["settings.adapter.rank=8"])
    assert read.settings.optimiser == fast.optimiser.model_copy(update={"warmup_steps": 3})
    assert read.settings.adapter == fast.adapter.model_copy(update={"rank": 8}) and read.settings.curriculum == fast.curriculum
    assert LiftRecipe.model_validate(read.model_dump(mode="json")) == read
    assert LiftRecipe().settings == PRESETS["v4"] and LiftRecipe(preset="v3").settings == PRESETS["v3"]
    memory = load(LiftRecipe, None, ["settings.adapter.kind=gated_memory"]).settings.adapter
    assert (memory.kind, memory.rank, memory.scale) == ("gated_memory", None, 1.0)
    with pytest.raises(ValueError, match="preset 'v5' is not known: give one of v1, v3, v4"):
        load(LiftRecipe, None, ["preset=v5"])


def test_lift_starts_from_what_the_hypernetwork_writes() -> None:
    base, one = HYPERNETWORK.base, document("Balmora lives in the old town. The old town is near Vostilo.")
    ids = torch.tensor([encode(base.tokenizer, one.text)])
    recipe = recipe_of(epochs=1, learning_rate=1e-9)
    [outcome] = LiftWriter(base, recipe, "fp32", HYPERNETWORK).write([one])
    with torch.no_grad():
        generated = HYPERNETWORK.generate(ids, torch.ones_like(ids))
    lifted = stored(outcome)
    assert isinstance(lifted, LoraWeights)
    for layer, site in ((0, "q"), (2, "down")):
        (a, b), (c, d) = lifted.factors(layer, site), generated.factors(layer, site)
        torch.testing.assert_close(a @ b, c @ d, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="only a lora"):
        LiftWriter(base, recipe_of("pissa"), hypernetwork=HYPERNETWORK)
    only_q = recipe.settings.model_copy(update={"adapter": recipe.settings.adapter.model_copy(update={"sites": ("q",)})})
    with pytest.raises(ValueError, match="LIFT trains none"):
        LiftWriter(base, recipe.model_copy(update={"settings": only_q}), hypernetwork=HYPERNETWORK)


def test_lift_starts_from_pre_lift_alone_and_beside_the_hypernetwork(tmp_path: Path) -> None:
    base, one = HYPERNETWORK.base, document("Balmora lives in the old town. The old town is near Vostilo.")
    taught = random_adapters(base, 1, rank=3)
    adapter_files.save(taught, base, tmp_path / "taught")
    recipe = recipe_of(epochs=1, learning_rate=1e-9, pre_lift=str(tmp_path / "taught"), serving_rank=None)
    rank = taught.spec.rank + HYPERNETWORK.spec.rank
    wide = recipe.settings.model_copy(update={"adapter": recipe.settings.adapter.model_copy(update={"rank": rank})})
    recipe = recipe.model_copy(update={"settings": wide})
    ids = torch.tensor([encode(base.tokenizer, one.text)])
    with torch.no_grad():
        both = compose([taught, HYPERNETWORK.generate(ids, torch.ones_like(ids))])
    producers = {LiftWriter(base, recipe_of()).producer.fingerprint}
    for hypernetwork, expected in ((None, taught), (HYPERNETWORK, both)):
        writer = LiftWriter(base, recipe, "fp32", hypernetwork)
        [outcome] = writer.write([one])
        lifted = stored(outcome)
        assert isinstance(lifted, LoraWeights)
        (a, b), (c, d) = lifted.factors(2, "down"), expected.factors(2, "down")
        torch.testing.assert_close(a @ b, c @ d, rtol=1e-3, atol=1e-6)
        producers.add(writer.producer.fingerprint)
    assert len(producers) == 3
    with pytest.raises(ValueError, match="of kind lora"):
        LiftWriter(base, recipe_of("gated_memory", pre_lift=str(tmp_path / "taught")))


def test_a_memory_that_cannot_open_changes_nothing() -> None:
    base = base_of()
    closed = initial(base, generator=torch.Generator().manual_seed(0))
    assert not changes_anything(closed) and changes_anything(initial(base, "released"))
    opened = GatedMemory(closed.spec, closed.flat_BN.clone())
    opened.tensors[1, "attention", "w"].fill_(0.1)
    assert changes_anything(opened) and changes_anything(random_adapters(base, 1))


# Questions from an endpoint


async def one_refused(server: Any, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
    return 200, {}, completion(None, refusal="No.") if "bees" in target or "honey" in target else good_reply(target)


async def nobody(server: Any, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
    return 401, {}, {"error": {"message": "no"}}


def test_lost_questions_are_counted_and_too_many_of_them_reject_the_document(tmp_path: Path) -> None:
    base, documents = base_of(torch.float64), documents_of()
    for share, lost in ((0.5, None), (0.7, 2)):
        run = {"scratch": str(tmp_path / str(share)), "max_lost_share": share}
        with serving(one_refused) as (server, url):
            questions = {"endpoint": endpoint(url).model_dump()}
            with LiftWriter(base, recipe_of(questions=questions, run=run)) as writer:
                first, second, third = writer.write(documents)
                asked = sum(server.asked.values())
                again = writer.write([documents[0], documents[2]])
        assert isinstance(first, Written) and isinstance(third, Written) and (first.lost, third.lost) == (0, 0)
        if lost is None:
            assert (
                isinstance(second, Rejected) and "2 of 3 passages lost their questions, one of them to refused" in second.reason
            )
        else:
            assert isinstance(second, Written) and second.lost == lost
        assert blobs(again) == blobs([first, third]) and sum(server.asked.values()) == asked == 8


def test_an_endpoint_that_answers_nobody_rejects_documents_until_it_does() -> None:
    base, documents = base_of(), documents_of()
    with serving(nobody) as (_, url), LiftWriter(base, recipe_of(questions={"endpoint": endpoint(url).model_dump()})) as writer:
        outcomes = writer.write(documents)
    assert len(outcomes) == 3 and all(isinstance(outcome, Rejected) and "check the key" in outcome.reason for outcome in outcomes)


def test_a_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    source = {"endpoint": {"model": "m", "run": {"api_key_variable": "NO_SUCH_KEY"}}}
    with pytest.raises(ValueError, match="NO_SUCH_KEY is not set"):
        LiftWriter(base_of(), recipe_of(questions=source))
