"""The benchmarks, in process on tiny sizes: their figures stand where they are said to, and are plausible."""

import json
import time

import pytest

import options
from benchmarks import embed, retrieval, start
from options import UserError


def figures(folder, name: str) -> dict:
    return json.loads((folder / "results" / "benchmarks" / f"{name}.json").read_text())


def test_retrieval_gives_every_question_its_exemplars_where_the_published_way_does_not(workdir, capsys):
    flags = "--stand-in --queries 20 --top-k 3 --fetched 5 --width 16 --rows 300 600 --growth-queries 5"
    retrieval.main(["--workdir", str(workdir), "--device", "cpu", "--repeats", "1", *flags.split()])
    found = figures(workdir, "retrieval")
    corpus = found["corpus"]
    assert corpus["with_their_k"]["ours"] > corpus["with_their_k"]["published"]
    assert corpus["same_order"] == 100 or corpus["with_their_k"]["published"] == 0
    assert corpus["seconds"].keys() == {"published", "ours", "bare"}
    for rows in (*found["growth"].values(), corpus["all_emotions"]):
        assert [row["index"] for row in rows] == ["flat", "ivf", "hnsw"]
        assert all(0 < row["recall"] <= 100 and row["ms"] > 0 for row in rows)
    assert "times ours" in capsys.readouterr().out


def test_an_index_that_would_take_too_long_is_left_out(workdir):
    flags = "--part growth --width 16 --rows 300 30000 --growth-queries 2 --build-limit 0.01"
    retrieval.main(["--workdir", str(workdir), "--device", "cpu", *flags.split()])
    growth = figures(workdir, "retrieval")["growth"]
    assert len(growth["300"]) == 3 and len(growth["30000"]) < 3


def test_embedding_reads_less_and_finds_the_same_vectors(workdir, capsys):
    bert = str(workdir / "data" / "bert-tiny")
    flags = ["--workdir", str(workdir), "--device", "cpu", "--encoder", bert]
    flags += "--texts 40 --batch-size 4 --padded 64 --precision fp32".split()
    result = embed.main(flags)
    assert result["times_plain"]["ours"] > 1
    assert result["distinct"] <= result["texts"] == 40
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ours  ")]
    assert float(rows[0][-1]) < 1e-4
    with pytest.raises(UserError, match="--overwrite"):
        embed.main(flags)


def test_start_times_a_script_and_leaves_the_workdir_alone(workdir, monkeypatch):
    before = sorted(workdir.rglob("*"))
    monkeypatch.setitem(start.SCRIPTS, "score.py", "--no-such-flag")
    found = start.main(["--workdir", str(workdir), "--only", "reproduce.py", "score.py"])
    score, reproduce = found
    assert 0 < reproduce["first_line"] <= reproduce["first_step"] and not reproduce["failed"]
    assert score["failed"] and "--no-such-flag" in score["says"]
    results = {workdir / "results", *(workdir / "results").rglob("*")}
    assert sorted(set(workdir.rglob("*")) - results) == before


def test_a_script_says_what_it_loads_only_where_it_is_silent_for_long(monkeypatch, capsys):
    options.run(lambda: None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(options, "PATIENCE", 0.01)
    options.run(lambda: time.sleep(0.3))
    out = capsys.readouterr()
    assert "loading packages (torch" in out.err and len(out.err.splitlines()) == 1 and not out.out
