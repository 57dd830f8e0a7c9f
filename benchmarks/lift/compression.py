"""What re-compression to a serving rank costs: accuracy of LIFT adapters cut by SVD, against the error of the cut and the bytes.

Documents and questions as in `benchmarks.lift.quality`; adapters are lifted at one rank and cut to lower ones, the last step bf16
as the store keeps them. For scale: bytes of the same ranks on an 8B model (Qwen3-8B's linears, 36 layers).

Run from the root: `python -m benchmarks.lift.compression`; about 3 minutes on 2 cores.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lift.setup import LIFT, PAIRS, PARTS, RUN, stand_in_questions
from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import BaseModel, load_base
from core.adapters.codec import decode, encode
from core.adapters.layout import encoded_bytes
from core.adapters.lora import LoraWeights, recompress, stack
from core.adapters.spec import AdapterSpec, SiteShape
from pipelines.evaluation.asking import Asker, evaluating
from pipelines.evaluation.lift_evaluation import LiftEvaluationSettings, Sheet, by_document
from pipelines.evaluation.lifting import jobs_of, lifted
from pipelines.evaluation.long_documents import long_documents
from pipelines.world.reference import REFERENCE

RANKS = (32, 16, 8, 4, 2, 1)
HIDDEN, KEYS, FEED_FORWARD, LAYERS = 4096, 1024, 12288, 36


def large_spec(rank: int) -> AdapterSpec:
    """An adapter of every linear of Qwen3-8B."""
    outputs = {"q": HIDDEN, "k": KEYS, "v": KEYS, "o": HIDDEN, "gate": FEED_FORWARD, "up": FEED_FORWARD}
    sites = [SiteShape(site, HIDDEN, width) for site, width in outputs.items()] + [SiteShape("down", FEED_FORWARD, HIDDEN)]
    return AdapterSpec((tuple(sites),) * LAYERS, rank)


def as_stored(weights: LoraWeights) -> LoraWeights:
    """The adapters as bf16 gives them back."""
    rows = [decode(encode(row_N, "bf16", weights.spec), weights.spec, "bf16") for row_N in weights.flat_BN]
    return LoraWeights(weights.spec, torch.stack(rows))


def accuracy(base: BaseModel, sheet: Sheet, weights: LoraWeights) -> float:
    """Exact match, mean over documents."""
    with evaluating(base.model):
        asker = Asker(base, LiftEvaluationSettings().run)
        result = asker.score(*sheet.shown("nothing"), sheet.golds, sheet.answer_tokens, weights, sheet.document_of)
    values = by_document(sheet, result.exact_match)
    return sum(values) / len(values)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--parts", type=int, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="two short documents and two ranks: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    count, parts, ranks = (2, 1, (32, 2)) if options.quick else (options.documents, options.parts, RANKS)

    base = load_base(REFERENCE / "base")
    documents = long_documents(count, parts)
    written = stand_in_questions(documents, 2 if options.quick else PAIRS)
    whole = stack(lifted(base, jobs_of(documents, written.pairs), LIFT, RUN).adapters)
    assert isinstance(whole, LoraWeights)
    sheet = Sheet(base, documents, LiftEvaluationSettings())
    uncut = accuracy(base, sheet, whole)
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        cut, error_B = (whole, torch.zeros(len(whole))) if rank == whole.spec.rank else recompress(whole, rank)
        kept = accuracy(base, sheet, as_stored(cut))
        rows.append(
            {
                "rank": rank,
                "relative_error": round(error_B.mean().item(), 4),
                "exact_match": kept,
                "exact_match_lost": uncut - kept,
                "bytes": encoded_bytes(cut.spec, "bf16"),
                "bytes_on_qwen3_8b": encoded_bytes(large_spec(rank), "bf16"),
            }
        )
    result = {
        "documents": count,
        "rank": whole.spec.rank,
        "exact_match_fp32": uncut,
        "by_rank": rows,
        "rank_128_bytes_on_qwen3_8b": encoded_bytes(large_spec(128), "bf16"),
        "quick": options.quick,
    }
    print(write_result("lift_compression", result, folder=options.output).read_text())


if __name__ == "__main__":
    main()
