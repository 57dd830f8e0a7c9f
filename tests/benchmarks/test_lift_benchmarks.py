"""The arithmetic of LIFT's benchmarks, and that each, and that of composition, runs at its smallest size (slow)."""

import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks.conversion import composition
from benchmarks.lift import batching as lift_batching
from benchmarks.lift import compression as lift_compression
from benchmarks.lift import cost as lift_cost
from benchmarks.lift import from_shine as lift_from_shine
from benchmarks.lift import needle as lift_needle
from benchmarks.lift import quality as lift_quality
from benchmarks.lift import questions as lift_questions
from benchmarks.lift.compression import as_stored, large_spec
from benchmarks.lift.cost import crossings
from benchmarks.lift.quality import Point, compare_steps, first_step, reading_at
from core.adapters.layout import encoded_bytes
from core.adapters.lora import LoraWeights
from core.text.prompts import encode
from pipelines.evaluation.long_documents import long_documents
from pipelines.world.tokenizer import build_tokenizer

PLAIN = [Point(0, 0.1, 0.9), Point(10, 0.5, 0.7), Point(20, 0.9, 0.5), Point(30, 0.8, 0.4)]


def test_steps_are_counted_to_the_final_accuracy_of_plain_lift() -> None:
    shine = [Point(0, 0.3, 0.9), Point(10, 0.85, 0.6), Point(20, 0.9, 0.5)]
    assert compare_steps(PLAIN, shine) == {"accuracy": 0.8, "plain_steps": 20, "from_shine_steps": 10, "share": 0.5}
    assert compare_steps(PLAIN, [Point(0, 0.3, 0.9)])["share"] is None
    assert first_step(PLAIN, 0.95) is None and first_step(PLAIN, 0.0) == 0


def test_reading_is_compared_at_equal_accuracy() -> None:
    assert reading_at(PLAIN, 0.7) == pytest.approx(0.6)
    assert reading_at(PLAIN, 0.5) == pytest.approx(0.7)
    assert reading_at(PLAIN, 0.05) == 0.9 and reading_at(PLAIN, 0.95) is None


def test_crossings_are_where_the_lines_cross() -> None:
    shown = {"first_token_s": 2.0, "reading_s": 2.0, "next_token_s": 0.05, "training_s": 0.0}
    lifted = {"first_token_s": 12.0, "reading_s": 0.0, "next_token_s": 0.01, "training_s": 12.0}
    crossed = crossings(shown, lifted)
    assert crossed["output_tokens"] == pytest.approx(10 / 0.04)
    assert crossed["questions"] == pytest.approx(12 / (2.0 + 32 * 0.04))
    assert crossings(shown, {**lifted, "next_token_s": 0.2, "reading_s": 3.0}) == {"output_tokens": None, "questions": None}


def test_the_needle_stands_where_it_is_said_to() -> None:
    tokenizer = build_tokenizer()
    [haystack] = long_documents(1, 12)
    for depth in (0.0, 0.3, 1.0):
        document, true_depth = lift_needle.needle_document(tokenizer, haystack.text, 600, depth, random.Random(0))
        needle, total = document.questions[0].passage, len(encode(tokenizer, document.text))
        before = len(encode(tokenizer, document.text[: document.text.index(needle)].rstrip()))
        assert document.text.count(needle) == 1 and document.questions[0].answers[0] in needle
        assert 560 <= total <= 610 and abs(before / total - true_depth) < 0.01 and abs(true_depth - depth) < 0.04
        assert [question.splits for question in document.questions] == [("seen",)] * 2 + [("held_out",)] * 2


def test_a_large_adapter_weighs_what_the_plan_says() -> None:
    """LIFT's rank 128 on an 8B model is 698 MB."""
    assert encoded_bytes(large_spec(128), "bf16") == pytest.approx(698e6, rel=0.01)


def test_what_is_stored_is_rounded_to_bf16() -> None:
    spec = large_spec(1)
    spec = type(spec)((spec.layers[0][:1],), 1)
    weights = LoraWeights(spec, torch.randn(2, spec.numel, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(as_stored(weights).flat_BN, weights.flat_BN.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark",
    [composition, lift_quality, lift_from_shine, lift_needle, lift_cost, lift_questions, lift_compression, lift_batching],
)
def test_each_benchmark_runs_at_its_smallest_size(benchmark, tmp_path: Path) -> None:
    benchmark.main(["--quick", "--output", str(tmp_path)])
    name = benchmark.__name__.rpartition(".")[2]
    result = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert result["quick"] and result["commit"]
