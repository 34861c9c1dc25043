"""Intervals and paired tests: their rates on simulated data, where the truth is known."""

import json
import math

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_ind

import comparison
import intervals
from columns import COLUMNS, judge_columns
from comparison import Comparison, Measured, Row, best
from exports import as_numbers, pairs_table
from intervals import Additive, Estimate, bootstrap, fixed_size, holm, item_means, paired_p, ratio, resamples
from rendering import Page


def test_intervals_of_a_mean_and_of_a_ratio_cover_it_at_their_rate():
    rng = np.random.default_rng(0)
    held = {"mean": 0, "ratio": 0}
    counts = resamples(range(120), 400, seed=1)
    for _ in range(300):
        weights = rng.integers(1, 9, size=120)
        values = rng.exponential(2.0, size=120)
        both = np.stack([values * weights, weights], axis=1)
        found = bootstrap({"mean": item_means(values), "ratio": Additive(both, ratio)}, counts)
        for key, estimate in found.items():
            low, high = estimate.interval()
            held[key] += low <= 2.0 <= high
    # of 300 at 95 %: 285, give or take 4 standard deviations of 3.8 and the skew of the exponential
    assert all(268 <= hits <= 299 for hits in held.values()), held


def test_turns_of_a_conversation_are_drawn_together():
    """Two turns of one conversation that say the same are one: the interval of their mean is that of 60."""
    rng = np.random.default_rng(0)
    conversations = np.repeat(np.arange(60), 2)
    together = resamples(conversations, 500, seed=1)
    assert (together[:, ::2] == together[:, 1::2]).all() and (together.sum(1) == 120).all()
    alone = resamples(range(120), 500, seed=1)
    held = {"together": 0, "alone": 0}
    for _ in range(200):
        values = item_means(np.repeat(rng.normal(size=60), 2))
        for name, counts in (("together", together), ("alone", alone)):
            low, high = bootstrap({"mean": values}, counts)["mean"].interval()
            held[name] += low <= 0 <= high
    assert held["alone"] < 180 < 183 <= held["together"]  # of 200 at 95 %: 190, three deviations of 3.1


def test_two_that_are_equally_far_from_gold_are_not_told_apart_more_often_than_the_rate():
    """On its two sides, or on one; and one that is nearer is found."""
    rng, counts = np.random.default_rng(0), resamples(range(330), 400, seed=1)

    def found(rates: tuple[float, float], trials: int) -> float:
        told = 0
        for _ in range(trials):
            drawn = {key: rng.random(330) < rate for key, rate in zip("abg", (*rates, 0.5), strict=True)}
            each = bootstrap({key: item_means(values) for key, values in drawn.items()}, counts)
            told += paired_p(each["a"], each["b"], each["g"]) < 0.05
        return told / trials

    # three standard deviations above the rate; a test of the distances themselves has .10 here
    assert found((0.46, 0.54), 600) < 0.077
    assert found((0.6, 0.6), 100) < 0.12
    assert found((0.75, 0.5), 100) > 0.85


def simulated(rng, items: int, lift: float = 0.0, kind: str = "system", name: str = "a") -> Row:
    words = rng.integers(40, size=(items, 6))
    replies = [" ".join(f"w{n}" for n in row) for row in words]
    figures = {
        "rouge_l": item_means(rng.normal(10 + lift, 5, size=items)),
        "vader": item_means(rng.normal(0.1 * lift, 0.4, size=items)),
    }
    return Row(name, kind, [Measured(tuple(range(items)), figures, replies)])


def test_two_samples_of_one_system_differ_no_more_often_than_the_rate():
    rng, wrong, bold = np.random.default_rng(3), 0, 0
    for trial in range(30):
        rows = [simulated(rng, 200, kind="gold", name="gold")]
        rows += [simulated(rng, 200, name=name) for name in ("one", "two")]
        comparison = Comparison(rows, COLUMNS, count=200, seed=trial)
        comparison.settle(tuple(range(200)))
        tests, refused = comparison.tests(range(200))
        assert not refused
        tested = {test.column for test in tests}
        assert tested >= {"rouge_l", "vader", "most_frequent", "distinct_1_items", "distinct_2_tokens"}
        wrong += any(test.corrected < 0.05 for test in tests)
        bold += bool(best(comparison, tests)[0])
    assert wrong == bold <= 5  # 30 families at 5 %: 1.5, and three standard deviations of 1.2


