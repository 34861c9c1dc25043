"""Retrievers are measured without training: BM25, an encoder as it is, one that was trained."""

import json
import math

import numpy as np
import pytest

from DPR import evaluate_retriever
from DPR.ranking import bm25
from options import UserError


def test_bm25_equals_the_formula_by_hand():
    passages = ["a dog ran", "a cat and a dog slept", "rain"]
    scores = bm25(["dog dog rain", "snow"], passages)

    def part(tf, length, holding):
        idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
        return idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / (10 / 3)))

    expected = [2 * part(1, 3, 2), 2 * part(1, 6, 2), part(1, 1, 1)]
    assert scores[0] == pytest.approx(expected) and not scores[1].any()


def figures(workdir, name):
    return json.loads((workdir / "results" / "retrieval" / f"{name}.json").read_text(encoding="utf-8"))


def test_a_trained_retriever_is_measured_as_its_training_measured_it(trained_copy):
    words = [
        "--workdir",
        str(trained_copy),
        "--device",
        "cpu",
        "--path",
        str(trained_copy / "saved/dpr/empd"),
    ]
    evaluate_retriever.main(words)
    logged = json.loads((trained_copy / "saved/dpr/empd/result.json").read_text(encoding="utf-8"))["after"]
    found = figures(trained_copy, "empd")
    assert {key: found[key] for key in logged} == pytest.approx(logged)
    with pytest.raises(UserError, match="empd.json; add --overwrite"):
        evaluate_retriever.main(words)


def test_only_passages_of_the_questions_emotion_compete_where_that_is_asked(trained_copy):
    words = ["--workdir", str(trained_copy), "--device", "cpu", "--bm25"]
    everything = evaluate_retriever.main(words)
    narrow = evaluate_retriever.main([*words, "--candidates", "same-emotion"])
    assert (
        narrow["passages"] < everything["passages"] and narrow["average_rank"] <= everything["average_rank"]
    )
    assert np.isfinite(narrow["mrr"])
    assert figures(trained_copy, "bm25-same-emotion")["passages"] == narrow["passages"]


def test_words_have_no_cosine(capsys):
    with pytest.raises(SystemExit):
        evaluate_retriever.parse_args(["--bm25", "--similarity", "cosine"])
    assert "--bm25: has no vectors" in capsys.readouterr().err
