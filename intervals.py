"""Uncertainty of the tables' figures: bootstrap over conversations, subsamples where a bootstrap would be
biased, Student's t where a system has several runs, paired tests, Holm's correction.

A figure is a function of sums over items, so a resample is a vector of counts, and all resamples of all
columns are one matrix product. Turns of one conversation are alike, and are drawn together. Two systems on
the same items share their resamples: their difference is paired.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student

LEVEL = 0.95  # of an interval; 1 - LEVEL of a test
FEWEST = 200  # items that a paired test needs
FEWEST_DRAWN = 30  # conversations that it needs, since these are drawn
LEAST_DRAWN = 10  # of them that an interval needs: what is drawn from fewer is hardly spread

Value = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Additive:
    """A figure that is `value` of the sums over items of `statistics` (N, K): a mean, BLEU, an F1.

    `value` takes (..., K) sums and gives (...).
    """

    statistics: np.ndarray
    value: Value

    def take(self, places: np.ndarray) -> "Additive":
        return Additive(self.statistics[places], self.value)

    @property
    def point(self) -> float:
        return float(self.value(self.statistics.sum(0)))

    def items(self) -> np.ndarray:
        """(N,) the figure of each item by itself."""
        return self.value(self.statistics)


@dataclass(frozen=True)
class Estimate:
    """A figure, and what it was in each resample of the items (R,); `rough` where R is too few for a tail.

    `among`: of each system in it that has several runs, the variance of their mean, and its degrees of
    freedom.
    """

    point: float
    replicates: np.ndarray | None = None
    rough: bool = False
    runs: tuple[float, ...] = ()  # the figure of each of a system's seeds, where it has several
    among: tuple[tuple[float, int], ...] = ()

    def known(self) -> np.ndarray:
        """The resamples in which there is such a figure (a kappa can be undefined), none without a point."""
        if self.replicates is None or not math.isfinite(self.point):
            return np.zeros(0)
        return self.replicates[~np.isnan(self.replicates)]

    def half_width(self, p: float) -> float:
        """Half of the interval that leaves `p` outside: the items' part, normal, and the runs' part,
        Student's t (Welch 1947, where two systems have several), at right angles (Zou and Donner 2008)."""
        items, runs = float(self.known().var()), sum(variance for variance, _ in self.among)
        width = items * norm.isf(p / 2) ** 2
        if runs:
            freedom = runs**2 / sum(variance**2 / free for variance, free in self.among)
            width += runs * student.isf(p / 2, freedom) ** 2
        return math.sqrt(width)

    def interval(self) -> tuple[float, float] | None:
        """The middle 95 %: percentiles; by `half_width` where there are several runs, or few resamples."""
        found = self.known()
        if not len(found):
            return None
        if self.rough or self.among:
            half = self.half_width(1 - LEVEL)
            return self.point - half, self.point + half
        low, high = np.percentile(found, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return float(low), float(high)


def item_means(values: Sequence[float] | np.ndarray) -> Additive:
    """A mean over items of `values` (N,)."""
    column = np.asarray(values, dtype=float)
    return Additive(np.stack([column, np.ones(len(column))], axis=1), ratio)


def ratio(sums: np.ndarray) -> np.ndarray:
    """First over second; nan where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def resamples(groups: Sequence | np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, N) how often each item stands in each bootstrap resample. `groups` (N,): what is drawn, each
    with all of its items (a cluster bootstrap; Davison and Hinkley 1997, 3.8). Of fewer than LEAST_DRAWN
    groups there are none, (0, N): their intervals would be far too narrow."""
    rng = np.random.default_rng(seed)
    group_of = np.unique(np.asarray(groups), return_inverse=True)[1]  # (N,)
    drawn = int(group_of.max(initial=-1)) + 1
    out = np.empty((count if drawn >= LEAST_DRAWN else 0, len(group_of)), dtype=np.float32)
    for row in out:  # counts of drawn places: faster than a multinomial over all groups
        row[:] = np.bincount(rng.integers(drawn, size=drawn), minlength=drawn)[group_of]
    return out


def too_few(groups: Sequence | np.ndarray) -> str:
    """What a paired test of items has too little of; empty where it can be had. `groups`: see `resamples`."""
    items, drawn = len(groups), len(set(groups))
    enough = items >= FEWEST and drawn >= FEWEST_DRAWN
    return "" if enough else f"{items:,} items of {drawn:,} conversations"


def bootstrap(measures: dict[str, Additive], counts: np.ndarray) -> dict[str, Estimate]:
    """Each figure with its resamples. `counts`: see `resamples`."""
    if not measures:
        return {}
    # float32 products of counts below 2^24 in pieces: sums of at most thousands of items stay exact enough
    stacked = np.concatenate([m.statistics for m in measures.values()], axis=1).astype(np.float32)
    sums = (counts @ stacked).astype(float)  # (R, N) @ (N, K) -> (R, K)
    found, start = {}, 0
    for key, measure in measures.items():
        width = measure.statistics.shape[1]
        found[key] = Estimate(measure.point, measure.value(sums[:, start : start + width]))
        start += width
    return found


def joined(estimates: Sequence[Estimate]) -> Estimate:
    """Several runs of one system as one figure: their mean. Its resamples are over items alone; how far the
    runs are apart says what other seeds would have given.

    A few runs, drawn with replacement as items are, know no tail: of two, more than one interval in four
    would miss. What each run's own sampling adds to the spread of the runs is in the resamples, too: where
    seeds hardly differ the interval is wider than need be.
    """
    if len(estimates) == 1:
        return estimates[0]
    points = np.array([e.point for e in estimates])
    found = [e.replicates for e in estimates if e.replicates is not None]
    if len(found) < len(points):
        return Estimate(float(points.mean()), runs=tuple(points.tolist()))
    among = (float(points.var(ddof=1)) / len(points), len(points) - 1)
    rough = any(e.rough for e in estimates)
    return Estimate(float(points.mean()), np.mean(found, axis=0), rough, tuple(points.tolist()), (among,))


def difference(one: Estimate, other: Estimate) -> Estimate:
    """One system less the other, on the same resamples of the items; their runs have nothing in common."""
    replicates = None
    if one.replicates is not None and other.replicates is not None:
        replicates = one.replicates - other.replicates
    among = among_runs(one, other)
    return Estimate(one.point - other.point, replicates, one.rough or other.rough, among=among)


def among_runs(one: Estimate, other: Estimate) -> tuple[tuple[float, int], ...]:
    """What two systems' runs add to the variance of their difference. The one run of a system beside several
    of the other would be as far from others of its own as those are from each other: s^2 / k becomes
    s^2 (1 + 1 / k)."""
    if bool(one.among) == bool(other.among):
        return one.among + other.among
    ((variance, free),) = one.among or other.among
    return ((variance * (free + 2), free),)  # variance: s^2 / k, k: free + 1


# ------------------------------------------------------------------------------------------------------ tests


def paired_p(one: Estimate, other: Estimate, gold: Estimate | None = None) -> float:
    """Two-sided p of "equally good" for two systems on the same resamples; nan where it cannot be had.

    `gold`: the gold replies' figure, where nearer to it is better. Two figures are equally near where they
    are equal, and where gold stands midway between them: it is the larger p of the two (an intersection-union
    test; Berger 1982). A difference of distances folds at gold, and its resamples are no picture of chance.
    """
    apart = difference(one, other)
    p = two_sided(apart)
    if gold is None or one.replicates is None or other.replicates is None:
        return p
    moving = gold.point if gold.replicates is None else gold.replicates
    both = replace(
        apart,
        point=one.point + other.point - 2 * gold.point,
        replicates=one.replicates + other.replicates - 2 * moving,
    )
    return float(np.maximum(p, two_sided(both)))


def two_sided(found: Estimate) -> float:
    """p of 0. The resamples, moved to have mean zero, are what chance does (Efron and Tibshirani 1993, 16.4);
    several runs, or few resamples: p of the interval that just reaches 0."""
    chance = found.known()
    if not len(chance):
        return math.nan
    if found.rough or found.among:
        apart, least = abs(found.point), 1e-12
        if apart >= found.half_width(least):
            return least if apart else 1.0
        return float(brentq(lambda p: found.half_width(p) - apart, least, 1.0))
    as_far = np.abs(chance - chance.mean()) >= abs(found.point) - 1e-12
    return float((1 + as_far.sum()) / (1 + len(chance)))


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979) over the tests that could be made; the others stay nan."""
    tested = sorted((key for key in p if not math.isnan(p[key])), key=p.__getitem__)
    corrected, most = dict(p), 0.0
    for rank, key in enumerate(tested):
        most = max(most, min(1.0, (len(tested) - rank) * p[key]))
        corrected[key] = most
    return corrected


# ------------------------------------------------------------------------------------------------- subsamples


def fixed_size(available: int) -> int:
    """The largest of 1, 2 or 5 times a power of ten, at most 20,000, that is at most half of `available`.

    Half, so that draws differ; round, so that tables of sets of about one size can be compared.
    """
    sizes = [m * 10**power for power in range(5) for m in (1, 2, 5)]
    return max((s for s in sizes if s <= min(available // 2, 20_000)), default=0)


def orders_of(groups: Sequence | np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, N) the N items in random orders that keep those of one group together, themselves in any order.
    `groups` (N,): see `resamples`; of fewer than LEAST_DRAWN groups there are none, (0, N)."""
    rng = np.random.default_rng(seed)
    group_of = np.unique(np.asarray(groups), return_inverse=True)[1]  # (N,)
    drawn = int(group_of.max(initial=-1)) + 1
    out = np.empty((count if drawn >= LEAST_DRAWN else 0, len(group_of)), dtype=np.int64)
    for row in out:
        row[:] = np.lexsort((rng.permutation(len(group_of)), rng.permutation(drawn)[group_of]))
    return out


