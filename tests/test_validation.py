"""Columns against human ratings. All ratings here are made up for the tests."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from columns import COLUMNS, judge_columns
from exports import worth
from options import UserError
from validation import read_ratings, validate_metrics

#: made up: 60 texts of a known quality, which three raters see with errors of their own
RNG = np.random.default_rng(3)
TEXTS = [f"Reply number {n} , isn't it?" for n in range(60)]
QUALITY = RNG.normal(size=60)
RATERS = {f"rater_{r}": np.clip(np.round(3 + QUALITY + RNG.normal(0, 0.5, 60)), 1, 5) for r in range(3)}


@pytest.fixture
def wide(tmp_path):
    table = pd.DataFrame({"reply": TEXTS, "scale": "empathy", **RATERS}).astype(object)
    table.loc[0, "rater_1"] = ""  # rater 1 has left it out
    table.to_csv(tmp_path / "wide.csv", index=False)
    return tmp_path / "wide.csv"


def test_columns_are_correlated_with_the_mean_rating_of_the_same_texts(wide):
    replies = [text.lower() for text in reversed(TEXTS)] + ["Nobody rated this."]
    good, noise = [*QUALITY[::-1], 0.0], RNG.normal(size=61).tolist()
    found = validate_metrics(read_ratings(wide), replies, {"good": good, "noise": noise, "same": [1.0] * 61})
    mean = np.mean([*RATERS.values()], axis=0)
    mean[0] = (RATERS["rater_0"][0] + RATERS["rater_2"][0]) / 2
    best = found.correlations["empathy"]["good"]
    assert best.rho == pytest.approx(spearmanr(mean, QUALITY).statistic)
    assert best.low < best.rho < best.high and best.count == found.matched == 60
    noisy = found.correlations["empathy"]["noise"]
    assert noisy.low < 0 < noisy.high
    assert np.isnan(found.correlations["empathy"]["same"].rho)
    assert 0.5 < found.raters["empathy"].alpha < found.raters["empathy"].against_others < 1
    others = []
    for name in RATERS:
        with_gap = {**RATERS, "rater_1": np.array([np.nan, *RATERS["rater_1"][1:]])}
        own = with_gap.pop(name)
        theirs = np.nanmean([*with_gap.values()], axis=0)
        others.append(spearmanr(own, theirs, nan_policy="omit").statistic)
    assert found.raters["empathy"].against_others == pytest.approx(np.mean(others))
    assert "| good | 0.9" in found.table() and "60 of the 60 rated texts" in found.table()


def test_a_rating_a_row_is_the_same_as_a_column_a_rater(wide, tmp_path):
    rows = [
        {"text": text, "rater": rater, "scale": "empathy", "value": values[n]}
        for rater, values in RATERS.items()
        for n, text in enumerate(TEXTS)
        if (rater, n) != ("rater_1", 0)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "long.csv", index=False)
    columns = {"good": QUALITY}
    one, other = (validate_metrics(read_ratings(f), TEXTS, columns) for f in (wide, tmp_path / "long.csv"))
    assert one == other


def test_capitals_in_the_names_of_columns_change_no_rating(wide, tmp_path):
    (tmp_path / "long.csv").write_text("text,rater,value\nhello,Ann,4\nhello,ann,5\n")
    for file in (wide, tmp_path / "long.csv"):
        expected = read_ratings(file)
        head, rows = file.read_text().split("\n", 1)
        for named in (head.title(), head.upper(), head.replace("rater_1", "Rater_1")):
            file.write_text(f"{named}\n{rows}")
            pd.testing.assert_frame_equal(read_ratings(file), expected)
    for name, text, place in (
        ("two.csv", "reply,Rater_1,rater_1\nhello,4,5\n", "two.csv, line 1"),
        ("two.jsonl", '{"reply":"x","rater_1":3}\n{"reply":"y","Rater_1":3}\n', "two.jsonl"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{place}: columns have one name .*ater_1, .ater_1\), .*rename"):
            read_ratings(tmp_path / name)


def test_ratings_that_cannot_be_used_are_refused_in_words(wide, tmp_path):
    with pytest.raises(UserError, match="only 10 of the 60 rated texts stand among the 10 replies"):
        validate_metrics(read_ratings(wide), TEXTS[:10], {"good": QUALITY[:10]})
    file = tmp_path / "bad.csv"
    file.write_text("reply,rater,value\nhello,ann,4\nhello,bob,good\n")
    with pytest.raises(UserError, match=r"bad.csv, line 3: the rating 'good' is no number"):
        read_ratings(file)
    file.write_text("reply,score\nhello,4\n")
    with pytest.raises(UserError, match="rater and value, or a column for each rater"):
        read_ratings(file)
    file = tmp_path / "long.jsonl"
    file.write_text('{"reply":"x","rater":"A","value":3}\n{"reply":"y","rater":"A"}\n')
    assert len(read_ratings(file)) == 1  # no value, no rating
    for row, said in (
        ('{"reply":"x","value":3}', "no rater"),
        ('{"reply":"x","rater":1,"value":[4]}', "no num"),
    ):
        file.write_text(f'{{"reply":"x","rater":"A","value":3}}\n{row}\n')
        with pytest.raises(UserError, match=f"long.jsonl, line 2: .*{said}"):
            read_ratings(file)
    file = tmp_path / "bad.csv"
    for ids in ("rater", "rater_id"):  # 1 and 2 are people, no ratings
        file.write_text(f"reply,{ids},rating\nhello,1,4\nhello,2,5\n")
        with pytest.raises(UserError, match=f"column {ids} names raters, .*; call that one value"):
            read_ratings(file)


def test_every_judge_has_its_own_rows(wide):
    columns = [*judge_columns("minilm", ["emo"]), *judge_columns("tfidf", ["emo"])]
    items = pd.DataFrame({"system": "mine", "reply": TEXTS})
    items = items.assign(minilm_emo_level=QUALITY, tfidf_emo_level=-QUALITY)
    table = worth(read_ratings(wide), items, columns)
    assert "| emo level, judge minilm | 0.9" in table and "| emo level, judge tfidf | -0.9" in table


def test_what_compares_with_the_gold_reply_says_nothing_of_the_gold_replies(wide):
    """People rate these highest, and each has all of its own words: no worth of BLEU."""
    gold = np.quantile(QUALITY, 0.6) < QUALITY
    items = pd.DataFrame({"system": np.where(gold, "gold", "mine"), "reply": TEXTS})
    items = items.assign(rouge_l=np.where(gold, 100.0, -QUALITY), length=QUALITY)
    table = worth(read_ratings(wide), items, [c for c in COLUMNS if c.key in ("rouge_l", "length")])
    assert "| ROUGE-L | -" in table and f"n = {len(TEXTS) - gold.sum()})" in table
    assert "| words | 0.9" in table and f"n = {len(TEXTS)})" in table


def test_a_reply_that_stands_there_several_times_counts_with_the_mean_of_its_values():
    texts = [f"Reply {n}" for n in range(40)]
    rated = [(text, rater, "empathy", float(n)) for n, text in enumerate(texts) for rater in ("a", "b")]
    ratings = pd.DataFrame(rated, columns=["text", "rater", "scale", "value"])
    mixed = [float(n * 7 % 40) for n in range(40)]
    found = validate_metrics(
        ratings,
        [*texts, *texts],
        {"falling": [*mixed, *(-2 * n - value for n, value in enumerate(mixed))]},
    )
    assert found.correlations["empathy"]["falling"].rho == -1  # the two of text n have the mean -n
