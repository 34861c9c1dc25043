"""Rows on one set of items: their figures with intervals, every two systems tested, floors that beat one."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from tqdm import tqdm

import intervals
import measures
from columns import Column
from intervals import Additive, Estimate

DRAWS = 100  # of Distinct at a fixed size: a spread, not a tail, is taken of them
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """One run's replies on its own items. `numbers`: places of its items among the split's listener turns."""

    numbers: Numbers
    figures: dict[str, Additive]
    replies: list[str]  # normalised; of a floor of levels none
    constants: dict[str, float] = field(default_factory=dict)  # the same on any set of items
    #: figures that are no function of sums over items, of the items at some places
    of_the_set: Callable[[np.ndarray], dict[str, Estimate]] | None = None
    #: (N,) of the reply that stands there, where a figure is of several samples
    of_the_reply: dict[str, np.ndarray] = field(default_factory=dict)

    def item_values(self, key: str) -> np.ndarray:
        """(N,) a figure of each item's own reply."""
        return self.of_the_reply[key] if key in self.of_the_reply else self.figures[key].items()

    def places(self, numbers: Numbers) -> np.ndarray:
        """Where the items `numbers` stand among its own."""
        return np.searchsorted(np.array(self.numbers), np.array(numbers, dtype=int))


@dataclass(frozen=True)
class Row:
    """One line of the tables; a system of several seeds has several runs."""

    name: str
    kind: str  # gold, floor, level floor, ceiling or system
    runs: list[Measured]

    @property
    def numbers(self) -> Numbers:
        common = set(self.runs[0].numbers).intersection(*(run.numbers for run in self.runs[1:]))
        return tuple(sorted(common))


@dataclass(frozen=True)
class Sizes:
    """How large the draws of Distinct are; 0 where a set is too small for any."""

    items: int
    tokens: int


@dataclass(frozen=True)
class Test:
    """Two systems in one column, on the items that both have."""

    one: str
    other: str
    column: str
    items: int
    difference: float
    interval: tuple[float, float]
    p: float
    corrected: float  # Holm, over the columns of these two systems
    better: str  # the one whose figure is better on these items; the first where they are equal


