"""The tables as a person gets them: one set of items, floors, seeds, judges, notes, files."""

import argparse
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import Killed
from sacrebleu.metrics import BLEU
from test_causal_models import make_tokenizer, save_llama
from transformers import LlamaConfig

import captions
import causal_models
import columns
import evaluate_responses
import floors
import judges
import lineage
import storage
import systems
import tables
from columns import COLUMNS, critic_columns, judge_columns
from corpora import Example, listener_turns
from DPR import biencoder, retriever
from floors import nearest_by_tfidf
from judges import Judge
from lineage import Served
from measuring import text_nll
from normalising import normalise
from options import CRITICS, DIMENSIONS, Paths, UserError
from session import Session
from settings import pick
from systems import Named, System


def write(file: Path, examples: list[Example], replies: list[str], samples: int = 1) -> str:
    rows = ["conv_id\tutterance_idx\tsample\tresponse"]
    for example, reply in zip(examples, replies, strict=True):
        for n in range(samples):
            text = f"{reply} and so on" * bool(n) or reply
            rows.append(f"{example.conv_id}\t{example.utterance_idx}\t{n + 1}\t{text}")
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def made(prepared, tmp_path_factory):
    """Tables of one system with two seeds, one of all items with two samples, and one of some items."""
    folder = tmp_path_factory.mktemp("tables")
    shutil.copytree(prepared / "data", folder / "data")  # a table keeps what judges said beside it
    examples = listener_turns(Paths(prepared).dialogues("test"))
    gold = [e.response for e in examples]
    exact = write(folder / "exact.tsv", examples, [g.upper().replace("'", "\u2019") for g in gold])
    sorry = write(folder / "sorry.tsv", examples, ["I am so sorry !"] * len(gold))
    mixed = write(folder / "mixed.tsv", examples, [g.split()[0] + " what ?" for g in gold], samples=2)
    some = write(folder / "some.tsv", examples[2:11], ["What happened then ?"] * 9)
    common = ["--workdir", str(folder), "--device", "cpu", "--family", "t5", "--cases", "2"]
    with pytest.raises(UserError, match="some: covers 9 of 14 listener turns.*--items shared"):
        evaluate_responses.main([*common, f"two={exact},{sorry}", mixed, some])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of numpy, where a figure cannot be had
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("intervals.LEAST_DRAWN", 2)  # these are nine turns
            words = [*common, f"two={exact},{sorry}", mixed, some, "--items", "shared"]
            content = evaluate_responses.main(words)
    return folder / "results" / "evaluation", content, examples


def test_references_that_no_file_needs_are_refused_with_how_each_was_read(prepared, tmp_path):
    examples = listener_turns(Paths(prepared).dialogues("test"))
    keyed = write(tmp_path / "keyed.tsv", examples, ["I see ."] * len(examples))
    gold, labelled, alone = (tmp_path / name for name in ("gold.txt", "theirs.txt", "alone.txt"))
    gold.write_text("".join(f"{e.response}\n" for e in examples), encoding="utf-8")
    labelled.write_text("".join(f"ref: {e.response}\nOurs: so\n" for e in examples), encoding="utf-8")
    alone.write_text("I see .\n" * len(examples))
    words = ["--workdir", str(prepared), "--references", str(gold), keyed, str(labelled)]
    said = r"gold\.txt: not used, .*\(keyed as tsv, theirs as ref-lines\); .* say --format lines"
    with pytest.raises(UserError, match=said):
        evaluate_responses.main([*words, "--rating-kit", "2"])
    asked = pick(tables.TableOptions, evaluate_responses.parse_args([*words, str(alone)]))
    assert len(tables.read_all(asked, examples, Paths(prepared))) == 3


def test_a_language_model_says_how_fluent_a_system_is(workdir, tmp_path, capsys):
    examples = listener_turns(Paths(workdir).dialogues("test"))
    replies = ["Oh, I am so sorry!", *["That is sad ."] * (len(examples) - 1)]
    file, place = write(tmp_path / "mine.tsv", examples, replies), tmp_path / "llama"
    words = [
        "--workdir",
        str(workdir),
        "--device",
        "cpu",
        "--family",
        "t5",
        "--cases",
        "2",
        "--judges",
        "tfidf",
    ]
    base = save_llama(place, make_tokenizer(template=None))
    found = evaluate_responses.main([*words, "--fluency-model", base, file])["systems"]["mine"]["fluency_ppl"]
    assert "chat template" not in capsys.readouterr().out  # it reads no dialogue
    model, tokenizer = causal_models.load_base(base, tmp_path)
    nll = text_nll(model, tokenizer, replies, Session(device="cpu"), "").sum()
    assert found == pytest.approx(np.exp(nll / (7 + 4 * (len(examples) - 1))), rel=1e-4)  # words and signs
    config = LlamaConfig.from_pretrained(place, max_position_embeddings=8)
    with pytest.raises(UserError, match="--fluency-model reads 8 tokens, and a text of mine: fluency has"):
        text_nll(type(model)(config), tokenizer, replies, Session(device="cpu"), "mine: fluency")


