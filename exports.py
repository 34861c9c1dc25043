"""A comparison as data: every score of every item, every test, every figure; what the columns are worth."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

import validation
from columns import Column
from comparison import Row, Test
from corpora import Example
from rendering import Page
from systems import System


def items_table(
    rows: Sequence[Row], columns: Sequence[Column], examples: Sequence[Example], numbers: Sequence[int]
) -> pd.DataFrame:
    """One row for each item of each run, one column for each score that an item has by itself; `in_table`:
    whether it is one of `numbers`, of which the tables are."""
    parts = []
    for row in rows:
        for run_number, run in enumerate(row.runs):
            if not run.replies:  # levels alone
                continue
            keys = [examples[i].key for i in run.numbers]
            part = pd.DataFrame(keys, columns=["conv_id", "utterance_idx"])
            part.insert(0, "run", run_number + 1)
            part.insert(0, "system", row.name)
            part["in_table"] = np.isin(run.numbers, numbers)
            part["reply"] = run.replies
            values = {
                c.key: np.round(run.item_values(c.key), 5)
                for c in columns
                if c.per_item and c.key in run.figures
            }
            parts.append(pd.concat([part, pd.DataFrame(values)], axis=1))
    return pd.concat(parts, ignore_index=True)


def unmatched_table(systems: Iterable[tuple[str, System]]) -> pd.DataFrame:
    """One row for each reply of a system's file that answers no item, and what the file says of it."""
    rows = []
    for name, system in systems:
        rows += [(name, r.line, r.history or "", r.reference or "", r.text) for r in system.left_out]
    return pd.DataFrame(rows, columns=["system", "line", "history", "reference", "reply"])


def pairs_table(tests: Sequence[Test]) -> pd.DataFrame:
    """One row for each two systems and column."""
    rows = []
    for t in tests:
        rows.append((t.one, t.other, t.column, t.items, t.difference, *t.interval, t.p, t.corrected))
    names = ["system", "other", "column", "items", "difference", "low", "high", "p", "p_holm"]
    return pd.DataFrame(rows, columns=names)


def worth(ratings: pd.DataFrame, items: pd.DataFrame, columns: Sequence[Column]) -> str:
    """Every column's rank correlation with human ratings of the same texts; of the gold replies none that
    compares with them."""
    values, gold = {}, items["system"] == "gold"
    for c in (c for c in columns if c.key in items):
        title = c.title
        if c.group.startswith("judge "):  # each judge has columns of the same titles
            title += f", {c.group}"
        elif c.key.startswith("ppl_"):  # of what the model expected, not of what it said
            title += ", of the gold reply"
        values[title] = items[c.key].mask(gold & c.against_gold).tolist()
    return validation.validate_metrics(ratings, items["reply"].tolist(), values).table()


def as_numbers(page: Page) -> dict[str, dict]:
    """The tables as data: {systems, floors (and the ceiling), intervals, runs}."""
    out: dict[str, dict] = {"systems": {}, "floors": {}, "intervals": {}, "runs": {}}
    columns = page.comparison.columns
    for row in page.comparison.rows:
        found = page.table[row.name]
        points = {key: e.point for key, e in found.items() if np.isfinite(e.point)}
        out["systems" if row.kind in ("gold", "system") else "floors"][row.name] = points
        spans = {
            key: columns[key].interval(e) if key in columns else e.interval() for key, e in found.items()
        }
        out["intervals"][row.name] = {key: span for key, span in spans.items() if span}
        if len(row.runs) > 1:
            out["runs"][row.name] = {
                key: [value if np.isfinite(value) else None for value in e.runs] for key, e in found.items()
            }
    return out
