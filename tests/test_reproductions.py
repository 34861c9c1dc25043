"""Tables by command: rows are run and measured, those that cannot be stay, and one row is compared."""

import argparse
import contextlib
import dataclasses
import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

import recipes
import recording
import reproduce
import reproductions
import results
import stages
import storage
from options import UserError
from recording import seconds_of_stages
from results import Column, Results, Row, Table
from rows import Request, evaluation, names_its_seed, read_figures, recipe_of, where

RANKS = {"average_rank": {"title": "average rank", "digits": 1}, "mrr": {"title": "MRR", "digits": 1}}
OLD = {"title": "an old one", "digits": 1, "retired": "another took its place"}
MEASURE = "python -m DPR.evaluate_retriever"


def row(key: str, command: str, **more) -> dict:
    return {
        "table": "retrieval",
        "row": key,
        "name": key.upper(),
        "state": "not run",
        "reason": "not yet",
        "after": ["questions"],
        "commands": [command],
        "result": [f"results/retrieval/{key}.json"],
        **more,
    }


@pytest.fixture
def data() -> dict:
    return {
        "hardware": {"here": "two cores"},
        "steps": {
            "data": {"commands": ["python prepare_data.py --source SOURCE"]},
            "questions": {"after": ["data"], "commands": ["python -m DPR.prepare_dpr_data --dataset empd"]},
        },
        "tables": {"retrieval": {"title": "T", "about": "A", "label": "retriever", "columns": RANKS}},
        "rows": [
            row("bm25", f"{MEASURE} --bm25", paper={"source": "P", "figures": {"mrr": 12.5}}),
            row("nowhere", f"{MEASURE} --path saved/dpr/nowhere", reason="no weights"),
        ],
    }


class InThisProcess:
    """A stage without a process of its own, for the tests' time."""

    def __init__(self, command, log, ended, *rest):
        script, *words = command[1:] if command[0] == "-m" else command
        code = 0
        try:
            importlib.import_module(script.removesuffix(".py")).main([*words])
        except UserError:
            code = 2
        self.process, self.began, self.commit = argparse.Namespace(returncode=code), 0.0, "1234567890"
        ended()

    def failure(self):
        return "failed"


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(stages, "Process", InThisProcess)


def request_of(workdir, **more) -> Request:
    return Request(str(workdir), "prepared", recipes.Changes(), stages.Box(), **more)


def test_a_table_shows_the_paper_and_ours_and_what_could_not_be_run(data, trained_copy, here, capsys):
    stale = trained_copy / "results" / "retrieval" / "nowhere.json"  # of a command that nobody knows
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text('{"mrr": 99.0}', encoding="utf-8")
    reproductions.make_table(results.parse(data), "retrieval", request_of(trained_copy))
    measured = json.loads((trained_copy / "results/retrieval/bm25.json").read_text(encoding="utf-8"))
    text = (trained_copy / "results/tables/retrieval.md").read_text(encoding="utf-8")
    assert "| BM25 | paper |  | 12.50 |" in text
    assert f"| BM25 | ours | {measured['average_rank']:.1f} | {measured['mrr']:.1f} |" in text
    assert "| NOWHERE | not run: no weights |  |  |" in text
    assert f"`{MEASURE} --bm25`" in text
    capsys.readouterr()
    assert not reproductions.make_table(results.parse(data), "retrieval", request_of(trained_copy))
    assert capsys.readouterr().out.count("finished before") == 2  # questions and bm25
    assert reproductions.make_table(
        results.parse(data), "retrieval", request_of(trained_copy, rows=("bm25",))
    )


