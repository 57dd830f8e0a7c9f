"""What an evaluation found, judged and written down: report.json, report.md, answers.jsonl and a figure.

In: a `Report`. Knows nothing of models; takes a second or two.
"""

from pathlib import Path
from typing import Any

from pipelines.evaluation.evaluate import Group, Report
from pipelines.evaluation.plots import Panel, grouped_bars
from pipelines.evaluation.report_writing import (
    SPLIT_LABELS,
    Bar,
    interval,
    number,
    requirements,
    strict,
    table,
    write_json,
    write_json_lines,
)

CONDITION_LABELS = {
    "question_only": "question only",
    "in_context": "document in context",
    "adapter": "the document's adapter",
    "other_adapter": "another document's adapter",
    "mean_adapter": "mean adapter",
}
GROUP_LABELS = {"all": "All documents", "level_1": "Level 1, one entity", "level_2": "Level 2, two or three entities"}


def bars(report: Report) -> list[Bar]:
    """The requirements that the report can judge: those of level 1, and the aim for level 2.

    Controls may not exceed chance by more than 3 points; below it they do no harm (a wrong adapter answers with values of another
    class). Without adapters only what concerns the base is listed.
    """
    found = []
    if group := report.groups.get("level_1"):
        exact_match = {condition: scores["all"].exact_match.mean for condition, scores in group.scores.items()}
        found += [
            Bar("level 1: chance", group.chance["all"], "<=", 0.05),
            Bar("level 1: exact match in context", exact_match["in_context"], ">=", 0.97),
        ]
        if group.collapse:
            controls = {name: exact_match[name] - group.chance["all"] for name in ("other_adapter", "mean_adapter")}
            found += [
                Bar("level 1: adapter / in context, one-fact questions", group.ratio_one_fact, ">=", 0.95),
                Bar("level 1: another document's adapter - chance", controls["other_adapter"], "<=", 0.03),
                Bar("level 1: mean adapter - chance", controls["mean_adapter"], "<=", 0.03),
                Bar("level 1: (shuffled - matched) / (question only - in context)", group.collapse["ratio"], ">=", 0.8),
            ]
    if group := report.groups.get("level_2"):
        found.append(Bar("level 2 (aim): exact match in context", group.scores["in_context"]["all"].exact_match.mean, ">=", 0.9))
    return found


def to_json(report: Report) -> dict[str, Any]:
    """The report as strict JSON values, without the answers; `exact_match` and `f1` of all questions stand first."""
    overall = report.groups["all"].scores
    values = {
        "exact_match": {condition: scores["all"].exact_match.mean for condition, scores in overall.items()},
        "f1": {condition: scores["all"].f1.mean for condition, scores in overall.items()},
        "bars": [bar.to_json() for bar in bars(report)],
        "groups": report.groups,
        "adapters": report.adapters,
        "timings": report.timings,
        "identity": report.identity,
    }
    found = strict(values)
    assert isinstance(found, dict)
    return found


def write_report(report: Report, directory: Path) -> None:
    """Writes report.json, report.md, answers.jsonl, exact_match.png and exact_match.svg into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(to_json(report), directory / "report.json")
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")
    write_json_lines(report.answers, directory / "answers.jsonl")
    draw(report, directory / "exact_match")


def draw(report: Report, path: Path) -> tuple[Path, Path]:
    """Exact match by condition and split, one panel a level; writes PNG and SVG and returns their paths."""
    panels = []
    for name in _shown(report):
        group = report.groups[name]
        labels = [f"{SPLIT_LABELS[split]}\n{count:,} questions" for split, count in group.questions.items()]
        chance = [group.chance[split] for split in group.questions]
        series = {
            CONDITION_LABELS[condition]: [scores[split].exact_match for split in group.questions]
            for condition, scores in group.scores.items()
        }
        panels.append(Panel(f"{GROUP_LABELS[name]}: {group.documents:,} documents", labels, series, chance))
    return grouped_bars(panels, "Exact match on unseen documents", "exact match", "chance", path)


def _shown(report: Report) -> list[str]:
    """The groups worth showing: the levels; all documents only where they have none."""
    return [name for name in report.groups if name != "all"] or ["all"]


def markdown(report: Report) -> str:
    """The report for people: scores by condition and split, requirements, collapse diagnostics, identity."""
    parts = ["# Evaluation", "![Exact match by condition](exact_match.png)"]
    if judged := bars(report):
        parts += ["## Requirements", requirements(judged)]
    for name in _shown(report):
        parts += _group_parts(GROUP_LABELS[name], report.groups[name])
    if report.adapters:
        rows = [[key.replace("_", " "), number(value)] for key, value in report.adapters.items()]
        parts += ["## Adapters", table(["figure", "value"], rows)]
    rows = [[key.replace("_", " "), f"{value:,.1f}"] for key, value in report.timings.items()]
    parts += ["## Speed", table(["figure", "value"], rows)]
    rows = [[key.replace("_", " "), f"`{value}`"] for key, value in report.identity.items() if key != "settings"]
    parts += ["## Identity", table(["of", "value"], rows)]
    return "\n\n".join(parts) + "\n"


def _group_parts(title: str, group: Group) -> list[str]:
    splits = list(group.questions)
    columns = [f"{SPLIT_LABELS[split]} ({group.questions[split]})" for split in splits]
    parts = [f"## {title}", f"{group.documents} documents. Means over questions, with 95 % intervals over documents."]
    for metric, heading in (("exact_match", "Exact match"), ("f1", "F1")):
        rows = [
            [CONDITION_LABELS[name], *(interval(getattr(scores[split], metric)) for split in splits)]
            for name, scores in group.scores.items()
        ]
        if metric == "exact_match":
            rows.append(["chance", *(f"{group.chance[split]:.3f}" for split in splits)])
        parts += [f"### {heading}", table(["condition", *columns], rows)]
    rows = [[CONDITION_LABELS[name], *(number(scores[split].loss) for split in splits)] for name, scores in group.scores.items()]
    parts += ["### Loss (nats per supervised token)", table(["condition", *columns], rows)]
    if group.collapse:
        rows = [[key.replace("_", " "), number(value)] for key, value in group.collapse.items() if not key.endswith("_loss")]
        rows.append(["adapter / in context, exact match on one-fact questions", number(group.ratio_one_fact)])
        parts += ["### What the adapters carry", table(["figure", "value"], rows)]
    return parts
