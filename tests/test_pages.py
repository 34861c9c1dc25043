"""The pages for people: rating kit and its summary, case studies, learning curves.

No person rated anything here: every rating in this file is a row made for its test.
"""

import html
import json
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

import evaluate_responses
import pages
import plots
import ratings
import storage
from corpora import Example, listener_turns
from options import Paths, UserError
from pages import sections, traits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run".split()
TRICKY = '<b>"hi"</b> <script>document.title = "taken"</script>'


def example(i: int, emotion: str = "sad") -> Example:
    history = (
        f"It was day {i} without sleep. <i>So tired.</i>",
        "Why is that?",
        "The neighbours' dog barks.",
    )
    return Example(f"hit:{i}_conv:{2 * i}", 4, emotion, history, f"Poor you, {i} days.")


def plain(examples: list[Example]) -> list[dict]:
    return [{"conv_id": e.conv_id, "utterance_idx": e.utterance_idx, "history": e.history} for e in examples]


EXAMPLES = [example(i, ("sad", "proud")[i % 2]) for i in range(40)]
SYSTEMS = {
    "one/lempex": [f"I feel for you in night {i}." for i in range(40)],
    "mime": [f"{TRICKY} Oh, {i}" for i in range(40)],
    "empdg": ["I feel for you in night 3." if i == 3 else f"oh no , {i}" for i in range(40)],
}


@pytest.fixture
def kit(tmp_path):
    """make(mode, count) -> page, key of a rating kit of the three systems."""

    def make(mode: str = "likert", count: int = 40):
        page, key = ratings.write_kit(tmp_path / mode, plain(EXAMPLES), SYSTEMS, count, mode, seed=1)
        return page, pd.read_csv(key)

    return make


def save(file: Path, mode: str, rows: list[tuple]) -> Path:
    """Made rows as the page would save them."""
    pd.DataFrame(rows, columns=list(ratings.SAVED[mode])).to_csv(file, index=False)
    return file


def likert_rows(key: pd.DataFrame, rater: str, value) -> list[tuple]:
    """One row for each reply of the key; `value(system, item number)`: its six made points."""
    numbers = {item: n for n, item in enumerate(key["item"].unique())}
    rows = key.drop_duplicates("reply").itertuples()
    return [(r.kit, rater, r.item, r.reply, 1, *[value(r.system, numbers[r.item])] * 6) for r in rows]


# ------------------------------------------------------------------------------------------------- rating kit


@pytest.mark.parametrize(("other", "cased"), [("no, sorry.", False), ("No, sorry.", True)])
def test_no_system_is_known_by_its_lower_case(tmp_path, other, cased):
    systems = {"gold": ["Oh No!"] * len(EXAMPLES), "glove": [other] * len(EXAMPLES)}
    page, key = ratings.write_kit(tmp_path / "kit", plain(EXAMPLES), systems, 5, seed=1)
    texts = set(pd.read_csv(key)["response"])
    assert texts == ({"Oh No!", other} if cased else {"oh no!", other})
    assert ("Oh No!" in page.read_text("utf-8")) == cased
    noted = json.loads(storage.origin_file(key).read_text("utf-8"))["about"]
    assert any("lower case, as glove would" in line for line in noted) != cased


def test_the_rating_page_names_no_system_and_its_key_names_the_writer_of_each_reply(kit):
    page, key = kit(count=12)
    text = page.read_text()
    assert not any(name in text for name in SYSTEMS) and "http" not in text.replace("http-equiv", "")
    shown = json.loads(re.search(r'id="content">(.*?)</script>', text).group(1))
    assert len(shown["items"]) == 12 and set(key["item"]) == {i["id"] for i in shown["items"]}
    assert not set(key["item"]) & set(key["conv_id"])
    texts = {reply["id"]: reply["text"] for item in shown["items"] for reply in item["replies"]}
    of_example = {e.conv_id: i for i, e in enumerate(EXAMPLES)}
    for row in key.itertuples():
        assert texts[row.reply] == row.response == SYSTEMS[row.system][of_example[row.conv_id]]
    for name, question, high, low in ratings.SCALES.values():
        assert all(
            html.escape(part) in text for part in (name, question, high.replace("'", "&#39;"), low)
        ) or (
            all(
                html.escape(part, quote=False).replace("'", "&#39;") in text for part in (name, question, low)
            )
        )


def test_a_reply_that_two_systems_share_is_shown_once_and_counts_for_both(kit):
    _, key = kit()
    shared = key[key.duplicated("reply", keep=False)]
    assert set(shared["system"]) == {"one/lempex", "empdg"} and len(shared) == 2


def test_the_same_seed_draws_the_same_kit_which_is_never_replaced_unasked(kit, tmp_path):
    page, _ = kit()
    again, _ = ratings.write_kit(tmp_path / "again", plain(EXAMPLES), SYSTEMS, 40, "likert", seed=1)
    assert page.read_text() == again.read_text()
    with pytest.raises(UserError, match="--overwrite"):
        kit()


