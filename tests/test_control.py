"""control.py: the best candidate for each target, measured by judges that did not choose it."""

import functools
import itertools
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Killed
from safetensors.torch import load_file, save_file
from test_causal_models import make_tokenizer, save_llama

import control
import plots
import steering
import storage
from causal_models import CausalGenerator
from corpora import Example, listener_turns
from intervals import resamples
from judges import Judge
from options import DIMENSIONS, Paths, UserError
from responder import CausalWriter, open_writer
from session import Session
from settings import Weights
from steering import Pool, choose, with_intervals


def pool(*log_probability: float) -> Pool:
    return Pool(np.array([["a", "b", "c"]]), np.array([log_probability]))


def test_the_best_candidate_is_the_likeliest_or_the_nearest_to_the_target():
    levels = {"emo": np.array([[0.1, 0.9, 0.6]]), "exp": np.array([[0.9, 0.9, 0.1]])}
    found = pool(-1.0, -1.5, -1.1)
    assert choose(found, levels, {}, Weights()) == [0]
    assert choose(found, levels, {"emo": 1}, Weights()) == [1]
    assert choose(found, levels, {"emo": 1}, Weights(empathy=1)) == [2]
    assert choose(found, levels, {"emo": 1}, Weights(empathy=0.1)) == [0]
    assert choose(found, levels, {"exp": 0}, Weights()) == [2]
    assert choose(pool(-1.0, -np.inf, -1.1), levels, {"emo": 1}, Weights()) == [2]  # an empty reply
    assert choose(pool(-1.0, -np.inf, -1.1), levels, {"emo": 1}, Weights(likelihood=0)) == [2]


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for n in range(200):
        drawn = resamples(np.arange(60), 300, n)
        mean, low, high = with_intervals({"emo": rng.random(60) < 0.3}, drawn).values()
        held += low <= 0.3 <= high
        assert low <= mean <= high
    assert 0.88 <= held / 200 <= 0.99
    few = with_intervals({"emo": np.full(5, 0.25)}, resamples(np.arange(5), 300, 0))
    assert few["emo"] == 0.25 and np.isnan([few["emo_low"], few["emo_high"]]).all(), "of five there is none"


@pytest.fixture
def flags(trained_copy, tmp_path) -> list[str]:
    base = save_llama(tmp_path / "llama", make_tokenizer())
    run = tmp_path / "run"
    CausalGenerator.start(base, rank=2, cache=tmp_path, src_len=60).save_pretrained(run)
    short = "--contexts 5 --candidates 1 6 --timed 1 --max-new-tokens 5 --device cpu"
    return [str(run), "--workdir", str(trained_copy), *short.split()]


def test_exemplars_that_are_not_there_are_missed_with_what_finds_them(trained_copy, flags, tmp_path):
    reads = CausalGenerator.start(
        str(tmp_path / "llama"), rank=2, cache=tmp_path, src_len=60, exemplars="prepend"
    )
    reads.save_pretrained(tmp_path / "reads")
    Paths(trained_copy).exemplars("valid").unlink()
    wanted = r"valid_dpr.csv: no such file; make it with: python dpr_exemplar_retriever.py"
    with pytest.raises(UserError, match=wanted):
        control.main([str(tmp_path / "reads"), *flags[1:], "--ranker", "glove-t5", "--judge", "tfidf"])