def test_a_row_is_checked_in_a_fresh_folder_figure_by_figure(data, trained_copy, tmp_path, here, capsys):
    run = {"state": "run", "commit": "abc", "hardware": "here", "seeds": [42]}
    data["rows"][0] |= run | {"figures": {"average_rank": [0.0, -1e3, 1e3], "mrr": 101.0, "old": 3.0}}
    columns = data["tables"]["retrieval"]["columns"]
    data["tables"]["retrieval"]["columns"] = columns | {"old": OLD}
    data["steps"]["data"]["commands"] = []
    with pytest.raises(UserError, match="takes a folder that is new or empty"):
        reproductions.check_row(results.parse(data), "bm25", request_of(trained_copy))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    with pytest.raises(UserError, match="has no data/prepared.json; leave the flag out"):
        reproductions.check_row(results.parse(data), "bm25", request_of(fresh))
    (fresh / "data").symlink_to(trained_copy / "data")
    assert not reproductions.check_row(results.parse(data), "bm25", request_of(fresh))
    shown = capsys.readouterr().out
    assert "average rank: recorded 0.0 [-1000.0, 1000.0], now" in shown and ": close" in shown
    assert "MRR: recorded 101.0, now" in shown and "no interval is recorded" in shown
    assert "an old one: recorded 3.0, not compared: another took its place" in shown


def test_the_sample_is_no_corpus_that_a_table_is_of(data, trained_copy, here, capsys):
    storage.write_json(trained_copy / "data" / "prepared.json", {"source": "sample"})
    with pytest.raises(UserError, match="--record: the data in .* are the bundled sample"):
        reproductions.make_table(results.parse(data), "retrieval", request_of(trained_copy, record="here"))
    reproductions.make_table(results.parse(data), "retrieval", request_of(trained_copy))
    assert "are the bundled sample, invented and small; what is printed is not" in capsys.readouterr().out


def test_a_row_is_of_the_test_split_it_was_measured_on(data, trained_copy, tmp_path, here, capsys):
    data |= {"first_test_conversation": "hit:0_conv:0", "places": {"short": "--test-conversations 9"}}
    data["rows"][0]["place"] = "short"
    known = results.parse(data)
    with pytest.raises(UserError, match="no data/prepared.json.* first: .*SOURCE --test-conversations 9 --w"):
        reproductions.check_row(known, "bm25", request_of(tmp_path))
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "data").symlink_to(trained_copy / "data")
    with pytest.raises(UserError, match="--record: the test split in .*short has other dialogues"):
        request = request_of(tmp_path, record="here", rows=("bm25",))
        reproductions.make_table(known, "retrieval", request)
    reproductions.check_row(known, "bm25", request_of(tmp_path))
    assert "has other dialogues (theirs, from the official files: python prep" in capsys.readouterr().out
    assert (tmp_path / "short" / "results" / "retrieval" / "bm25.json").exists()
    with pytest.raises(UserError, match="--record there: .* names no such hardware; known: here"):
        reproductions.make_table(known, "retrieval", request_of(tmp_path, record="there", dry_run=True))


def test_a_call_that_measures_nothing_leaves_the_page(data, trained_copy, here):
    reproductions.make_table(results.parse(data), "retrieval", request_of(trained_copy))
    page = trained_copy / "results" / "tables" / "retrieval.md"
    before = page.read_text()
    with pytest.raises(UserError, match="nothing was measured; .*retrieval.md stays as it was"):
        reproductions.make_table(
            results.parse(data), "retrieval", request_of(trained_copy, rows=("nowhere",))
        )
    assert page.read_text() == before