# --------------------------------------------------------------------------------------- what the raters said


def test_means_intervals_agreement_and_wins_are_those_worked_out_by_hand(kit, tmp_path):
    _, key = kit()

    def anna(system, n):
        return {"one/lempex": 4 + n % 2, "mime": 1 + n % 2, "empdg": 4 + (n < 5)}[system]

    files = [
        save(tmp_path / "a.csv", "likert", likert_rows(key, "Anna", anna)),
        save(tmp_path / "b.csv", "likert", likert_rows(key, "Ben", lambda s, n: anna(s, n) - (s != "mime"))),
    ]
    text = ratings.summarise(files, tmp_path / "likert" / "key.csv")
    assert "2 raters, 40 items" in text
    # forty values, half 4 and half 3.5 + .5: mean 4, standard error .5 / sqrt(39), t(39) = 2.0227
    half = 2.0227 * 0.5 / 39**0.5
    row = next(line for line in text.splitlines() if line.startswith("| one/lempex |"))
    assert row.count(f"4.00 ({4 - half:.2f} to {4 + half:.2f})") == 6
    # mime loses every item: 2 * .5**40
    wins = next(line for line in text.splitlines() if line.startswith("| one/lempex : mime"))
    assert wins.count("**40 / 0 / 0**, p 0.000") == 6
    assert "krippendorff" in text.lower() and "single rater" not in text


def test_an_interval_of_few_items_is_students_and_bold_is_after_holms_correction():
    assert ratings.mean_cell(pd.Series([1.0, 5.0] * 15)) == "3.00 (2.24 to 3.76)"  # t(29) = 2.0452
    won = {("a : b", scale): pd.Series([1] * 21 + [-1] * 9) for scale in ("one", "two", "three")}
    assert "| **21 / 0 / 9**, p 0.043 |" in ratings.outcome_lines({("a : b", "one"): won["a : b", "one"]})[0]
    assert ratings.outcome_lines(won)[0].count("| 21 / 0 / 9, p 0.043 ") == 3


def test_an_item_on_which_its_raters_disagree_is_a_tie(kit, tmp_path):
    _, key = kit()
    files = []
    for name, high in (("Anna", "one/lempex"), ("Ben", "mime")):
        rows = likert_rows(key, name, lambda system, _, high=high: 5 if system == high else 1)
        files.append(save(tmp_path / f"{name}.csv", "likert", rows))
    text = ratings.summarise(files, tmp_path / "likert" / "key.csv")
    tied = next(line for line in text.splitlines() if line.startswith("| one/lempex : mime"))
    assert tied.count("0 / 40 / 0, p 1.000") == 6


def test_alpha_is_one_for_equal_raters_and_refused_for_a_single_one(kit, tmp_path):
    _, key = kit()
    value = {"one/lempex": 5, "mime": 1, "empdg": 3}
    rows = {name: likert_rows(key, name, lambda s, n: value[s]) for name in ("Anna", "Ben")}
    files = [save(tmp_path / f"{name}.csv", "likert", r) for name, r in rows.items()]
    key_file = tmp_path / "likert" / "key.csv"
    assert "alpha* |" + " 1.00 |" * 6 in ratings.summarise(files, key_file)
    assert "alpha* |" + " a single rater |" * 6 in ratings.summarise(files[:1], key_file)


def test_a_rater_who_saved_twice_counts_once_and_two_minds_are_refused(kit, tmp_path):
    _, key = kit()
    rows = likert_rows(key, "Anna", lambda s, n: 2)
    files = [save(tmp_path / "1.csv", "likert", rows[:50]), save(tmp_path / "2.csv", "likert", rows)]
    assert "1 rater, 40 items" in ratings.summarise(files, tmp_path / "likert" / "key.csv")
    other = save(tmp_path / "3.csv", "likert", [(*rows[0][:5], *[4] * 6)])
    with pytest.raises(UserError, match=r"3\.csv, line 2: Anna rated the same otherwise in .*1\.csv, line 2"):
        ratings.summarise([*files, other], tmp_path / "likert" / "key.csv")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: ("other", *row[1:]), "line 2: a rating of kit 'other'"),
        (lambda row: (row[0], " ", *row[2:]), "line 2: no name"),
        (lambda row: (*row[:3], "xxxxxx", *row[4:]), "line 2: a reply that is not in this kit"),
        (lambda row: (*row[:5], 6, *row[6:]), "line 2: empathy is '6', expected 1 to 5"),
    ],
)
def test_a_row_that_cannot_be_is_named_by_file_and_line(kit, tmp_path, change, message):
    _, key = kit()
    rows = likert_rows(key, "Anna", lambda s, n: 2)
    file = save(tmp_path / "a.csv", "likert", [change(rows[0]), *rows[1:]])
    with pytest.raises(UserError, match=message):
        ratings.summarise([file], tmp_path / "likert" / "key.csv")