def test_levels_under_every_target_stand_beside_their_difference_and_cost(
    trained_copy, flags, capsys, monkeypatch
):
    drawn = []
    monkeypatch.setattr(plots.pyplot, "close", drawn.append)
    words = [*flags, "--ranker", "glove-t5", "--judge", "tfidf", "t5", "--empathy-w", "1000", "0"]
    content = control.main(words)
    shown = capsys.readouterr().out
    folder = trained_copy / "results" / "control"
    table = pd.read_csv(folder / "control.csv")
    assert json.loads((folder / "metrics.json").read_text())["contexts"] == content["contexts"] == 5
    assert (folder / "table.md").read_text() in shown
    for judge in ("tfidf", "t5"):
        assert set(content["scale"][judge]) == set(DIMENSIONS)
        assert f"as {judge} sees them, by emo {content['scale'][judge]['emo']:+.2f}, exp" in shown
    names = ["none", *(f"{d}{end}" for d in DIMENSIONS for end in ("=0", "=1", ": 1 - 0"))]
    assert sorted(table["target"].unique()) == sorted([*names, "gold"])
    assert len(table) == 2 + 2 * 2 * 2 * len(names)  # judges x weights x candidates
    candidates = pd.read_csv(folder / "candidates.csv", keep_default_na=False)
    assert len(candidates) == 5 * 6
    known = {e.key for e in listener_turns(Paths(trained_copy).dialogues("valid"))}
    assert set(zip(candidates["conv_id"], candidates["utterance_idx"], strict=True)) <= known
    first = table[(table["judge"] == "tfidf") & (table["candidates"] == 1)]
    for dim in DIMENSIONS:  # one candidate leaves no choice, and neither does a weight of 0
        assert (first[first["target"] == f"{dim}: 1 - 0"][dim] == 0).all()
        rows = table[(table["judge"] == "tfidf") & (table["candidates"] == 6)].set_index(["weight", "target"])
        assert rows.loc[(0.0, f"{dim}=1"), dim] == rows.loc[(0.0, "none"), dim]
        aimed, other = (rows.loc[(1000.0, f"{dim}={n}"), dim] for n in (1, 0))
        assert rows.loc[(1000.0, f"{dim}: 1 - 0"), dim] == pytest.approx(aimed - other)
        shares = rows[f"{dim}_share"]  # of five replies
        assert ((shares * 5).round(6) % 1 == 0).all() and shares.between(-1, 1).all()
    assert (folder / "control.png").exists()
    assert [drawn[0].axes[n].get_ylabel() for n in (0, 3)] == ["level, by tfidf", "level, by t5"]
    for axis, (judge, dim) in zip(drawn[0].axes, itertools.product(("tfidf", "t5"), DIMENSIONS), strict=True):
        assert axis.get_title() == DIMENSIONS[dim].title
        own = table[table["judge"] == judge]
        gold, *lines = axis.get_lines()
        assert gold.get_ydata()[0] == pytest.approx(own[own["target"] == "gold"][dim].item())
        for line, (weight, level) in zip(lines, itertools.product((1000.0, 0.0), (1, 0)), strict=True):
            asked = own[(own["weight"] == weight) & (own["target"] == f"{dim}={level}")]
            assert line.get_xdata().tolist() == [1, 6]
            assert line.get_ydata().tolist() == pytest.approx(asked[dim].tolist())
            assert line.get_linestyle() == ("-" if level else "--")
        likely = rows.loc[(1000.0, "none"), "log_probability"]
        assert rows.loc[(1000.0, f"{dim}=1"), "log_probability"] <= likely
    moved = table[table["target"].str.contains("1 - 0") & (table["weight"] == 1000)]
    assert (moved[moved["candidates"] == 6][list(DIMENSIONS)] != 0).any(axis=None)


def test_likelihood_counts_as_much_as_is_asked_for(flags):
    words = [*flags, "--ranker", "glove-t5", "--judge", "tfidf", "--empathy-w", "0.01", "--timed", "0"]
    chosen = []
    for weight in ("1000", "0"):  # against the same small weight of the distance
        control.main([*words, "--likelihood-w", weight, "--overwrite"])
        table = pd.read_csv(Paths(flags[2]).results / "control" / "control.csv")
        rows = table[(table["candidates"] == 6) & table["target"].isin([f"{d}=1" for d in DIMENSIONS])]
        chosen.append(rows["log_probability"].mean())
    assert chosen[0] > chosen[1]


