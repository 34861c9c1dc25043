"""results/results.yaml: the README says what stands there, and what stands there can be run."""

import copy
import itertools
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from test_scripts import PARSERS

import plots
import prepare_data
import reproduce
import results
from columns import COLUMNS, critic_columns, judge_columns
from options import CRITICS, DIMENSIONS, UserError

ALL = {**PARSERS, "prepare_data.py": prepare_data.parse_args}


@pytest.fixture(scope="module")
def data() -> dict:
    return results.load((ROOT / results.FILE).read_text(encoding="utf-8"))


def test_the_readme_and_the_page_of_results_are_rendered_from_the_data(data):
    for file, text in results.rendered(ROOT, data, results.parse(data)).items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: python reproduce.py --render"


def test_the_pictures_are_drawn_from_the_data(data, tmp_path):
    found = results.pictures(ROOT, results.parse(data))
    assert len(found) == 2 and all(results.is_of(file, about) for file, (_, about) in found.items())
    changed = copy.deepcopy(data)
    row = next(row for row in changed["rows"] if row["row"] == "mini-energy")
    row["figures"]["minilm-b_emo_level"][0] += 0.001
    next(iter(changed["tables"]["ablations"]["curves"].values()))[0][1] += 0.1
    again = results.pictures(ROOT, results.parse(changed))
    assert not any(results.is_of(file, about) for file, (_, about) in again.items())


