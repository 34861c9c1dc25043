"""What the columns of a table are worth: their rank correlation with human ratings of the same texts.

Ratings come as a csv, tsv or jsonl with a column of replies (`reply`, `response` or `text`) and either
`rater` and `value`, one rating a row, or a column for each rater whose name begins with `rater` (rater_1,
rater_2 ...). A column `scale` (empathy, fluency ...) sets several scales apart; without one, all ratings are
of one scale. Capitals in these names do not matter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import krippendorff
import numpy as np
import pandas as pd
from scipy.stats import pearsonr, rankdata

import markup
from normalising import normalise
from options import UserError
from records import REPLY_COLUMNS, read_records

FEWEST = 30  # texts that a correlation needs
ONE_SCALE = "rating"  # the scale of a file that names none


def read_ratings(file: str | Path) -> pd.DataFrame:
    """One row for each rating: text, rater, scale, value. A cell without a value is no rating.

    Raises `UserError` with file and line for a value that is no number, and for columns that say nothing.
    """
    records = read_records(file).in_small_letters()
    text = next((c for c in REPLY_COLUMNS if c in records.columns), None)
    long = "rater" in records.columns and "value" in records.columns
    raters = [c for c in records.columns if c.startswith("rater")]
    if text is None or not (long or raters):
        raise UserError(
            f"{file}: ratings need a column {', '.join(REPLY_COLUMNS[:3])} and either rater and value, or a "
            f"column for each rater (rater_1, rater_2 ...); there are {', '.join(records.columns)[:200]}"
        )
    if not long and (ids := next((c for c in ("rater", "rater_id") if c in raters), None)):
        also = ", and this one rater" * (ids != "rater")
        raise UserError(
            f"{file}: column {ids} names raters, and no column value holds what they gave; call that one "
            f"value{also}"
        )
    rows = []
    for row, line in zip(records.rows, records.lines, strict=True):
        scale = str(row.get("scale") or ONE_SCALE).strip()
        if long and (row.get("rater") is None or not str(row["rater"]).strip()):
            raise UserError(f"{file}, line {line}: no rater; give each rating one, a name or a number")
        given = {str(row["rater"]): row.get("value")} if long else {r: row.get(r) for r in raters}
        for rater, said in given.items():
            if said is None or not str(said).strip():
                continue
            try:
                value = float(said)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise UserError(f"{file}, line {line}: the rating {str(said)[:20]!r} is no number")
            rows.append((str(row.get(text) or "").strip(), rater, scale, value))
    return pd.DataFrame(rows, columns=["text", "rater", "scale", "value"])


@dataclass(frozen=True)
class Raters:
    """How far the raters of one scale agree among themselves: what no column can be expected to pass."""

    count: int
    texts: int
    alpha: float  # Krippendorff's, ordinal; nan where no text has two ratings, or all are the same
    against_others: float  # mean over raters of the rank correlation with the mean of the others


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a column with the raters' mean, and its 95 % interval (Fisher's z)."""

    rho: float
    low: float
    high: float
    count: int  # texts


@dataclass(frozen=True)
class Validation:
    """What `validate_metrics` found, by scale."""

    raters: dict[str, Raters]
    correlations: dict[str, dict[str, Correlation]]  # {scale: {column: ...}}
    matched: int  # rated texts that stand among the replies
    rated: int

    def table(self) -> str:
        """Markdown: a row for each column, a column for each scale."""
        scales = list(self.raters)
        agreed = [f"{self.raters[s].alpha:.2f}" for s in scales]
        others = [f"{self.raters[s].against_others:.2f}" for s in scales]
        rows = [
            ["*raters: Krippendorff's alpha (ordinal)*", *agreed],
            ["*raters: one against the mean of the others*", *others],
        ]
        for column in next(iter(self.correlations.values())):
            found = [self.correlations[s][column] for s in scales]
            cells = [f"{c.rho:.2f} ({c.low:.2f} to {c.high:.2f}, n = {c.count})" for c in found]
            rows.append([column, *cells])
        said = [f"{s}: {self.raters[s].count} raters, {self.raters[s].texts} texts" for s in scales]
        return (
            f"{markup.table(['', *scales], rows)}\n\n"
            f"Spearman's rank correlation with the raters' mean, 95 % interval. {'; '.join(said)}.\n"
            f"{self.matched} of the {self.rated} rated texts stand among the replies.\n"
        )


def validate_metrics(
    ratings: pd.DataFrame, texts: Sequence[str], columns: Mapping[str, Sequence[float]]
) -> Validation:
    """Rank correlation of every column with what people said of the same texts.

    `ratings`: as `read_ratings` gives them. `texts` (N,) are the replies of all systems, `columns` their
    values (N,) each; a text that stands there several times counts with the mean of its values, nan as none.
    Texts are matched normalised. Raises `UserError` where too few of the rated ones are there.
    """
    matched, rated = require_matches(ratings, texts)
    own = [normalise(text) for text in texts]
    values = pd.DataFrame(dict(columns)).groupby(pd.Series(own).to_numpy()).mean()
    ratings = ratings.assign(text=ratings["text"].map(normalise))
    raters, correlations = {}, {}
    for scale, of_scale in ratings.groupby("scale", sort=False):
        table = of_scale.pivot_table(index="rater", columns="text", values="value")  # (raters, texts)
        raters[str(scale)] = agreement(table)
        mean = table.mean()
        correlations[str(scale)] = {name: correlate(mean, values[name]) for name in values}
    return Validation(raters, correlations, matched, rated)


def require_matches(ratings: pd.DataFrame, texts: Sequence[str]) -> tuple[int, int]:
    """(how many of the rated texts stand among `texts`, how many there are); raises `UserError` where those
    are too few for a correlation."""
    rated, known = {normalise(text) for text in ratings["text"]}, {normalise(text) for text in texts}
    matched = len(rated & known)
    if matched < FEWEST:
        raise UserError(
            f"only {matched} of the {len(rated)} rated texts stand among the {len(texts)} replies, and "
            f"a correlation needs {FEWEST}; give the systems whose replies were rated"
        )
    return matched, len(rated)


def agreement(table: pd.DataFrame) -> Raters:
    """Of ratings (raters, texts), nan where there is none."""
    against = [correlate(table.loc[rater], table.drop(index=rater).mean()).rho for rater in table.index]
    against = [rho for rho in against if math.isfinite(rho)]
    one = float(np.mean(against)) if against else math.nan
    return Raters(len(table), table.shape[1], alpha(table, "ordinal"), one)


def alpha(table: pd.DataFrame, level: Literal["ordinal", "nominal"]) -> float:
    """Krippendorff's alpha of ratings (raters, units), nan where there is none, over the units that two or
    more rated; nan where there is no such unit, or all of them are rated the same."""
    known = table.to_numpy(dtype=float)
    shared = known[:, np.isfinite(known).sum(0) > 1]
    if not shared.size or len(np.unique(shared[np.isfinite(shared)])) < 2:
        return math.nan
    return float(krippendorff.alpha(shared, level_of_measurement=level))


def correlate(one: pd.Series, other: pd.Series) -> Correlation:
    """Of two series by text, over the texts that both know; nan where they are too few, or all the same."""
    both = pd.concat([one, other], axis=1, join="inner").dropna().to_numpy()
    if len(both) < FEWEST or (np.ptp(both, axis=0) == 0).any():
        return Correlation(math.nan, math.nan, math.nan, len(both))
    found = pearsonr(rankdata(both[:, 0]), rankdata(both[:, 1]))  # of ranks: Spearman's
    low, high = found.confidence_interval()
    return Correlation(float(found.statistic), float(low), float(high), len(both))