def test_a_level_is_the_mean_over_all_samples_of_a_context(made):
    folder, content, examples = made
    (judge,) = [j for j in judges.load(Paths(folder.parents[1]), Session(device="cpu"), ["tfidf"])]
    first = [f"{e.response.split()[0]} what ?" for e in examples[2:11]]
    each = [judge.levels(texts)["exp"].mean() for texts in (first, [f"{t} and so on" for t in first])]
    assert each[0] != pytest.approx(each[1], abs=1e-4)
    assert content["systems"]["mixed"]["tfidf_exp_level"] == pytest.approx(sum(each) / 2)
    # beside a reply stands what that reply is given, as a person reads it
    items = pd.read_csv(folder / "items.csv").query("system == 'mixed'")
    shown = [f"{e.response.split()[0]} what ?" for e in examples]
    assert items["tfidf_exp_level"].tolist() == pytest.approx(judge.levels(shown)["exp"], abs=1e-4)


def test_a_table_is_of_one_set_which_it_names_with_its_own_gold_and_floors(made):
    folder, content, examples = made
    page = (folder / "table.md").read_text()
    assert content["replies"] == 9 and content["items"] == "shared"
    talks = len({e.conv_id for e in examples[2:11]})
    assert f"Items: shared, n = 9 of {talks} conversations, set {content['set']}." in page
    assert list(content["systems"]) == ["gold", "two", "mixed", "some"]
    assert list(content["floors"])[:3] == [floors.CONSTANT, floors.OTHER_GOLD, floors.NEAREST]
    length = np.mean([len(normalise(e.response).split()) for e in examples[2:11]])
    for row in (content["systems"]["gold"], content["floors"][floors.OTHER_GOLD]):
        assert row["length"] == pytest.approx(length)
    assert content["floors"][floors.CONSTANT]["most_frequent"] == 100
    assert content["floors"][floors.NEAREST]["verbatim_training"] == 100
    refused = f"two and mixed: 14 items of {len({e.conv_id for e in examples})} conversations in common"
    assert f"No paired test below 200 items of 30 conversations: {refused}" in page
    for text in (page, *((folder / f"case_studies.{kind}").read_text() for kind in ("md", "html"))):
        assert re.search(r"Commit \w+.*`python .*`\.", text) and "normaliser version 2" in text
        assert content["set"] in text
    for kind in ("md", "html"):  # a page shows one run's replies, and says whose
        text = (folder / f"case_studies.{kind}").read_text()
        assert "two: replies and levels of exact alone, the first of its 2 runs." in text
        assert "tfidf, the probability that the reply reaches level 1 of exploration" in text
        assert "signed gap" not in text


def test_items_of_the_tables_are_marked_among_all_that_were_scored(made):
    folder, content, examples = made
    items = pd.read_csv(folder / "items.csv", dtype={"conv_id": str})
    assert len(items.query("system == 'mixed'")) == len(examples)
    asked = items[items["in_table"]]
    assert (asked.groupby(["system", "run"]).size() == 9).all()
    means = asked.groupby("system")["length"].mean()
    for name in ("gold", "mixed", "some"):
        assert means[name] == pytest.approx(content["systems"][name]["length"])


def test_gold_written_otherwise_scores_100_and_two_seeds_have_a_mean_and_a_spread(made):
    folder, content, _ = made
    seeds = content["runs"]["two"]
    assert seeds["norm_bleu_4"][0] == pytest.approx(100) and seeds["bleu_1"][0] < 100
    assert content["systems"]["two"]["rouge_l"] == pytest.approx(np.mean(seeds["rouge_l"]))
    line = next(row for row in (folder / "table.md").read_text().splitlines() if row.startswith("| two |"))
    mean, spread = content["systems"]["two"]["rouge_l"], np.std(seeds["rouge_l"], ddof=1)
    assert f"| {mean:.2f} \u00b1 {spread:.2f}" in line
    page = (folder / "table.md").read_text()
    assert "One seed: mixed, some." in page and "two: mean \u00b1 standard deviation over 2 runs." in page


def test_a_floor_that_beats_a_system_is_marked_there_and_said_below(made):
    folder, content, _ = made
    first = (folder / "table.md").read_text().split("\n\n")[0].splitlines()
    titles = [cell.strip() for cell in first[0].split("|")]
    some = dict(zip(titles, (cell.strip() for cell in first[-1].split("|")), strict=True))
    best = max(row["rouge_l"] for row in content["floors"].values() if "rouge_l" in row)
    assert content["systems"]["some"]["rouge_l"] < best and some["ROUGE-L"].endswith("\u2020")
    assert re.search(
        r"\u2020, columns in which floors beat systems: .*ROUGE-L \([^)]*nearest",
        "\n".join((folder / "table.md").read_text().splitlines()),
    )


