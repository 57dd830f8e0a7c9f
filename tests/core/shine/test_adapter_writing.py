from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from core.adapters.base_model import BaseModel
from core.adapters.deltas import delta_norms
from core.adapters.layout import Encoding
from core.adapters.lora import LoraWeights, composed, stack
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.shine.writer import HypernetworkWriter
from core.text.documents import Document, Window
from core.text.prompts import encode
from core.text.tokens import Tokens, read
from core.writing.quality_gate import GateSettings
from core.writing.writer import Rejected, WindowRule, Written
from pipelines.world.tokenizer import build_tokenizer
from tests.models import SHAPE, tiny_base

TOKENIZER = build_tokenizer()
SETTINGS = HypernetworkSettings(rank=2, meta_rank=2, num_layers=2, num_heads=4, feed_forward=32, input_norm="layer", scale=1e-2)
TEXTS = ("Balmora lives in the old town.", "A ü.", "one two three " * 6, "What is the colour? It is crimson.", "x")


def tiny_hypernetwork(composition: str = "mean") -> Hypernetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(**{**SHAPE, "vocab_size": len(TOKENIZER)}, head_dim=12, tie_word_embeddings=True)
        base = BaseModel(AutoModelForCausalLM.from_config(config), TOKENIZER)
        hypernetwork = Hypernetwork(base, SETTINGS.model_copy(update={"composition": composition}))
        torch.nn.init.normal_(hypernetwork.meta_1N, std=0.05)
    return hypernetwork


HYPERNETWORK = tiny_hypernetwork()


def document(text: str, tenant: str = "t") -> Document:
    return Document(tenant=tenant, collection="c", name=text[:40].strip(), text=text)


def alone(text_or_ids: str | list[int]) -> LoraWeights:
    """What the hypernetwork gives for these tokens without a batch."""
    ids = encode(TOKENIZER, text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    with torch.no_grad():
        return HYPERNETWORK.generate(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))


def vectors(outcome: object) -> torch.Tensor:
    assert isinstance(outcome, Written)
    return outcome.weights().flat_BN


@pytest.mark.parametrize(("encoding", "relative"), [("fp32", 1e-5), ("bf16", 2**-8)])
def test_batched_adapters_equal_those_of_each_document_alone(encoding: Encoding, relative: float) -> None:
    writer = HypernetworkWriter(HYPERNETWORK, encoding, max_rows=3)
    documents = [document(text) for text in TEXTS]
    outcomes = writer.write(documents)
    for one, outcome in zip(documents, outcomes, strict=True):
        [vector] = vectors(outcome)
        torch.testing.assert_close(vector, alone(one.text).flat_BN[0], rtol=relative, atol=1e-5)
        assert isinstance(outcome, Written) and outcome.error == 0
        [new] = outcome.adapters
        tokens = len(encode(TOKENIZER, one.text))
        assert (new.tenant, new.content_hash, new.window, new.tokens) == ("t", one.content_hash, Window(0, tokens), tokens)
        assert writer.adapter_ids(one, read(TOKENIZER, one.text)) == [new.adapter_id]


