"""Scores against the released script's numbers; diagnostics against closed forms."""

import json
import math

import pytest
import torch

from core.training.metrics import (
    centred_cosine,
    collapse,
    exact_match,
    f1,
    mean_interval,
    normalise_answer,
    pairwise_cosine,
    specific_share,
)
from tests import places

GOLDEN = json.loads((places.GOLDEN / "metrics/f1_em.json").read_text())


@pytest.mark.parametrize("pair", GOLDEN["pairs"], ids=lambda pair: pair["note"])
def test_golden_pairs(pair: dict) -> None:
    prediction, golds = pair["prediction"], pair["golds"]
    assert normalise_answer(prediction) == pair["normalized_prediction"]
    assert [normalise_answer(gold) for gold in golds] == pair["normalized_golds"]
    assert exact_match(prediction, golds) == pair["em"]
    assert f1(prediction, golds) == pytest.approx(pair["f1"], abs=1e-12, rel=0)
    for gold, single in zip(golds, pair["per_gold"], strict=True):
        assert exact_match(prediction, [gold]) == single["em"]
        assert f1(prediction, [gold]) == pytest.approx(single["f1"], abs=1e-12, rel=0)


def test_golden_totals() -> None:
    pairs = GOLDEN["pairs"]
    assert len(pairs) == GOLDEN["count"]
    for score, total in ((exact_match, "overall_em"), (f1, "overall_f1")):
        mean = math.fsum(score(pair["prediction"], pair["golds"]) for pair in pairs) / len(pairs)
        assert 100 * mean == pytest.approx(GOLDEN[total], abs=1e-10, rel=0)


@pytest.mark.parametrize("golds", [[], "Paris"])
def test_accepted_answers_are_a_list(golds: list[str] | str) -> None:
    for score in (exact_match, f1):
        with pytest.raises(ValueError, match="at least one"):
            score("Paris", golds)


def test_interval_of_coin_throws_is_the_normal_one() -> None:
    interval = mean_interval([0.0, 1.0] * 200, seed=1)
    assert interval.mean == 0.5
    half = 1.96 * 0.5 / math.sqrt(400)
    assert interval.low == pytest.approx(0.5 - half, abs=0.006)
    assert interval.high == pytest.approx(0.5 + half, abs=0.006)
    assert mean_interval([0.0, 1.0] * 200, seed=1) == interval
    narrower = mean_interval([0.0, 1.0] * 200, confidence=0.5, seed=1)
    assert interval.low < narrower.low < narrower.high < interval.high


def test_interval_of_equal_values_is_a_point() -> None:
    assert mean_interval([0.25] * 9) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="share between 0 and 1"):
        mean_interval([1.0], confidence=95)


def test_collapse_ratio() -> None:
    working = collapse(0.2, 2.0, 1.6, 2.1, 0.1)
    assert working["ratio"] == pytest.approx(0.9)
    assert working["shuffled_minus_matched"] == pytest.approx(1.8)
    assert working["mean_adapter_minus_matched"] == pytest.approx(1.4)
    assert collapse(1.0, 1.0, 1.0, 2.1, 0.1)["ratio"] == 0
    assert math.isnan(collapse(0.2, 2.0, 1.6, 0.1, 0.1)["ratio"])


def gram(vectors_BN: torch.Tensor) -> torch.Tensor:
    return vectors_BN @ vectors_BN.T


def test_cosines_equal_those_of_the_vectors_themselves() -> None:
    vectors_BN = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    pairs = torch.triu_indices(6, 6, offset=1)
    for made, vectors in (
        (pairwise_cosine(gram(vectors_BN)), vectors_BN),
        (centred_cosine(gram(vectors_BN)), vectors_BN - vectors_BN.mean(0)),
    ):
        cosine_BB = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        assert made == pytest.approx(float(cosine_BB[pairs[0], pairs[1]].mean()), abs=1e-12)


def test_orthogonal_vectors() -> None:
    gram_BB = 9 * torch.eye(5)
    assert pairwise_cosine(gram_BB) == 0
    assert centred_cosine(gram_BB) == pytest.approx(-1 / 4)
    assert centred_cosine(gram_BB, absolute=True) == pytest.approx(1 / 4)
    assert specific_share(gram_BB) == pytest.approx(4 / 5)


def test_collapse_shows_in_cosine_and_share() -> None:
    """One vector for all, plus a millionth of its squared norm that is each document's own."""
    gram_BB = torch.ones(8, 8, dtype=torch.float64) + 1e-6 * torch.eye(8)
    assert pairwise_cosine(gram_BB) == pytest.approx(1 / (1 + 1e-6), abs=1e-12)
    assert specific_share(gram_BB) == pytest.approx(1e-6 * 7 / 8, rel=1e-5)
    assert centred_cosine(gram_BB, absolute=True) == pytest.approx(1 / 7, rel=1e-6)


def test_variation_in_one_direction_shows_in_the_absolute_cosine() -> None:
    direction_N = torch.tensor([3.0, 4.0], dtype=torch.float64)
    vectors_BN = 10 + torch.tensor([[1.0], [-1.0], [2.0], [-2.0]], dtype=torch.float64) * direction_N
    assert centred_cosine(gram(vectors_BN), absolute=True) == pytest.approx(1)
    assert centred_cosine(gram(vectors_BN)) == pytest.approx(-1 / 3)


def test_undefined_cosines_are_nan() -> None:
    assert math.isnan(pairwise_cosine(torch.zeros(2, 2)))
    assert math.isnan(centred_cosine(torch.ones(4, 4)))
    with pytest.raises(ValueError, match="at least two vectors"):
        pairwise_cosine(torch.ones(1, 1))