def test_judges_have_their_own_table_with_floors_of_levels_and_a_ceiling_of_context_auc(made):
    folder, content, examples = made
    [part] = re.findall(r"## Judge tfidf\n(.*?)\n## ", (folder / "table.md").read_text() + "\n## ", re.DOTALL)
    rows = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")]
    assert rows[5:8] == [floors.ZERO_LEVEL, floors.MEAN_LEVEL, floors.MAJORITY_LEVEL]
    assert "ceiling: context alone" in rows
    shown = {line.split("|")[1].strip(): line for line in part.splitlines() if line.startswith("| ")}
    for name, points in (content["systems"] | content["floors"]).items():
        aucs = {key: value for key, value in points.items() if key.endswith("_context_auc")}
        assert bool(aucs) == (name in ("mixed", "ceiling: context alone")), name
        for key, value in aucs.items():
            low, high = content["intervals"][name][key]
            assert 0 <= low <= value <= high <= 1 and f"{value:.3f} [{low:.3f}, {high:.3f}]" in shown[name]
    gold, zero = content["systems"]["gold"], content["floors"][floors.ZERO_LEVEL]
    assert gold["tfidf_emo_f1"] == pytest.approx(100) and gold["tfidf_diff_epitome"] == 0
    items = pd.read_csv(folder / "items.csv", keep_default_na=False)
    mine = items[(items["system"] == "gold")].iloc[2:11]
    reached = [(mine[f"tfidf_{dim}_level"].astype(float) >= 0.5).mean() for dim in DIMENSIONS]
    assert zero["tfidf_diff_epitome"] == pytest.approx(sum(reached))
    mean = content["floors"][floors.MEAN_LEVEL]
    assert "tfidf_emo_f1" in zero and "tfidf_emo_f1" not in mean, "a mean is no level that could be right"
    assert "tfidf_emo_level" in zero and "tfidf_emo_level" not in mean, "nor a mean of probabilities"
    assert mean["tfidf_diff_epitome"] == pytest.approx(sum(r * (1 - r) for r in reached))
    assert "Mean level by tfidf of texts that show nothing" in (folder / "table.md").read_text()
    assert (
        "- **tfidf: emo**: by the judge tfidf, the probability that"
        in (folder / "case_studies.md").read_text()
    )


def test_a_gap_to_gold_has_a_sign(made):
    folder, content, _ = made
    main, systems = (folder / "table.md").read_text().split("\n\n")[0], content["systems"]
    for name in ("two", "mixed", "some"):
        [line] = [line for line in main.splitlines() if line.startswith(f"| {name} |")]
        assert f"({systems[name]['vader'] - systems['gold']['vader']:+.3f})" in line


def test_what_is_said_of_the_judges_is_of_the_items_of_the_table(made):
    folder, _, examples = made
    session = Session(device="cpu")
    [judge] = judges.load(Paths(folder.parent.parent), session, ["tfidf"])
    said = [
        judges.report([judge], [e.response for e in chosen], [e.history for e in chosen])[-1]
        for chosen in (examples[2:11], examples)
    ]
    shown = (folder / "table.md").read_text()
    assert said[0] in shown and said[1] not in shown


def test_the_nearest_training_reply_is_of_another_conversation(prepared):
    """Own splits may share a conversation, whose reply would be the gold one."""
    training = listener_turns(Paths(prepared).dialogues("train"))
    asked = training[:6]
    how = tables.nearest(
        argparse.Namespace(nearest="tfidf"),
        argparse.Namespace(training=training),
        asked,
        Paths(prepared),
        Session(device="cpu"),
    )
    places = how([" ".join(e.history) for e in asked], [" ".join(t.history) for t in training])
    assert all(training[place].conv_id != e.conv_id for place, e in zip(places, asked, strict=True))


def test_every_score_of_every_item_is_kept_and_averages_to_the_table(made):
    folder, content, examples = made
    items = pd.read_csv(folder / "items.csv", keep_default_na=False)
    assert items.groupby(["system", "run"]).size().to_dict() == {
        ("gold", 1): 14,
        ("two", 1): 14,
        ("two", 2): 14,
        ("mixed", 1): 14,
        ("some", 1): 9,
        **{(name, 1): 9 for name in (floors.CONSTANT, floors.OTHER_GOLD, floors.NEAREST)},
    }
    mine = items[items["system"] == "some"]
    assert list(zip(mine["conv_id"], mine["utterance_idx"], strict=True)) == [e.key for e in examples[2:11]]
    for column in ("rouge_l", "vader", "length", "tfidf_int_level"):
        assert mine[column].astype(float).mean() == pytest.approx(
            content["systems"]["some"][column], abs=1e-4
        )
    raw = [BLEU(tokenize="none", smooth_method="none", max_ngram_order=1, force=True) for _ in mine.index]
    alone = [
        bleu.corpus_score(["What happened then ?"], [[e.response]]).score
        for bleu, e in zip(raw, examples[2:11], strict=True)
    ]
    assert mine["bleu_1"].astype(float).tolist() == pytest.approx(alone, abs=1e-4)
    assert content["critics"] == "none" and list(content["judges"]["tfidf"]) == list(DIMENSIONS)


def test_every_column_says_what_it_is(made):
    folder, content, _ = made
    columns = [*COLUMNS, *judge_columns("tfidf", list(DIMENSIONS)), *critic_columns(CRITICS)]
    assert len({c.key for c in columns}) == len(columns)
    keys = {key for row in (*content["systems"].values(), *content["floors"].values()) for key in row}
    assert keys <= {c.key for c in columns}
    page = (folder / "table.md").read_text()
    for column in columns:
        assert column.formula and column.source and column.better in ("higher", "lower", "gold", "none")
        if column.key in keys and "{" not in column.title:
            assert f"- {column.title}: {column.formula}"[:60].replace("*", "") in page, column.key
    assert json.loads((folder / "metrics.json").read_text())["set"] == content["set"]


def test_a_run_that_a_critic_rewarded_or_a_judge_trained_is_named(tmp_path):
    critic = tmp_path / "emo"
    critic.mkdir()
    (critic / "model.safetensors").write_bytes(b"weights")
    reward = storage.sha256(critic / "model.safetensors")
    run = tmp_path / "run"
    run.mkdir()
    storage.write_json(run / "args.json", {"inputs": {"reward emo": reward, "critic int": "of a judge"}})
    judge = Judge("t5", {"emo": "another", "int": "of a judge"}, {}, {}, reads_context=True)
    line = Named("mine", [System("mine", [], [], folder=run, notes=["empty replies: 3"])])
    file, said = captions.notes([line], {"emo": critic}, [judge], Paths(tmp_path))
    assert file == "File of mine: empty replies: 3."
    assert (
        said
        == "mine was trained against the very critics that judge it here, or on their labels: emo, t5 int."
    )