def test_too_few_rated_items_are_refused_with_their_number(kit, tmp_path):
    _, key = kit()
    rows = [r for r in likert_rows(key, "Anna", lambda s, n: 2) if r[2] in set(key["item"].unique()[:29])]
    file = save(tmp_path / "a.csv", "likert", rows)
    with pytest.raises(UserError, match="29 rated items, of 40 in the kit, are too few"):
        ratings.summarise([file], tmp_path / "likert" / "key.csv")


def test_choices_between_two_replies_become_wins_ties_and_losses_with_a_sign_test(kit, tmp_path):
    _, key = kit("ab")
    by = key.pivot(index="item", columns="system", values="reply")
    rows = []
    for n, (item, reply) in enumerate(by.iterrows()):
        first, second = reply["one/lempex"], reply["mime"]
        chosen = first if n < 25 else second if n < 35 else "tie"
        rows.append((key["kit"][0], "Anna", item, *((first, second) if n % 2 else (second, first)), chosen))
    file = save(tmp_path / "a.csv", "ab", rows)
    text = ratings.summarise([file], tmp_path / "ab" / "key.csv")
    p = 2 * sum(math.comb(35, k) for k in range(11)) / 2**35  # 25 of 35
    assert f"| one/lempex : mime | **25 / 5 / 10**, p {p:.3f} |" in text
    # empdg's one reply that is also one/lempex's was judged against mime's, and found equal to itself
    assert "| mime : empdg | too few (n = 1) |" in text and "| one/lempex : empdg | too few (n = 1) |" in text
    assert "Krippendorff's alpha of the choices: a single rater" in text
    assert "same word by word count as ties unseen: 1." in text
    turned = [(*row[:3], row[4], row[3], row[5]) for row in rows]  # the same choices, shown the other way
    files = [file, save(tmp_path / "b.csv", "ab", turned)]
    assert len(ratings.read_ratings(files, key)) == len(rows), "equal ones count once"
    save(tmp_path / "b.csv", "ab", [(*row[:5], "tie") for row in turned])
    with pytest.raises(UserError, match="Anna rated the same otherwise in"):
        ratings.read_ratings(files, key)
    (tmp_path / "ab" / "ratings.csv").write_text("of an earlier kit")
    with pytest.raises(UserError, match=r"ratings\.csv; add --overwrite"):
        ratings.report([file], tmp_path / "ab", overwrite=False)
    ratings.report([file], tmp_path / "ab", overwrite=True)
    assert (tmp_path / "ab" / "ratings.md").exists() and not (tmp_path / "ab" / "ratings.csv").exists()


def test_pairs_of_the_same_replies_which_no_rater_is_shown_are_ties(tmp_path):
    other = [text if n < 8 else f"{text} Well." for n, text in enumerate(SYSTEMS["mime"])]
    systems = {"one": SYSTEMS["mime"], "other": other}
    _, file = ratings.write_kit(tmp_path / "ab", plain(EXAMPLES), systems, 40, "ab", seed=1)
    key = ratings.read_key(file)
    by = key.pivot(index="item", columns="system", values="reply")
    shown = by[by["one"] != by["other"]]
    rows = [(key["kit"][0], "Anna", item, r["one"], r["other"], r["one"]) for item, r in shown.iterrows()]
    text = ratings.summarise([save(tmp_path / "a.csv", "ab", rows)], file)
    assert len(by) - len(shown) == 8
    assert f"| one : other | **{len(shown)} / {len(by) - len(shown)} / 0**" in text
    assert f"count as ties unseen: {len(by) - len(shown)}." in text


def test_ratings_of_another_kit_are_said_to_be_so_whatever_their_columns(kit, tmp_path):
    kit()
    file = save(tmp_path / "a.csv", "ab", [("other", "Anna", "i", "r", "s", "tie")])
    with pytest.raises(UserError, match="line 2: a rating of kit 'other'.*--name"):
        ratings.summarise([file], tmp_path / "likert" / "key.csv")


def test_empty_rows_below_the_ratings_are_passed_over(kit, tmp_path):
    _, key = kit("ab")
    by = key.pivot(index="item", columns="system", values="reply")
    rows = [(key["kit"][0], "Anna", item, r["one/lempex"], r["mime"], "tie") for item, r in by.iterrows()]
    saved = save(tmp_path / "a.csv", "ab", rows)
    saved.write_text(saved.read_text() + ",,,,,\n" * 3)
    assert len(ratings.read_ratings([saved], key)) == len(rows)