def test_a_copy_of_a_system_ties_and_a_better_one_is_bold():
    rng = np.random.default_rng(5)
    gold = simulated(rng, 300, kind="gold", name="gold")
    one = simulated(rng, 300, name="one")
    copy = Row("copy", "system", one.runs)
    better = simulated(rng, 300, lift=6, name="better")
    comparison = Comparison([gold, one, copy], COLUMNS, count=500, seed=0)
    comparison.settle(tuple(range(300)))
    tests, _ = comparison.tests(range(300))
    assert {test.p for test in tests} == {1.0} and {test.difference for test in tests} == {0.0}
    winners, ties = best(comparison, tests)
    assert not winners and ties["rouge_l"] == {"one", "copy"}

    comparison = Comparison([gold, one, copy, better], COLUMNS, count=500, seed=0)
    comparison.settle(tuple(range(300)))
    tests, _ = comparison.tests(range(300))
    winners, ties = best(comparison, tests)
    assert winners["rouge_l"] == "better" and "rouge_l" not in ties
    assert ties["vader"] == {"one", "copy"}  # nearer to gold, not higher, is better there


def test_pairs_are_tested_on_the_items_that_both_have_and_refused_below_200():
    rng = np.random.default_rng(2)
    rows = [simulated(rng, 500, kind="gold", name="gold"), simulated(rng, 500, name="all")]
    for name, numbers in (("first", range(0, 300)), ("last", range(180, 500))):
        run = simulated(rng, 500).runs[0]
        places = np.array(numbers)
        figures = {key: figure.take(places) for key, figure in run.figures.items()}
        replies = [run.replies[i] for i in numbers]
        rows.append(Row(name, "system", [Measured(tuple(numbers), figures, replies)]))
    comparison = Comparison(rows, COLUMNS, count=100, seed=0)
    comparison.settle(tuple(range(180, 300)))
    tests, refused = comparison.tests(range(500))
    assert {(t.one, t.other, t.items) for t in tests} == {("all", "first", 300), ("all", "last", 320)}
    assert refused == ["first and last: 120 items of 120 conversations in common"]


def test_an_interval_stays_within_what_its_figure_can_be(tmp_path):
    """Student's t of two runs is wide: a level of .3 is no level below 0, an AUC none above 1."""
    columns = judge_columns("tfidf", ["exp"])
    rng, rows = np.random.default_rng(8), []
    for name, kind in (("gold", "gold"), ("one", "system")):
        row = simulated(rng, 100, kind=kind, name=name)
        row.runs.append(simulated(rng, 100).runs[0])
        for run, level in zip(row.runs, (0.05, 0.75), strict=True):
            run.figures["tfidf_exp_level"] = item_means(rng.uniform(level, level + 0.2, size=100))
            run.figures["tfidf_exp_kappa"] = item_means(np.full(100, level))
            run.figures["rouge_l"] = item_means(np.full(100, 100 * level))
            run.figures["bleu_4"] = item_means(np.full(100, level if level < 0.1 else np.nan))
        rows.append(row)
    comparison = Comparison(rows, [*COLUMNS, *columns], count=100, seed=0)
    comparison.settle(tuple(range(100)))
    page = Page(comparison, [])
    numbers = json.loads(json.dumps(as_numbers(page), allow_nan=False))  # NaN is no JSON
    assert numbers["runs"]["one"]["bleu_4"] == [pytest.approx(0.05), None]
    spans = as_numbers(page)["intervals"]["one"]
    assert spans["tfidf_exp_level"] == (0, 1) and spans["tfidf_exp_kappa"] == (-1, 1)
    assert spans["distinct_1_items"][0] >= 0 and spans["rouge_l"] == (0, 100)
    shown = next(c for c in columns if c.key == "tfidf_exp_level")
    assert "[0.000, 1.000]" in page.marked(rows[1], shown, interval=True)