def test_a_critic_has_learnt_from_what_its_teacher_and_its_beginning_have(tmp_path):
    paths = Paths(tmp_path)

    def critic(name: str, part: str, **made_from: Path) -> Path:
        storage.write_text(tmp_path / name / "model.safetensors", name)
        storage.write_json(
            tmp_path / name / "args.json", {"args": {"part": part}, "inputs": {"posts": "of a half"}}
        )
        sources = {}
        for how, place in made_from.items():
            sources[how] = storage.source(place, paths, storage.sha256(place / "model.safetensors"))
        storage.write_json(tmp_path / name / "sources.json", sources)
        return tmp_path / name

    whole, one, other = critic("whole", "all"), critic("one", "a"), critic("other", "b")
    assert lineage.half_of(critic("pupil", "a", teacher=one), paths) == "a"
    assert lineage.half_of(critic("of all", "a", teacher=whole), paths) == lineage.ALL
    assert lineage.half_of(critic("of both", "a", init=other), paths) == lineage.ALL
    two = {"teacher": one, "teacher 2": other}
    assert lineage.half_of(critic("of two", "a", **two), paths) == lineage.ALL
    earlier = critic("earlier", "a")
    storage.write_json(earlier / "args.json", {"args": {"part": "a"}, "inputs": {}})
    assert lineage.half_of(earlier, paths) == lineage.UNKNOWN, "halves were cut otherwise before it was noted"
    orphan = critic("orphan", "a", teacher=one)
    (one / "args.json").unlink()
    assert lineage.half_of(orphan, paths) == lineage.UNKNOWN


def test_what_a_figure_can_be_is_known_of_every_column():
    every = [c for found in vars(columns).values() if isinstance(found, tuple) for c in found]
    units = {
        c.unit
        for c in (*every, *columns.judge_columns("mine", ["emo"]), *columns.critic_columns(["emo"]))
        if isinstance(c, columns.Column)
    }
    assert len(units) > 5 and units <= columns.BOUNDS.keys()


def test_a_run_that_is_given_twice_is_no_second_seed(tmp_path):
    (tmp_path / "run").mkdir()
    twice = argparse.Namespace(runs=[f"x={tmp_path / 'run'},{tmp_path / 'other' / '..' / 'run'}"])
    with pytest.raises(UserError, match="run is given twice; each place is one seed"):
        tables.read_all(twice, [], Paths(tmp_path))


def test_a_run_that_has_taken_the_place_of_the_one_begun_from_is_not_followed(tmp_path):
    paths = Paths(tmp_path)
    places = {name: tmp_path / name for name in ("first", "second")}
    for name, other in (("first", "second"), ("second", "first")):
        storage.write_json(places[name] / "args.json", {"inputs": {"critic emo": "1"}})
        start = storage.source(places[other], paths, "of weights that lie there no more")
        storage.write_json(places[name] / "sources.json", {"init": start})
        storage.write_text(places[name] / "model.safetensors", name)
    own, *unknown = lineage.served(places["first"], paths)  # it comes to an end
    assert own.sha256 == "1"
    assert unknown == [Served(dim, "", lineage.UNKNOWN) for dim in DIMENSIONS], "what lay there is gone"
    right = storage.source(places["first"], paths, storage.sha256(places["first"] / "model.safetensors"))
    storage.write_json(places["second"] / "sources.json", {"init": right})
    assert lineage.served(places["second"], paths) == [own, own, *unknown]
    published = tmp_path / "published"
    storage.write_text(published / "model.safetensors", "published")
    assert lineage.served(published, paths) == unknown, "a published model says nothing of its training"
    pleased = [{"kind": "emo", "sha256": "2", "half": "a"}]
    storage.write_json(published / "result.json", {"served": pleased})
    assert lineage.served(published, paths) == [Served("emo", "2", "a")], "but one that was noted"


def test_the_notes_of_a_run_of_another_workdir_are_seen_from_there(tmp_path):
    there, here = Paths(tmp_path / "there"), Paths(tmp_path / "here")
    places = {name: there.saved / "empathy" / name for name in ("teacher", "pupil")}
    for place in places.values():
        storage.write_text(place / "model.safetensors", place.name)
        storage.write_json(place / "args.json", {"args": {"part": "a"}, "inputs": {"posts": "of a half"}})
    digest = storage.sha256(places["teacher"] / "model.safetensors")
    made_from = {"teacher": storage.source(places["teacher"], there, digest)}
    assert made_from["teacher"]["path"] == "saved/empathy/teacher"
    storage.write_json(places["pupil"] / "sources.json", made_from)
    assert lineage.half_of(places["pupil"], here) == "a"

    labels = there.labels("train")
    by = {"critic": "saved/empathy/pupil", "sha256": storage.sha256(places["pupil"] / "model.safetensors")}
    storage.write_text(labels, "labels", origin=dict.fromkeys(DIMENSIONS, by))
    run = there.saved / "t5" / "marked"
    storage.write_json(run / "args.json", {"args": {"control": "marks"}, "inputs": {}})
    storage.write_json(run / "sources.json", {"labels train": storage.source(labels, there)})
    assert {critic.half for critic in lineage.served(run, here)} == {"a"}