@pytest.mark.parametrize("cell", ["../x", "b" * 300, ""])
def test_whatever_stands_in_the_first_cell_is_no_file_of_ours(kit, tmp_path, cell):
    kit("ab")
    saved = save(tmp_path / "a.csv", "ab", [(cell, "Anna", "i", "r", "s", "tie")])
    with pytest.raises(UserError, match="line 2: a rating of kit "):
        ratings.report([saved], tmp_path / "ab", overwrite=False)


def test_where_every_choice_is_a_tie_no_share_of_the_first_is_given(kit, tmp_path):
    _, key = kit("ab")
    by = key.pivot(index="item", columns="system", values="reply")
    rows = [(key["kit"][0], "Anna", item, r["one/lempex"], r["mime"], "tie") for item, r in by.iterrows()]
    text = ratings.summarise([save(tmp_path / "a.csv", "ab", rows)], tmp_path / "ab" / "key.csv")
    assert "nan" not in text and "Every choice was a tie." in text
    assert "| one/lempex : mime | 0 / 40 / 0, p 1.000 |" in text


def test_in_the_agreement_on_choices_each_comparison_counts_once(kit, tmp_path):
    _, key = kit("ab")
    by, files = key.pivot(index="item", columns="system", values="reply"), []
    pairs = [(item, *sorted(reply[["one/lempex", "mime"]])) for item, reply in by.iterrows()]
    assert all(first != second for _, first, second in pairs) and len(pairs) == 40
    for rater, ties in (("Anna", 0), ("Ben", 10)):
        rows = [(key["kit"][0], rater, *pair, "tie" if n < ties else pair[1]) for n, pair in enumerate(pairs)]
        files.append(save(tmp_path / f"{rater}.csv", "ab", rows))
    # of 80 votes 70 are for the one and 10 ties
    alpha = 1 - (10 / 40) / (2 * 70 * 10 / (80 * 79))
    text = ratings.summarise(files, tmp_path / "ab" / "key.csv")
    assert f"Krippendorff's alpha of the choices: {alpha:.2f} (nominal" in text


def test_the_command_makes_a_kit_of_anybodys_replies_and_reads_what_its_raters_saved(
    prepared, tmp_path, capsys, monkeypatch
):
    examples = listener_turns(Paths(prepared).dialogues("test"))
    rows = [f"{e.conv_id}\t{e.utterance_idx}\tReply number {n}." for n, e in enumerate(examples)]
    theirs = tmp_path / "theirs.tsv"
    theirs.write_text("\n".join(["conv_id\tutterance_idx\tresponse", *rows]) + "\n", encoding="utf-8")
    (tmp_path / "data").symlink_to(prepared / "data")
    common = ["--workdir", str(tmp_path)]
    evaluate_responses.main([*common, str(theirs), "--rating-kit", "10", "--rating-mode", "likert"])
    folder = tmp_path / "results" / "evaluation" / "rating_kit"
    key = pd.read_csv(folder / "key.csv")
    assert set(key["system"]) == {"gold", "theirs"} and key["item"].nunique() == 10
    said = capsys.readouterr().out
    assert "10 conversations, 120 judgements" in said
    assert "refuse fewer than 30 rated items; make a larger kit" in said
    whole = ["--rating-kit", str(len(examples) + 1), "--name", "whole"]
    monkeypatch.setattr(ratings, "MIN_ITEMS", len(examples) + 1)
    evaluate_responses.main([*common, str(theirs), *whole])
    assert "these are all that the table has" in capsys.readouterr().out

    monkeypatch.setattr(ratings, "MIN_ITEMS", 10)
    file = save(tmp_path / "a.csv", "likert", likert_rows(key, "Anna", lambda s, n: 2 + (s == "gold")))
    evaluate_responses.main([*common, "--ratings", str(file)])
    summary = (folder / "ratings.md").read_text()
    assert "| gold | 3.00 (3.00 to 3.00) |" in summary
    assert re.search(rf"Split test, items all, n = {len(examples)}, set [0-9a-f]{{12}}", summary)
    assert len(re.findall(r"Commit \w+.*; `python ", summary)) == 2, "of the kit and of its summary"
    table = pd.read_csv(folder / "ratings.csv")
    assert table.groupby("system")["value"].mean().to_dict() == {"gold": 3, "theirs": 2}
    assert set(table["response"]) == set(key["response"]) and len(table) == 20 * 6
    with pytest.raises(SystemExit):
        evaluate_responses.main([*common, str(theirs), "--ratings", str(file)])
    assert "not both" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"key.csv: no such file; --name is to be the one"):
        evaluate_responses.main([*common, "--ratings", str(file), "--name", "other"])
    # another kit in its place keeps the key: what people rated stays readable
    evaluate_responses.main([*common, str(theirs), "--rating-kit", "11", "--overwrite"])
    assert pd.read_csv(folder / "key.csv")["item"].nunique() == 11
    evaluate_responses.main([*common, "--ratings", str(file), "--overwrite"])
    again = (folder / "ratings.md").read_text()
    assert "| gold | 3.00 (3.00 to 3.00) |" in again and again.count("Kit drawn with seed") == 1