@pytest.mark.parametrize(("talks", "known"), [(1, False), (9, False), (10, True), (12, True)])
def test_many_items_of_few_conversations_are_few(talks, known):
    """Whole conversations are drawn: of one, every resample is the same, and chance would look certain."""
    rng = np.random.default_rng(3)
    rows = [simulated(rng, 360, kind="gold", name="gold"), simulated(rng, 360, name="one")]
    rows.append(simulated(rng, 360, name="two"))
    comparison = Comparison(rows, COLUMNS, count=200, seed=0, groups=[f"c{n % talks}" for n in range(360)])
    comparison.settle(tuple(range(360)))
    tests, refused = comparison.tests(range(360))
    assert not tests and refused == [f"one and two: 360 items of {talks} conversations in common"]
    for column in ("rouge_l", "distinct_1_items", "distinct_2_tokens"):
        assert (comparison.table()["one"][column].interval() is not None) == known
    winners, ties = best(comparison, tests)
    assert not winners and not ties


def test_the_best_of_few_items_is_not_bold_where_the_test_on_all_of_them_says_the_other():
    rng = np.random.default_rng(4)
    gold, worse = simulated(rng, 400, kind="gold", name="gold"), simulated(rng, 400, name="worse")
    better = simulated(rng, 400, lift=4, name="better")
    for run, few in ((worse.runs[0], 90.0), (better.runs[0], 10.0)):
        run.figures["rouge_l"].statistics[:5, 0] = few  # the other way round on the items of the table
    comparison = Comparison([gold, worse, better], COLUMNS, count=1000, seed=0)
    comparison.settle(tuple(range(5)))
    tests, _ = comparison.tests(range(400))
    [test] = [t for t in tests if t.column == "rouge_l"]
    assert test.better == "better" and test.corrected < 0.05
    winners, ties = best(comparison, tests)
    assert "rouge_l" not in winners and ties["rouge_l"] == {"worse", "better"}


@pytest.mark.parametrize(("count", "seeds", "few"), [(100, 1, True), (500, 1, False), (100, 2, False)])
def test_resamples_that_can_make_nothing_significant_are_said_to_be_too_few(count, seeds, few):
    """Where a system has several seeds, p comes from a distribution, which has tails without resamples."""
    rng = np.random.default_rng(6)
    rows = [simulated(rng, 200, kind=kind, name=kind) for kind in ("gold", "system")]
    rows.append(simulated(rng, 200, name="other"))
    rows[-1].runs.extend(simulated(rng, 200).runs[0] for _ in range(1, seeds))
    comparison = Comparison(rows, COLUMNS, count=count, seed=0)
    comparison.settle(tuple(range(200)))
    tests, refused = comparison.tests(range(200))
    said = "\n".join(Page(comparison, tests).remarks(refused))
    assert (f"100 resamples are too few for the correction over {len(tests)} columns" in said) == few


def test_several_seeds_are_one_figure_with_each_of_them_kept():
    counts = resamples(range(50), 100, seed=0)
    each = [bootstrap({"x": item_means(np.full(50, value))}, counts)["x"] for value in (1.0, 2.0, 3.0)]
    found = intervals.joined(each)
    assert (found.point, found.runs) == (2.0, (1.0, 2.0, 3.0))
    # items that are all alike add nothing: Student's t of two degrees of freedom, standard error 1 / sqrt(3)
    assert found.interval() == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (5, 5), (3, 1), (1, 5)])
