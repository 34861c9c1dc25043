"""Figures of critics, words and perplexities: thin wraps of kept libraries, with the definition that was
used."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from scipy import sparse
from scipy.stats import pearsonr
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
from sklearn.pipeline import Pipeline, make_pipeline

WORDS_13A = Tokenizer13a()


def classification(gold: Sequence[int], predicted: Sequence[int], labels: int) -> dict[str, float]:
    """Accuracy, macro-F1, weighted F1 and the F1 of each of `labels` classes, in percent (paper, section
    V)."""
    each = f1_score(gold, predicted, labels=range(labels), average=None, zero_division=0)
    scores = {
        "accuracy": accuracy_score(gold, predicted),
        "macro_f1": each.mean(),
        "weighted_f1": f1_score(gold, predicted, labels=range(labels), average="weighted", zero_division=0),
        **{f"f1_{i}": value for i, value in enumerate(each)},
    }
    return {k: 100 * float(v) for k, v in scores.items()}


def calibration_error(gold: Sequence[int], probabilities: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of the most likely label, in percent (Guo et al. 2017, eq. 3).

    `probabilities` (N, labels). Mean gap between confidence and accuracy, over equally wide bins of
    confidence, each weighted by its share of the examples.
    """
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == np.asarray(gold)) - confidence  # (N,)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    return 100 * float(np.abs(np.bincount(bin_of, weights=gap, minlength=bins)).sum()) / len(gap)


def tfidf_classifier(texts: Sequence[str], labels: Sequence[int]) -> Pipeline | DummyClassifier:
    """TF-IDF of words (1-2 grams) and logistic regression, fitted; where no text has a word (of two letters,
    for scikit-learn), the frequencies of the labels."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    if not any(map(words.build_analyzer(), texts)):
        return DummyClassifier(strategy="prior").fit(texts, labels)
    regression = LogisticRegression(C=10, max_iter=2000, class_weight="balanced")
    return make_pipeline(words, regression).fit(texts, labels)


def classification_baselines(
    train: tuple[Sequence[str], Sequence[int]], valid: tuple[Sequence[str], Sequence[int]], labels: int
) -> dict:
    """What a critic has to beat: the majority class, and TF-IDF (1-2 grams) + logistic regression on the
    response."""
    out = {}
    for name, model in (
        ("majority", DummyClassifier(strategy="most_frequent").fit(*train)),
        ("tfidf", tfidf_classifier(*train)),
    ):
        found = np.zeros((len(valid[0]), labels))  # a label that training lacks stays at 0
        found[:, model.classes_] = model.predict_proba(valid[0])
        out[name] = classification(valid[1], found.argmax(1), labels)
        out[name]["calibration_error"] = calibration_error(valid[1], found)
    return out


def regression(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Mean squared error, and Pearson's r (nan where one side is constant)."""
    right, guessed = np.asarray(gold, dtype=float), np.asarray(predicted, dtype=float)
    constant = len(right) < 2 or np.ptp(right) == 0 or np.ptp(guessed) == 0
    return {
        "mse": float(mean_squared_error(gold, predicted)),
        "pearson": math.nan if constant else float(pearsonr(gold, predicted)[0]),
    }


def split_words(text: str) -> list[str]:
    """Words and punctuation marks by sacreBLEU's 13a tokeniser."""
    return WORDS_13A(text).split()


def count_words(text: str) -> int:
    """The unit of word perplexity, the same for every model."""
    return len(split_words(text))


def unknown_words(tokenizer, texts: Sequence[str]) -> set[str]:
    """What a (fast) tokenizer takes for its unknown token in `texts`: each distinct piece, lower-cased."""
    unknown = tokenizer.unk_token_id
    if unknown is None or not texts or not tokenizer.is_fast:  # a slow one, of bytes, knows every word
        return set()
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    words: set[str] = set()
    for text, ids, spans in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
        words.update(text[a:b].strip().lower() for i, (a, b) in zip(ids, spans, strict=True) if i == unknown)
    return words


def tfidf_rows(known: Sequence[str], texts: Sequence[str], **how: Any) -> sparse.csr_matrix:
    """(N, V): TF-IDF of `texts` over the words of the `known` ones; nothing at all where these have none.

    `how`: of scikit-learn's TfidfVectorizer.
    """
    try:
        return TfidfVectorizer(sublinear_tf=True, **how).fit(known).transform(texts)
    except ValueError:  # no text has a word, or none stands in `min_df` of them
        return sparse.csr_matrix((len(texts), 1))


def perplexity(nll: float, units: float) -> float:
    """exp(sum of token NLL / number of units), all sums over the whole set: never a mean of batch means."""
    return math.exp(min(nll / units, 700)) if units else math.nan


def distinct(responses: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of all responses, in percent (Li et al. 2016, corpus level).

    Over lower-cased words and punctuation marks (13a): split at white space, "you" and "you?" would be two
    words.
    """
    return distinct_of([split_words(response.lower()) for response in responses], n)


def distinct_of(responses: Sequence[Sequence[str]], n: int) -> float:
    """The same of words."""
    grams = [tuple(words[i : i + n]) for words in responses for i in range(len(words) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0