def test_a_figure_changed_by_hand_in_the_readme_is_rendered_away(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(
        readme.replace("| ours | 76.0 |", "| ours | 86.0 |"), encoding="utf-8"
    )
    kept = (ROOT / results.FILE).read_text(encoding="utf-8")
    by_hand = kept.replace("seeds: [42]", "seeds:\n  - 42")
    (tmp_path / results.FILE).write_text(by_hand, encoding="utf-8")
    results.render(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme
    assert (tmp_path / results.FILE).read_text(encoding="utf-8") == kept != by_hand


def test_every_command_of_a_row_parses_and_a_training_means_each_of_its_flags(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    parsed = results.parse(data)
    commands = [c for step in parsed.steps.values() for c in step.commands]
    commands += [c for row in parsed.rows.values() for c in row.commands]
    commands += [t.evaluate.replace("RUNS", "saved/a/b") for t in parsed.tables.values() if t.evaluate]
    Path("saved/a/b").mkdir(parents=True)
    Path("SOURCE").mkdir()
    for command in dict.fromkeys(commands):
        script, *words = shlex.split(command.removeprefix("python ").removeprefix("-m "))
        try:
            ALL[script](words)
        except SystemExit:
            pytest.fail(f"does not parse: {command}")
        said = capsys.readouterr().out
        assert "train_" not in script or "ignored" not in said, f"a flag of it does nothing: {command}"


def test_no_two_trainings_of_rows_have_one_folder(data):
    """In a workdir the second of them would be refused."""
    parsed = results.parse(data)
    folders: dict[tuple[str, ...], str] = {}
    for row in parsed.rows.values():
        for command in row.commands:
            words = shlex.split(command)
            if "--name" in words and "train_" in command:
                place, name = row.place_in(parsed.tables[row.table]), words[words.index("--name") + 1]
                stage = next(word for word in words if "train_" in word)
                assert folders.setdefault((place, stage, name), command) == command


def test_a_row_that_has_commands_says_where_they_leave_its_figures(data):
    for row in results.parse(data).rows.values():
        assert not row.commands or row.run or row.system or row.result, row.row


def test_the_tables_have_a_row_for_everything_that_is_compared_run_or_not(data):
    rows = results.parse(data).rows
    published = ("emo", "exp", "int")  # the paper's; an own dimension needs no rows
    for dim, model in itertools.product(published, ("majority", "tfidf", "glove-t5", "t5", "minilm")):
        for ending in ("", "-seeker", "-3", "-seeker-3"):
            assert f"{dim}-{model}{ending}" in rows
    tuned = ("minilm-empd", "minilm-reddit", "minilm-empd-reddit")
    for retriever in ("bm25", "minilm-cosine", *tuned):
        assert {retriever, f"{retriever}-same-emotion"} <= set(rows)
    flags: dict[str, set[str]] = {}
    alone = set()
    for row in (row for row in rows.values() if row.table in ("ablations", "losses", "processor")):
        for command in row.commands:
            words = shlex.split(command)
            for flag, value in itertools.pairwise(words):
                flags.setdefault(flag, set()).add(value)
            off = {loss for loss in ("empathy", "sentiment") if f"--{loss}-loss-w 0 " in f"{command} "}
            alone |= off if len(off) == 1 else set()
    assert flags["--top-exemplars"] >= {"1", "3", "5", "10"} and flags["--strategy"] >= {"1", "2"}
    assert flags["--add-exemplars"] >= {"none", "glove-t5"} and alone == {"empathy", "sentiment"}


def test_every_table_can_be_asked_for(data):
    assert set(reproduce.TABLES) == set(results.parse(data).tables)


def test_every_column_of_a_scored_table_is_still_written_or_says_that_it_is_not(data):
    written = [*COLUMNS, *critic_columns(CRITICS)]
    for judge in ("tfidf", "minilm", "tfidf-b", "minilm-b"):
        written += judge_columns(judge, list(DIMENSIONS))
    known = {column.key for column in written}
    for table in results.parse(data).tables.values():
        if table.evaluate:
            old = {k for k, c in table.columns.items() if not c.retired and not k.startswith("human_")}
            assert old <= known, table.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "done"}, "row emo-glove-t5: state done: must be one of run, not run"),
        ({"commit": ""}, "row emo-glove-t5: a row that was run needs commit"),
        ({"commit": 1533943}, "row emo-glove-t5: commit: 1533943 is no text; put it in quotation marks"),
        ({"state": "not run"}, "row emo-glove-t5: a row that was not run has no figures"),
        (
            {"figures": {"f1": 70.0}},
            "no such column in its table: f1; its columns: accuracy, macro_f1",
        ),
        ({"hardware": "moon"}, "row emo-glove-t5: hardware moon"),
        ({"figures": {"macro_f1": [72.8, 70.0]}}, r"macro_f1: \[72.8, 70.0\] is no figure; one is a number"),
        ({"figures": {"macro_f1": "72.8"}}, "macro_f1: 72.8 is no figure"),
        ({"row": "int-glove-t5"}, "row int-glove-t5: stands twice"),
        ({"colour": "red"}, "unknown key colour"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_its_name(change, message, data):
    wrong = copy.deepcopy(data)
    wrong["rows"][0] |= change
    with pytest.raises(UserError, match=message):
        results.parse(wrong)


def test_a_file_without_one_of_its_parts_is_refused(data):
    for whole in ({k: v for k, v in data.items() if k != "steps"}, None):
        with pytest.raises(UserError, match=r"results.yaml: lacks .*steps"):
            results.parse(whole)


def test_curves_that_cannot_be_drawn_are_refused_by_their_table(data):
    wrong = copy.deepcopy(data)
    wrong["tables"]["ablations"]["curves"]["one more"] = [[550]]
    with pytest.raises(UserError, match=r"table ablations: curves: \[550\] is no \[updates, value\]"):
        results.parse(wrong)
    unsaid = copy.deepcopy(data)
    del unsaid["tables"]["ablations"]["plot"]
    with pytest.raises(UserError, match="table ablations: curves are drawn where `plot` says"):
        results.parse(unsaid)


@pytest.mark.parametrize("values", [(90.0, 45.0), (1.9, 1.6), (20_000.0, 12_000.0)])
def test_curves_of_any_unit_have_a_scale(values, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, target, about: drawn.append(figure))
    plots.plot_curves({"a run": [(100, values[0]), (200, values[1])]}, "nats", tmp_path / "x.svg")
    (axis,) = drawn[0].axes
    drawn[0].canvas.draw()
    low, high = axis.get_ylim()
    labels = [t for t in [*axis.get_yticklabels(), *axis.get_yticklabels(minor=True)] if t.get_text()]
    assert sum(low <= t.get_position()[1] <= high for t in labels) > 1


def test_a_scale_has_ticks_where_most_curves_end(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, target, about: drawn.append(figure))
    plots.plot_curves(
        {"a": [(1, 190.0), (9, 43.0)], "b": [(1, 80.0), (9, 52.0)]}, "a word", tmp_path / "x.svg"
    )
    ticks = drawn[0].axes[0].get_yticks()
    assert sum(43 <= tick <= 60 for tick in ticks) >= 3 and sum(tick > 100 for tick in ticks) >= 1
