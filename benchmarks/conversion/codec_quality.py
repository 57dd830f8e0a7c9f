"""What quantised storage costs: exact match of the shipped adapters as each encoding gives them back, on the same questions.

Documents are of the test split of the reference world, whose names training never saw; questions are asked alone, under their
document's adapter. Every encoding answers every question, so differences are paired; their intervals resample documents. Bars:
int8 loses half a point against bf16 at most, int4 two.

Run from the root: `python -m benchmarks.conversion.codec_quality`; about 3 minutes on 2 cores. Writes
benchmarks/results/codec_quality.json.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import load_base, tokenizer_of
from core.adapters.codec import decode, encode
from core.adapters.layout import ENCODINGS, Encoding, encoded_bytes
from core.adapters.lora import LoraWeights
from core.adapters.spec import AdapterSpec
from core.shine.hypernetwork import Hypernetwork
from core.training.examples import DEFAULT_LIMITS
from core.training.metrics import Interval, mean_interval
from pipelines.evaluation.asking import Asker, Questions, Throughput, evaluating, from_hypernetwork
from pipelines.world.documents import WorldDocument, WorldSpec, generate
from pipelines.world.reference import REFERENCE

REFERENCE_ENCODING: Encoding = "bf16"
BARS = {"int8": 0.005, "int4": 0.02}
CHUNK_DOCUMENTS = 64


def stored(weights: LoraWeights, encoding: Encoding) -> LoraWeights:
    """The adapters as a store gives them back."""
    rows = [decode(encode(flat_N, encoding, weights.spec), weights.spec, encoding) for flat_N in weights.flat_BN]
    return LoraWeights(weights.spec, torch.stack(rows))


def answered(documents: Sequence[WorldDocument]) -> tuple[AdapterSpec, np.ndarray, dict[Encoding, dict[str, np.ndarray]]]:
    """The adapters' spec, the document of each question, and by encoding its exact match, loss and relative error."""
    base = load_base(REFERENCE / "base")
    hypernetwork = Hypernetwork.load(REFERENCE / "hypernetwork", base)
    asker, write = Asker(base, Throughput()), from_hypernetwork(hypernetwork)
    scores: dict[Encoding, dict[str, list[np.ndarray]]] = {
        name: {"exact_match": [], "loss": [], "error": []} for name in ENCODINGS
    }
    document_of: list[int] = []
    with evaluating(base.model, hypernetwork):
        for start in range(0, len(documents), CHUNK_DOCUMENTS):
            chunk = documents[start : start + CHUNK_DOCUMENTS]
            questions, weights = Questions(tokenizer_of(base), chunk, DEFAULT_LIMITS), write(chunk)
            document_of += [start + number for number in questions.document_of]
            for encoding, score in scores.items():
                kept = stored(weights, encoding)
                result = asker.ask(questions, range(len(questions)), kept, questions.document_of)
                error_B = (kept.flat_BN - weights.flat_BN).norm(dim=1) / weights.flat_BN.norm(dim=1)
                score["exact_match"].append(result.exact_match)
                score["loss"].append(result.loss / result.tokens)
                score["error"].append(error_B.numpy())
    joined = {encoding: {name: np.concatenate(parts) for name, parts in score.items()} for encoding, score in scores.items()}
    return hypernetwork.spec, np.array(document_of), joined


def paired(ours: np.ndarray, reference: np.ndarray, document_of: np.ndarray) -> Interval:
    """Mean of `ours - reference` over questions; its 95 % interval over documents, whose questions are not independent."""
    sums = np.bincount(document_of, weights=ours - reference)
    return mean_interval((sums * len(sums) / len(document_of)).tolist())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=250, help="of each level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    specs = [WorldSpec(seed=options.seed, split="test", level=level, count=options.documents) for level in (1, 2)]
    spec, document_of, scores = answered(list(chain.from_iterable(map(generate, specs))))
    reference = scores[REFERENCE_ENCODING]["exact_match"]
    encodings: dict[str, Any] = {}
    for encoding, score in scores.items():
        lost = paired(reference, score["exact_match"], document_of)
        encodings[encoding] = {
            "exact_match": float(score["exact_match"].mean()),
            "lost_against_bf16": lost._asdict(),
            "answers_that_differ_in_score": int((score["exact_match"] != reference).sum()),
            "loss": float(score["loss"].mean()),
            "relative_error": float(score["error"].mean()),
            "bytes": encoded_bytes(spec, encoding),
        }
    bars = [
        {
            "name": f"{name} loses",
            "value": (value := encodings[name]["lost_against_bf16"]["mean"]),
            "limit": limit,
            "passed": value <= limit,
        }
        for name, limit in BARS.items()
    ]
    result = {"documents": int(document_of[-1]) + 1, "questions": len(document_of), "encodings": encodings, "bars": bars}
    print(write_result("codec_quality", result, folder=options.output).read_text())


if __name__ == "__main__":
    main()