def distinct_of_draws(
    replies: Sequence[Sequence[str]],
    n: int,
    orders: np.ndarray,
    size: int,
    tokens: bool,
    together: np.ndarray | None = None,
) -> Estimate:
    """Distinct-n in percent of draws of `size` items, or of the first `size` tokens of randomly ordered ones.

    `orders` (R, N): the items in a random order, for each draw; the figure is the mean over these. `together`
    (R, N): orders that keep the turns of one conversation together (`orders_of`), for the spread (default:
    `orders`). The spread of draws without replacement is scaled by sqrt(m / (N - m)) to that of the mean over
    all N items, m of which a draw holds (Politis and Romano 1994): at m = N / 2 that is the delete-half
    jackknife.
    """
    lengths = np.array([len(r) for r in replies])
    if (tokens and lengths.sum() < 2 * size) or (not tokens and len(replies) < 2 * size) or size == 0:
        return Estimate(math.nan)
    grams, begins = numbered_grams(replies, n)
    counts = np.diff(begins)

    def drawn_from(order: np.ndarray) -> tuple[float, int]:
        """Distinct of one draw, and how many items it holds."""
        chosen = np.zeros(len(replies), dtype=bool)
        rest = 0  # grams of the reply that the last tokens are of
        drawn = size
        if tokens:
            ends = lengths[order].cumsum()
            drawn = int(np.searchsorted(ends, size, side="right"))
            if drawn < len(order):
                rest = max(0, size - int(ends[drawn] - lengths[order[drawn]]) - n + 1)
        chosen[order[:drawn]] = True
        mine = grams[np.repeat(chosen, counts)]
        if rest:
            first = begins[order[drawn]]
            mine = np.concatenate([mine, grams[first : first + rest]])
        return (100 * np.count_nonzero(np.bincount(mine)) / len(mine) if len(mine) else 0.0), drawn

    found = [drawn_from(order) for order in orders]
    point = float(np.mean([value for value, _ in found]))
    if together is not None:
        found = [drawn_from(order) for order in together]
    if not found:
        return Estimate(point)
    values, items = np.array([value for value, _ in found]), float(np.mean([held for _, held in found]))
    scale = math.sqrt(items / max(len(replies) - items, 1.0))
    return Estimate(point, point + scale * (values - values.mean()), rough=True)


def numbered_grams(replies: Sequence[Sequence[str]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of all replies as numbers (G,), and where those of each reply begin (N + 1,)."""
    known: dict[str, int] = {}
    words = np.array([known.setdefault(w, len(known)) for reply in replies for w in reply], dtype=np.int64)
    lengths = np.array([len(reply) for reply in replies], dtype=np.int64)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(words))  # words of its reply from each on
    grams = words
    for length in range(2, n + 1):  # longer by a word, and numbered anew, so that no number grows too large
        longer = grams[:-1] * len(known) + words[length - 1 :]
        grams = np.unique(longer, return_inverse=True)[1]
    counts = np.maximum(lengths - n + 1, 0)
    return grams[left[: len(grams)] >= n], np.concatenate([[0], counts.cumsum()])