def test_another_ranker_samples_nothing_again_and_an_interrupted_call_goes_on(
    trained_copy, flags, monkeypatch
):
    words = [*flags, "--judge", "t5", "--timed", "0"]
    real, asked = CausalWriter.generate, []

    def stops(self, batch, count, decoding):
        asked.append(count)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return real(self, batch, count, decoding)

    monkeypatch.setattr(CausalWriter, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        control.main([*words, "--ranker", "tfidf"])
    control.main([*words, "--ranker", "tfidf"])
    assert asked == [6] * 6  # four were kept
    control.main([*words, "--ranker", "glove-t5", "--name", "other"])
    assert len(asked) == 6
    results = trained_copy / "results"
    one, two = ((results / name / "candidates.csv").read_text() for name in ("control", "other"))
    assert one == two
    with pytest.raises(UserError, match="already there.*--overwrite"):
        control.main([*words, "--ranker", "tfidf"])

    def killed(*_):
        raise Killed

    monkeypatch.setattr(steering, "page", killed)
    with pytest.raises(Killed):
        control.main([*words, "--ranker", "tfidf", "--overwrite"])
    assert not (results / "control" / "metrics.json").exists(), "figures of before beside a table of now"


def test_marks_are_a_way_of_control_where_the_generator_reads_them(trained_copy, flags, tmp_path):
    words = [*flags, "--ranker", "glove-t5", "--judge", "tfidf", "--timed", "0", "--ways", "ranking", "marks"]
    with pytest.raises(UserError, match="trained without --control marks; leave the flag out"):
        control.main(words)
    known = {"emo": 2, "exp": 2, "int": 2}
    CausalGenerator.start(str(tmp_path / "llama"), rank=2, cache=tmp_path, marks=known).save_pretrained(
        words[0]
    )
    control.main([*words, "both"])
    table = pd.read_csv(trained_copy / "results" / "control" / "control.csv")
    rows = table[table["target"].isin(["none", "exp=1"])].set_index(["way", "candidates", "target"])
    assert set(table["way"].dropna()) == {"ranking", "marks", "both"}
    likely = rows["log_probability"]
    assert likely["marks", 6, "none"] == likely["both", 6, "none"] == likely["ranking", 6, "none"]
    assert likely["marks", 1, "exp=1"] == likely["both", 1, "exp=1"] != likely["ranking", 1, "exp=1"]
    candidates = pd.read_csv(trained_copy / "results" / "control" / "candidates.csv", keep_default_na=False)
    first = candidates[(candidates["marks"] == "exp=1") & (candidates["candidate"] == 0)]
    # what a reply under marks costs the model that is told none
    paths = Paths(trained_copy)
    writer = open_writer(tmp_path / "run", Session("cpu"), paths)
    examples = {e.key: e for e in listener_turns(paths.dialogues("valid"))}
    with torch.inference_mode():
        costs = [
            writer.log_probability(examples[row.conv_id, row.utterance_idx].history, [], row.response)
            for row in first.itertuples()
            if row.response
        ]
    assert likely["marks", 1, "exp=1"] == pytest.approx(np.mean(costs), abs=1e-4)
    assert likely["marks", 1, "exp=1"] != pytest.approx(first["log_probability"].mean(), abs=1e-3)
    assert candidates["marks"].value_counts().to_dict() == dict.fromkeys(candidates["marks"].unique(), 30)
    assert candidates["marks"].nunique() == 7


def test_a_ranker_is_no_judge_of_its_own_choice(flags, capsys):
    with pytest.raises(SystemExit):
        control.parse_args([*flags, "--ranker", "t5", "--judge", "tfidf", "t5"])
    assert "--judge t5: it is the ranker" in capsys.readouterr().err


def test_a_critic_of_all_dimensions_is_a_judge_but_of_nothing_that_it_ranked(trained_copy, flags, tmp_path):
    import train_empathy_classifier

    short = ["--workdir", str(trained_copy), "--device", "cpu", "--max-steps", "2", "--model", "glove-t5"]
    for seed in ("1", "2"):
        words = [*short, "--size", "tiny", "--dim", "all", "--seed", seed, "--name", f"seed-{seed}"]
        train_empathy_classifier.main(words)
    one, two = (str(trained_copy / "saved" / "empathy" / f"seed-{seed}") for seed in (1, 2))
    words = [*flags, "--timed", "0"]
    control.main([*words, "--ranker", "tfidf", "--judge", one])
    page = (trained_copy / "results" / "control" / "table.md").read_text()
    levels = page.split("## Levels as seed-1 sees them")[1]
    assert "| none |" in levels and "| emo=1 |" in levels
    assert "Judge seed-1 has learnt from pairs that the ranker has seen" in page
    assert "trained to please: emo, exp, int;" in page
    train_empathy_classifier.main([*short, "--size", "tiny", "--dim", "all", "--part", "b", "--name", "half"])
    half = str(trained_copy / "saved" / "empathy" / "half")
    for noted, pleased in (
        (True, "(its pairs are unknown, as"),
        (False, "learnt from pairs that the ranker"),
    ):
        control.main([*words, "--ranker", "tfidf-a", "--judge", half, "--name", f"apart-{noted}"])
        said = (trained_copy / "results" / f"apart-{noted}" / "table.md").read_text()
        assert (pleased in said) == noted
        storage.write_json(Path(words[0]) / "result.json", {"served": []})  # now its run does say
    shutil.copytree(one, tmp_path / "copy")
    with pytest.raises(UserError, match="--judge copy: in emo, exp, int it is the ranker seed-1 itself"):
        control.main([*words, "--ranker", one, "--judge", str(tmp_path / "copy"), "--overwrite"])
    shutil.copytree(two, tmp_path / "other" / "seed-1")
    both = [*words, "--ranker", "tfidf", "--overwrite", "--judge", one, str(tmp_path / "other" / "seed-1")]
    with pytest.raises(UserError, match="two judges named seed-1, as their columns would be"):
        control.main(both)


def test_another_base_has_candidates_of_its_own(trained_copy, flags, tmp_path):
    words = [*flags, "--ranker", "tfidf", "--judge", "t5", "--timed", "0"]
    control.main([*words, "--name", "one"])
    other = save_llama(tmp_path / "other", make_tokenizer(), seed=1)
    control.main([*words, "--base-in-other-precision", other, "--name", "two"])
    results = trained_copy / "results"
    one, two = ((results / name / "candidates.csv").read_text() for name in ("one", "two"))
    assert one != two


def test_what_a_reply_costs_is_of_all_of_it(flags, trained_copy, tmp_path):
    run = tmp_path / "short"
    CausalGenerator.start(
        str(tmp_path / "llama"), rank=2, cache=tmp_path, src_len=60, tgt_len=6
    ).save_pretrained(run)
    writer = open_writer(run, Session("cpu"), Paths(trained_copy))
    reply = "i am so sorry to hear that"
    with torch.inference_mode():
        one, two = (writer.log_probability(["hello"], [], reply + rest) for rest in ("", " my dear friend"))
    assert one != two


def test_other_seeds_have_other_candidates_for_the_same_contexts(trained_copy, flags):
    words = [*flags, "--contexts", "999", "--candidates", "2", "--ranker", "tfidf", "--judge", "t5"]
    tables = []
    for seed in ("1", "2"):
        content = control.main([*words, "--timed", "0", "--seed", seed, "--name", f"seed-{seed}"])
        folder = trained_copy / "results" / f"seed-{seed}"
        tables.append(pd.read_csv(folder / "candidates.csv"))
        there = len(tables[-1]) // 2
        assert content["contexts"] == there < 999
        assert f"{there} contexts of valid" in (folder / "table.md").read_text()
    one, two = tables
    assert one[["conv_id", "utterance_idx"]].equals(two[["conv_id", "utterance_idx"]])
    assert (one["response"] != two["response"]).any()


def test_a_choices_cost_in_bleu_is_of_normalised_words_and_half_a_chance_shows_a_level():
    cost = steering.texts_cost(["I'm so sorry to hear that!"], ["i am so sorry to hear that !"])
    assert cost["norm_bleu_4"] == pytest.approx(100) and cost["length"] == 8
    half = Judge("half", {}, {}, {"emo": lambda texts, _: np.array([0.5, 0.49])}, reads_context=False)
    assert steering.seen_by(half, ["a", "b"], [(), ()])["emo_share"].tolist() == [1, 0]


def test_fewer_contexts_are_among_those_of_more(trained):
    paths = Paths(trained)
    few, more = ({e.key for e in steering.drawn_contexts(control_options(n), paths)} for n in (3, 6))
    assert len(few) == 3 and len(more) == 6 and few <= more


def control_options(contexts: int) -> steering.ControlOptions:
    return control.pick(steering.ControlOptions, control.parse_args(["run", "--contexts", str(contexts)]))


# ------------------------------------------------------------------------------------------- sampled and kept


def sampler_of(words: list[str], *more: str, precision: str = "fp32") -> steering.Sampler:
    args = control.parse_args([*words, "--contexts", "3", "--candidates", "1", "2", *more])
    options = control.pick(steering.ControlOptions, args)
    return steering.Sampler(options, control.places(args), Session("cpu", precision))


@pytest.fixture
def drawn(monkeypatch) -> list[tuple]:
    """What is sampled, without a model: the context's number, how many, the marks."""
    asked: list[tuple] = []
    opened = functools.cache(lambda run: open_writer(run, Session("cpu"), Paths(run)))
    monkeypatch.setattr(steering, "open_writer", lambda run, *_: opened(run))

    def sample(self, number, count, marks=None):
        asked.append((number, count, marks))
        return [(f"reply {n}" if n else "", -0.5) for n in range(count)]

    monkeypatch.setattr(steering.Sampler, "sample", sample)
    return asked


def test_candidates_are_kept_for_all_that_they_depend_on_and_for_nothing_else(
    trained_copy, flags, drawn, tmp_path
):
    found = sampler_of(flags).pool()
    assert [asked[:2] for asked in drawn] == [(0, 2), (1, 2), (2, 2)]
    assert found.log_probability.tolist() == [[-np.inf, -0.5]] * 3, "an empty reply is as unlikely as can be"
    sampler_of(flags, "--ranker", "t5", "--judge", "tfidf", "--candidates", "2", "--timed", "0").pool()
    assert len(drawn) == 3
    run = CausalGenerator.start(
        str(tmp_path / "llama"), rank=2, cache=tmp_path, src_len=60, exemplars="prepend"
    )
    run.save_pretrained(tmp_path / "reads")
    reads = [str(tmp_path / "reads"), *flags[1:]]
    others = {
        "more candidates": lambda: sampler_of(flags, "--candidates", "3").pool(),
        "another seed": lambda: sampler_of(flags, "--contexts", "999", "--seed", "1").pool(),
        "another decoding": lambda: sampler_of(flags, "--temperature", "0.5").pool(),
        "another split": lambda: sampler_of(flags, "--split", "test").pool(),
        "marks": lambda: sampler_of(flags).pool({"emo": 1}),
        "other marks": lambda: sampler_of(flags).pool({"emo": 0}),
        "another precision": lambda: sampler_of(flags, precision="bf16").pool(),
        "exemplars": lambda: sampler_of(reads).pool(),
    }
    for what, pool in others.items():
        drawn.clear()
        pool()
        assert drawn, what
    file = Paths(trained_copy).exemplars("valid")
    table = pd.read_csv(file)
    table.assign(exemplars='["something else"]').to_csv(file, index=False)
    drawn.clear()
    sampler_of(reads).pool()
    assert drawn, "other exemplars"
    table.assign(exemplars='["its own"]').to_csv(tmp_path / "valid_dpr.csv", index=False)
    own = {"exemplars train": {"path": str(tmp_path / "train_dpr.csv"), "sha256": "0"}}
    (tmp_path / "reads" / "sources.json").write_text(json.dumps(own))
    assert sampler_of(reads).exemplars == [["its own"]] * 3, "those that it was trained with"
    given = sampler_of([*reads, "--exemplars", str(file.parent)])
    assert given.exemplars == [["something else"]] * 3
    weights = load_file(file := tmp_path / "run" / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, file)
    drawn.clear()
    sampler_of(flags).pool()
    assert drawn, "other weights"
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"src_len": 60', '"src_len": 50'))
    drawn.clear()
    sampler_of(flags).pool()
    assert drawn, "other settings"


def test_candidates_and_their_costs_are_of_their_own_exemplars_and_random_stream(
    flags, tmp_path, monkeypatch
):
    run = CausalGenerator.start(
        str(tmp_path / "llama"), rank=2, cache=tmp_path, src_len=60, exemplars="prepend"
    )
    run.save_pretrained(tmp_path / "reads")
    sampler = sampler_of([str(tmp_path / "reads"), *flags[1:]])
    shown, seeds = [], []

    def encode(self, turns, texts, marks=None):
        shown.append((turns, texts, marks))
        return {}

    def log_probability(self, turns, texts, reply):
        shown.append((turns, texts, reply))
        return -1.0

    def generate(self, batch, count, decoding):
        seeds.append(torch.initial_seed())
        return [("yes", -2.0)] * count

    for fake in (encode, log_probability, generate):
        monkeypatch.setattr(CausalWriter, fake.__name__, fake)
    for number in (0, 1, 2, 1):
        sampler.sample(number, 1, {"exp": 1})
    own = [(e.history, texts) for e, texts in zip(sampler.examples, sampler.exemplars, strict=True)]
    assert len({tuple(texts) for _, texts in own}) > 1
    assert shown == [(*own[n], {"exp": 1}) for n in (0, 1, 2, 1)]
    assert len(set(seeds)) == 3 and seeds[3] == seeds[1]
    alone = steering.Choice("ranking", 5.0, 1, {}, ["one", "two", ""], -2.0)
    assert sampler.told_nothing([alone]) == [alone], "as drawn, where nothing was written under marks"
    for other in (["one", "two", ""], ["one", "three", ""]):  # the costs of one are none of the other
        shown.clear()
        choice = steering.Choice("marks", 0.0, 1, {"exp": 1}, other, -2.0)
        told = sampler.told_nothing([choice, replace(alone, replies=["one", "four", ""])])
        assert [each.log_probability for each in told] == [-1.0, -1.0], "all read again, to be compared"
        assert shown == [(*own[0], "one"), *((*own[1], text) for text in sorted({other[1], "four"}))]


def test_seconds_are_of_one_context_once_warm_and_measured_anew_where_asked_otherwise(flags, monkeypatch):
    now = [0.0]

    def sample(self, number, count, marks=None):
        now[0] += count if now[0] else 100.0  # the first call loads and compiles

    monkeypatch.setattr(steering.Sampler, "sample", sample)
    monkeypatch.setattr(steering.time, "perf_counter", lambda: now[0])
    for more, counts in (((), [1, 2]), (("--candidates", "1", "4"), [1, 4]), (("--timed", "2"), [1, 2])):
        now[0] = 0.0
        assert sampler_of(flags, "--timed", "3", *more).seconds() == {count: count for count in counts}
        assert now[0] > 100
    now[0] = 0.0
    sampler_of(flags, "--timed", "3").seconds()
    assert not now[0], "kept"


def test_contexts_stand_in_the_order_of_the_split_and_another_seed_draws_others(trained):
    paths = Paths(trained)
    turns = listener_turns(paths.dialogues("valid"))
    drawn = []
    for seed in ("1", "2", "3"):
        args = control.parse_args(["run", "--contexts", "4", "--seed", seed])
        found = steering.drawn_contexts(control.pick(steering.ControlOptions, args), paths)
        drawn.append([turns.index(example) for example in found])
    assert all(places == sorted(places) for places in drawn)
    assert len(set(map(tuple, drawn))) > 1


def test_results_that_another_process_wrote_meanwhile_are_not_replaced(
    trained_copy, flags, drawn, monkeypatch
):
    real, folder = steering.measured, trained_copy / "results" / "control"

    def measured(*args):
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
        return real(*args)

    monkeypatch.setattr(steering, "measured", measured)
    words = [*flags, "--candidates", "2", "--ranker", "t5", "--judge", "glove-t5", "--timed", "0"]
    with pytest.raises(UserError, match="already there.*control/metrics.json; .*another --name"):
        control.main(words)
    assert [file.name for file in folder.iterdir()] == ["metrics.json"]


def test_exemplars_for_a_generator_that_reads_none_are_said_to_be_ignored(flags, capsys, tmp_path):
    sampler_of(flags)
    assert "ignored" not in capsys.readouterr().out
    (tmp_path / "valid_dpr.csv").touch()
    sampler_of([*flags, "--exemplars", str(tmp_path)])
    assert f"note: --exemplars: ignored, since {flags[0]} reads none" in capsys.readouterr().out


# --------------------------------------------------------------------------------- chosen and judged, by hand


def test_the_best_of_n_is_among_the_first_n_and_its_cost_is_a_mean_without_empty_replies():
    replies = np.array([["a", "b", "c"], ["d", "e", "f"], ["", "", "g"]])
    pool = Pool(replies, np.array([[-2.0, -2.0, -1.0], [-4.0, -5.0, -9.0], [-np.inf, -np.inf, -1.0]]))
    two, three = (steering.chosen(pool, None, {}, Weights(), n, "ranking") for n in (2, 3))
    assert two.replies == ["a", "d", ""] and two.log_probability == pytest.approx(-3)
    assert three.replies == ["c", "d", "g"] and three.log_probability == pytest.approx(-2)
    levels = {"emo": np.array([[0.1, 0.3, 0.9], [0.1, 0.8, 0.8], [0.0, 0.0, 0.2]])}
    near = [steering.chosen(pool, levels, {"emo": 1}, Weights(), n, "ranking").replies for n in (2, 3)]
    assert near == [["b", "e", ""], ["c", "e", "g"]]
    mute = Pool(np.array([["", ""]]), np.full((1, 2), -np.inf))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(steering.chosen(mute, None, {}, Weights(), 2, "ranking").log_probability)


def judge_of(value) -> Judge:
    """A judge of every dimension, by what `value(reply, turns before)` says."""

    def ask(texts, contexts):
        return np.array([value(text, before) for text, before in zip(texts, contexts, strict=True)])

    return Judge("hand", {}, {}, dict.fromkeys(DIMENSIONS, ask), reads_context=True)


def conversations(count: int, turns: int = 1) -> list[Example]:
    return [
        Example(f"c{n}", 2 * turn + 2, "sad", (f"told {n}",), f"gold {n}")
        for n in range(count)
        for turn in range(turns)
    ]


def test_each_way_chooses_by_what_it_is_named_after(flags):
    ranker = judge_of(lambda text, before: float(text.startswith("near") and text.endswith(before[0])))
    examples = conversations(2)

    def pool(marks: str) -> Pool:
        near = [f"near {marks} told {n}" for n in range(2)]  # less likely, and what is asked for
        return Pool(np.array([["likely " + marks, text] for text in near]), np.array([[-1.0, -2.0]] * 2))

    pools = {named: pool(named) for named in map(steering.named, steering.TARGETS)}
    args = control.parse_args([*flags, "--candidates", "2", "--ways", "ranking", "marks", "both"])
    found = steering.choices(control.pick(steering.ControlOptions, args), pools, ranker, examples)
    replies = {(c.way, steering.named(c.target)): c.replies for c in found}
    assert replies["ranking", "exp=1"] == ["near none told 0", "near none told 1"]
    assert replies["ranking", "exp=0"] == ["likely none"] * 2
    assert replies["marks", "exp=1"] == ["likely exp=1"] * 2
    assert replies["both", "exp=1"] == ["near exp=1 told 0", "near exp=1 told 1"]
    assert {replies[way, "none"][0] for way in ("ranking", "marks", "both")} == {"likely none"}


def test_replies_are_judged_after_their_own_turns_and_turns_of_one_conversation_count_as_one():
    judge = judge_of(lambda text, before: (int(before[0].split()[1]) + len(text)) % 7 / 10)
    intervals = []
    for turns in (1, 4):
        examples = conversations(12, turns)
        gold = [e.response for e in examples]
        found = [steering.Choice("ranking", 5.0, n, {}, gold, -1.0) for n in (1, 4)]
        table = steering.measured(found, [judge], examples, {1: 0.5, 4: 2.0}, seed=1)
        people, one, four = (row for _, row in table.iterrows())
        wanted = np.mean([(n + len(f"gold {n}")) % 7 / 10 for n in range(12)])
        assert people["emo"] == one["emo"] == pytest.approx(wanted)
        assert (one["seconds"], four["seconds"]) == (0.5, 2.0)
        intervals.append((people["emo_low"], people["emo_high"], one["exp_low"], one["exp_high"]))
    assert intervals[1] == pytest.approx(intervals[0], abs=1e-6)
    assert intervals[0][0] < wanted < intervals[0][1]


def test_every_figure_of_the_page_stands_under_its_title(flags):
    levels = {"gold": 0.5, "none": 0.4}
    for n, dim in enumerate(DIMENSIONS):
        levels |= {f"{dim}=0": 0.1 + n / 100, f"{dim}=1": 0.6 + n / 100}
    judge = judge_of(lambda text, before: levels[text.split()[0]] if text != "gold 0" else 0.5)
    ways = [("ranking", 2.0), ("ranking", 9.0), ("marks", 0.0)]
    found = [
        steering.Choice(way, weight, 4, target, [f"{steering.named(target)} of {way}"], cost - weight)
        for way, weight in ways
        for target, cost in zip(steering.TARGETS, (-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0), strict=True)
    ]
    table = steering.measured(found, [judge], conversations(1), {4: 1.5}, seed=1)
    words = [*flags, "--ways", "ranking", "marks", "--empathy-w", "2", "9", "--judge", "hand"]
    options = control.pick(steering.ControlOptions, control.parse_args(words))
    page = steering.page(options, ["hand"], 1, table, ["a note"])
    level, share, ranking, marks = page.split("\n## ")[1:]
    moved = "| hand | ranking | 9 | 4 | +0.50 | +0.50 | +0.50 | -13.50 | 0.00 |"
    assert level.startswith("Difference of the judged level") and moved in level
    assert share.startswith("Difference of the share") and moved.replace("0.50", "1.00") in share
    assert ranking.startswith("Levels as hand sees them, ranking, weight 2")
    assert marks.startswith("Levels as hand sees them, marks, weight 0")
    own = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ranking.splitlines() if "|" in line]
    assert own[0] == ["target", "N", *DIMENSIONS, *steering.COSTS.values()]
    assert [row[0] for row in own[2:]] == ["gold", *map(steering.named, steering.TARGETS)]
    assert own[2] == ["gold", "", *["0.50"] * 3, *[""] * 5]
    assert own[5] == ["emo=1", "4", *["0.60"] * 3, "-5.00", "0.00", "100.00", "5.00", "1.50"]
    assert "| exp=0 | 4 | 0.11 | 0.11 | 0.11 | -4.00 |" in marks and page.rstrip().endswith("a note")


