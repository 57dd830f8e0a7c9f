"""What the comparison of LIFT with its baselines found, judged and written down: lift.json, lift.md, answers and figures.

In: a `LiftReport`, gate telemetry where there is some. Out: strict JSON, Markdown, figures. Knows nothing of models; takes a
second or two.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.training.metrics import Interval, mean_interval
from pipelines.evaluation.lift_evaluation import LiftReport
from pipelines.evaluation.plots import Panel, grouped_bars, heat_maps
from pipelines.evaluation.report_writing import (
    SPLIT_LABELS,
    Bar,
    interval,
    requirements,
    strict,
    table,
    write_json,
    write_json_lines,
)

METHOD_LABELS = {
    "question_only": "question only",
    "in_context": "document in context, head and tail",
    "oracle": "needed passage in context",
    "rag": "BM25 passages in context",
    "shine": "SHINE adapter",
    "finetune_raw": "fine-tuned on the raw text, adapter",
    "full_finetune": "fine-tuned on the raw text, all weights",
    "lift": "LIFT",
    "lift_in_context": "LIFT + document in context",
    "lift_rules": "LIFT, questions by rule",
    "lift_from_shine": "LIFT from the SHINE adapter",
    "gated_memory": "LIFT, Gated Memory",
    "gated_memory_in_context": "LIFT, Gated Memory + document in context",
}
ORACLE_SHARE = 0.9
"""What LIFT shall reach of the oracle's exact match; fixed before anything was measured."""


def bars(report: LiftReport) -> list[Bar]:
    """The requirement that the report can judge; none without LIFT or the oracle."""
    if not {"lift", "oracle"} <= report.scores.keys():
        return []
    share = oracle_share(report, "lift").mean
    return [Bar("LIFT / needed passage in context, exact match", share, ">=", ORACLE_SHARE)]


def oracle_share(report: LiftReport, method: str, resamples: int = 2000) -> Interval:
    """Exact match over the oracle's: the ratio of their means over documents, its interval by resampling documents."""
    own, shown = (np.array(report.by_document[name]) for name in (method, "oracle"))
    drawn = np.random.default_rng(0).integers(len(own), size=(resamples, len(own)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = own[drawn].mean(axis=1) / shown[drawn].mean(axis=1)
        ratio = float(own.mean() / shown.mean())
    low, high = np.nanquantile(ratios, [0.025, 0.975]) if np.isfinite(ratios).any() else (math.nan, math.nan)
    return Interval(ratio, float(low), float(high))


def gain_over_better(report: LiftReport, adapters: str) -> Interval | None:
    """Exact match of adapter and document together minus that of the better of the two alone, document by document."""
    names = f"{adapters}_in_context", adapters, "in_context"
    if any(name not in report.by_document for name in names):
        return None
    both, alone, shown = (report.by_document[name] for name in names)
    return mean_interval([a - max(b, c) for a, b, c in zip(both, alone, shown, strict=True)])


def to_json(report: LiftReport, gates: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The report as strict JSON values, without the answers."""
    shares = {name: oracle_share(report, name) for name in report.scores if "oracle" in report.scores}
    gains = {name: gain_over_better(report, name) for name in ("lift", "gated_memory")}
    values = strict(
        {
            "bars": [bar.to_json() for bar in bars(report)],
            "questions": report.questions,
            "scores": report.scores,
            "share_of_oracle": shares,
            "gain_over_better_of_both": {name: gain for name, gain in gains.items() if gain is not None},
            "document_nll": report.nll,
            "reading_other_passages": report.reading,
            "exact_match_by_document": report.by_document,
            "gates": gates,
            "timings": report.timings,
            "identity": report.identity,
        }
    )
    assert isinstance(values, dict)
    return values


def markdown(report: LiftReport) -> str:
    """The report for people."""
    splits = list(report.questions)
    count = len(next(iter(report.by_document.values())))
    parts = [f"{count} documents. Means over documents of means over questions, with 95 % intervals over documents."]
    if judged := bars(report):
        parts.append(requirements(judged))
    columns = [f"{SPLIT_LABELS.get(split, split)} ({report.questions[split]})" for split in splits]
    for metric, heading in (("exact_match", "Exact match"), ("f1", "F1"), ("judged", "Judge")):
        found = {name: [getattr(scores[split], metric) for split in splits] for name, scores in report.scores.items()}
        if any(value is not None for values in found.values() for value in values):
            rows = [[METHOD_LABELS.get(name, name), *map(interval, values)] for name, values in found.items()]
            parts += [f"## {heading}", table(["method", *columns], rows)]
    parts += ["## The document's own text (nats a token)", _by_adapters(report.nll, "NLL")]
    if report.reading:
        heading = "## Reading another document's passage in context (exact match)"
        parts += [heading, _by_adapters(report.reading, "exact match")]
    return "\n\n".join(["# LIFT", *parts]) + "\n"


def _by_adapters(values: Mapping[str, Interval], figure: str) -> str:
    rows = [[METHOD_LABELS.get(name, name) or "bare base", interval(value)] for name, value in values.items()]
    return table(["adapter", figure], rows)


def write_lift_report(
    report: LiftReport, directory: Path, gates: Mapping[str, Sequence[Sequence[float]]] | None = None
) -> dict[str, Any]:
    """Writes lift.json, lift.md, lift_answers.jsonl, lift.png and .svg, and gates.png and .svg; returns the JSON values."""
    directory.mkdir(parents=True, exist_ok=True)
    values = to_json(report, gates)
    write_json(values, directory / "lift.json")
    (directory / "lift.md").write_text(markdown(report), encoding="utf-8")
    write_json_lines(report.answers, directory / "lift_answers.jsonl")
    draw(report, directory / "lift")
    if gates:
        draw_gates(gates, directory / "gates")
    return values


def draw(report: LiftReport, path: Path) -> tuple[Path, Path]:
    """Exact match of each method by split; writes PNG and SVG and returns their paths."""
    splits = list(report.questions)
    labels = [f"{SPLIT_LABELS.get(split, split)}\n{count:,} questions" for split, count in report.questions.items()]
    oracle = report.scores.get("oracle")
    line = [oracle[split].exact_match.mean if oracle else 0.0 for split in splits]
    series = {
        METHOD_LABELS.get(name, name): [scores[split].exact_match for split in splits]
        for name, scores in report.scores.items()
        if name != "oracle"
    }
    panel = Panel("Documents longer than the window", labels, series, line)
    return grouped_bars([panel], "LIFT against its baselines", "exact match", METHOD_LABELS["oracle"], path)


def draw_gates(gates: Mapping[str, Sequence[Sequence[float]]], path: Path) -> tuple[Path, Path]:
    """Mean gates by layer and head, one panel for each kind of text; writes PNG and SVG and returns their paths."""
    titles = {name.replace("_", " "): rows for name, rows in gates.items()}
    return heat_maps(titles, "Mean gate of the memory", ("layer", "head"), path)
