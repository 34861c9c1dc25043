"""The numbers of the tables, against hand-computed values and written-out formulas."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report

from floors import nearest_by_tfidf
from metrics import (
    classification,
    classification_baselines,
    count_words,
    distinct,
    perplexity,
    regression,
    tfidf_classifier,
    tfidf_rows,
)

# --------------------------------------------------------------------------------------------- classification


def test_classification_by_hand():
    scores = classification(gold=[0, 0, 0, 1, 1, 2], predicted=[0, 0, 1, 1, 1, 0], labels=3)
    f1 = [2 / 3, 4 / 5, 0.0]  # (P 2/3, R 2/3), (P 2/3, R 1), never predicted
    assert scores["accuracy"] == pytest.approx(100 * 4 / 6)
    assert scores["macro_f1"] == pytest.approx(100 * sum(f1) / 3)
    assert scores["weighted_f1"] == pytest.approx(100 * (3 * f1[0] + 2 * f1[1] + f1[2]) / 6)
    assert [scores[f"f1_{i}"] for i in range(3)] == pytest.approx([100 * f for f in f1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_classification_equals_sklearns_report(pairs):
    gold, predicted = zip(*pairs, strict=True)
    report = classification_report(gold, predicted, labels=[0, 1, 2], output_dict=True, zero_division=0)
    scores = classification(gold, predicted, 3)
    assert scores["macro_f1"] == pytest.approx(100 * report["macro avg"]["f1-score"])
    assert scores["weighted_f1"] == pytest.approx(100 * report["weighted avg"]["f1-score"])
    assert scores["accuracy"] == pytest.approx(100 * sum(g == p for g, p in pairs) / len(pairs))


def test_a_class_that_never_occurs_still_counts_in_macro_f1():
    scores = classification([0, 1], [0, 1], labels=3)
    assert (scores["accuracy"], scores["f1_2"]) == (100, 0)
    assert scores["macro_f1"] == pytest.approx(200 / 3)


def test_baselines_majority_by_hand_and_tfidf_beats_it_on_separable_text():
    kind = ["i am so sorry for you", "that must hurt i am sorry"]
    cold = ["buy a new one", "call the shop", "just buy it at the shop"]
    train = (kind * 6 + cold * 6, [1] * 12 + [0] * 18)
    valid = (["so sorry", "you must hurt", "the shop", "buy one", "call them"], [1, 1, 0, 0, 0])
    found = classification_baselines(train, valid, 2)
    assert found["majority"]["accuracy"] == pytest.approx(60)
    assert found["majority"]["macro_f1"] == pytest.approx(100 * (2 * 0.6 / 1.6) / 2)
    assert found["tfidf"]["macro_f1"] == 100


def test_to_the_word_classifier_a_rare_label_counts_as_much_as_a_frequent_one():
    """A third of what is labelled 0 says "rain", and all of the few that are labelled 1."""
    texts, labels = ["rain"] * 30 + ["cup"] * 60 + ["rain"] * 10, [0] * 90 + [1] * 10
    assert tfidf_classifier(texts, labels).predict(["rain", "cup"]).tolist() == [1, 0]


def test_where_no_training_reply_has_a_word_the_words_tell_no_more_than_the_frequencies():
    found = classification_baselines((["?", "k", "!"], [0, 0, 1]), (["oh no", "k"], [0, 1]), 2)
    assert found["tfidf"] == found["majority"] | {"calibration_error": pytest.approx(100 / 6)}


def test_baselines_are_fitted_on_the_training_side():
    found = classification_baselines(
        (["yes we", "yes you", "no"], [0, 0, 1]), (["never", "no", "no"], [1, 1, 1]), 2
    )
    assert found["majority"]["accuracy"] == 0


# ------------------------------------------------------------------------------------------------- regression


def test_regression_by_hand():
    scores = regression([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    assert scores["mse"] == pytest.approx(2 / 3)
    assert scores["pearson"] == pytest.approx(0.5)
    assert regression([1.0, 2.0, 3.0], [-2.0, -4.0, -6.0])["pearson"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("gold", "predicted"), [([1.0, 2.0], [0.5, 0.5]), ([0.5, 0.5], [1.0, 2.0]), ([1.0], [2.0])]
)
def test_correlation_with_a_constant_is_nan_without_a_warning(gold, predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = regression(gold, predicted)
    assert math.isnan(scores["pearson"])
    assert scores["mse"] == pytest.approx(np.mean((np.array(gold) - np.array(predicted)) ** 2))


# ------------------------------------------------------------------------------------ perplexity, word counts


def test_perplexity_is_exp_of_sum_over_sum():
    nll, tokens = [2.0, 30.0], [1, 10]
    assert perplexity(sum(nll), sum(tokens)) == pytest.approx(math.exp(32 / 11))
    mean_of_means = math.exp(np.mean([n / t for n, t in zip(nll, tokens, strict=True)]))
    assert perplexity(sum(nll), sum(tokens)) != pytest.approx(
        mean_of_means
    )  # the published fault would be seen


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    assert perplexity(12 * math.log(500), 12) == pytest.approx(500)


def test_perplexity_neither_overflows_nor_divides_by_zero():
    assert math.isfinite(perplexity(1e9, 1))
    assert math.isnan(perplexity(0.0, 0))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("hello there", 2),
        ("Hello, there!", 4),
        ("3.14 is pi.", 4),
        ("a - b", 3),
        ("well...", 4),
        ("", 0),
        ("  ", 0),
        ("don't", 1),
    ],
)
def test_words_are_counted_with_punctuation_marks(text, count):
    assert count_words(text) == count


# --------------------------------------------------------------------------------------------------- distinct


@pytest.mark.parametrize(
    ("responses", "n", "expected"),
    [
        (["a b a", "b c"], 1, 100 * 3 / 5),
        (["a b a", "b c"], 2, 100),
        (["a b", "A B"], 1, 50),  # lower-cased
        (["you, you?"], 1, 75),  # words and marks apart
        (["a b", "a b"], 2, 50),  # no bigram across replies
        (["a b a b"], 2, 100 * 2 / 3),
        (["a", "b"], 2, 0),
        (["", ""], 1, 0),
        ([], 1, 0),
    ],
)
def test_distinct_by_hand(responses, n, expected):
    assert distinct(responses, n) == pytest.approx(expected)


def test_texts_without_a_word_have_no_neighbour_and_foretell_nothing():
    assert tfidf_rows(["? !", "..."], ["hello", "?"]).nnz == 0
    assert nearest_by_tfidf(["?", "hello"], ["!", "..."], [None, None], ["a", "b"]) == [0, 0]
    found = tfidf_rows(["a dog", "a cat"], ["a dog", "a bird"])
    assert found.toarray().max(axis=1).tolist() == [1, 0]


def test_a_label_that_training_lacks_takes_no_other_labels_place():
    train = (["so sorry", "buy one"] * 3, [0, 2] * 3)
    found = classification_baselines(train, (["sorry", "buy"], [0, 2]), 3)
    assert found["tfidf"]["accuracy"] == 100 and found["tfidf"]["f1_2"] == 100
