"""Figures for reports: numbers in, one PNG and one SVG out. No window, no global state; about a second a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from core.training.metrics import Interval

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#999999", "#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#009E73")
INK, GRID = "#222222", "#DDDDDD"


@dataclass(frozen=True)
class Panel:
    """Groups of bars side by side: `series[label][g]` is a bar of group g, `line[g]` the level to compare its bars with."""

    title: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[Interval]]
    line: Sequence[float]


def grouped_bars(panels: Sequence[Panel], title: str, value_label: str, line_label: str, path: Path) -> tuple[Path, Path]:
    """Draws shares from 0 to 1 with their intervals, panels below one another; returns `path` with suffixes .png and .svg."""
    figure = Figure(figsize=(9, 1.2 + 2.9 * len(panels)), layout=ConstrainedLayoutEngine(h_pad=0.1, hspace=0.05))
    rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        _draw(axes, panel, value_label, line_label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    line, *bars = rows[0].get_legend_handles_labels()[0]
    figure.legend(handles=[*bars, line], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _saved(figure, path)


def _draw(axes: Axes, panel: Panel, value_label: str, line_label: str) -> None:
    width = 0.84 / len(panel.series)
    groups = range(len(panel.groups))
    starts, ends = [group - 0.45 for group in groups], [group + 0.45 for group in groups]
    axes.hlines(panel.line, starts, ends, colors=INK, linestyles=(0, (3, 2)), linewidth=1.1, label=line_label, zorder=4)
    for number, (label, bars) in enumerate(panel.series.items()):
        places = [group + (number - (len(panel.series) - 1) / 2) * width for group in groups]
        means = [bar.mean for bar in bars]
        errors = [[max(bar.mean - bar.low, 0) for bar in bars], [max(bar.high - bar.mean, 0) for bar in bars]]
        hatch = "///" if number >= len(COLOURS) else ""
        axes.bar(
            places,
            means,
            width * 0.92,
            color=COLOURS[number % len(COLOURS)],
            hatch=hatch,
            edgecolor="white",
            label=label,
            zorder=2,
        )
        axes.errorbar(places, means, errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)
        for place, bar, level in zip(places, bars, panel.line, strict=True):
            top = max(bar.mean, bar.high, level) + 0.015
            size = 7.5 if len(panel.series) <= len(COLOURS) else 5
            axes.text(place, top, f"{100 * bar.mean:.0f}", ha="center", va="bottom", fontsize=size, color=INK)
    _frame(axes, panel.title, ("", value_label), hidden=("top", "right", "left"))
    axes.set_xticks(groups, panel.groups)
    axes.set_xlim(-0.55, len(panel.groups) - 0.45)
    axes.set_ylim(0, 1.09)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _frame(
    axes: Axes, title: str, labels: tuple[str, str], hidden: Sequence[str] = ("top", "right"), label_size: float = 9
) -> None:
    """What all panels share: the title, what the axes say, and no more lines than needed."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.spines[list(hidden)].set_visible(False)
    axes.tick_params(length=0, colors=INK, labelsize=label_size)


def training_curves(records: Sequence[Mapping[str, Any]], path: Path) -> tuple[Path, Path]:
    """Loss of training and exact match on unseen documents, by step, from the records of a run; `path` with .png and .svg."""
    figure = Figure(figsize=(9, 3.4), layout=ConstrainedLayoutEngine(w_pad=0.1, wspace=0.05))
    left, right = figure.subplots(1, 2)
    for axes, name, title in ((left, "loss", "Loss, nats per token"), (right, "exact_match", "Exact match, unseen documents")):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(
            *zip(*points, strict=True), color=COLOURS[1], linewidth=1.6, marker="o" if len(points) < 30 else "", markersize=4
        )
        _frame(axes, title, ("step", ""))
        axes.grid(True, color=GRID, linewidth=0.8)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return _saved(figure, path)


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis; `marks` are places on it, with what they say. log: both axes."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)


def curves(panels: Sequence[Curves], title: str, path: Path) -> tuple[Path, Path]:
    """Draws panels side by side under one legend; returns `path` with suffixes .png and .svg."""
    figure = Figure(figsize=(1 + 4.2 * len(panels), 3.8), layout=ConstrainedLayoutEngine(w_pad=0.1, wspace=0.05))
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in panel.series.items():
            colour = COLOURS[(list({**handles, label: None}).index(label) + 1) % len(COLOURS)]
            [handles[label]] = axes.plot(
                *zip(*points, strict=True), color=colour, linewidth=1.6, marker="o", markersize=4, label=label
            )
        if panel.log:
            axes.set_xscale("log")
            axes.set_yscale("log")
        for label, place in panel.marks.items():
            axes.axvline(place, color=INK, linestyle=(0, (3, 2)), linewidth=1)
            axes.text(place, 0.98, f" {label}", transform=axes.get_xaxis_transform(), va="top", fontsize=8, color=INK)
        _frame(axes, panel.title, (panel.x_label, panel.y_label))
        axes.grid(True, color=GRID, linewidth=0.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _saved(figure, path)


def heat_maps(
    maps: Mapping[str, Sequence[Sequence[float]]], title: str, labels: tuple[str, str], path: Path
) -> tuple[Path, Path]:
    """Matrices side by side on one scale, cells with their values; labels: of rows and columns. `path` with .png and .svg."""
    values = [value for rows in maps.values() for row in rows for value in row]
    bounds = {"vmin": min(values), "vmax": max(max(values), min(values) + 1e-9)}
    height, width = max(map(len, maps.values())), max(len(rows[0]) for rows in maps.values())
    size = 1.2 + max(2.4, 0.6 * width) * len(maps), 1.4 + max(1.6, 0.45 * height)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, wspace=0.05))
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(rows, cmap="cividis", aspect="auto", **bounds)
        if height * width <= 256:
            digits = 2 if bounds["vmax"] - bounds["vmin"] > 0.05 else 4
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    dark = value < (bounds["vmin"] + bounds["vmax"]) / 2
                    axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color="white" if dark else INK)
        _frame(axes, name, (labels[1], labels[0]), hidden=("top", "right", "left", "bottom"), label_size=8)
        axes.set_yticks(range(len(rows)))
        axes.set_xticks(range(len(rows[0])))
    figure.colorbar(image, ax=list(panels), shrink=0.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return _saved(figure, path)


def _saved(figure: Figure, path: Path) -> tuple[Path, Path]:
    paths = path.with_suffix(".png"), path.with_suffix(".svg")
    figure.savefig(paths[0], dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