def test_who_has_made_the_labels_has_led_a_run_too(tmp_path):
    paths, critics = Paths(tmp_path), {}
    for part in ("a", "all"):
        storage.write_text(tmp_path / part / "model.safetensors", part)
        storage.write_json(
            tmp_path / part / "args.json", {"args": {"part": part}, "inputs": {"posts": "of a half"}}
        )
        critics[part] = storage.source(
            tmp_path / part, paths, storage.sha256(tmp_path / part / "model.safetensors")
        )
    by = {dim: {"critic": "all", "sha256": critics["all"]["sha256"]} for dim in DIMENSIONS}
    labels = paths.labels("train")
    storage.write_text(labels, "labels", origin=by)

    def halves(**args) -> list:
        inputs = {} if args else {"critic emo": critics["a"]["sha256"]}
        storage.write_json(tmp_path / "run" / "args.json", {"args": args, "inputs": inputs})
        return sorted((critic.kind, critic.half) for critic in lineage.served(tmp_path / "run", paths))

    sources = {"critic emo": critics["a"], "labels train": storage.source(labels, paths)}
    storage.write_json(tmp_path / "run" / "sources.json", sources)
    assert halves() == [("emo", "a"), ("emo", "all")], "no other dimension has led it"
    assert halves(control="marks") == [("emo", "all"), ("exp", "all"), ("int", "all")]
    assert lineage.other_half(lineage.served(tmp_path / "run", paths)) == lineage.ALL
    storage.write_json(
        storage.origin_file(labels), by | {"emo": {"critic": "a", "sha256": critics["a"]["sha256"]}}
    )
    assert halves() == [("emo", "a")]
    storage.write_text(labels, "labels of others")
    assert halves() == [("emo", "a"), ("emo", lineage.UNKNOWN)]


def test_judges_keep_to_the_half_that_no_loss_has_seen_and_copies_to_a_runs_own_exemplars(prepared, tmp_path):
    (tmp_path / "data").symlink_to(prepared / "data")
    examples = listener_turns(Paths(prepared).dialogues("test"))
    for name, part in (("halved", "a"), ("whole", "all")):
        critic, run = tmp_path / "critics" / name, tmp_path / "runs" / name
        critic.mkdir(parents=True)
        (critic / "model.safetensors").write_bytes(name.encode())
        storage.write_json(critic / "args.json", {"args": {"part": part}, "inputs": {"posts": "of a half"}})
        source = storage.source(critic, Paths(tmp_path), storage.sha256(critic / "model.safetensors"))
        storage.write_json(run / "args.json", {"inputs": {"critic exp": source["sha256"]}})
        storage.write_json(run / "sources.json", {"critic exp": source})
        file = Path(write(run / f"{name}.tsv", examples, ["What happened ?"] * len(examples)))
        own = {"exemplars": {"path": "runs/test_dpr.csv"}} if name == "halved" else {}
        storage.write_json(storage.origin_file(file), {"model": {"path": f"runs/{name}"}, **own})
    shown = pd.DataFrame([(*e.key, '["what happened?"]') for e in examples])
    shown.set_axis(["conv_id", "utterance_idx", "exemplars"], axis=1).to_csv(
        tmp_path / "runs" / "test_dpr.csv", index=False
    )
    common = ["--workdir", str(tmp_path), "--device", "cpu", "--family", "none", "--cases", "1"]
    evaluate_responses.main([*common, "--name", "one", str(tmp_path / "runs" / "halved" / "halved.tsv")])
    page = (tmp_path / "results" / "one" / "table.md").read_text()
    assert "## Judge tfidf-b\n" in page and "learnt from half b of the seeker posts" in page
    assert "\u2021" not in page
    files = [str(tmp_path / "runs" / name / f"{name}.tsv") for name in ("halved", "whole")]
    content = evaluate_responses.main([*common, "--name", "two", *files, "--judges", "tfidf-b"])
    copied = {name: row.get("verbatim_exemplar") for name, row in content["systems"].items()}
    assert copied == {"gold": None, "halved": 100, "whole": None}, "each by the exemplars of its own run"
    assert content["systems"]["halved"]["words_exemplar"] == 0  # of three words no four are in a row
    page = (tmp_path / "results" / "two" / "table.md").read_text()
    assert "| whole \u2021 |" in page and "| halved |" in page and "may flatter them: whole (exp)" in page


def test_copies_are_not_looked_for_in_exemplars_that_another_search_has_put_there(tmp_path, capsys):
    file = tmp_path / "test_dpr.csv"
    file.write_text('conv_id,utterance_idx,exemplars\nc,2,"[""I see.""]"\n', encoding="utf-8")
    noted = storage.source(file, Paths(tmp_path))
    system = System("mine", ["i see ."], [0], run=tmp_path, origin={"exemplars": noted})
    against = argparse.Namespace(examples=[Example("c", 2, "", ("hi",), "oh")], shown=None)
    assert tables.Shown("test", against, Paths(tmp_path)).to(system) == [{normalise("I see.")}]
    file.write_text(file.read_text().replace("I see.", "No."), encoding="utf-8")
    assert tables.Shown("test", against, Paths(tmp_path)).to(system) is None
    assert "other exemplars than its replies were written with; what mine copies" in capsys.readouterr().out