# ----------------------------------------------------------------------------------------------- case studies


def judged(name: str, **traits) -> dict:
    scores = {kind: [((7 * i + len(name)) % 40) / 40 for i in range(40)] for kind in ("emo", "MiniLM <emo>")}
    found = {"name": name, "replies": SYSTEMS.get(name, SYSTEMS["mime"]), "scores": scores}
    return found | ({"traits": {"model": "t5", **traits}} if traits else {})


@pytest.fixture
def four_kinds() -> list[pages.Section]:
    systems = [
        {"name": "gold", "replies": [e.response for e in EXAMPLES], "scores": {"emo": [math.nan] * 40}},
        judged("one/lempex", exemplars=True, losses=True),
        judged("no losses", exemplars=True, losses=False),
        judged("plain | *T5*", exemplars=False, losses=False),
        judged("mime"),
    ]
    exemplars = [[f"{TRICKY} [x](http://x) {i}", f"second {i}", "third", "fourth"] for i in range(40)]
    return pages.sections(systems, exemplars, {"tuned": exemplars, "untuned": [["as it was"]] * 40})


def test_the_four_kinds_of_case_studies_stand_where_the_systems_allow_them(four_kinds):
    assert [(s.title, [x["name"] for x in s.systems]) for s in four_kinds] == [
        ("Models side by side", ["gold", "one/lempex", "no losses", "plain | *T5*", "mime"]),
        ("With and without exemplars", ["gold", "no losses", "plain | *T5*"]),
        ("With and without the losses of empathy and sentiment", ["gold", "one/lempex", "no losses"]),
        ("Top exemplar of each retriever", ["gold", "tuned", "untuned"]),
    ]
    assert [s.title for s in pages.sections([judged("mime")])] == ["Models side by side"]


@pytest.mark.parametrize("page", [pages.markdown_cases, pages.html_cases])
def test_case_studies_print_their_rule_explain_each_column_and_show_every_text_as_text(four_kinds, page):
    foot = ["Replies of &lt;b&gt;: beam search.", "Commit abc."]
    text = page(four_kinds, EXAMPLES, 5, 7, {"MiniLM <emo>": "another judge"}, foot)
    assert foot[0] in text and text.rindex("Commit abc.") > text.rindex("as it was")
    assert "5 of the 40 items, drawn at random with seed 7" in text
    explained = ["another judge", *(v for k, v in pages.COLUMN_KEYS.items() if k not in ("exp", "int"))]
    is_markdown = page == pages.markdown_cases
    length = pages.COLUMN_KEYS["words"]  # a column of one page alone
    assert all(key in html.unescape(text) for key in explained[:-1] if key != length)
    assert (length in html.unescape(text)) != is_markdown
    assert "<i>" not in text and "<emo>" not in text and not (is_markdown and "](http" in text)
    assert "document.title" in text and "<script>document" not in text
    assert "nan" not in text and text.count("as it was") == 5 and "third" in text and "fourth" not in text


def test_cases_are_a_random_sample_of_all_items_and_the_same_for_the_same_seed():
    assert pages.choose(40, 5, 7) == pages.choose(40, 5, 7) != pages.choose(40, 5, 8)
    assert pages.choose(3, 5, 7) == [0, 1, 2]
    drawn = {i for seed in range(200) for i in pages.choose(40, 5, seed)}
    assert drawn == set(range(40))


# -------------------------------------------------------------------------------------------- learning curves


def test_learning_curves_have_a_panel_a_term_and_a_colour_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(plots.TERMS, "unlikelihood", "nats")  # a term needs nothing but its unit there
    for name, terms in (("a", ("nll", "emo", "unlikelihood")), ("a2", ("nll", "reward")), ("b", ("nll",))):
        rows = [
            {"step": step, "kind": kind, **{t: 3 - step / 10 for t in terms}}
            for step in range(3)
            for kind in ("train", "valid")
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr(plots.pyplot, "close", drawn.append)
    seeds = {"a": ["a", "a2"], "b": ["b"]}
    systems = [{"name": name, "folders": [str(tmp_path / f) for f in own]} for name, own in seeds.items()]
    systems += [{"name": "a file"}]
    assert plots.plot_learning(systems, tmp_path / "curves.png") and (tmp_path / "curves.png").exists()
    panels = {axis.get_title(): axis.get_lines() for axis in drawn[0].axes}
    assert {k: len(v) for k, v in panels.items()} == {"nll": 6, "emo": 2, "reward": 2, "unlikelihood": 2}
    colours = {term: [line.get_color() for line in lines] for term, lines in panels.items()}
    assert colours["nll"][:4] == 2 * colours["emo"] == 2 * colours["reward"], "two seeds of one system"
    assert colours["nll"][3] != colours["nll"][4] == colours["nll"][5]
    assert [line.get_linestyle() for line in panels["emo"]] == ["-", "--"]
    assert panels["emo"][0].get_marker() == "None" and panels["emo"][1].get_marker() == "o"
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 3, "kind": "train", "nll": 3.0}\n')
    assert plots.plot_learning(systems[1:], tmp_path / "curves.png")
    assert drawn[-1].axes[0].get_lines()[0].get_marker() == "x"  # of a point there is no line
    assert all(tick == int(tick) for tick in drawn[-1].axes[0].get_xticks()), "no part of an update"
    assert not plots.plot_learning([{"name": "a file"}], tmp_path / "none.png")


