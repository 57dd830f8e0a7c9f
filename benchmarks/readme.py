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
        whole, level = quality["groups"]["all"], quality["groups"]["level_1"]
        of = {name: each["all"]["exact_match"]["mean"] for name, each in whole["scores"].items()}
        adapter, context = (level["scores"][name]["one_fact"]["exact_match"]["mean"] for name in ("adapter", "in_context"))
        lines.append(
            f"- **{of['adapter']:.1%}** exact match by the document's adapter alone on {whole['documents']:,} unseen documents "
            f"of the reference world, both levels; {of['in_context']:.1%} with the document in context, "
            f"{of['question_only']:.1%} by the question alone, {of['other_adapter']:.1%} by another document's adapter. On its "
            f"easiest part, one-fact questions on documents with one entity: {adapter:.1%} and {context:.1%}"
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
        of = {name: each["all"]["exact_match"]["mean"] for name, each in lift["scores"].items()}
        lines.append(
            f"- **{of['lift_rules']:.1%}** exact match by LIFT with the questions that Imprint writes itself (gaps by rule) on "
            f"{len(lift['exact_match_by_document']['lift'])} unseen documents longer than the base's window: such adapters are "
            f"withheld. {of['lift']:.1%} with a question writer that knows the reference world's phrases (a stand-in for a "
            f"language model). BM25 passages in context {of['rag']:.1%}, the needed passage {of['oracle']:.1%}, as much of the "
            f"document as fits {of['in_context']:.1%}"
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