@pytest.mark.parametrize("written_in", ["a", "b"])
def test_a_run_of_another_workdir_has_the_exemplars_that_lie_there(tmp_path, written_in):
    """Each workdir has a file of this name; the note says which one by its sha256."""
    here, there = Paths(tmp_path / "a"), Paths(tmp_path / "b")
    for paths in (here, there):
        storage.write_text(paths.exemplars("test"), str(paths.root))
    run = there.saved / "t5" / "run"
    own = {"exemplars train": storage.source(there.exemplars("test"), there)}
    storage.write_json(run / "sources.json", own)
    assert lineage.exemplars_of({}, run, "test", here) == there.exemplars("test")
    wrote = {"a": here, "b": there}[written_in]
    noted = {"exemplars": storage.source(wrote.exemplars("test"), wrote)}
    assert lineage.exemplars_of(noted, run, "test", here) == wrote.exemplars("test")


def test_replies_of_a_published_model_are_said_to_be_so_and_copy_from_no_exemplars_but_their_own(tmp_path):
    paths, item = Paths(tmp_path), Example("c", 2, "", ("hi",), "oh")
    for name, more in (("published", {}), ("run", {"args.json": "{}"})):
        for file, text in ({"config.json": '{"model": "Generator"}', "model.safetensors": ""} | more).items():
            storage.write_text(paths.saved / "t5" / name / file, text)
    found = {}
    for name in ("published", "run"):
        file = Path(write(tmp_path / f"{name}.tsv", [item], ["I see."]))
        storage.write_json(storage.origin_file(file), {"model": {"path": f"saved/t5/{name}"}})
        [found[name]] = systems.read_system(file, [item], "test", paths)
    said = "of a published model: what its training knew of the judges is not recorded"
    assert found["published"].notes == [said] and found["published"].run is None
    assert found["run"].notes == [] and found["run"].run == paths.saved / "t5" / "run"
    against = argparse.Namespace(examples=[item], shown=[{normalise("I see.")}])
    assert tables.Shown("test", against, paths).to(found["published"]) is None
    assert tables.Shown("test", against, paths).to(System("theirs", ["I see."], [0])) == against.shown


def test_every_reply_that_answers_no_item_is_listed_beside_the_table(prepared, tmp_path):
    (tmp_path / "data").symlink_to(prepared / "data")
    gold = [e.response for e in listener_turns(Paths(prepared).dialogues("test"))]
    lines = [f"Ref: {text}\nPred: I see.\n" for text in gold]
    lines += [f"Ref: nobody said {n} here\nPred: lost {n}\n" for n in range(4)]
    (tmp_path / "mine.txt").write_text("".join(lines), encoding="utf-8")
    words = ["--workdir", str(tmp_path), "--device", "cpu", "--family", "none", "--judges", "none"]
    words += ["--nearest", "none", "--cases", "1", str(tmp_path / "mine.txt")]
    evaluate_responses.main(words)
    folder = tmp_path / "results" / "evaluation"
    listed = pd.read_csv(folder / "unmatched.csv")
    assert listed["reply"].tolist() == [f"lost {n}" for n in range(4)]
    assert listed["line"].tolist() == [2 * len(gold) + 2 * (n + 1) for n in range(4)]
    page = (folder / "table.md").read_text()
    assert f"4 of {len(gold) + 4}" in page and "Every reply left out: unmatched.csv." in page
    (tmp_path / "mine.txt").write_text("".join(lines[:-4]), encoding="utf-8")
    evaluate_responses.main([*words, "--overwrite"])
    assert not (folder / "unmatched.csv").exists()