def test_what_was_measured_is_recorded_with_its_commit_beside_what_stood_there(data, tmp_path, capsys):
    data["rows"][1] |= {"state": "run", "commit": "abc", "hardware": "here", "seeds": [42]}
    data["rows"][1] |= {"figures": {"mrr": 3.0}}
    file = tmp_path / "results.yaml"
    results.write(file, data)
    found = {"bm25": {0: {"mrr": [12.34567, 11.0, 13.0]}}, "nowhere": {42: {"mrr": 4.0}}}
    note = tmp_path / "results" / "tables" / "stages.json"
    entry = {"seconds": 3.0, "line": "", "finished": True, "commit": "1234567890"}
    storage.write_json(note, {f"{MEASURE.removeprefix('python ')} --bm25": entry})
    recording.record(results.parse(data), file, found, request_of(tmp_path), "here")
    rows = results.read(file).rows
    assert (rows["bm25"].state, rows["bm25"].commit) == ("run", "1234567")
    assert rows["bm25"].figures == {"mrr": [12.346, 11.0, 13.0]} and rows["bm25"].seeds == [0]
    assert rows["nowhere"].figures == {"mrr": 3.0}
    assert "recorded: bm25; left as they stood: nowhere" in capsys.readouterr().out
    assert rows["bm25"].seconds == 3.0
    results.write(file, data)
    note.unlink()
    for commit in ("12 with uncommitted changes", "abcdef1234"):  # of a stage that finished long ago
        storage.write_json(tmp_path / "results" / "retrieval" / "environment.json", {"commit": commit})
        recording.record(results.parse(data), file, found, request_of(tmp_path), "here")
    assert (
        "not recorded: bm25: figures belong to a commit, and it was run at 12 with" in capsys.readouterr().out
    )
    assert results.read(file).rows["bm25"].commit == "abcdef1"


def test_a_run_that_was_finished_before_is_recorded_with_its_own_commit_and_seconds(data, tmp_path):
    data["rows"].append(row("critic", "python train_t5.py") | {"result": ["saved/c/result.json"]})
    own, table = results.parse(data).rows["critic"], results.parse(data).tables[data["rows"][-1]["table"]]
    entry = {"seconds": 15.3, "line": "", "finished": True, "commit": "later"}
    storage.write_json(tmp_path / "results" / "tables" / "stages.json", {"train_t5.py": entry})
    storage.write_json(tmp_path / "saved" / "c" / "environment.json", {"commit": "earlier"})
    asked = (own, table, request_of(tmp_path))
    for trained, commit, seconds in ((597.7, "earlier", 597.7), (12.0, "later", 15.3)):
        storage.write_json(tmp_path / "saved" / "c" / "result.json", {"seconds": trained})
        assert (recording.commit_of(*asked), recording.seconds_of(*asked)) == (commit, seconds)


@pytest.mark.parametrize(
    ("commands", "run", "seeds", "of_7"),
    [
        (["train_t5.py"], "", [42], [7]),
        (["train_t5.py --seed 13"], "", [13], [13]),
        (["train_t5.py --seed 13", "train_t5.py --init-from x"], "", [42], [7]),
        (["train_t5.py --seed 2", "train_t5.py --inference x"], "", [2], [2]),
        (["train_t5.py --seed 42", "train_t5.py --seed 43"], "x=a,b", [42, 43], [42, 43]),
        (["evaluate_responses.py x"], "", [42], [7]),
    ],
)
def test_seeds_are_recorded_as_the_rows_own_trainings_name_them(data, commands, run, seeds, of_7):
    data["rows"].append(row("own", "python x") | {"commands": [f"python {c}" for c in commands], "run": run})
    own = results.parse(data).rows["own"]
    assert recording.seeds_of(own, [42]) == seeds
    assert recording.seeds_of(own, [7]) == of_7, "of --seed"
    assert names_its_seed(own) == (of_7 != [7])


@pytest.mark.parametrize(
    ("recorded", "now", "verdict"),
    [
        (72.8, 72.84, "equal"),
        ([72.8, 71.0, 74.0], 73.9, "close"),
        ({"mean": 72.8, "std": 0.5}, 72.4, "close"),
        ([72.8, 71.0, 74.0], 74.2, "off by +1.4"),
        (72.8, 71.0, "off by -1.8 (no interval is recorded)"),
        (72.8, None, "not measured"),
    ],
)
def test_a_figure_is_equal_close_or_off(recorded, now, verdict):
    assert reproductions.compare(results.Column("F1", 1), recorded, now) == verdict