def test_a_system_that_is_better_by_the_luck_of_its_seeds_alone_is_not_significantly_better(seeds):
    """Two systems of a few seeds: seeds differ by 1, items by 1; a test over items alone takes that for
    certain. And how far the seeds are apart says where the mean of all seeds is. One seed beside several is
    as much a matter of luck as each of those."""
    rng = np.random.default_rng(1)
    counts, found, alone, held = resamples(range(50), 100, seed=0), [], [], []
    for _ in range(300):
        sides = []
        for count in seeds:
            runs = [{"x": item_means(rng.normal(rng.normal(), 1, 50))} for _ in range(count)]
            sides.append(intervals.joined([bootstrap(run, counts)["x"] for run in runs]))
        found.append(paired_p(*sides) < 0.05)
        alone.append(paired_p(*(Estimate(e.point, e.replicates) for e in sides)) < 0.05)
        held += [low <= 0 <= high for low, high in (side.interval() for side in sides if side.runs)]
    # of 300 at 5 %: 15, and three standard deviations of 3.8; twice as many intervals
    assert np.mean(found) < 0.088 and np.mean(held) > 0.923
    assert np.mean(alone) > 0.3


def test_systems_of_several_seeds_that_differ_by_more_than_luck_are_told_apart():
    rng, counts = np.random.default_rng(2), resamples(range(50), 100, seed=0)
    sides = []
    for mean in (0.0, 5.0):
        runs = [{"x": item_means(rng.normal(rng.normal(mean), 1, 50))} for _ in range(4)]
        sides.append(intervals.joined([bootstrap(run, counts)["x"] for run in runs]))
    assert paired_p(*sides) < 0.01


def test_holm_by_hand_and_as_statsmodels_has_it():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": math.nan}, nan_ok=True
    )
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = dict(enumerate(np.random.default_rng(0).uniform(0, 0.2, size=12)))
    expected = multitest.multipletests(list(p.values()), method="holm")[1]
    assert list(holm(p).values()) == pytest.approx(expected)


def test_no_p_is_smaller_than_its_resamples_can_tell():
    counts = resamples(range(50), 99, seed=0)
    values = np.random.default_rng(0).normal(size=50)
    one, far = (bootstrap({"x": item_means(values + shift)}, counts)["x"] for shift in (0, 100))
    other = bootstrap({"x": item_means(np.random.default_rng(1).normal(size=50))}, counts)["x"]
    assert paired_p(far, other) == paired_p(other, far) == 1 / 100 < paired_p(one, other)


@pytest.mark.parametrize(
    ("items", "talks", "said"),
    [
        (200, 30, ""),
        (199, 30, "199 items of 30 conversations"),
        (200, 29, "200 items of 29 conversations"),
        (200, 200, ""),
    ],
)
def test_what_a_paired_test_needs_is_enough_as_it_is(items, talks, said):
    assert intervals.too_few([n % talks for n in range(items)]) == said


def test_a_floor_that_is_as_good_beats_nobody():
    rng = np.random.default_rng(9)
    gold, system = simulated(rng, 200, kind="gold", name="gold"), simulated(rng, 200)
    equal, better = Row("equal", "floor", system.runs), simulated(rng, 200, 9, "floor", "better")
    comparison = Comparison([gold, equal, better, system], COLUMNS, count=50, seed=0)
    comparison.settle(tuple(range(200)))
    found = comparison.beaten()
    assert found["rouge_l"] == {"better": ["a"]}
    assert not any("equal" in floors for floors in found.values())


def test_what_has_no_interval_is_not_tested():
    assert math.isnan(paired_p(Estimate(1.0), Estimate(2.0)))
    assert Estimate(1.0).interval() is None


# ----------------------------------------------------------------------------------- Distinct of a fixed size


def test_numbered_grams_are_equal_where_the_words_are_and_cross_no_reply():
    rng = np.random.default_rng(5)
    replies = [list(rng.choice(list("abc"), size=size)) for size in (0, 1, 5, 2, 0, 9, 3)]
    for n in (1, 2, 3, 12):
        numbers, begins = intervals.numbered_grams(replies, n)
        wanted = [[tuple(r[i : i + n]) for i in range(len(r) - n + 1)] for r in replies]
        flat = [gram for row in wanted for gram in row]
        assert np.diff(begins).tolist() == [len(row) for row in wanted] and len(numbers) == len(flat)
        assert len(set(zip(numbers.tolist(), flat, strict=True))) == len(set(flat)) == len(set(numbers))


