"""What an evaluation found, judged and written down: report.json, report.md, answers.jsonl and a figure.

In: a `Report`. JSON is strict: a figure that does not exist (NaN) is null. Knows nothing of models; takes a second or two.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

from core.metrics import Interval
from pipelines.evaluate import Group, Report
from pipelines.plots import Panel, grouped_bars

SPLIT_LABELS = {
    "all": "all",
    "one_fact": "one fact",
    "two_facts": "two facts",
    "seen": "seen phrasing",
    "held_out": "held-out phrasing",
}
CONDITION_LABELS = {
    "question_only": "question only",
    "in_context": "document in context",
    "adapter": "the document's adapter",
    "other_adapter": "another document's adapter",
    "mean_adapter": "mean adapter",
}
GROUP_LABELS = {"all": "All documents", "level_1": "Level 1, one entity", "level_2": "Level 2, two or three entities"}


@dataclass(frozen=True)
class Bar:
    """A requirement on the reference model: `value` against `limit`."""

    name: str
    value: float
    relation: Literal[">=", "<="]
    limit: float

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit


def bars(report: Report) -> list[Bar]:
    """The requirements that the report can judge: those of level 1, and the aim for level 2.

    Controls may not exceed chance by more than 3 points; below it they do no harm (a wrong adapter answers with values of another
    class). Without adapters only what concerns the base is listed.
    """
    found = []
    if group := report.groups.get("level_1"):
        exact_match = {condition: scores["all"].exact_match.mean for condition, scores in group.scores.items()}
        found += [
            Bar("level 1: unseen documents", group.documents, ">=", 500),
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
        "bars": [{**asdict(bar), "passed": bar.passed} for bar in bars(report)],
        "groups": report.groups,
        "adapters": report.adapters,
        "timings": report.timings,
        "identity": report.identity,
    }
    found = strict(values)
    assert isinstance(found, dict)
    return found


def strict(value: Any) -> Any:
    """Dataclasses and intervals as JSON values; a figure that is not finite becomes null."""
    if isinstance(value, Interval):
        return strict(value._asdict())
    if is_dataclass(value):
        return strict({name: getattr(value, name) for name in value.__dataclass_fields__})
    if isinstance(value, Mapping):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_report(report: Report, directory: Path) -> None:
    """Writes report.json, report.md, answers.jsonl, exact_match.png and exact_match.svg into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(to_json(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")
    with (directory / "answers.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n" for answer in report.answers)
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
        met = {True: "yes", False: "**no**"}
        rows = [[bar.name, _number(bar.value), f"{bar.relation} {bar.limit:g}", met[bar.passed]] for bar in judged]
        parts += ["## Requirements", table(["requirement", "measured", "wanted", "met"], rows)]
    for name in _shown(report):
        parts += _group_parts(GROUP_LABELS[name], report.groups[name])
    if report.adapters:
        rows = [[key.replace("_", " "), _number(value)] for key, value in report.adapters.items()]
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
            [CONDITION_LABELS[name], *(_interval(getattr(scores[split], metric)) for split in splits)]
            for name, scores in group.scores.items()
        ]
        if metric == "exact_match":
            rows.append(["chance", *(f"{group.chance[split]:.3f}" for split in splits)])
        parts += [f"### {heading}", table(["condition", *columns], rows)]
    rows = [[CONDITION_LABELS[name], *(_number(scores[split].loss) for split in splits)] for name, scores in group.scores.items()]
    parts += ["### Loss (nats per supervised token)", table(["condition", *columns], rows)]
    if group.collapse:
        rows = [[key.replace("_", " "), _number(value)] for key, value in group.collapse.items() if not key.endswith("_loss")]
        rows.append(["adapter / in context, exact match on one-fact questions", _number(group.ratio_one_fact)])
        parts += ["### What the adapters carry", table(["figure", "value"], rows)]
    return parts


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first hold numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(value: Interval) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