def test_every_seed_has_a_folder_of_its_own_and_their_mean_is_shown(data, tmp_path):
    request = request_of(tmp_path, seeds=2)
    parsed = results.parse(data)
    bm25 = parsed.rows["bm25"]
    for seed, value in ((42, 10.0), (43, 20.0)):
        place = where(request, bm25, parsed.tables["retrieval"], seed)
        file = tmp_path / place / bm25.result[0]
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"mrr": value}), encoding="utf-8")
    table = parsed.tables["retrieval"]
    runs = [read_figures(table, bm25, p) for p in (tmp_path, tmp_path / "seed-43")]
    shown = table.columns["mrr"].show(recording.over_seeds(runs)["mrr"])
    assert shown == "15.0 ± 7.1"


def test_at_the_end_of_the_time_a_tables_runs_are_gathered(data, tmp_path, monkeypatch):
    def stopped(*_):
        raise SystemExit(143)

    monkeypatch.setattr(reproductions, "run_rows", stopped)
    for place in (tmp_path, tmp_path / "seed-43"):
        (place / "saved" / "dpr" / "empd").mkdir(parents=True)
        (place / "saved" / "dpr" / "empd" / "metrics.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "seed-44" / "results" / "classifiers").mkdir(parents=True)  # a row that trains nothing
    (tmp_path / "seed-44" / "results" / "classifiers" / "emo.json").write_text("{}", encoding="utf-8")
    request = dataclasses.replace(request_of(tmp_path, seeds=3), box=stages.Box(seconds=60))
    with pytest.raises(SystemExit):
        reproductions.make_table(results.parse(data), "retrieval", request)
    found = tmp_path / "results" / "tables" / "gathered"
    for name in ("workdir", "seed-43"):
        assert (found / name / "saved" / "dpr" / "empd" / "metrics.jsonl").exists()
    assert (found / "seed-44" / "results" / "classifiers" / "emo.json").exists()
    monkeypatch.setattr(reproductions, "run_rows", lambda *_: {})  # it ends in time: with its page
    reproductions.make_table(results.parse(data), "retrieval", request)
    assert (found / "workdir" / "results" / "tables" / "retrieval.md").exists()


def test_another_judge_makes_another_table(data, tmp_path):
    data["tables"]["retrieval"]["evaluate"] = "python evaluate_responses.py RUNS --name main"
    table, seen = results.parse(data).tables["retrieval"], []
    for figure in ("1", "1", "2"):
        judge = tmp_path / "saved" / "empathy" / "minilm-emo"
        storage.write_text(judge / "result.json", figure)
        request = request_of(tmp_path, systems=(__file__,))
        seen.append(evaluation(table, [], str(tmp_path), request, []).identity)
    assert seen[0] == seen[1] != seen[2]


def test_one_row_of_a_table_can_be_run_alone_and_the_page_keeps_the_others(
    data, workdir, here, monkeypatch, capsys
):
    columns = {"macro_f1": {"title": "macro-F1", "digits": 1, "read": ["valid", "macro_f1"]}}
    data["tables"]["critics"] = {"title": "T", "about": "A", "label": "critic", "columns": columns}
    for dim in ("emo", "int"):
        command = f"python train_empathy_classifier.py --dim {dim} --baselines --split-by seeker"
        own = {"table": "critics", "result": [f"results/classifiers/{dim}-seeker.json", "tfidf"]}
        data["rows"].append(row(dim, command, **own, after=["data"]))
    run = {"state": "run", "commit": "abc", "hardware": "here", "seeds": [42]}
    data["rows"][-1] |= run | {"reason": "", "figures": {"macro_f1": 50.0}}
    parsed = results.parse(data)
    with pytest.raises(UserError, match="--rows em: no such row; .*emo"):
        reproductions.make_table(parsed, "critics", request_of(workdir, rows=("em",)))
    with pytest.raises(UserError, match="--rows bm25: of another table than critics"):
        reproductions.make_table(parsed, "critics", request_of(workdir, rows=("bm25",)))
    reproductions.make_table(parsed, "critics", request_of(workdir, rows=("emo",)))
    found = json.loads((workdir / "results/classifiers/emo-seeker.json").read_text(encoding="utf-8"))
    assert found["majority"]["valid"]["macro_f1"] <= 50 and sum(found["examples"].values()) == 80
    text = (workdir / "results/tables/critics.md").read_text(encoding="utf-8")
    assert f"| EMO | ours | {found['tfidf']['valid']['macro_f1']:.1f} |" in text
    assert "| INT | not run: not among --rows |  |" in text
    recorded = []
    monkeypatch.setattr(
        reproductions, "record", lambda results, file, found, *rest: recorded.append([*found])
    )
    capsys.readouterr()
    reproductions.make_table(parsed, "critics", request_of(workdir, rows=("int",), record="here"))
    both = (workdir / "results/tables/critics.md").read_text(encoding="utf-8")
    kept = next(line for line in text.splitlines() if line.startswith("| EMO | ours"))
    assert kept in both and "| INT | ours |" in both and recorded == [["int"]]
    said = capsys.readouterr().out
    assert "| INT | ours |" in said and "EMO" not in said


def test_runs_of_rows_that_were_not_asked_for_stay_in_the_table_that_scores_them(data, tmp_path, monkeypatch):
    data["tables"]["retrieval"]["evaluate"] = "python evaluate_responses.py RUNS --name main"
    for key, entry in zip("abc", [*data["rows"], row("cc", f"{MEASURE} --cosine")], strict=True):
        data["rows"] = [r for r in data["rows"] if r is not entry]
        data["rows"].append(entry | {"result": [], "run": f"saved/x/{key}"})
        storage.write_json(tmp_path / "saved" / "x" / key / "result.json", {})
    storage.write_json(tmp_path / "data" / "prepared.json", {})
    ran = []

    def run(todo, record, *rest):
        ran.extend(stage.line for stage in todo)
        for stage in todo:
            record.add(stage, 1.0, finished=True)
        return stages.Outcome()

    monkeypatch.setattr(stages, "run", run)
    for key in ("bm25", "cc"):
        with contextlib.suppress(UserError):  # nothing is measured here
            reproductions.make_table(results.parse(data), "retrieval", request_of(tmp_path, rows=(key,)))
    scored = [line for line in ran if "evaluate_responses" in line]
    assert [line.split(" --name")[0].split("responses.py ")[1] for line in scored] == [
        "saved/x/a",
        "saved/x/a saved/x/c",  # of nowhere a run lies there, of a command that never finished
    ]


def test_other_replies_under_the_same_name_are_another_table(data, tmp_path):
    data["tables"]["retrieval"]["evaluate"] = "python evaluate_responses.py RUNS --name main"
    table = results.parse(data).tables["retrieval"]
    theirs, seen = tmp_path / "theirs.txt", []
    for text in ("I see.", "Oh no!", "I see."):
        theirs.write_text(text, encoding="utf-8")
        request = request_of(tmp_path, systems=(str(theirs),))
        seen.append(evaluation(table, [], str(tmp_path), request, []).identity)
    assert seen[0] == seen[2] != seen[1]


def test_a_run_that_was_trained_again_is_measured_again(data, tmp_path):
    data["tables"]["retrieval"]["evaluate"] = "python evaluate_responses.py RUNS --name main"
    data["rows"][0] |= {"result": [], "run": "saved/x/a"}
    parsed, record = results.parse(data), stages.Record(tmp_path / "results" / "tables" / "stages.json")

    def scoring() -> recipes.Stage:
        table, row = parsed.tables["retrieval"], parsed.rows["bm25"]
        stage = evaluation(table, [row], str(tmp_path), request_of(tmp_path), [])
        assert stage is not None
        return stage

    trained = tmp_path / "saved" / "x" / "a" / "result.json"
    storage.write_json(trained, {"seconds": 1.0})
    record.add(scoring(), 1.0, True)
    assert record.finished(scoring())
    storage.write_json(trained, {"seconds": 1.1})  # deleted, and made anew by the same command
    assert not record.finished(scoring()), "figures of the run of before would be shown as measured now"
    storage.write_json(trained, {"seconds": 1.0})
    del record.entries[scoring().key]["reads"]
    assert record.finished(scoring())  # as older records are


def test_a_row_of_seeds_is_one_system_and_is_scored_once_all_of_them_are_there(data, tmp_path):
    data["tables"]["retrieval"]["evaluate"] = "python evaluate_responses.py RUNS --name main"
    data["rows"][0] |= {"result": [], "run": "seeds=saved/x/a-42,saved/x/a-43"}
    parsed = results.parse(data)
    table, scored = parsed.tables["retrieval"], parsed.rows["bm25"]
    for seed in (42, 43):
        assert evaluation(table, [scored], str(tmp_path), request_of(tmp_path), []) is None
        storage.write_json(tmp_path / "saved" / "x" / f"a-{seed}" / "result.json", {})
    stage = evaluation(table, [scored], str(tmp_path), request_of(tmp_path), [])
    assert stage is not None
    assert f"seeds={tmp_path}/saved/x/a-42,{tmp_path}/saved/x/a-43" in stage.command
    figures = {"systems": {"seeds": {"mrr": 1.5}}, "intervals": {"seeds": {"mrr": [1.0, 2.0]}}}
    storage.write_json(tmp_path / "results" / "main" / "metrics.json", figures)
    assert read_figures(table, scored, tmp_path) == {"mrr": [1.5, 1.0, 2.0]}


def test_a_runs_number_of_weights_is_read_from_its_weights(data, tmp_path):
    data["tables"]["retrieval"]["columns"] = {
        "parameters": {"title": "parameters, M", "digits": 2, "scale": 1e-6},
        "mrr": {"title": "MRR", "digits": 1},
    }
    data["rows"][0] |= {"result": ["saved/x/a/result.json", "test"], "paper": {}}
    parsed = results.parse(data)
    storage.write_json(tmp_path / "saved" / "x" / "a" / "result.json", {"test": {"mrr": 1.5}})
    weights = {"w": torch.zeros(300, 100), "b": torch.zeros(7)}
    save_file(weights, tmp_path / "saved" / "x" / "a" / "model.safetensors")
    found = read_figures(parsed.tables["retrieval"], parsed.rows["bm25"], tmp_path)
    assert found == {"parameters": pytest.approx(0.030007), "mrr": 1.5}


def test_a_floors_figures_stand_beside_the_systems(data, tmp_path):
    data["tables"]["retrieval"]["evaluate"] = "python evaluate_responses.py RUNS --name main"
    data["rows"][0] |= {"result": [], "commands": [], "system": "floor: constant reply"}
    parsed = results.parse(data)
    name = "floor: constant reply"
    figures = {"systems": {}, "floors": {name: {"mrr": 1.5}}, "intervals": {name: {"mrr": [1.0, 2.0]}}}
    storage.write_json(tmp_path / "results" / "main" / "metrics.json", figures)
    assert read_figures(parsed.tables["retrieval"], parsed.rows["bm25"], tmp_path) == {"mrr": [1.5, 1.0, 2.0]}
    with pytest.raises(UserError, match="no commands of its own; --table retrieval measures it beside"):
        reproductions.check_row(parsed, "bm25", request_of(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_tables_are_those_of_the_data():
    data = results.read(reproduce.HERE / results.FILE)
    assert set(reproduce.TABLES) == set(data.tables)
    for name in data.tables:
        recipe = recipe_of(data, data.of(name), "download")
        lines = recipes.lines_of(recipe)
        assert len(lines) == len(set(lines)) and lines[0].startswith("python prepare_data.py")
        recipes.plan(recipe, ".", "download", recipes.Changes())  # each after what it builds on


def test_seeds_of_one_training_do_not_wait_for_each_other():
    data = results.read(reproduce.HERE / results.FILE)
    row = dataclasses.replace(
        data.rows["lora-control"],
        after=[],
        commands=["python a.py --name base"]
        + [f"python a.py --init-from saved/base --seed {n} --name again-{n}" for n in (42, 43)]
        + ["python b.py --path saved/again-43"],
    )
    base, one, other, last = recipes.plan(
        recipe_of(data, [row], "download"), ".", "download", recipes.Changes()
    )
    assert (base.after, one.after, other.after, last.after) == ((), (0,), (0,), (1, 2))


def test_a_rows_training_waits_for_all_that_the_row_builds_on_though_another_row_begins_with_the_same(data):
    """The second row's training reads labels, which the first row's commands know nothing of."""
    data["steps"]["labels"] = {"after": ["data"], "commands": ["python label_dialogues.py"]}
    base, last = "python train_t5.py --name base", "python train_t5.py --init-from saved/t5/base --name last"
    data["rows"][0] |= {"after": ["data"], "commands": [base]}
    data["rows"][1] |= {"after": ["labels"], "commands": [base, last]}
    parsed = results.parse(data)

    def planned(*keys: str) -> dict[str, recipes.Stage]:
        recipe = recipe_of(parsed, [parsed.rows[key] for key in keys], "download")
        return {stage.line: stage for stage in recipes.plan(recipe, ".", "download", recipes.Changes())}

    both = planned("bm25", "nowhere")
    places = list(both)
    assert both[last].after == (places.index("python label_dialogues.py"), places.index(base))
    # whichever rows are asked for, a command that has finished has
    alone = planned("nowhere")
    assert {line: s.identity for line, s in alone.items()} == {line: both[line].identity for line in alone}
    assert list(planned("bm25")) == ["python prepare_data.py --source download", base]


def test_every_command_is_one_stage_in_whatever_table():
    data = results.read(reproduce.HERE / results.FILE)
    identities: dict[tuple[str, str], str] = {}
    for name, table in data.tables.items():
        at_place: dict[str, list[results.Row]] = {}
        for one in data.of(name):
            at_place.setdefault(one.place_in(table), []).append(one)
        for place, rows in at_place.items():
            for asked in (rows, *([one] for one in rows)):
                recipe = recipe_of(data, asked, "download")
                for stage in recipes.plan(recipe, ".", "download", recipes.Changes()):
                    assert identities.setdefault((place, stage.key), stage.identity) == stage.identity


def test_a_seed_of_the_call_does_not_make_one_of_several_seeds():
    lines = {"a": recipes.Group(["python train_t5.py --seed 42", "python train_t5.py --seed 43"])}
    lines |= {"b": recipes.Group(["python train_t5.py", "python respond.py --seed 1"])}
    stages = recipes.plan(lines, ".", "download", recipes.Changes(seed=7))
    assert [stage.command[-1] for stage in stages] == ["42", "43", "7", "7"]


def test_a_row_is_good_only_where_every_figure_is(tmp_path, monkeypatch, capsys):
    columns = {"mrr": Column("MRR", 1), "rank": Column("average rank", 1)}
    table = Table("retrieval", "Retrieval", "", "retriever", columns)
    figures = {"mrr": 101.0, "rank": [0.0, -10.0, 10.0]}
    row = Row(
        "retrieval", "bm25", "BM25", "run", commands=["python x.py"], result=["a/b.json"], figures=figures
    )
    monkeypatch.setattr(reproductions, "run_rows", lambda *asked: {"bm25": {42: {"mrr": 1.0, "rank": 5.0}}})
    results = Results({}, {}, {"retrieval": table}, {"bm25": row})
    request = Request(str(tmp_path / "fresh"), "sample", recipes.Changes(), stages.Box())
    assert not reproductions.check_row(results, "bm25", request)
    said = capsys.readouterr().out
    assert "MRR: recorded 101.0, now 1.0: off by" in said and said.count(": close") == 1


def test_a_rows_seconds_are_those_of_all_its_commands():
    lines = ["train_t5.py --seed 1", "train_t5.py --seed 2"]
    row = Row("t", "r", "R", "not run", commands=[f"python {line}" for line in lines])
    request = Request("work", "prepared", recipes.Changes(), stages.Box())
    entries = {line: {"seconds": n} for n, line in enumerate([*lines, "train_t5.py --seed 3"], 10)}
    assert seconds_of_stages(row, entries, request) == 21