def test_a_level_is_shown_with_its_sign_where_it_is_a_difference_and_its_interval():
    row = pd.Series({"emo": 0.123, "emo_low": -0.051, "emo_high": 0.298})
    assert steering.level(row, "emo") == "0.12 [-0.05, 0.30]"
    assert steering.level(row, "emo", signed=True) == "+0.12 [-0.05, +0.30]"


def test_short_replies_pay_in_bleu_and_words_said_again_in_distinct_pairs():
    cost = steering.texts_cost(["i am so sorry"], ["i am so sorry to hear that !"])
    assert cost["norm_bleu_4"] == pytest.approx(100 * np.exp(1 - 8 / 4))
    assert steering.texts_cost(["no no no", "no no"], ["yes", "no"])["distinct_2"] == pytest.approx(100 / 3)


def test_every_candidate_is_listed_beside_its_context_and_number():
    replies = np.array([["a", "b"], ["c", "d"], ["e", "f"]])
    pool = Pool(replies, -np.arange(6.0).reshape(3, 2))
    table = steering.listed({"none": pool, "emo=1": pool}, conversations(3))
    rows = table[["conv_id", "candidate", "response", "log_probability"]].values.tolist()
    keys = [("c0", 0), ("c0", 1), ("c1", 0), ("c1", 1), ("c2", 0), ("c2", 1)]
    assert rows == [[*key, "abcdef"[n], -n] for n, key in enumerate(keys)] * 2
    assert table["marks"].tolist() == ["none"] * 6 + ["emo=1"] * 6


def test_what_is_named_twice_is_measured_once():
    words = "run --candidates 4 1 4 --empathy-w 5 5 --judge tfidf minilm tfidf --ways both ranking both"
    args = control.parse_args(words.split())
    assert (args.candidates, args.empathy_w, args.judge) == ([4, 1], [5.0], ["tfidf", "minilm"])
    assert args.ways == ["both", "ranking"]
