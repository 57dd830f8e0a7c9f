"""Scores of answers, and the diagnostics of centroid collapse: pure functions of texts, losses and Gram matrices.

Exact match and F1 follow SQuAD's normalisation, as the released SHINE scores (golden numbers: 1e-12). The diagnostics show
what the training loss hides: a hypernetwork that writes nearly the same adapter for every document. Knows nothing of models;
costs microseconds an answer, `mean_interval` about 20 us a resample of 1,000 values.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, white space collapsed; no Unicode folding (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> bool:
    """Whether the prediction equals one of the accepted answers, normalised."""
    return normalise_answer(prediction) in [normalise_answer(gold) for gold in _checked(golds)]


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Best F1 over the accepted answers, on multisets of normalised words; 1 where both sides have none, 0 where one has none."""
    return max(_f1(normalise_answer(prediction).split(), normalise_answer(gold).split()) for gold in _checked(golds))


def contains_answer(prediction: str, golds: Sequence[str]) -> bool:
    """Whether an accepted answer stands in the prediction as whole words, normalised: fair to whoever answers in sentences."""
    said = f" {normalise_answer(prediction)} "
    return any(f" {normalise_answer(gold)} " in said for gold in _checked(golds) if normalise_answer(gold))


def _f1(predicted: list[str], accepted: list[str]) -> float:
    if not predicted or not accepted:
        return float(predicted == accepted)
    overlap = (Counter(predicted) & Counter(accepted)).total()
    return 2 * overlap / (len(predicted) + len(accepted))


def _checked(golds: Sequence[str]) -> Sequence[str]:
    if isinstance(golds, str) or not golds:
        raise ValueError(f"accepted answers are {golds!r}: give a list with at least one")
    return golds


DRAWS_AT_ONCE = 2**20


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean with its percentile-bootstrap interval; the seed decides it.

    Values count as independent: where several questions share a document, give one mean per document.
    """
    if not values:
        raise ValueError("no values: a mean needs at least one")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // len(sample))
    sizes = [(min(rows, resamples - done), len(sample)) for done in range(0, resamples, rows)]
    means = np.concatenate([sample[rng.integers(len(sample), size=size)].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def collapse(
    matched_loss: float, shuffled_loss: float, mean_adapter_loss: float, question_only_loss: float, in_context_loss: float
) -> dict[str, float]:
    """How much of what a document is worth its own adapter carries, from mean losses per supervised token on one question set.

    Losses under the document's own adapter, another document's, the mean adapter, without any, and with the document in the
    prompt. `ratio` is (shuffled - matched) / (question only - in context): about 1 for a working hypernetwork, 0 under
    collapse, NaN where the document does not help the base at all.
    """
    specific, worth = shuffled_loss - matched_loss, question_only_loss - in_context_loss
    return {
        "matched_loss": matched_loss,
        "shuffled_loss": shuffled_loss,
        "mean_adapter_loss": mean_adapter_loss,
        "question_only_loss": question_only_loss,
        "in_context_loss": in_context_loss,
        "shuffled_minus_matched": specific,
        "mean_adapter_minus_matched": mean_adapter_loss - matched_loss,
        "ratio": specific / worth if worth > 0 else float("nan"),
    }


def pairwise_cosine(gram_BB: Tensor) -> float:
    """Mean cosine over pairs of B vectors, from their inner products; near 1 under collapse. NaN if a vector is zero."""
    return float(_cosines(_double(gram_BB)).mean())


def centred_cosine(gram_BB: Tensor, *, absolute: bool = False) -> float:
    """Mean (absolute) cosine over pairs of B vectors with their common mean removed, from the inner products of the raw ones.

    The signed mean is -1/(B-1) for any vectors that lie equally far from their mean, so it tells of outliers only. The
    absolute mean tells in how many directions the vectors differ: 1 for one direction, about 1/(B-1) when all are their own.
    NaN if a vector equals the mean.
    """
    cosines = _cosines(_centred(_double(gram_BB)))
    return float((cosines.abs() if absolute else cosines).mean())


def specific_share(gram_BB: Tensor) -> float:
    """Share of the vectors' mean squared norm that is not common to all: 0 under full collapse, (B-1)/B when orthogonal."""
    gram_BB = _double(gram_BB)
    return float(_centred(gram_BB).trace() / gram_BB.trace())


def _double(gram_BB: Tensor) -> Tensor:
    if gram_BB.ndim != 2 or gram_BB.shape[0] != gram_BB.shape[1] or gram_BB.shape[0] < 2:
        raise ValueError(f"gram_BB has shape {tuple(gram_BB.shape)}: give the inner products [B, B] of at least two vectors")
    return gram_BB.double()


def _centred(gram_BB: Tensor) -> Tensor:
    """Inner products after the mean vector is subtracted from each."""
    return gram_BB - gram_BB.mean(0, keepdim=True) - gram_BB.mean(1, keepdim=True) + gram_BB.mean()


def _cosines(gram_BB: Tensor) -> Tensor:
    """Cosines of the B(B-1)/2 pairs."""
    norms_B = gram_BB.diagonal().clamp_min(0).sqrt()
    rows, columns = torch.triu_indices(len(gram_BB), len(gram_BB), offset=1)
    return gram_BB[rows, columns] / (norms_B[rows] * norms_B[columns])