def test_order_and_company_of_documents_do_not_matter() -> None:
    writer = HypernetworkWriter(HYPERNETWORK, "fp32", max_rows=2)
    documents = [document(text) for text in TEXTS]
    forward, backward = writer.write(documents), writer.write(documents[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        torch.testing.assert_close(vectors(one), vectors(other), rtol=1e-5, atol=1e-6)


def test_a_long_document_becomes_one_adapter_with_its_error() -> None:
    rule = WindowRule(max_tokens=10, overlap=2)
    writer = HypernetworkWriter(HYPERNETWORK, "fp32", rule)
    long, short = document("alpha beta gamma"), document("x")
    ids = [list(range(10, 34)), [7]]
    outcome, other = writer.write([long, short], [Tokens(each) for each in ids])
    assert isinstance(outcome, Written) and isinstance(other, Written)
    covers = [(0, 10), (8, 17), (15, 24)]
    expected, error = composed(stack([alone(ids[0][start:end]) for start, end in covers]), "mean", SETTINGS.rank)
    [new] = outcome.adapters
    assert (new.window, new.tokens) == (Window(0, 24), 24)
    assert writer.adapter_ids(long, Tokens(ids[0])) == [new.adapter_id]
    assert outcome.error == pytest.approx(error, rel=1e-3) and 0 < outcome.error < 1 and other.error == 0
    got = LoraWeights(writer.spec, vectors(outcome))
    for layer, site in {(entry.layer, entry.site) for entry in writer.spec.table}:
        (a, b), (c, d) = got.factors(layer, site), expected.factors(layer, site)
        torch.testing.assert_close(a @ b, c @ d, rtol=1e-3, atol=1e-5)


def test_a_long_document_may_keep_an_adapter_for_each_window() -> None:
    writer = HypernetworkWriter(HYPERNETWORK, "fp32", WindowRule(max_tokens=10, long_documents="windows"))
    one, ids = document("alpha"), list(range(10, 35))
    [outcome] = writer.write([one], [Tokens(ids)])
    assert isinstance(outcome, Written) and outcome.error == 0
    assert [new.window for new in outcome.adapters] == [(0, 9), (9, 17), (17, 25)]
    assert writer.adapter_ids(one, Tokens(ids)) == [new.adapter_id for new in outcome.adapters]
    for new, vector in zip(outcome.adapters, vectors(outcome), strict=True):
        torch.testing.assert_close(vector, alone(ids[new.window.start : new.window.end]).flat_BN[0], rtol=1e-5, atol=1e-5)


def test_windows_end_at_sentences_as_long_as_the_hypernetwork_was_trained_for() -> None:
    hypernetwork = tiny_hypernetwork()
    hypernetwork.trained_tokens = 40
    text = "Balmora lives in the old town. It is crimson.\n\nThe harbour was built in 1874. Nobody knows why. It still stands."
    one, tokens = document(text), read(TOKENIZER, text)
    writer = HypernetworkWriter(hypernetwork, "fp32", WindowRule(long_documents="windows"))
    assert writer.rule.max_tokens == 40 < len(tokens.ids)
    [outcome], [same] = writer.write([one]), writer.write([one], [tokens])
    assert isinstance(outcome, Written) and torch.equal(vectors(outcome), vectors(same))
    windows = [new.window for new in outcome.adapters]
    shown = [TOKENIZER.decode(tokens.ids[start:end]).strip() for start, end in windows]
    assert len(shown) > 1 and all(each.endswith(".") for each in shown) and " ".join(shown).split() == text.split()
    assert writer.adapter_ids(one, tokens) == [new.adapter_id for new in outcome.adapters]
    evenly = HypernetworkWriter(hypernetwork, "fp32", WindowRule(long_documents="windows", borders="token"))
    assert set(evenly.adapter_ids(one, tokens)).isdisjoint(writer.adapter_ids(one, tokens))


@contextmanager
def memory_for(base: BaseModel, tokens: int, error: Exception) -> Iterator[list[int]]:
    """The base's forward raises for batches of more tokens. Yields the rows of the batches that ran."""
    rows: list[int] = []

    def check(decoder: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        inputs_BTH = kwargs["inputs_embeds"]
        if inputs_BTH.shape[0] * inputs_BTH.shape[1] > tokens:
            raise error
        rows.append(len(inputs_BTH))

    hook = base.decoder.register_forward_pre_hook(check, with_kwargs=True)
    yield rows
    hook.remove()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_batch_and_rejects_what_does_not_fit_alone(error: Exception) -> None:
    writer = HypernetworkWriter(HYPERNETWORK, "fp32", WindowRule(max_tokens=200), gate=GateSettings(share=0))
    texts = [f"Document {number}." for number in range(8)]
    documents = [document(text) for text in (*texts, "one two three four " * 10, "The first is long. " * 20)]
    expected = writer.write(documents)
    longest = max(len(encode(TOKENIZER, text)) for text in texts) + len(HYPERNETWORK.memory_MH)
    with memory_for(HYPERNETWORK.base, 3 * longest, error) as rows:
        outcomes = writer.write(documents)
    assert sum(rows) == 8 and max(rows) <= 3
    for one, other in zip(outcomes[:8], expected[:8], strict=True):
        torch.testing.assert_close(vectors(one), vectors(other), rtol=1e-5, atol=1e-6)
    for outcome in outcomes[8:]:
        assert isinstance(outcome, Rejected) and outcome.reason.startswith("out of memory: a window does not fit alone")
    with memory_for(HYPERNETWORK.base, 0, ValueError("something else")), pytest.raises(ValueError, match="something else"):
        writer.write(documents)


def test_a_failing_document_is_rejected_alone() -> None:
    hypernetwork = tiny_hypernetwork()
    with torch.no_grad():
        hypernetwork.base.embedding.weight[50] = torch.nan
    writer = HypernetworkWriter(hypernetwork, "fp32", WindowRule(max_tokens=8, max_windows=2))
    documents = [document(text) for text in ("bad", "good", "no tokens", "long", "bad in its second window", "also good")]
    ids = [[9, 50, 9], [9, 10, 11], [], list(range(10, 35)), [9] * 12 + [50], [12, 13]]
    bad, good, empty, long, partly, also_good = writer.write(documents, [Tokens(each) for each in ids])
    for outcome, beginning in (
        (bad, "the hypernetwork gave no usable adapter: zero or not finite, tokens 0 to 3"),
        (partly, "the hypernetwork gave no usable adapter: zero or not finite, tokens 7 to 13"),
        (empty, "no tokens"),
        (long, "too long: 4 windows of 8 tokens, 2 are allowed"),
    ):
        assert isinstance(outcome, Rejected) and outcome.reason.startswith(beginning)
    for outcome, tokens in ((good, ids[1]), (also_good, ids[5])):
        torch.testing.assert_close(vectors(outcome)[0], alone(tokens).flat_BN[0], rtol=1e-5, atol=1e-5)


def test_over_a_bf16_base_all_products_are_in_bf16_and_adapters_little_different() -> None:
    exact, rounded = tiny_hypernetwork(), tiny_hypernetwork()
    rounded.base.model.to(torch.bfloat16)
    seen: list[torch.dtype] = []
    rounded.m2p.transformer_layers[0].linear1.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    texts = [document("A text of some words."), document("Another one, which is a little longer than the first.")]
    outcomes = [HypernetworkWriter(each, "fp32").write(texts) for each in (exact, rounded)]
    assert seen == [torch.bfloat16]
    for expected, got in zip(*(map(vectors, each) for each in outcomes), strict=True):
        assert 0 < (got - expected).norm() < 0.05 * expected.norm()


def test_a_zero_delta_is_rejected() -> None:
    hypernetwork = tiny_hypernetwork()
    hypernetwork.gain_K.zero_()
    [outcome] = HypernetworkWriter(hypernetwork).write([document("text")])
    assert isinstance(outcome, Rejected) and "zero or not finite" in outcome.reason


def test_delta_norms_are_those_of_the_deltas() -> None:
    base = tiny_base("qwen2")
    spec = base.spec(3, generated_bias=True)
    weights = LoraWeights(spec, torch.randn(2, spec.numel, generator=torch.Generator().manual_seed(0)))
    square_B = torch.zeros(2)
    for (layer, site, tensor), value in weights.tensors.items():
        if tensor == "A":
            square_B += (value @ weights.tensors[layer, site, "B"]).square().sum((1, 2))
        elif tensor == "C":
            square_B += value.square().sum(1)
    torch.testing.assert_close(delta_norms(weights), square_B.sqrt())


def test_the_producer_bears_what_changes_an_adapter_and_no_more() -> None:
    def fingerprint(**changes: object) -> str:
        return HypernetworkWriter(HYPERNETWORK, **changes).producer.fingerprint  # type: ignore[arg-type]

    same = fingerprint()
    assert fingerprint(max_rows=1, max_padded_tokens=64, rule=WindowRule(max_windows=2)) == same
    assert fingerprint(rule=WindowRule(max_tokens=256 - len(HYPERNETWORK.memory_MH))) == same
    assert fingerprint(gate=GateSettings(share=1.0, min_gain=5.0)) == same
    assert fingerprint(rule=WindowRule(composition="mean")) == same
    rules = [
        WindowRule(overlap=1),
        WindowRule(long_documents="windows"),
        WindowRule(borders="token"),
        WindowRule(composition="sum"),
    ]
    assert len({same, *(fingerprint(rule=rule) for rule in rules)}) == 5
    summing = tiny_hypernetwork(composition="sum")
    assert HypernetworkWriter(summing).producer.fingerprint == fingerprint(rule=rules[-1]), "None is what it was trained for"
    other = tiny_hypernetwork()
    torch.nn.init.normal_(other.memory_MH)
    assert HypernetworkWriter(other).producer.weights != HypernetworkWriter(HYPERNETWORK).producer.weights


def test_windows_that_do_not_fit_the_base_are_refused() -> None:
    room = 256 - len(HYPERNETWORK.memory_MH)
    with pytest.raises(ValueError, match=f"leaves {room}"):
        HypernetworkWriter(HYPERNETWORK, rule=WindowRule(max_tokens=room + 1))
    with pytest.raises(ValueError, match="overlap of 8 do not fit"):
        HypernetworkWriter(HYPERNETWORK, rule=WindowRule(max_tokens=8, overlap=8))
    with pytest.raises(ValueError, match="no tokenizer: save one beside its weights"):
        HypernetworkWriter(Hypernetwork(tiny_base(), SETTINGS))