def test_levels_stand_beside_the_gold_replies_that_come_before_them(tmp_path, monkeypatch):
    rows = [
        ("gold", {"emo": (0.4, 0.3, 0.5), "int": (0.2, 0.1, 0.3)}),
        ("one", {"emo": (0.6, 0.5, 0.7)}),
        ("the whole split's gold", {"emo": (0.1,)}),
        ("two", {"emo": (0.2,), "int": (0.25,)}),
    ]
    drawn = []
    monkeypatch.setattr(plots.pyplot, "close", drawn.append)
    titles = {"emo": "emo, by a judge", "int": "int"}
    assert plots.plot_levels(rows, titles, [0, 2], tmp_path / "levels.svg", about="of <four> rows")
    emo, interpretation = drawn[0].axes
    assert emo.get_title() == "emo, by a judge" and interpretation.get_title() == "int"
    assert emo.get_xlabel() == "mean level"
    assert [label.get_text() for label in emo.get_yticklabels()] == [name for name, _ in rows]
    marks = [line for line in emo.get_lines() if line.get_marker() != "None"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [
        (0.4, 0),
        (0.6, 1),
        (0.1, 2),
        (0.2, 3),
    ]
    bands = [band.get_paths()[0].get_extents() for band in emo.collections]
    assert [(b.x0, b.x1) for b in bands] == [(0.3, 0.5), (0.1, 0.1)]
    assert [(round(b.y0), round(b.y1)) for b in bands] == [(0, 1), (2, 3)]
    bands = [band.get_paths()[0].get_extents() for band in interpretation.collections]
    assert [(b.x0, b.x1) for b in bands] == [(0.1, 0.3)]  # the other gold has none
    assert not plots.plot_levels(rows, {}, [0], tmp_path / "none.png")


def test_a_name_is_no_formula_in_a_picture(tmp_path):
    name = r"my$^$runs_\$"
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "nll": 2.0}\n')
    assert plots.plot_learning([{"name": name, "folders": [str(tmp_path / name)]}], tmp_path / "curves.png")
    assert plots.plot_levels([(name, {"k": (0.5,)})], {"k": name}, [0], tmp_path / "levels.png")


# --------------------------------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright (requirements-app.txt)")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(file): its page, opened with empty storage on a phone's width; it may ask for nothing else."""
    context = browser.new_context(viewport={"width": 360, "height": 700}, accept_downloads=True)
    context.set_default_timeout(15000)
    asked, faults = [], []

    def go(file: Path):
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield go
    context.close()
    assert not faults and all(url.startswith(("file:", "blob:", "data:")) for url in asked)


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def begin(page, rater: str) -> None:
    page.get_by_label("Your name").fill(rater)
    page.keyboard.press("Enter")