def test_distinct_of_draws_by_hand():
    orders = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    replies = [["a", "b"], ["a", "b", "c"], ["d"], ["d", "d"]]
    items = intervals.distinct_of_draws(replies, 1, orders, 2, tokens=False)
    assert items.point == pytest.approx(100 * (3 / 5 + 1 / 3) / 2)
    tokens = intervals.distinct_of_draws(replies, 1, orders, 4, tokens=True)  # a b a b | d d d c
    assert tokens.point == pytest.approx(100 * (2 / 4 + 2 / 4) / 2)
    pairs = intervals.distinct_of_draws(replies, 2, orders, 4, tokens=True)  # ab ab | dd, ab cut off
    assert pairs.point == pytest.approx(100 * (1 / 2 + 1 / 1) / 2)
    assert math.isnan(intervals.distinct_of_draws(replies, 1, orders, 3, tokens=False).point)


@pytest.mark.parametrize("size", [100, 40])
def test_the_spread_of_draws_is_that_of_other_samples_of_the_same_size(size):
    """Distinct of a part of a set, from draws of one set, against the same of many sets."""
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(200) for _ in range(100)])
    points, spreads = [], []
    for _ in range(60):
        replies = [[str(w) for w in rng.zipf(1.6, size=8)] for _ in range(200)]
        found = intervals.distinct_of_draws(replies, 1, orders, size, tokens=False)
        points.append(found.point)
        spreads.append(found.replicates.std())
    assert np.mean(spreads) == pytest.approx(np.std(points), rel=0.35)


def test_the_spread_of_draws_knows_that_turns_of_one_conversation_are_alike():
    """As above, of conversations that are dull or lively as a whole; its point is that of single turns."""
    groups = np.repeat(np.arange(40), 8)
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(len(groups)) for _ in range(100)])
    together = intervals.orders_of(groups, 100, seed=1)
    points, alone, spreads = [], [], []
    for _ in range(40):
        dull = rng.random(40) < 0.5
        replies = [
            ["i", "am", "sorry"] if dull[g] else [str(w) for w in rng.integers(5000, size=3)] for g in groups
        ]
        without = intervals.distinct_of_draws(replies, 1, orders, 100, tokens=False)
        found = intervals.distinct_of_draws(replies, 1, orders, 100, tokens=False, together=together)
        assert found.point == without.point
        points.append(found.point)
        alone.append(without.replicates.std())
        spreads.append(found.replicates.std())
    assert np.mean(spreads) == pytest.approx(np.std(points), rel=0.35)
    assert np.mean(alone) < 0.6 * np.std(points)  # what the turns by themselves would say


def test_distinct_of_a_table_is_drawn_by_conversations():
    rng = np.random.default_rng(7)
    rows = []
    for name, kind in (("gold", "gold"), ("one", "system")):
        dull = np.repeat(rng.random(40) < 0.5, 8)
        replies = ["i am sorry" if d else " ".join(f"w{n}" for n in rng.integers(5000, size=3)) for d in dull]
        rows.append(Row(name, kind, [Measured(tuple(range(320)), {}, replies)]))
    widths, points = [], []
    for groups in (None, [f"c{n // 8}" for n in range(320)]):
        comparison = Comparison(rows, COLUMNS, count=100, seed=0, groups=groups)
        comparison.settle(tuple(range(320)))
        found = comparison.table()["one"]["distinct_1_items"]
        low, high = found.interval()
        widths.append(high - low)
        points.append(found.point)
    assert points[0] == points[1] and widths[1] > 1.5 * widths[0]


def test_orders_keep_groups_together_and_know_no_others():
    groups = [c for c in "abcdefghijkl" for _ in range(3)]
    orders = intervals.orders_of(groups, 50, seed=3)
    assert orders.shape == (50, 36) and (np.sort(orders) == np.arange(36)).all()
    in_threes = np.array(groups)[orders].reshape(50, 12, 3)
    assert (in_threes == in_threes[:, :, :1]).all()
    assert len({tuple(row) for row in orders.tolist()}) == 50
    assert {tuple(row[:3] % 3) for row in orders} > {(0, 1, 2), (2, 1, 0)}  # and within one, any order
    assert intervals.orders_of(groups[:9], 50, seed=3).shape == (0, 9)  # of so few no spread is said


