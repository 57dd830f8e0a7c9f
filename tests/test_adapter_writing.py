import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SHAPE, tiny_base
from transformers import AutoModelForCausalLM, Qwen3Config

from core.adapter_writing import HypernetworkWriter, Rejected, WindowRule, Written, delta_norms, plan_batches
from core.base_model import BaseModel
from core.codec import Encoding
from core.documents import Document, Window
from core.hypernetwork import Hypernetwork, HypernetworkSettings
from core.lora import LoraWeights, mean_adapter, stack
from core.prompts import encode
from pipelines.world_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SETTINGS = HypernetworkSettings(rank=2, meta_rank=2, num_layers=2, num_heads=4, feed_forward=32, input_norm="layer", scale=1e-2)
TEXTS = ("Balmora lives in the old town.", "A ü.", "one two three " * 6, "What is the colour? It is crimson.", "x")


def tiny_hypernetwork() -> Hypernetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(**{**SHAPE, "vocab_size": len(TOKENIZER)}, head_dim=12, tie_word_embeddings=True)
        base = BaseModel(AutoModelForCausalLM.from_config(config), TOKENIZER)
        hypernetwork = Hypernetwork(base, SETTINGS)
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
        assert writer.adapter_ids(one, tokens) == [new.adapter_id]


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
    outcome, other = writer.write([long, short], ids)
    assert isinstance(outcome, Written) and isinstance(other, Written)
    covers = [(0, 10), (8, 17), (15, 24)]
    expected, error = mean_adapter(stack([alone(ids[0][start:end]) for start, end in covers]), SETTINGS.rank)
    [new] = outcome.adapters
    assert (new.window, new.tokens) == (Window(0, 24), 24)
    assert writer.adapter_ids(long, 24) == [new.adapter_id]
    assert outcome.error == pytest.approx(error, rel=1e-3) and 0 < outcome.error < 1 and other.error == 0
    got = LoraWeights(writer.spec, vectors(outcome))
    for layer, site in {(entry.layer, entry.site) for entry in writer.spec.table}:
        (a, b), (c, d) = got.factors(layer, site), expected.factors(layer, site)
        torch.testing.assert_close(a @ b, c @ d, rtol=1e-3, atol=1e-5)


def test_a_long_document_may_keep_an_adapter_for_each_window() -> None:
    writer = HypernetworkWriter(HYPERNETWORK, "fp32", WindowRule(max_tokens=10, long_documents="windows"))
    one, ids = document("alpha"), list(range(10, 35))
    [outcome] = writer.write([one], [ids])
    assert isinstance(outcome, Written) and outcome.error == 0
    assert [new.window for new in outcome.adapters] == [(0, 9), (9, 17), (17, 25)]
    assert writer.adapter_ids(one, 25) == [new.adapter_id for new in outcome.adapters]
    for new, vector in zip(outcome.adapters, vectors(outcome), strict=True):
        torch.testing.assert_close(vector, alone(ids[new.window.start : new.window.end]).flat_BN[0], rtol=1e-5, atol=1e-5)


def test_a_failing_document_is_rejected_alone() -> None:
    hypernetwork = tiny_hypernetwork()
    with torch.no_grad():
        hypernetwork.base.embedding.weight[50] = torch.nan
    writer = HypernetworkWriter(hypernetwork, "fp32", WindowRule(max_tokens=8, max_windows=2))
    documents = [document(text) for text in ("bad", "good", "no tokens", "long", "bad in its second window", "also good")]
    ids = [[9, 50, 9], [9, 10, 11], [], list(range(10, 35)), [9] * 12 + [50], [12, 13]]
    bad, good, empty, long, partly, also_good = writer.write(documents, ids)
    for outcome, beginning in (
        (bad, "the hypernetwork gave no usable adapter: zero or not finite, tokens 0 to 3"),
        (partly, "the hypernetwork gave no usable adapter: zero or not finite, tokens 7 to 13"),
        (empty, "no tokens"),
        (long, "too long: 4 windows of 8 tokens, 2 are allowed"),
    ):
        assert isinstance(outcome, Rejected) and outcome.reason.startswith(beginning)
    for outcome, tokens in ((good, ids[1]), (also_good, ids[5])):
        torch.testing.assert_close(vectors(outcome)[0], alone(tokens).flat_BN[0], rtol=1e-5, atol=1e-5)


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
    assert len({same, fingerprint(rule=WindowRule(overlap=1)), fingerprint(rule=WindowRule(long_documents="windows"))}) == 3
    other = tiny_hypernetwork()
    torch.nn.init.normal_(other.memory_MH)
    assert HypernetworkWriter(other).producer.weights != HypernetworkWriter(HYPERNETWORK).producer.weights


def test_windows_that_do_not_fit_the_base_are_refused() -> None:
    room = 256 - len(HYPERNETWORK.memory_MH)
    with pytest.raises(ValueError, match=f"leaves {room}"):
        HypernetworkWriter(HYPERNETWORK, rule=WindowRule(max_tokens=room + 1))
    with pytest.raises(ValueError, match="overlap of 8 do not fit"):
        HypernetworkWriter(HYPERNETWORK, rule=WindowRule(max_tokens=8, overlap=8))
    with pytest.raises(ValueError, match="no tokenizer"):
        HypernetworkWriter(Hypernetwork(tiny_base(), SETTINGS))


@given(lengths=st.lists(st.integers(0, 300), max_size=60), max_rows=st.integers(1, 9), max_tokens=st.integers(1, 600))
def test_batches_hold_every_index_once_within_their_limits(lengths: list[int], max_rows: int, max_tokens: int) -> None:
    batches = plan_batches(lengths, max_rows, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) <= max_rows and (len(batch) == 1 or longest * len(batch) <= max_tokens)
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths, reverse=True)