def saved_by(page, target: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as csv").click()
    download.value.save_as(target)
    return target


def test_a_rater_leaves_comes_back_and_saves_what_was_rated_by_keys_and_clicks(kit, visit, tmp_path):
    file, key = kit(count=3)
    page = visit(file)
    assert fits(page)
    begin(page, 'Anna  "A", Ähm')
    assert fits(page) and TRICKY in page.inner_text("body") and page.title() == "Rating replies"
    for n in range(3 * 6):
        page.keyboard.press("13542"[n % 5])
    page.keyboard.press("Enter")  # Next has the focus after the last scale
    page.get_by_label("Fluency: 2, a little").nth(1).check()
    order = page.locator(".reply > p:first-child").all_inner_texts()
    page.reload()
    assert page.inner_text("#status").startswith('Anna "A", Ähm: 19 of 54')
    assert page.inner_text("h1 >> visible=true") == "Conversation 2 of 3"
    assert page.locator(".reply > p:first-child").all_inner_texts() == order
    assert page.get_by_label("Fluency: 2, a little").nth(1).is_checked()
    page.get_by_role("button", name="Back").click()
    assert page.locator(".points :checked").count() == 18

    again = ratings.read_ratings([saved_by(page, tmp_path / "a.csv")], key)
    assert set(again["rater"]) == {'Anna "A", Ähm'} and len(again) == 4
    points = ["13542"[n % 5] for n in range(18)]
    assert again[list(ratings.SCALES)].iloc[:3].to_numpy().ravel().tolist() == points
    assert again["position"].tolist() == ["1", "2", "3", "2"]
    shown = key.drop_duplicates("reply").set_index("reply")["response"]
    assert shown[again["reply"].iloc[3]] == order[1]
    assert again[list(ratings.SCALES)].iloc[3].tolist() == ["", "", "2", "", "", ""]


def test_raters_see_the_same_conversations_with_their_replies_in_orders_of_their_own(kit, visit):
    file, _ = kit(count=3)
    page = visit(file)
    orders = set()
    for rater in ("Anna", "Ben", "Cleo"):
        begin(page, rater)
        assert "It was day" in page.inner_text(".turns") and page.locator(":checked").count() == 0
        orders.add(tuple(page.locator(".reply > p:first-child").all_inner_texts()))
        page.get_by_role("button", name="Change name").click()
    assert len(orders) > 1 and len(set(map(frozenset, orders))) == 1


def test_two_replies_are_compared_by_the_keys_a_t_and_b(kit, visit, tmp_path):
    file, key = kit("ab", 2)
    page = visit(file)
    begin(page, "Ben")
    assert fits(page)
    for letter in "atb":
        page.keyboard.press(letter)
        page.keyboard.press("Enter")
    again = ratings.read_ratings([saved_by(page, tmp_path / "b.csv")], key)
    expected = [again["first"][0], "tie", again["second"][2]]
    assert again["chosen"].tolist() == expected and again["item"].nunique() == 1


def test_cases_sort_whole_by_the_score_of_the_chosen_system(four_kinds, visit, tmp_path):
    file = tmp_path / "cases.html"
    file.write_text(pages.html_cases(four_kinds, EXAMPLES, 5, seed=7), encoding="utf-8")
    page = visit(file)
    page.set_viewport_size({"width": 1200, "height": 800})
    section = page.locator("section").first
    assert TRICKY in section.inner_text() and page.title() == "Case studies"

    def column(row: int, place: int) -> list[str]:
        rows = section.locator(f"tbody > tr:nth-child({row})")
        return [r.locator("td").nth(place).inner_text() for r in rows.all()]

    assert column(1, 0) == ["1", "2", "3", "4", "5"]
    before = sorted(map(str.strip, section.locator("tbody").all_inner_texts()))
    section.get_by_role("button", name="emo", exact=True).click()
    scores = [float(text) for text in column(2, 3)]  # one/lempex, the first after gold
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    section.get_by_role("button", name="emo", exact=True).click()
    assert [float(text) for text in column(2, 3)] == scores[::-1]
    section.get_by_role("combobox").select_option("mime")
    scores = [float(text) for text in column(5, 3)]
    assert scores == sorted(scores)
    assert sorted(map(str.strip, section.locator("tbody").all_inner_texts())) == before  # whole cases
    page.set_viewport_size({"width": 360, "height": 700})
    assert fits(page)


@pytest.mark.parametrize("width", [1600, 1370, 1200, 360])
def test_texts_stay_readable_beside_many_judges(visit, tmp_path, width):
    scores = {f"a-judge-{n}: emo": [0.5] * len(EXAMPLES) for n in range(6)}
    replies = ["Oh no, I am so sorry to hear that. How did it happen?"] * len(EXAMPLES)
    systems = [{"name": name, "replies": replies, "scores": scores} for name in ("gold", "causal-lm/lora-1")]
    file = tmp_path / "cases.html"
    file.write_text(pages.html_cases(pages.sections(systems), EXAMPLES, 2, seed=7), encoding="utf-8")
    page = visit(file)
    page.set_viewport_size({"width": width, "height": 800})
    assert fits(page)
    for kind in ("context", "reply"):
        assert page.locator(f"td.{kind}").first.bounding_box()["width"] >= 230


def test_another_seed_draws_other_conversations(tmp_path):
    drawn = []
    for seed in (1, 2):
        _, key = ratings.write_kit(tmp_path / str(seed), plain(EXAMPLES), SYSTEMS, 10, "likert", seed=seed)
        drawn.append(set(pd.read_csv(key)["conv_id"]))
    assert drawn[0] != drawn[1]


def test_a_scale_that_was_left_out_takes_no_other_with_it(tmp_path):

    _, key = ratings.write_kit(tmp_path, plain(EXAMPLES), SYSTEMS, 40, "likert", seed=1)
    rows = [(*row[:-1], "") for row in likert_rows(pd.read_csv(key), "Anna", lambda system, n: 3)]
    text = ratings.summarise([save(tmp_path / "a.csv", "likert", rows)], key)
    line = next(line for line in text.splitlines() if line.startswith("| mime |"))
    assert line.count("3.00 (3.00 to 3.00)") == 5 and "too few (n = 0)" in line


def test_what_has_it_stands_before_what_lacks_it_in_whatever_order_they_are_given():
    plain, led = (
        {"name": name, "replies": ["Oh."], "scores": {}}
        | {"traits": {"model": "t5", "exemplars": exemplars, "losses": False}}
        for name, exemplars in (("plain", False), ("led", True))
    )
    for systems in ([plain, led], [led, plain]):
        assert [s["name"] for s in sections(systems)[1].systems] == ["led", "plain"]


def test_case_studies_know_every_way_of_exemplars_and_each_loss(tmp_path):
    for flags, found in (
        ({"add_exemplars": "none", "empathy_loss_w": 0, "sentiment_loss_w": 0}, (False, False)),
        ({"add_exemplars": "prepend", "empathy_loss_w": 0, "sentiment_loss_w": 0.1}, (True, True)),
        ({"add_exemplars": "glove-t5", "empathy_loss_w": 0.1, "sentiment_loss_w": 0}, (True, True)),
    ):
        (tmp_path / "args.json").write_text(json.dumps({"args": {"model": "t5", **flags}}))
        assert (traits(tmp_path)["exemplars"], traits(tmp_path)["losses"]) == found


@pytest.mark.parametrize("more", [{}, {"sampled_loss_w": 1.0}, {"size": "mini"}, {"control": "marks"}])
@pytest.mark.parametrize("start", ["of a run", "of another"])
def test_runs_that_differ_in_more_than_exemplars_make_no_pair(more, start, tmp_path):
    systems = []
    begun = {
        "plain": ("saved/t5/mine", start),
        "led": ("./saved/t5/mine", "of a run"),
    }  # seen from two places
    for name, flags in (("plain", {"add_exemplars": "none"} | more), ("led", {"add_exemplars": "prepend"})):
        place, digest = begun[name]
        flags = {"model": "t5", "size": "tiny", "init_from": place, **flags}
        storage.write_json(tmp_path / name / "args.json", {"args": flags, "inputs": {"init": digest}})
        systems.append({"name": name, "replies": ["Oh."], "scores": {}, "traits": traits(tmp_path / name)})
    assert len(sections(systems)) == (1 if more or start != "of a run" else 2)


@pytest.mark.parametrize(
    ("others", "rated"), [(["mime"], ["gold", "mime"]), (["mime", "empdg"], ["empdg", "mime"])]
)
def test_gold_is_compared_pair_by_pair_where_there_is_no_other_pair(tmp_path, others, rated):
    systems = [{"name": "gold", "replies": [e.response for e in EXAMPLES]}]
    systems += [{"name": name, "replies": SYSTEMS[name]} for name in others]
    ratings.kit_of(tmp_path, EXAMPLES, systems, 5, "ab", 1, overwrite=False)
    assert sorted(set(ratings.read_key(tmp_path / "key.csv")["system"])) == rated


def test_the_alpha_of_points_is_ordinal(kit, tmp_path):
    """Of raters who are a point apart it is high; by the points' names alone they would never agree."""
    _, key = kit()
    level = {"one/lempex": 1, "mime": 3, "empdg": 4}
    files = []
    for name, more in (("Anna", 0), ("Ben", 1)):
        rows = likert_rows(key, name, lambda system, _, more=more: level[system] + more)
        files.append(save(tmp_path / f"{name}.csv", "likert", rows))
    text = ratings.summarise(files, tmp_path / "likert" / "key.csv")
    (row,) = [line for line in text.splitlines() if line.startswith("| *Krippendorff's alpha*")]
    assert all(float(value) > 0.5 for value in row.split("|")[2:-1])


def test_the_command_makes_a_kit_of_the_mode_and_the_seed_that_are_asked_for(prepared, tmp_path):
    (tmp_path / "data").symlink_to(prepared / "data")
    examples, kits = listener_turns(Paths(prepared).dialogues("test")), []
    rows = [f"{e.conv_id}\t{e.utterance_idx}\tReply number {n}." for n, e in enumerate(examples)]
    theirs = tmp_path / "theirs.tsv"
    theirs.write_text("\n".join(["conv_id\tutterance_idx\tresponse", *rows]) + "\n", encoding="utf-8")
    for seed in ("1", "2"):
        words = ["--workdir", str(tmp_path), str(theirs), "--rating-kit", "5", "--rating-mode", "ab"]
        evaluate_responses.main([*words, "--seed", seed, "--name", seed])
        key = ratings.read_key(tmp_path / "results" / seed / "rating_kit" / "key.csv")
        assert set(key["mode"]) == {"ab"}
        kits.append(set(zip(key["conv_id"], key["utterance_idx"], strict=True)))
    assert len(kits[0]) == len(kits[1]) == 5 and kits[0] != kits[1]
