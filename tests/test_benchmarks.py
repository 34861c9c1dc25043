"""The benchmarks, in process on tiny sizes: their figures stand where they are said to, and are plausible."""

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
from test_causal_models import make_tokenizer, save_llama, trained

import evaluate_responses
import options
import train_empathy_classifier
import train_glove_t5
from benchmarks import cost, decoding, embed, generate, reporting, retrieval, sampled_step, start, table
from DPR import biencoder
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


def test_embedding_reads_less_and_finds_the_same_vectors(workdir, capsys, monkeypatch):
    vectors, read = biencoder.vectors, []

    def counted(encoder, ids, mask):
        read.append(ids.numel())
        return vectors(encoder, ids, mask)

    monkeypatch.setattr(biencoder, "vectors", counted)
    monkeypatch.setattr(reporting, "knows_bf16", lambda device: False)
    bert = str(workdir / "data" / "bert-tiny")
    flags = ["--workdir", str(workdir), "--device", "cpu", "--encoder", bert]
    flags += "--texts 40 --batch-size 4 --padded 64 --precision fp32".split()
    result = embed.main(flags)
    assert result["times_plain"]["ours"] > 0
    # after the batch that warms up, ten batches of each plain way; seconds of so little are no measure
    padded, to_batch, ours = sum(read[1:11]), sum(read[11:21]), sum(read[21:])
    assert padded == 40 * 64 and ours < to_batch < padded
    assert result["distinct"] <= result["texts"] == 40
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ours  ")]
    assert float(rows[0][-1]) < 1e-4
    with pytest.raises(UserError, match="--overwrite"):
        embed.main(flags)


def test_generation_writes_as_many_tokens_both_ways(workdir, tmp_path):
    model = trained(save_llama(tmp_path / "llama", make_tokenizer()), tmp_path)
    model.save_pretrained(tmp_path / "run")
    flags = "--size tiny --replies 6 --batch-size 3 --beams 1 2 --contexts 2 --candidates 3 --new-tokens 4"
    generate.main(
        ["--workdir", str(workdir), "--device", "cpu", "--causal", str(tmp_path / "run")]
        + [*flags.split(), "--repeats", "1"]
    )
    found = figures(workdir, "generate")
    assert found["generator"]["beam 2"]["same_replies"] == 1
    assert found["causal"]["replies"] == 6


def test_sampled_replies_are_scored_alike_both_ways(workdir, tmp_path, capsys):
    model = trained(save_llama(tmp_path / "llama", make_tokenizer()), tmp_path)
    model.save_pretrained(tmp_path / "run")
    flags = "--contexts 2 --samples 3 --new-tokens 6 --repeats 1"
    common = ["--workdir", str(workdir), "--device", "cpu", "--causal", str(tmp_path / "run")]
    found = sampled_step.main([*common, *flags.split()])  # it compares the likelihoods itself
    assert [found[part]["replies"] for part in ("t5", "causal")] == [6, 6]
    assert all(len(found[part]["seconds"][name]) == 2 for part in found for name in ("draw", "score"))
    assert "causal: 2 contexts, 6 replies, fp32" in capsys.readouterr().out


def test_each_decoding_writes_to_a_folder_of_its_own_and_one_table_scores_them(home):
    run = home / "saved" / "glove-t5" / "exemplars"
    args = decoding.parse_args(["--workdir", str(home), str(run), "--ways", *decoding.WAYS])
    folder = home / "results" / "decoding-exemplars"
    writing, scoring = decoding.lines(args, "train_glove_t5.py", "glove-t5", folder)
    asked = [train_glove_t5.parse_args(shlex.split(line)[1:]) for line in writing]
    assert len({a.output for a in asked}) == len(decoding.WAYS)
    assert [a.beams for a in asked].count(8) == 2 and {a.inference for a in asked} == {str(run)}
    for a in asked:
        Path(a.output).mkdir(parents=True)
    scored = evaluate_responses.parse_args(shlex.split(scoring)[1:])
    shutil.rmtree(folder)  # the fixture is read-only
    assert scored.runs == [a.output for a in asked]
    rows = {"gold": {"length": 9.0, "tfidf_emo_level": 0.4, "bleu_1": 100.0}, "greedy": {"length": 5.0}}
    shown = reporting.table(*decoding.short_table(rows)).splitlines()
    assert [line.split() for line in shown] == [
        ["words", "tfidf", "emo"],
        ["gold", "9", "0.4"],
        ["greedy", "5", "-"],
    ]


def test_a_table_of_made_up_systems_is_timed_apart_from_its_judge(workdir, capsys):
    common = ["--workdir", str(workdir), "--device", "cpu"]
    short = "--model glove-t5 --size tiny --max-steps 1 --dim all"
    train_empathy_classifier.main([*common, *short.split()])
    flags = "--systems 2 --judge glove-t5 --texts 10 --resamples 100"
    found = table.main([*common, *flags.split()])
    assert found["readings"] == 1 and found["texts"] == 10 < found["distinct"]
    assert len(found["spent"]) == 3 and all(part["processor"] > 0 for part in found["spent"].values())
    assert f"for the {found['distinct']} distinct replies" in capsys.readouterr().out
    assert not (workdir / "results" / "evaluation").exists()


def test_stand_ins_need_no_files(tmp_path):
    common = ["--workdir", str(tmp_path), "--device", "cpu", "--stand-in"]
    flags = (
        "--size tiny --replies 2 --beams 1 --contexts 1 --candidates 2 --new-tokens 2 --layers 1 --repeats 1"
    )
    assert generate.main([*common, *flags.split()])["causal"]["replies"] == 2
    assert embed.main([*common, "--texts", "2", "--padded", "24"])["distinct"] == 2


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

    monkeypatch.setattr(
        options, "HEAVY", ("late_package",)
    )  # begun after the first look, as on a slow machine

    def slow():
        time.sleep(0.1)
        monkeypatch.setitem(sys.modules, "late_package", options)
        time.sleep(0.3)

    options.run(slow)
    assert "loading packages (late_package" in capsys.readouterr().err


def test_the_formulae_of_the_costs_are_what_is_counted():
    """docs/cost.md, "A training step, by part"."""
    b, s, t, more, v = 3, 11, 5, 7, 90
    found = cost.cost("mini", cost.Shape(b, s, t, more, v, critics=2, context=4))
    d, a, f, layers = 256, 256, 1024, 4

    def encoder(n: int) -> int:
        return 3 * b * n * layers * (8 * d * a + 4 * d * f + 4 * n * a)

    def decoder(n: int) -> int:
        each = 12 * d * a + 4 * d * f + 4 * t * a + 4 * n * a
        return 3 * b * layers * (t * each + 4 * n * d * a)

    e, wide, inner, both = 300, 300, 2048, 4 + t
    critic = b * both * (16 * e * wide + 8 * e * inner + 12 * both * wide)
    assert found["encoder"] == encoder(s)
    assert found["decoder"] == decoder(s)
    assert found["exemplars"] == encoder(s + more) + decoder(s + more) - encoder(s) - decoder(s)
    assert found["vocabulary"] == 6 * b * t * v * d
    assert found["critics"] == 2 * (4 * b * t * v * e + critic)