@pytest.mark.parametrize(("available", "size"), [(1, 0), (2, 1), (14, 5), (5257, 2000), (57_000, 20_000)])
def test_sizes_are_round_and_at_most_half(available, size):
    assert intervals.fixed_size(available) == size


def of_seeds(*values: float) -> Estimate:
    """A system's seeds, on items that are all alike."""
    counts = resamples(range(50), 100, seed=0)
    return intervals.joined([bootstrap({"x": item_means(np.full(50, v))}, counts)["x"] for v in values])


def test_seeds_are_compared_by_welchs_test_and_one_seed_by_where_another_of_several_would_be():
    one, other = (1.0, 2.0, 4.0), (3.0, 9.0, 5.5, 7.0, 4.0)
    expected = ttest_ind(one, other, equal_var=False).pvalue
    assert paired_p(of_seeds(*one), of_seeds(*other)) == pytest.approx(expected, rel=1e-4)
    apart = (np.mean(other) - 1) / (np.std(other, ddof=1) * math.sqrt(1 + 1 / 5))
    assert paired_p(of_seeds(1.0), of_seeds(*other)) == pytest.approx(2 * student.sf(apart, 4), rel=1e-4)


@pytest.mark.parametrize(("size", "scale"), [(1, math.sqrt(1 / 3)), (2, 1.0)])
def test_the_spread_of_draws_is_scaled_to_that_of_all_items(size, scale):
    """At half of the items that of the draws themselves (Politis and Romano 1994)."""
    orders = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    replies = [["a", "b"], ["a", "b", "c"], ["d"], ["d", "d"]]
    found = intervals.distinct_of_draws(replies, 1, orders, size, tokens=False)
    apart = {1: 100 - 50, 2: 60 - 100 / 3}[size]
    assert np.ptp(found.replicates) == pytest.approx(scale * apart)


def test_resamples_without_a_figure_are_no_part_of_its_interval():
    """A kappa is undefined where all of a resample are of one level."""
    known = np.linspace(0.4, 0.6, 101)
    found = Estimate(0.5, np.concatenate([known, np.full(60, math.nan)]))
    assert found.interval() == Estimate(0.5, known).interval()


def test_a_row_of_pairs_says_by_how_much_the_first_lies_above_the_other_and_both_ps():
    found = pairs_table([comparison.Test("a", "b", "rouge_l", 300, 0.2, (0.1, 0.3), 0.01, 0.04, "a")])
    (row,) = found.to_dict("records")
    names = {"system": "a", "other": "b", "column": "rouge_l", "items": 300}
    assert row == names | {"difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.01, "p_holm": 0.04}


def test_draws_of_distinct_are_as_large_as_the_shortest_system_and_gold_can_fill():
    numbers = tuple(range(400))

    def row(name: str, kind: str, words: int) -> Row:
        return Row(name, kind, [Measured(numbers, {}, [" ".join(["so"] * words)] * 400)])

    gold, long, short = row("gold", "gold", 5), row("long", "system", 10), row("short", "system", 2)
    table = Comparison([gold, long, short], [], 10, 0)
    assert table.sizes(numbers, [long, short]).tokens == fixed_size(800) > 0
    assert table.sizes(numbers, [long]).tokens == fixed_size(2000) > fixed_size(800)


def test_a_system_of_several_seeds_has_the_items_that_all_of_them_have():
    seeds = [Measured(numbers, {}, ["Oh."] * len(numbers)) for numbers in ((0, 1, 2, 5), (1, 2, 3, 5))]
    assert Row("run", "system", seeds).numbers == (1, 2, 5)


def test_pairs_are_tested_on_the_items_of_the_set_and_no_others():
    rng = np.random.default_rng(2)
    rows = [simulated(rng, 500, kind="gold", name="gold")]
    rows += [simulated(rng, 500, name=name) for name in ("one", "two")]
    comparison = Comparison(rows, COLUMNS, count=100, seed=0)
    comparison.settle(tuple(range(250)))
    tests, _ = comparison.tests(range(250))
    assert {test.items for test in tests} == {250}
