"""Figures: learning curves of runs, levels of systems beside the gold replies', and how far control goes."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

import storage
from options import DIMENSIONS, SENTIMENT

matplotlib.use("Agg")  # draws into files, with no screen
from matplotlib import pyplot, ticker  # noqa: E402

#: the panels of the learning curves, in their order: a loss term, and its unit
TERMS = {"nll": "nats a token", **dict.fromkeys(DIMENSIONS, "nats an example"), SENTIMENT: "squared score"}
TERMS |= {"reward": "share of a critic's range"}
#: a figure and the bounds of its 95 % interval, or a figure alone
Point = Sequence[float]
INK, GOLD = "#2f5d8a", "#b8860b"


def plot_learning(systems: list[dict], target: Path) -> bool:
    """Loss terms over the updates, from the metrics.jsonl of each run; False where no system is a run.

    A panel for each term, a colour for each system (`folders`: its runs): solid where it trains, dashed with
    marks where it is validated.
    """
    logs: dict[str, list[pd.DataFrame]] = {}
    for system in systems:
        for file in (Path(folder) / "metrics.jsonl" for folder in system.get("folders", ())):
            if file.exists():
                rows = map(json.loads, file.read_text("utf-8").splitlines())
                logs.setdefault(system["name"], []).append(pd.DataFrame(rows))
    every = [(n, log) for n, of_system in enumerate(logs.values()) for log in of_system]
    terms = [t for t in TERMS if any(t in log and log[t].notna().any() for _, log in every)]
    if not terms:
        return False
    figure, axes = pyplot.subplots(
        1, len(terms), figsize=(0.5 + 3.4 * len(terms), 3.6), squeeze=False, layout="constrained"
    )
    colours = [f"C{n % 10}" for n in range(len(logs))]
    for axis, term in zip(axes[0], terms, strict=True):
        for n, log in every:
            for kind, style in (("train", "-"), ("valid", "o--")):
                if term in log:
                    part = log[(log["kind"] == kind) & log[term].notna()]
                    if len(part) == 1 and kind == "train":  # of a point there is no line
                        style = "x"
                    axis.plot(part["step"], part[term], style, color=colours[n], markersize=4)
        axis.set(title=term, xlabel="updates", ylabel=TERMS[term])
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.25)
    lines = [pyplot.Line2D([], [], color=colours[n], label=as_it_is(name)) for n, name in enumerate(logs)]
    lines += [
        pyplot.Line2D([], [], color="grey", label="train"),
        pyplot.Line2D([], [], color="grey", linestyle="--", marker="o", markersize=4, label="valid"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 2 + len(terms)))
    save(figure, target)
    return True


def plot_curves(curves: Mapping[str, Sequence[Point]], unit: str, target: Path, about: str = "") -> None:
    """A line for each of `curves`: {name: (updates, value) of each evaluation}, values in `unit`, on a scale
    of ratios. `about`: kept within an svg."""
    figure, axis = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), "o-", label=as_it_is(name), markersize=4)
    axis.set(xlabel="updates", ylabel=as_it_is(unit), yscale="log")
    # a scale's own has a tick at powers of ten alone
    low, high = axis.get_ylim()
    near = (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8)
    fine = ticker.LogLocator(subs=near if high < 10 * low else (1, 2, 5)).tick_values(low, high)
    ticks = [tick for tick in fine if low <= tick <= high]
    axis.yaxis.set_major_locator(ticker.FixedLocator(ticks) if len(ticks) > 3 else ticker.AutoLocator())
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small")
    save(figure, target, about)


def plot_levels(
    rows: Sequence[tuple[str, Mapping[str, Point]]],
    titles: Mapping[str, str],
    gold: Sequence[int],
    target: Path,
    about: str = "",
) -> bool:
    """Each row's figures with their intervals, a panel for each of `titles` (key -> what stands above it);
    False where there is none.

    `gold`: the places of the gold replies' rows; each is a band behind the rows that follow it, which are
    to come near it. `about`: kept within an svg.
    """
    if not titles:
        return False
    across = min(len(titles), len(DIMENSIONS))
    down = -(-len(titles) // across)
    names = [as_it_is("\n".join(textwrap.wrap(name, 46)) or name) for name, _ in rows]
    height = sum(0.12 + 0.17 * (1 + name.count("\n")) for name in names)
    figure, axes = pyplot.subplots(
        down,
        across,
        figsize=(3.6 + 2.3 * across, down * (height + 0.7)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    ends = [*gold[1:], len(rows)]
    for axis, (key, title) in zip(axes.flat, titles.items(), strict=False):
        for place, end in zip(gold, ends, strict=True):
            if key in rows[place][1]:
                value, *span = rows[place][1][key]
                low, high = span or (value, value)
                axis.fill_betweenx([place - 0.4, end - 0.6], low, high, color=GOLD, alpha=0.2, linewidth=0)
                axis.plot([value, value], [place - 0.4, end - 0.6], color=GOLD, linewidth=1)
        for place, (_, found) in enumerate(rows):
            if key in found:
                value, *span = found[key]
                colour = GOLD if place in gold else INK
                if span:
                    axis.plot(span, [place, place], color=colour, linewidth=1.5)
                axis.plot([value], [place], "D" if place in gold else "o", color=colour, markersize=4)
        axis.set(title=as_it_is(title), xlabel="mean level", ylim=(len(rows) - 0.4, -0.6))
        axis.set_yticks(range(len(rows)), names, fontsize="small")
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x", alpha=0.25)
        axis.tick_params(axis="y", length=0)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    save(figure, target, about)
    return True


def plot_control(table: pd.DataFrame, target: Path) -> None:
    """The judged level under target 1 (solid) and under target 0 (dashed) over the number of candidates: a
    line of panels for each judge, a panel for each dimension, a colour for each way and weight; the gold
    replies' level is a band. `table`: of `steering.measured`."""
    judges = list(dict.fromkeys(table["judge"]))
    known = table[table["way"].notna()]
    ways = list(dict.fromkeys(zip(known["way"], known["weight"], strict=True)))
    figure, axes = pyplot.subplots(
        len(judges),
        len(DIMENSIONS),
        figsize=(2.7 * len(DIMENSIONS), 0.6 + 2.4 * len(judges)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for line, judge in zip(axes, judges, strict=True):
        own = table[table["judge"] == judge]
        for axis, (dim, dimension) in zip(line, DIMENSIONS.items(), strict=True):
            gold = own[own["target"] == "gold"].iloc[0]
            axis.axhline(gold[dim], color=GOLD, linewidth=1)
            axis.axhspan(gold[f"{dim}_low"], gold[f"{dim}_high"], color=GOLD, alpha=0.2, linewidth=0)
            for n, (way, weight) in enumerate(ways):
                for level, style in ((1, "o-"), (0, "o--")):
                    part = own[
                        (own["way"] == way) & (own["weight"] == weight) & (own["target"] == f"{dim}={level}")
                    ].sort_values("candidates")
                    axis.plot(part["candidates"], part[dim], style, color=f"C{n % 10}", markersize=4)
                    axis.fill_between(
                        part["candidates"],
                        part[f"{dim}_low"],
                        part[f"{dim}_high"],
                        color=f"C{n % 10}",
                        alpha=0.15,
                        linewidth=0,
                    )
            counts = sorted(known["candidates"].unique())
            axis.set_xscale("log", base=2)
            axis.set_xticks(counts, [f"{count:g}" for count in counts])
            axis.set(title=dimension.title, ylim=(0, 1))
            axis.grid(alpha=0.25)
        line[0].set_ylabel(as_it_is(f"level, by {judge}"))
    for axis in axes[-1]:
        axis.set_xlabel("candidates")
    lines = [
        pyplot.Line2D([], [], color=f"C{n % 10}", label=f"{way}, weight {weight:g}")
        for n, (way, weight) in enumerate(ways)
    ]
    lines += [
        pyplot.Line2D([], [], color="grey", marker="o", markersize=4, label="target 1"),
        pyplot.Line2D([], [], color="grey", linestyle="--", marker="o", markersize=4, label="target 0"),
        pyplot.Line2D([], [], color=GOLD, label="gold replies"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5))
    save(figure, target)


def as_it_is(text: str) -> str:
    """So that matplotlib sees no formula in somebody's name."""
    return text.replace("$", r"\$")


def save(figure: Any, target: Path, about: str = "") -> None:
    """Written whole, as a png or as an svg, which holds `about` and is the same twice."""
    kind = target.suffix[1:]
    said = {"Date": None, "Description": about} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "levels"}), storage.whole_file(target) as part:
        figure.savefig(part, dpi=120, format=kind, metadata=said)
    pyplot.close(figure)
