"""Writes the README's measured numbers from benchmarks/results: `python -m benchmarks.readme` (`--check` only compares)."""

import json
import re
import sys
from typing import Any

from benchmarks.record import RESULTS, ROOT

BLOCK = re.compile(r"(<!-- numbers: .*? -->\n).*?(<!-- end of numbers -->)", re.DOTALL)


def numbers() -> str:
    """The numbers that stand first in the README; those without a result are left out."""
    lines = []
    if quality := _result("quality"):
        level = quality["groups"]["level_1"]
        adapter, context = (level["scores"][name]["one_fact"]["exact_match"]["mean"] for name in ("adapter", "in_context"))
        lines.append(
            f"- **{adapter:.1%}** exact match on one-fact questions about {level['documents']} unseen documents from the adapter "
            f"alone, {context:.1%} with the document in context, {level['chance']['one_fact']:.1%} by chance"
        )
    if conversion := _result("conversion"):
        lines.append(
            f"- **{conversion['conversion_documents_per_s']['median']:.0f} documents/s** converted on 2 cores, "
            f"{conversion['ratio']['median']:.1f} times a plain loop over the same hypernetwork"
        )
    if serving := _result("serving_batching"):
        lines.append(
            f"- **{serving['ratio']['median']:.1f} times** the tokens/s for 16 concurrent requests to 16 documents, against "
            "one after another, with the same answers"
        )
    if lift := _result("lift_quality"):
        scores = {name: lift["scores"][name]["all"]["exact_match"]["mean"] for name in ("lift", "oracle", "in_context")}
        lines.append(
            f"- **{scores['lift']:.1%}** exact match by LIFT on {len(lift['exact_match_by_document']['lift'])} unseen documents "
            f"longer than the base's window, {scores['oracle']:.1%} with the needed passage in context, "
            f"{scores['in_context']:.1%} with as much of the document as fits"
        )
    return "\n".join(["", *lines, "", ""]) if lines else ""


def _result(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rendered(text: str) -> str:
    """The README with the numbers of today's results."""
    return BLOCK.sub(lambda match: match[1] + numbers() + match[2], text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    fresh = rendered(readme.read_text())
    if "--check" in sys.argv and fresh != readme.read_text():
        sys.exit("README.md does not show the latest results: run python -m benchmarks.readme")
    readme.write_text(fresh)
