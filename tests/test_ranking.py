"""Retrievers are measured without training: BM25, an encoder as it is, one that was trained."""

import json
import math

import numpy as np
import pytest
from sklearn.preprocessing import normalize

import dpr_exemplar_retriever
from DPR import evaluate_retriever, train_dpr
from DPR.learning import HeldOut, rank_report, read_entries
from DPR.ranking import allowed_by, bm25
from DPR.retriever import Retriever
from options import Paths, UserError
from session import Session


def test_bm25_equals_the_formula_by_hand():
    passages = ["a dog ran", "a cat and a dog slept", "rain"]
    scores = bm25(["dog dog rain", "snow"], passages)

    def part(tf, length, holding):
        idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
        return idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / (10 / 3)))

    expected = [2 * part(1, 3, 2), 2 * part(1, 6, 2), part(1, 1, 1)]
    assert scores[0] == pytest.approx(expected) and not scores[1].any()
    assert bm25(["a dog"], ["?!", "..."]).tolist() == [[0, 0]], "passages without a word are equally far"


def test_held_out_questions_are_ranked_among_the_passages_of_all_of_them():
    entries = []
    for n in range(6):
        lists = {"positive_ctxs": f"p{n}", "hard_negative_ctxs": f"h{n}", "negative_ctxs": "of all"}
        entries.append({"question": f"q{n}"} | {name: [{"text": text}] for name, text in lists.items()})
    held = HeldOut.draw(entries, 0, seed=1)  # 0: all
    assert held.questions == [f"q{n}" for n in range(6)]
    assert sorted(held.passages) == sorted([*(f"{kind}{n}" for kind in "ph" for n in range(6)), "of all"])
    assert [held.passages[place] for place in held.positive] == [f"p{n}" for n in range(6)]
    few = [HeldOut.draw(entries, 2, seed).questions for seed in range(9)]
    assert all(len(row) == 2 for row in few) and len({tuple(row) for row in few}) > 1


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


def test_a_retriever_reads_as_many_tokens_as_it_was_trained_to(trained_copy):
    common = ["--workdir", str(trained_copy), "--device", "cpu"]
    lengths = ["--max-length", "12", "--max-passage-length", "8"]
    bert = ["--encoder", str(trained_copy / "data" / "bert-tiny"), "--max-steps", "2", "--batch-size", "4"]
    train_dpr.main([*common, *bert, *lengths, "--name", "short"])
    run = trained_copy / "saved" / "dpr" / "short"
    evaluate_retriever.main([*common, "--path", str(run)])
    logged = json.loads((run / "result.json").read_text(encoding="utf-8"))["after"]
    found = figures(trained_copy, "short")
    assert {key: found[key] for key in logged} == pytest.approx(logged)
    session = Session("cpu")
    assert Retriever.from_pretrained(run, session).encoders.lengths == {"question": 12, "context": 8}
    told = Retriever.from_pretrained(run, session, max_length=30).encoders.lengths
    assert told == {"question": 30, "context": 8}
    dpr_exemplar_retriever.main([*common, "--path", str(run), "--output", str(trained_copy / "found")])
    origin = json.loads((trained_copy / "found" / "test_dpr.csv.origin.json").read_text())
    assert (origin["max_length"], origin["max_passage_length"]) == (12, 8)


def test_a_passage_competes_where_it_was_said_in_the_questions_emotion(tmp_path):
    rows = ["conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"]
    for conv, emotion, reply in (("a", "sad", "oh no"), ("b", "joyful", "great"), ("c", "sad", "great")):
        rows += [f"{conv},1,{emotion},p,1,{conv} it is,x,", f"{conv},2,{emotion},p,2,{reply},x,"]
    (tmp_path / "d.csv").write_text("\n".join(rows) + "\n")
    held = HeldOut(["a it is", "b it is", "c it is"], ["oh no", "great"], np.array([0, 1, 1]))
    found = allowed_by("same-emotion", held, tmp_path / "d.csv", "make it")
    assert found.tolist() == [[True, True], [False, True], [True, True]]
    (tmp_path / "d.csv").write_text("\n".join(rows).replace("b it is", "b it was") + "\n")
    with pytest.raises(UserError, match="d.csv: not what the questions were made from; .*make it"):
        allowed_by("same-emotion", held, tmp_path / "d.csv", "make it")


def test_only_passages_of_the_questions_emotion_compete_where_that_is_asked(trained_copy):
    words = ["--workdir", str(trained_copy), "--device", "cpu", "--bm25"]
    everything = evaluate_retriever.main(words)
    narrow = evaluate_retriever.main([*words, "--candidates", "same-emotion"])
    assert (
        narrow["passages"] < everything["passages"] and narrow["average_rank"] <= everything["average_rank"]
    )
    assert np.isfinite(narrow["mrr"])
    assert figures(trained_copy, "bm25-same-emotion")["passages"] == narrow["passages"]


def test_by_cosine_the_lengths_of_vectors_do_not_count(trained_copy):
    tiny = str(trained_copy / "data" / "bert-tiny")
    words = ["--workdir", str(trained_copy), "--device", "cpu", "--encoder", tiny, "--pooling", "mean"]
    inner = evaluate_retriever.main([*words, "--name", "inner"])
    cosine = evaluate_retriever.main([*words, "--similarity", "cosine"])
    args, session = evaluate_retriever.parse_args(words), Session("cpu")
    entries = read_entries(Paths(trained_copy).dpr_data("empd", "valid"), drop_without_positive=True)
    held = HeldOut.draw(entries, args.valid_queries, args.seed)
    encoders = Retriever.from_pretrained(None, session, encoder=tiny, pooling="mean").encoders
    sides = (("question", held.questions), ("context", held.passages))
    questions, passages = (normalize(encoders.embed(side, texts, session, "")) for side, texts in sides)
    expected = rank_report(questions, passages, held.positive)
    assert {key: cosine[key] for key in expected} == pytest.approx(expected)
    assert cosine["average_rank"] != inner["average_rank"]


def test_words_have_no_cosine(capsys):
    with pytest.raises(SystemExit):
        evaluate_retriever.parse_args(["--bm25", "--similarity", "cosine"])
    assert "--bm25: has no vectors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate_retriever.parse_args(["--bm25", "--max-length", "64"])
    assert "--bm25: reads every word; leave --max-length" in capsys.readouterr().err


def test_one_seed_holds_the_same_questions_out_whenever_it_is_asked():
    entries = [{"question": f"q{n}", "positive_ctxs": [{"text": f"p{n}"}]} for n in range(40)]
    for seed in range(3):
        assert HeldOut.draw(entries, 5, seed).questions == HeldOut.draw(entries, 5, seed).questions


def test_some_of_the_held_out_questions_are_those_of_a_training_of_that_seed(trained_copy):
    common = ["--workdir", str(trained_copy), "--device", "cpu", "--valid-queries", "5", "--seed"]
    bert = ["--encoder", str(trained_copy / "data" / "bert-tiny"), "--max-steps", "1", "--batch-size", "4"]
    train_dpr.main([*common, "7", *bert, "--name", "few"])
    run = trained_copy / "saved" / "dpr" / "few"
    logged = json.loads((run / "result.json").read_text(encoding="utf-8"))["after"]
    found = evaluate_retriever.main([*common, "7", "--path", str(run)])
    assert found["questions"] == 5 and {key: found[key] for key in logged} == pytest.approx(logged)
    other = evaluate_retriever.main([*common, "8", "--path", str(run), "--name", "other"])
    assert {key: other[key] for key in logged} != pytest.approx(logged)
