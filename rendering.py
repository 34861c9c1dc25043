"""The tables as markdown: one compact table, further ones by group with intervals, what the marks mean."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

import markup
from columns import GROUPS, Column
from comparison import Comparison, Row, Sizes, Test, best
from intervals import FEWEST, FEWEST_DRAWN, LEVEL, Estimate
from markup import cell

MARKS = (
    "**bold**: significantly better than every other system (paired bootstrap over conversations, with "
    "Student's t for the runs of systems that have several; Holm's correction over the columns, "
    f"p < {1 - LEVEL:.2f}). =: not significantly different from the best. \u2020: a floor has a better "
    "figure; no system's figure in such a column says much by itself. [ ], in the tables by group: 95 % "
    "interval (percentile bootstrap over conversations, of Distinct from subsamples of them; of several runs "
    "with Student's t)."
)


def titled(column: Column, sizes: Sizes) -> Column:
    """With the sizes of the draws in its title."""
    return dataclasses.replace(column, title=column.title.format(items=sizes.items, tokens=sizes.tokens))


class Page:
    """Everything that is said of one comparison on its set of items."""

    def __init__(
        self,
        comparison: Comparison,
        tests: Sequence[Test],
        flattered: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    ):
        """`flattered`: {group of columns: {system: critics of its training that have seen pairs of the
        group's judge}}."""
        self.comparison, self.tests = comparison, tests
        self.flattered = flattered or {}
        self.table = comparison.table()
        self.winners, self.ties = best(comparison, tests)
        self.beaten = comparison.beaten()
        self.losers: dict[str, set[str]] = {}
        for key, by in self.beaten.items():
            self.losers[key] = {name for names in by.values() for name in names}
        sizes = comparison.table_sizes
        present = {key for found in self.table.values() for key in found}
        self.columns = [titled(c, sizes) for c in comparison.columns.values() if c.key in present]

    def marked(self, row: Row, column: Column, interval: bool) -> str:
        """One cell."""
        estimate = self.table[row.name].get(column.key)
        if estimate is None:
            return "-"
        text = column.shown(estimate.point)
        if text == "-":
            return text
        if self.winners.get(column.key) == row.name:
            text = f"**{text}**"
        if len(estimate.runs) > 1:
            text += f" \u00b1 {column.shown(float(np.std(estimate.runs, ddof=1)))}"
        if column.signed and row.kind != "gold":
            text += self.gap(estimate, column)
        span = column.interval(estimate) if interval else None
        if span:
            text += f" [{column.shown(span[0])}, {column.shown(span[1])}]"
        if row.name in self.ties.get(column.key, ()):
            text += " ="
        if row.name in self.losers.get(column.key, ()):
            text += " \u2020"
        return text

    def gap(self, estimate: Estimate, column: Column) -> str:
        gold = self.table[self.comparison.gold.name].get(column.key)
        if gold is None:
            return ""
        sign = "+" if estimate.point >= gold.point else "-"
        return f" ({sign}{column.shown(abs(estimate.point - gold.point))})"

    def block(self, columns: Sequence[Column], interval: bool, kinds: Sequence[str]) -> str:
        """One markdown table, of the rows of some kinds that have any of its columns."""
        titles = ["system", *(cell(c.title) for c in columns)]
        rows = []
        for row in self.comparison.rows:
            if row.kind in kinds and any(c.key in self.table[row.name] for c in columns):
                cells = [self.marked(row, column, interval) for column in columns]
                name = cell(row.name) + " \u2021" * (row.name in self.flattered.get(columns[0].group, ()))
                rows.append([name, *cells])
        return markup.table(titles, rows)

    def main(self) -> str:
        """The compact table."""
        return self.block([c for c in self.columns if c.main], False, ("gold", "floor", "system"))

    def groups(self, place: str) -> list[str]:
        """A table with intervals for each group of columns. `place`: the line that says of which items."""
        out = []
        for group in dict.fromkeys(c.group for c in self.columns):
            columns = [c for c in self.columns if c.group == group]
            title = GROUPS.get(group, group[0].upper() + group[1:])
            kinds = ("gold", "floor", "level floor", "ceiling", "system")
            out += [f"## {title}", place, self.block(columns, True, kinds)]
            out += [*self.flattery(group), *self.floors_said(columns), self.keys(columns)]
        return out

    def keys(self, columns: Sequence[Column]) -> str:
        """What the columns are."""
        wanted = {"higher": "higher is better", "lower": "lower is better", "none": "not ranked"}
        wanted["gold"] = "nearer to gold is better"
        return "\n".join(
            f"- {cell(c.title)}: {cell(c.formula)} ({c.unit}; {wanted[c.better]}; {cell(c.source)})"
            for c in columns
        )

    def flattery(self, group: str) -> list[str]:
        """Whose training has pleased critics that know what this judge knows."""
        found = self.flattered.get(group)
        if not found:
            return []
        said = "; ".join(f"{cell(name)} ({', '.join(kinds)})" for name, kinds in found.items())
        return [
            "\u2021, systems trained to please critics, or on labels of critics, that have learnt from pairs "
            f"that this judge has seen, so that its levels may flatter them: {said}. Critics of --part a and "
            "judges of --part b share none."
        ]

    def floors_said(self, columns: Sequence[Column]) -> list[str]:
        """Which floors beat a system in which of these columns."""
        said = []
        for column in columns:
            if by := self.beaten.get(column.key):
                said.append(
                    f"{cell(column.title)} ({', '.join(cell(f.removeprefix('floor: ')) for f in by)})"
                )
        if not said:
            return []
        lines = [f"\u2020, columns in which floors beat systems: {'; '.join(said)}."]
        whole = [cell(c.title) for c in columns if c.of_the_whole]
        if whole:
            lines.append(
                "Another item's gold is, as a whole, like the gold replies by construction; columns that "
                f"look at nothing else cannot tell them apart: {', '.join(whole)}."
            )
        return lines

    def remarks(self, refused: Sequence[str]) -> list[str]:
        """Lines below the compact table: marks, floors that beat systems, seeds, tests that were refused."""
        lines = [MARKS]
        lines += self.floors_said([c for c in self.columns if c.main])
        one = [cell(row.name) for row in self.comparison.systems if len(row.runs) == 1]
        several = [row for row in self.comparison.systems if len(row.runs) > 1]
        if one:
            beside = " Beside a system of several seeds its own are taken to vary as much." * bool(several)
            lines.append(
                f"One seed: {', '.join(one)}. What is bold or tied there is so of this one run.{beside}"
            )
        for row in several:
            lines.append(f"{cell(row.name)}: mean \u00b1 standard deviation over {len(row.runs)} runs.")
        if refused:
            lines.append(
                f"No paired test below {FEWEST} items of {FEWEST_DRAWN} conversations: "
                f"{cell('; '.join(refused))}. Nothing is bold for them."
            )
        elif len(self.comparison.systems) > 1:
            lines.append("Every two systems in every column, with intervals and p: pairs.csv.")
        by_seeds = {row.name for row in several}  # their p comes from the spread of the runs, too
        alone = [(t.one, t.other) for t in self.tests if not {t.one, t.other} & by_seeds]
        most = max(Counter(alone).values(), default=0)
        if most / (self.comparison.count + 1) >= 1 - LEVEL:  # the least p there is, corrected
            enough = round(2 * most / (1 - LEVEL), -2)
            lines.append(
                f"{self.comparison.count} resamples are too few for the correction over {most} columns: only "
                f"Distinct could be significant. --resamples {enough:.0f} are enough."
            )
        return lines