class Comparison:
    """Estimates are made once for each row and set of items.

    count: bootstrap resamples. groups: of each listener turn of the split, what is drawn with all of its
    items (default: each turn by itself).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        columns: Sequence[Column],
        count: int,
        seed: int,
        groups: Sequence[str] | None = None,
    ):
        self.rows, self.columns = list(rows), {c.key: c for c in columns}
        self.count, self.seed = count, seed
        self.groups = groups
        # of the tables' items, and of a pair's
        self.resamples = lru_cache(maxsize=2)(self.drawn)
        self.orders = lru_cache(maxsize=2)(self.ordered)
        self.known: dict[tuple, dict[str, Estimate]] = {}
        self.made: dict[str, dict[str, Estimate]] = {}

    def drawn(self, numbers: Numbers) -> np.ndarray:
        return intervals.resamples(self.groups_of(numbers), self.count, self.seed)

    def ordered(self, numbers: Numbers) -> tuple[np.ndarray, np.ndarray | None]:
        """Random orders of the items, and others in which those of a group stay together; None where each is
        a group by itself."""
        rng = np.random.default_rng(self.seed)
        alone = np.stack([rng.permutation(len(numbers)) for _ in range(DRAWS)])
        return alone, intervals.orders_of(self.groups_of(numbers), DRAWS, self.seed) if self.groups else None

    def groups_of(self, numbers: Numbers) -> Sequence:
        return [self.groups[n] for n in numbers] if self.groups else numbers

    @property
    def systems(self) -> list[Row]:
        return [row for row in self.rows if row.kind == "system"]

    @property
    def gold(self) -> Row:
        return next(row for row in self.rows if row.kind == "gold")

    def ranked(self, gold: Mapping[str, Estimate]) -> Iterator[tuple[str, Column, Estimate | None]]:
        """The columns that rank; with each the `gold` replies' figure, where the nearer to it the better."""
        for key, column in self.columns.items():
            if column.better != "none" and (column.better != "gold" or key in gold):
                yield key, column, gold[key] if column.better == "gold" else None

    def sizes(self, numbers: Numbers, rows: Iterable[Row]) -> Sizes:
        """As large as all of `rows` and the gold replies can fill twice."""
        tokens = []
        for run in itertools.chain.from_iterable(row.runs for row in (self.gold, *rows)):
            tokens.append(sum(len(run.replies[place].split()) for place in run.places(numbers)))
        return Sizes(intervals.fixed_size(len(numbers)), intervals.fixed_size(min(tokens)))

    def estimates(self, row: Row, numbers: Numbers, sizes: Sizes) -> dict[str, Estimate]:
        """{column: figure} of one row on the items `numbers`, which all its runs have."""
        key = (row.name, numbers, sizes)
        if key not in self.known:
            self.known[key] = self.joined([self.of_one(run, numbers, sizes) for run in row.runs])
        return self.known[key]

    def untested(self, row: Row) -> dict[str, Estimate]:
        """The other figures of one row, on the set of the tables alone."""
        each = []
        for run in row.runs:
            found = {key: Estimate(value) for key, value in run.constants.items()}
            if run.of_the_set:
                found |= run.of_the_set(run.places(self.numbers))
            each.append(found)
        return self.joined(each)

    def joined(self, each: Sequence[dict[str, Estimate]]) -> dict[str, Estimate]:
        """The columns that all runs of a row have, as one."""
        if len(each) == 1:
            return each[0]
        common = [key for key in each[0] if all(key in found for found in each)]
        return {key: intervals.joined([found[key] for found in each]) for key in common}

    def of_one(self, run: Measured, numbers: Numbers, sizes: Sizes) -> dict[str, Estimate]:
        places = run.places(numbers)
        found: dict[str, Estimate] = {}
        figures = {key: figure.take(places) for key, figure in run.figures.items()}
        replies = [run.replies[place] for place in places] if run.replies else []
        if replies:
            figures["most_frequent"] = measures.most_frequent(replies)
            split, (orders, together) = [reply.split() for reply in replies], self.orders(numbers)
            for kind, size in (("items", sizes.items), ("tokens", sizes.tokens)):
                for n in (1, 2):
                    drawn = intervals.distinct_of_draws(split, n, orders, size, kind == "tokens", together)
                    found[f"distinct_{n}_{kind}"] = drawn
        return found | intervals.bootstrap(figures, self.resamples(numbers))

    def tests(self, scope: Iterable[int]) -> tuple[list[Test], list[str]]:
        """Every two systems in every column, on the items of `scope` that both have; and who was refused."""
        within, found, refused = set(scope), [], []
        pairs = list(itertools.combinations(self.systems, 2))
        for one, other in tqdm(pairs, desc="paired tests", disable=None, leave=False):
            numbers = tuple(sorted(within.intersection(one.numbers).intersection(other.numbers)))
            if few := intervals.too_few(self.groups_of(numbers)):
                refused.append(f"{one.name} and {other.name}: {few} in common")
                continue
            found += self.tests_of(one, other, numbers)
        return found, refused

    def tests_of(self, one: Row, other: Row, numbers: Numbers) -> list[Test]:
        same = numbers == self.numbers  # then the draws of the table serve
        sizes = self.table_sizes if same else self.sizes(numbers, (one, other))
        left, right, gold = (self.estimates(row, numbers, sizes) for row in (one, other, self.gold))
        p, better = {}, {}
        for key, column, target in self.ranked(gold):
            if key in left and key in right:
                p[key] = intervals.paired_p(left[key], right[key], target)
                wanted = target.point if target else 0.0
                behind = column.badness(left[key].point, wanted) > column.badness(right[key].point, wanted)
                better[key] = other.name if behind else one.name
        corrected = intervals.holm(p)
        found = []
        for key in (k for k in p if not math.isnan(p[k])):
            difference = intervals.difference(left[key], right[key])
            span = difference.interval() or (math.nan, math.nan)
            test = Test(
                one.name,
                other.name,
                key,
                len(numbers),
                difference.point,
                span,
                p[key],
                corrected[key],
                better[key],
            )
            found.append(test)
        return found

    # ------------------------------------------------------------------------------------ one table's marks

    def settle(self, numbers: Numbers) -> None:
        """The one set of items that the tables are of."""
        self.numbers = numbers
        self.table_sizes = self.sizes(numbers, self.systems)

    def table(self) -> dict[str, dict[str, Estimate]]:
        """{row: {column: figure}} on the set of the tables."""
        if not self.made:
            for row in tqdm(self.rows, desc="intervals", disable=None, leave=False):
                found = self.estimates(row, self.numbers, self.table_sizes)
                self.made[row.name] = self.untested(row) | found
        return self.made

    def beaten(self) -> dict[str, dict[str, list[str]]]:
        """{column: {floor: the systems that it beats}}, by the figures as they stand."""
        found: dict[str, dict[str, list[str]]] = {}
        table = self.table()
        for key, column, target in self.ranked(table[self.gold.name]):
            wanted = target.point if target else 0.0
            for floor in (row for row in self.rows if "floor" in row.kind and key in table[row.name]):
                least = column.badness(table[floor.name][key].point, wanted)
                for system in (row for row in self.systems if key in table[row.name]):
                    if least < column.badness(table[system.name][key].point, wanted):
                        found.setdefault(key, {}).setdefault(floor.name, []).append(system.name)
        return found


def best(comparison: Comparison, tests: Sequence[Test]) -> tuple[dict[str, str], dict[str, set[str]]]:
    """({column: the system that is significantly better than every other}, {column: the systems that tie}).

    Ties are those that do not differ significantly from the best figure, and that one; also those that are
    better than it on the items that both have, where the tables are of fewer. Columns in which not all
    systems could be tested are left out.
    """
    winners: dict[str, str] = {}
    ties: dict[str, set[str]] = {}
    known = {(test.column, frozenset((test.one, test.other))): test for test in tests}
    table, names = comparison.table(), [row.name for row in comparison.systems]
    for key, column, target in comparison.ranked(table[comparison.gold.name]):
        there = [name for name in names if key in table[name] and math.isfinite(table[name][key].point)]
        if len(there) < 2:
            continue
        wanted = target.point if target else 0.0
        order = sorted(there, key=lambda name: column.badness(table[name][key].point, wanted))
        against = {name: known.get((key, frozenset((order[0], name)))) for name in order[1:]}
        if None in against.values():
            continue
        level = []
        for name, test in against.items():
            if test and (test.corrected >= 1 - intervals.LEVEL or test.better != order[0]):
                level.append(name)
        if level:
            ties[key] = {order[0], *level}
        else:
            winners[key] = order[0]
    return winners, ties