def test_figures_of_before_never_stand_beside_a_page_of_now(prepared, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(prepared / "data")
    examples = listener_turns(Paths(prepared).dialogues("test"))
    words = ["--workdir", str(tmp_path), "--device", "cpu", "--family", "none", "--judges", "none"]
    words += ["--nearest", "none", "--cases", "1"]
    evaluate_responses.main([*words, write(tmp_path / "old.tsv", examples, ["I see ."] * len(examples))])

    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(tables, "items_table", killed)
    new = write(tmp_path / "new.tsv", examples, ["Oh no !"] * len(examples))
    with pytest.raises(Killed):
        evaluate_responses.main([*words, new, "--overwrite"])
    folder = tmp_path / "results" / "evaluation"
    assert "new" in (folder / "table.md").read_text() and not (folder / "metrics.json").exists()
    monkeypatch.undo()
    assert "new" in evaluate_responses.main([*words, new])["systems"]  # nothing whole is left to overwrite


def test_all_seeds_of_a_system_have_learning_curves(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        storage.write_json(folder / "args.json", {"args": {}})
    seeds = [System(folder.name, ["Oh."], [0], folder=folder) for folder in folders]
    run = SimpleNamespace(figures={}, places=lambda numbers: numbers)
    rows = [SimpleNamespace(kind="system", name="plain", runs=[run])]
    (shown,) = tables.cases([Named("plain", seeds)], rows, [], [0])
    assert shown["folders"] == [str(folder) for folder in folders]


def test_decodings_in_one_file_are_not_taken_for_seeds(prepared, tmp_path):
    gold = [e.response for e in listener_turns(Paths(prepared).dialogues("test"))]
    lines = [f"Ref: {text}\nGreedy: Oh.\nBeam: I see.\n" for text in gold]
    (tmp_path / "both.txt").write_text("".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="holds 2 systems.*give it without a name"):
        evaluate_responses.main(["--workdir", str(prepared), f"mine={tmp_path / 'both.txt'}"])


def test_minilm_and_human_ratings_enter_through_the_command(prepared, tmp_path, monkeypatch):
    """bert-tiny stands in MiniLM's place; the raters give each text its length."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    stand_in = tmp_path / "data" / "bert-tiny"
    storage.write_json(stand_in / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    for place in (biencoder, retriever, judges):
        monkeypatch.setattr(place, "resolve", lambda name: str(stand_in))
    examples = listener_turns(Paths(tmp_path).dialogues("test"))
    said = {
        "echo": [e.history[-1] for e in examples],
        "own": [f"Reply {n} {'so ' * n}." for n in range(len(examples))],
    }
    files = [write(tmp_path / f"{name}.tsv", examples, texts, samples=2) for name, texts in said.items()]
    texts = [text for texts in said.values() for text in texts] + [e.response for e in examples]
    rated = pd.DataFrame({"reply": texts, "rater_1": [len(normalise(text).split()) for text in texts]})
    ratings = tmp_path / "ratings.csv"
    words = ["--workdir", str(tmp_path), *files, "--family", "none", "--cases", "1", "--device", "cpu"]
    words += ["--relevance", "--nearest", "minilm", "--validate-metrics", str(ratings)]
    rated.assign(rater_2="good").to_csv(ratings, index=False)
    with monkeypatch.context() as nothing_is_judged:
        nothing_is_judged.setattr(Judge, "levels", lambda *args: pytest.fail("judged before it is refused"))
        with pytest.raises(UserError, match="line 2: the rating 'good' is no number"):
            evaluate_responses.main(words)
        rated[:5].to_csv(ratings, index=False)
        with pytest.raises(UserError, match="only 5 of the 5 rated texts stand among"):
            evaluate_responses.main(words)
        with pytest.raises(UserError, match="has no model_max_length"):
            evaluate_responses.main([*words[:-2], "--bertscore-model", str(tmp_path / "data" / "bert-tiny")])
        (tmp_path / "untuned").mkdir()
        (tmp_path / "untuned" / "test_dpr.csv").write_text("conv_id,utterance_idx,exemplars\nc,2,[\n")
        with pytest.raises(UserError, match="test_dpr.csv"):
            evaluate_responses.main([*words[:-2], "--untuned-exemplars", str(tmp_path / "untuned")])
    rated.assign(rater_2=rated["rater_1"] + 1).to_csv(ratings, index=False)
    content = evaluate_responses.main(words)

    rows = content["systems"] | content["floors"]
    assert rows["echo"]["cosine_last_turn"] == pytest.approx(1, abs=1e-5)
    assert rows["own"]["cosine_last_turn"] < 0.999
    assert rows[floors.NEAREST]["verbatim_training"] == 100
    assert not [file for file in Paths(tmp_path).cache.iterdir() if file.is_dir()]  # no parts are left
    lines = (tmp_path / "results" / "evaluation" / "validation.md").read_text().splitlines()
    assert any(content["set"] in line for line in lines) and lines[-1].startswith("Commit ")
    worth = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines if line.startswith("|")}
    assert (
        worth["words"].startswith("1.00 (")
        and worth["*raters: one against the mean of the others*"] == "1.00"
    )
    assert set(worth) >= {"relevance stand-in", "BLEU-1 raw", "BLEU-4", "VADER", "emo level, judge tfidf"}
    items = pd.read_csv(tmp_path / "results" / "evaluation" / "items.csv", keep_default_na=False)
    said_there = items[~items["system"].str.startswith("floor")]  # a floor gives gold texts to other items
    own = said_there[said_there["system"] != "gold"]  # the gold reply has the best BLEU beside itself
    for column, each in (("BLEU-1", own), ("ROUGE-L", own), ("words", said_there)):
        assert worth[column].endswith(f"n = {len(set(map(normalise, each['reply'])))})"), column
    evaluate_responses.main([*words[: words.index("--relevance")], "--nearest", "none", "--overwrite"])
    assert not (tmp_path / "results" / "evaluation" / "validation.md").exists()  # of ratings, of another day


def test_a_ceiling_is_of_the_items_of_the_table(made):
    folder, content, examples = made
    paths, held = Paths(folder.parents[1]), examples[2:11]
    (judge,) = judges.load(paths, Session(device="cpu"), ["tfidf"])
    training = listener_turns(paths.dialogues("train"))
    foretold = judges.context_predictor(judge, training, held, Session(device="cpu"), encoder=None)
    gold = judge.levels([e.response for e in held])
    for dim in foretold:
        expected = judges.context_auc(foretold[dim], gold[dim]).point
        found = content["floors"]["ceiling: context alone"].get(f"tfidf_{dim}_context_auc", float("nan"))
        assert found == pytest.approx(expected, nan_ok=True), dim


def test_a_system_is_flattered_by_a_judge_whose_pairs_one_of_its_seeds_has_pleased(monkeypatch):
    monkeypatch.setattr(captions, "served_by", lambda system, paths: system.critics)
    seeds = [SimpleNamespace(critics=[]), SimpleNamespace(critics=[Served("emo", "x", "b")])]
    judge = SimpleNamespace(name="minilm", halves={"emo": "b"})
    lines = [SimpleNamespace(name="run", systems=seeds)]
    assert captions.flattered(lines, [judge], Paths(".")) == {"judge minilm": {"run": ["emo"]}}


def test_no_history_of_many_finds_its_own_conversation():
    known = [f"word{n} dog" for n in range(300)]
    names = [f"c{n}" for n in range(300)]
    found = nearest_by_tfidf(known, known, names, names)
    assert len(found) == 300 and all(place != n for n, place in enumerate(found))


def test_the_nearest_history_does_not_depend_on_what_else_is_asked():
    """How rare a word is, the training histories say alone."""
    known, asked = ["dog park", "cat lake"], ["dog cat cat", "cat dog dog"]
    beside = ["dog"] * 50
    alone = nearest_by_tfidf(asked, known, [None] * 2, ["a", "b"])
    assert alone == [1, 0] == nearest_by_tfidf([*asked, *beside], known, [None] * 52, ["a", "b"])[:2]


@pytest.mark.parametrize("items", ["all", "last"])
def test_figures_are_drawn_as_often_from_the_seed_and_tested_on_the_items_that_were_asked_for(
    prepared, tmp_path, monkeypatch, items
):
    (tmp_path / "data").symlink_to(prepared / "data")
    examples, asked = listener_turns(Paths(prepared).dialogues("test")), []

    class Watched(tables.Comparison):
        def __init__(self, rows, columns, count, seed, groups):
            asked.append((count, seed, list(groups)))
            super().__init__(rows, columns, count, seed, groups)

        def tests(self, scope):
            asked.append(list(scope))
            raise Killed

    monkeypatch.setattr(tables, "Comparison", Watched)
    words = ["--workdir", str(tmp_path), "--device", "cpu", "--family", "none", "--judges", "none"]
    words += ["--nearest", "none", "--resamples", "133", "--seed", "7", "--items", items]
    with pytest.raises(Killed):
        evaluate_responses.main([*words, write(tmp_path / "mine.tsv", examples, ["Oh ."] * len(examples))])
    assert asked == [(133, 7, [e.conv_id for e in examples]), systems.item_set(examples, items)]


def test_what_every_line_is_held_against_is_as_it_was_asked_for(prepared, tmp_path):
    examples, place = listener_turns(Paths(prepared).dialogues("test")), tmp_path / "bert"
    shutil.copytree(Paths(prepared).bert_tiny, place)
    said = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps(said | {"model_max_length": 512}))
    words = [write(tmp_path / "mine.tsv", examples, ["Oh ."] * len(examples)), "--resamples", "133"]
    asked = evaluate_responses.parse_args([*words, "--seed", "7", "--bertscore-model", str(place)])
    given = pick(tables.TableOptions, asked)
    found = tables.standard(given, examples, [], Paths(prepared), Session("cpu"), {}, [])
    assert (found.resamples, found.seed, found.extras.bertscore) == (133, 7, place)


def test_a_file_is_read_in_the_layout_that_is_named(prepared, tmp_path):
    """Its lines are replies, though all of them begin as labels of another layout."""
    examples = listener_turns(Paths(prepared).dialogues("test"))
    file, gold = tmp_path / "mine.txt", tmp_path / "gold.txt"
    gold.write_text("".join(f"{e.response}\n" for e in examples), encoding="utf-8")
    replies = [("Ref: so", "Pred: so")[n % 2] for n in range(len(examples))]
    file.write_text("".join(f"{text}\n" for text in replies), encoding="utf-8")
    words = [str(file), "--references", str(gold), "--format", "lines"]
    asked = pick(tables.TableOptions, evaluate_responses.parse_args(words))
    [line] = tables.read_all(asked, examples, Paths(prepared))
    assert line.systems[0].replies == replies


def test_as_many_cases_are_shown_as_are_asked_for_and_drawn_by_the_seed(prepared, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(prepared / "data")
    examples, drawn = listener_turns(Paths(prepared).dialogues("test")), []

    def page(sides, items, count, seed, *_):
        drawn.append((count, seed))
        return ""

    monkeypatch.setattr(tables, "PAGES", {"case_studies.md": page})
    words = ["--workdir", str(tmp_path), "--device", "cpu", "--family", "none", "--judges", "none"]
    words += ["--nearest", "none", "--cases", "3", "--seed", "7"]
    evaluate_responses.main([*words, write(tmp_path / "mine.tsv", examples, ["Oh ."] * len(examples))])
    assert drawn == [(3, 7)]


def test_another_retrievers_exemplars_stand_beside_the_tuned_ones_on_the_pages(trained_copy, tmp_path):
    paths = Paths(trained_copy)
    examples = listener_turns(paths.dialogues("test"))
    untuned = pd.DataFrame([(*e.key, '["Nobody said this."]') for e in examples])
    untuned.columns = ["conv_id", "utterance_idx", "exemplars"]
    untuned.to_csv(tmp_path / "test_dpr.csv", index=False)
    mine = write(tmp_path / "mine.tsv", examples, ["Oh ."] * len(examples))
    words = ["--workdir", str(trained_copy), "--device", "cpu", "--family", "none", "--judges", "none"]
    words += ["--nearest", "none", "--cases", "2", mine]
    for more, there in (([], False), (["--untuned-exemplars", str(tmp_path), "--overwrite"], True)):
        evaluate_responses.main([*words, *more])
        for kind in ("md", "html"):
            page = (paths.results / "evaluation" / f"case_studies.{kind}").read_text()
            assert ("Nobody said this." in page) == there == ("untuned retriever" in page)
