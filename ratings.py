"""The human columns: a page on which people rate replies blindly, and what follows from their ratings.

`write_kit` makes the page and, beside it, the key that says which reply is whose; `summarise` reads the files
that the page saved. The six scales are those of the paper's table; the texts that explain them stand here.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

import markup
import runs
import storage
from corpora import Example
from intervals import holm
from markup import cell
from options import UserError, refuse_existing
from pages import render
from tabular import read_rows
from validation import alpha

LIKERT, AB = "likert", "ab"
MODES = (LIKERT, AB)
#: fewer rated items carry neither an interval nor a test, fewer shared replies no alpha
MIN_ITEMS = 30
POINTS = ("not at all", "a little", "somewhat", "mostly", "fully")
#: what the examples of all scales answer to
EXAMPLE = "I failed my driving test again this morning."
#: key -> name, question, a reply to EXAMPLE that earns a 5, one that earns a 1
SCALES = {
    "empathy": (
        "Empathy",
        "Does the reply show that its writer has understood how the speaker feels, and cares?",
        "A second time, that must sting. I'm sorry, you had worked so hard for it.",
        "Okay. Lots of people drive.",
    ),
    "relevance": (
        "Relevance",
        "Does the reply answer what was said here, this topic and these facts?",
        "Was it the parking again, or did something new go wrong?",
        "My cousin likes pizza too.",
    ),
    "fluency": (
        "Fluency",
        "Is the reply correct and natural language, whatever it says?",
        "My cousin likes pizza too.",
        "sorry the you test is fail was of.",
    ),
    "emotional_presence": (
        "Emotional presence",
        "Does its writer voice a feeling of their own about what the speaker tells: warmth, concern, joy?",
        "Oh no, I feel for you, and I am sad to hear that.",
        "You can take it again in two weeks.",
    ),
    "interpretation": (
        "Interpretation",
        "Does the reply put into words what the speaker feels or goes through, more than was said?",
        "You must dread telling everybody at home a second time.",
        "So you failed the test this morning.",
    ),
    "exploration": (
        "Exploration",
        "Does the reply ask about feelings or experiences that the speaker has not told yet?",
        "How do you feel about a third try? What made you nervous?",
        "Better luck next time.",
    ),
}
#: letters without vowels: no words, and no spreadsheet reads them as numbers or dates
LETTERS = "bcdfghjkmnpqrstvwxz"
KIT = 8  # letters of a kit's name
KEY_COLUMNS = ("kit", "mode", "item", "reply", "system", "conv_id", "utterance_idx", "response")
#: what the page saves, in each mode
SAVED = {
    LIKERT: ("kit", "rater", "item", "reply", "position", *SCALES),
    AB: ("kit", "rater", "item", "first", "second", "chosen"),
}


# ---------------------------------------------------------------------------------------------------- the kit


def write_kit(
    folder: Path,
    examples: Sequence[dict],
    systems: dict[str, list[str]],
    count: int,
    mode: str = LIKERT,
    seed: int = 42,
    overwrite: bool = False,
    about: Sequence[str] = (),
) -> tuple[Path, Path]:
    """rating.html, for the raters, and key.csv, which unblinds it; returns both paths.

    `examples`: dicts with conv_id, utterance_idx and history (texts, oldest first, the speaker begins), one
    for each of a system's replies. `count` of them are drawn with `seed`. The page knows no system, only ids
    that are drawn too; replies that several systems share are shown once and count for all of them. Where one
    system writes no capital letter, as GloVe-T5 does, none is shown. `about`: lines on items and systems,
    noted beside the key for the summary's foot. `overwrite` keeps another kit's key, without which its
    ratings mean nothing, as key-KIT.csv.
    """
    page, key = Path(folder) / "rating.html", Path(folder) / "key.csv"
    refuse_existing([page, key], overwrite, "another --name")
    if mode == AB and len(systems) < 2:
        raise UserError("--rating-mode ab compares two systems or more; give another one, or likert")
    for name, replies in systems.items():
        if len(replies) != len(examples):
            raise UserError(f"{name}: {len(replies)} replies for {len(examples)} items")
    draw = random.Random(f"{seed} rating kit")
    chosen = draw.sample(range(len(examples)), min(count, len(examples)))
    uncased = [name for name, replies in systems.items() if "".join(replies).islower()]
    if 0 < len(uncased) < len(systems):
        note = f"All replies are shown in lower case, as {', '.join(sorted(uncased))} would be known by it."
        print(f"note: {note}")
        about = [*about, note]
        systems = {name: [text.lower() for text in replies] for name, replies in systems.items()}
    used: set[str] = set()
    items, rows = [], []
    for i in chosen:
        ids = {}
        for name in draw.sample(sorted(systems), len(systems)):  # an order that says nothing either
            text = " ".join(systems[name][i].split())
            if text not in ids:
                ids[text] = new_id(draw, used)
        item = new_id(draw, used)
        shown = [{"id": reply, "text": text} for text, reply in ids.items()]
        items.append({"id": item, "history": list(examples[i]["history"]), "replies": shown})
        for name, replies in systems.items():
            text = " ".join(replies[i].split())
            place = (examples[i]["conv_id"], examples[i]["utterance_idx"])
            rows.append((mode, item, ids[text], name, *place, text))
    kit = "".join(LETTERS[int(c, 16)] for c in storage.fingerprint(mode, seed, items)[:KIT])
    content = {
        "kit": kit,
        "mode": mode,
        "items": items,
        "points": POINTS,
        "columns": SAVED[mode],
        "scales": [{"key": k, "name": v[0], "question": v[1]} for k, v in SCALES.items()],
    }
    if key.exists() and (former := read_key(key)["kit"].iloc[0]) != kit:
        kept = former_key(key, former)
        for old, new in ((key, kept), (storage.origin_file(key), storage.origin_file(kept))):
            if old.exists():
                old.rename(new)
        print(f"{kept}: the key of the kit that was here, for the ratings of it")
    storage.write_csv(
        key,
        pd.DataFrame([(kit, *row) for row in rows], columns=list(KEY_COLUMNS)),
        origin={"about": [*about, f"Kit drawn with seed {seed}. {runs.made_by()}"]},
    )
    storage.write_text(
        page, render("rating.html", content=content, scales=SCALES, points=POINTS, example=EXAMPLE)
    )
    return page, key


def kit_of(
    folder: Path,
    examples: Sequence[Example],
    systems: Sequence[dict],
    count: int,
    mode: str,
    seed: int,
    overwrite: bool,
    about: Sequence[str] = (),
) -> None:
    """`write_kit` of a table's systems (dicts with name and replies), and say what to do with it.

    The gold replies are rated too; where two systems or more are compared pair by pair, they are not.
    """
    replies = {s["name"]: s["replies"] for s in systems}
    if mode == AB and len(replies) > 2:
        replies.pop("gold", None)
    plain = [{k: getattr(e, k) for k in ("conv_id", "utterance_idx", "history")} for e in examples]
    page, key = write_kit(folder, plain, replies, count, mode, seed, overwrite, about)
    each = read_key(key).groupby("item")["reply"].nunique()
    asked = each.sum() * len(SCALES) if mode == LIKERT else (each * (each - 1) // 2).sum()
    print(f"{page}: for the raters, who open it in a browser and send back the csv that it saves")
    print(f"{len(each)} conversations, {asked} judgements a rater, replies of {', '.join(replies)}")
    print(f"{key}: says whose each reply is; raters must not have it")
    shown = len(each) if mode == LIKERT else int((each > 1).sum())  # same replies are not shown as a pair
    if shown < MIN_ITEMS:
        more = "make a larger kit (--rating-kit N, --items all)"
        if len(each) < count:
            more = "these are all that the table has; it takes a larger test split"
        print(
            f"warning: {shown} of these conversations have something to rate, and the summary will refuse "
            f"fewer than {MIN_ITEMS} rated items; {more}"
        )


def former_key(key: Path, kit: str) -> Path:
    """Where the key of a replaced kit is kept."""
    return key.with_name(f"key-{kit}.csv")


def new_id(draw: random.Random, used: set[str]) -> str:
    """Six letters that were not drawn before."""
    while True:
        name = "".join(draw.choices(LETTERS, k=6))
        if name not in used:
            used.add(name)
            return name


# --------------------------------------------------------------------------------------------- what came back


def read_key(file: Path) -> pd.DataFrame:
    """The rows of key.csv: which system wrote which reply of which item."""
    if not file.exists():
        raise UserError(
            f"{file}: no such file; --name is to be the one that the kit was made with (a new kit: python "
            "evaluate_responses.py SYSTEM ... --rating-kit N)"
        )
    key = read_rows(file, KEY_COLUMNS, made_by="python evaluate_responses.py SYSTEM ... --rating-kit N")
    kits = key[["kit", "mode"]].drop_duplicates()
    if len(kits) != 1 or kits["mode"].iloc[0] not in MODES:
        raise UserError(f"{file}: not the key of one rating kit; take the key.csv beside its rating.html")
    return key


def read_ratings(files: Iterable[str | Path], key: pd.DataFrame) -> pd.DataFrame:
    """All ratings of one kit, a row for each rater and reply (or comparison), as the page saves them.

    Raises UserError, with file and line, for a row of another kit, a value that is none, and two ratings of
    one thing by one name that differ. A rater may save several times: equal rows count once.
    """
    kit, mode = key["kit"].iloc[0], key["mode"].iloc[0]
    known = set(zip(key["item"], key["reply"], strict=True))
    tables = []
    for file in map(Path, files):
        for row in read_rows(file, ["kit"], made_by=None).to_dict("records"):
            if row["kit"] != kit:
                raise UserError(
                    f"{file}, line {row['line']}: a rating of kit {row['kit'][:20]!r}, but the key is that "
                    f"of kit {kit}; --name says whose kit was rated"
                )
        table = read_rows(file, SAVED[mode], made_by=None)
        for row in table.to_dict("records"):
            check_row(row, f"{file}, line {row['line']}", mode, known)
        table["rater"] = table["rater"].str.split().str.join(" ")
        tables.append(table.assign(place=[f"{file}, line {line}" for line in table["line"]]))
    ratings = pd.concat(tables, ignore_index=True)
    values = list(SCALES) if mode == LIKERT else ["chosen"]
    names = ["reply"]
    ratings[values] = ratings[values].apply(lambda column: column.str.strip())
    if mode == AB:  # a pair is one thing in whichever order it was shown
        names = ["one of two", "other of two"]
        ratings[names] = np.sort(ratings[["first", "second"]].to_numpy(dtype=str), axis=1)
    ratings = ratings.drop_duplicates(["rater", "item", *names, *values])
    twice = ratings[ratings.duplicated(["rater", "item", *names], keep=False)]
    if len(twice):
        one, other = twice[twice["item"] == twice["item"].iloc[0]]["place"].iloc[:2]
        raise UserError(
            f"{other}: {twice['rater'].iloc[0]} rated the same otherwise in {one}; give the newest file of a "
            "rater alone, and to two people of one name two names"
        )
    return ratings.drop(columns=["line", "place", "one of two", "other of two"], errors="ignore")


def check_row(row: dict, where: str, mode: str, known: set[tuple[str, str]]) -> None:
    if not row["rater"].strip():
        raise UserError(f"{where}: no name of a rater")
    replies = [row["reply"]] if mode == LIKERT else [row["first"], row["second"]]
    if any((row["item"], reply) not in known for reply in replies):
        raise UserError(f"{where}: a reply that is not in this kit")
    if mode == AB and row["chosen"].strip() not in ("tie", *replies):
        raise UserError(f"{where}: chosen is {row['chosen'][:20]!r}, expected one of the two, or tie")
    if mode == LIKERT:
        for scale in SCALES:
            if row[scale].strip() not in ("", "1", "2", "3", "4", "5"):
                raise UserError(f"{where}: {scale} is {row[scale][:20]!r}, expected 1 to 5, or nothing")


def unblinded(files: Iterable[str | Path], key_file: Path) -> pd.DataFrame:
    """Likert ratings, one a row: rater, scale, value, response, and the systems whose reply that is.

    Raises UserError as `read_ratings`, and for choices between two, which rate no reply by itself.
    """
    key = read_key(key_file)
    if key["mode"].iloc[0] != LIKERT:
        raise UserError(f"{key_file}: the key of choices between two replies, not of ratings of each")
    told = key.groupby(["item", "reply", "conv_id", "utterance_idx", "response"], as_index=False)
    told = told.agg(system=("system", ", ".join))
    long = read_ratings(files, key).melt(["rater", "item", "reply"], list(SCALES), "scale", "value")
    long = long[long["value"] != ""].merge(told, on=["item", "reply"])
    return long[["conv_id", "utterance_idx", "system", "response", "rater", "scale", "value"]]


def summarise(files: Iterable[str | Path], key_file: Path) -> str:
    """Markdown: what the raters said of each system, how far they agree, and who wins against whom.

    Raises UserError where fewer than MIN_ITEMS items were rated at all; a figure that the ratings do not
    carry is replaced by the reason.
    """
    files = list(files)
    key = read_key(key_file)
    ratings = read_ratings(files, key)
    mode = key["mode"].iloc[0]
    if mode == LIKERT:
        ratings[list(SCALES)] = ratings[list(SCALES)].apply(pd.to_numeric)
        ratings = ratings.dropna(subset=list(SCALES), how="all")
    count, raters = ratings["item"].nunique(), ratings["rater"].nunique()
    if count < MIN_ITEMS:
        names = ", ".join(map(str, files))
        raise UserError(
            f"{names}: {count} rated items, of {key['item'].nunique()} in the kit, are too few; intervals "
            f"and tests need {MIN_ITEMS} (rate on: the page has kept what was rated; or make a larger kit)"
        )
    people = "1 rater" if raters == 1 else f"{raters} raters"
    lines = [f"# Human ratings ({people}, {count} items, kit {key['kit'].iloc[0]})", ""]
    if mode == LIKERT:
        lines += likert_lines(ratings, key)
    else:
        lines += comparison_lines(ratings, key)
    return "\n".join(lines) + "\n"


def likert_lines(ratings: pd.DataFrame, key: pd.DataFrame) -> list[str]:
    systems = list(dict.fromkeys(key["system"]))
    joined = ratings.merge(key[["item", "reply", "system"]], on=["item", "reply"])
    names = [SCALES[s][0] for s in SCALES]
    rows = []
    for system in systems:
        of_items = joined[joined["system"] == system].groupby("item")[list(SCALES)].mean()
        rows.append([cell(system), *(mean_cell(of_items[s]) for s in SCALES)])
    alphas = [agreement(ratings.pivot(index="rater", columns="reply", values=s), "ordinal") for s in SCALES]
    rows.append(["*Krippendorff's alpha*", *alphas])
    lines = [
        markup.table(["system", *names], rows),
        "",
        "Means of items (1 to 5; an item's raters averaged first), with 95 % intervals of the mean (t). "
        "Alpha: ordinal, over the replies that two or more rated.",
    ]
    outcomes = {}
    for a, b in combinations(systems, 2):
        for scale in SCALES:
            wide = joined.pivot(index=["item", "rater"], columns="system", values=scale)
            if {a, b} <= set(wide):
                of_items = (wide[a] - wide[b]).dropna().groupby("item").mean()
                outcomes[f"{a} : {b}", SCALES[scale][0]] = np.sign(of_items)
    return [*lines, "", *outcome_lines(outcomes)]


def comparison_lines(ratings: pd.DataFrame, key: pd.DataFrame) -> list[str]:
    sides = []
    for one, other in (("first", "second"), ("second", "first")):  # each comparison seen from both sides
        side = ratings[["item", "rater"]].assign(one=ratings[one], other=ratings[other])
        won, lost = ratings["chosen"] == ratings[one], ratings["chosen"] == ratings[other]
        sides.append(side.assign(vote=won.astype(int) - lost.astype(int)))
    votes = pd.concat(sides)
    means = votes.groupby(["item", "one", "other"])["vote"].mean()
    replies = key.pivot(index="item", columns="system", values="reply")
    outcomes, same = {}, 0
    for a, b in combinations(dict.fromkeys(key["system"]), 2):
        signs = {}
        for item, one, other in zip(replies.index, replies[a], replies[b], strict=True):
            if one == other:
                signs[item], same = 0.0, same + 1
            elif (item, one, other) in means.index:
                signs[item] = float(np.sign(means[item, one, other]))
        outcomes[f"{a} : {b}", "Preference"] = pd.Series(signs, dtype=float)
    lines = outcome_lines(outcomes)
    ordered = votes[votes["one"] < votes["other"]]
    units = ordered.pivot(index="rater", columns=["item", "one", "other"], values="vote")
    decided = ratings[ratings["chosen"] != "tie"]
    first = "Every choice was a tie."
    if len(decided):
        share = (decided["chosen"] == decided["first"]).mean()
        first = (
            f"The reply shown first was chosen in {share:.1%} of the {len(decided)} choices without a tie."
        )
    return [
        *lines,
        "",
        f"Krippendorff's alpha of the choices: {agreement(units, 'nominal')} (nominal, over the comparisons "
        f"that two or more made). {first} Replies that were the same word by word count as ties unseen: "
        f"{same}.",
    ]


def mean_cell(values: pd.Series) -> str:
    """Mean and 95 % interval over items."""
    values = values.dropna()
    if len(values) < MIN_ITEMS:
        return f"too few (n = {len(values)})"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():.2f} ({values.mean() - half:.2f} to {values.mean() + half:.2f})"


def agreement(table: pd.DataFrame, level: Literal["ordinal", "nominal"]) -> str:
    """Krippendorff's alpha of a table raters x units with gaps, or why there is none."""
    shared = table.loc[:, table.notna().sum() > 1]
    if table.notna().any(axis=1).sum() < 2:
        return "a single rater"
    if shared.shape[1] < MIN_ITEMS:
        return f"too few shared (n = {shared.shape[1]})"
    found = alpha(table, level)
    return "undefined: all the same" if np.isnan(found) else f"{found:.2f}"


def outcome_lines(outcomes: dict[tuple[str, str], pd.Series]) -> list[str]:
    """Wins, ties and losses (a sign for each item) of pairs of systems, with a sign test, Holm-corrected."""
    counts = {k: [int((v == s).sum()) for s in (1, 0, -1)] for k, v in outcomes.items()}
    enough = [k for k in counts if sum(counts[k]) >= MIN_ITEMS]
    raw = {str(k): sign_test(counts[k][0], counts[k][2]) for k in enough}
    adjusted = holm(raw)
    titles = list(dict.fromkeys(title for _, title in outcomes))
    rows = []
    for pair in dict.fromkeys(pair for pair, _ in outcomes):
        cells = [cell(pair)]
        for title in titles:
            case = (pair, title)
            if str(case) not in adjusted:
                cells.append(f"too few (n = {sum(counts.get(case, [0]))})")
                continue
            text = " / ".join(map(str, counts[case]))
            if adjusted[str(case)] < 0.05:
                text = f"**{text}**"
            cells.append(f"{text}, p {raw[str(case)]:.3f}")
        rows.append(cells)
    return [
        markup.table(["win / tie / loss", *titles], rows),
        "",
        "Items that the first of the two wins, ties, loses: the sum of its raters' judgements. p: two-sided "
        f"sign test over items, ties left out; bold: below .05 after Holm's correction over the {len(raw)} "
        "tests of this table.",
    ]


def sign_test(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def report(files: Iterable[str | Path], folder: Path, overwrite: bool) -> str:
    """`summarise` the ratings of the kit in `folder`, or of one that it replaced, into ratings.md;
    `unblinded`, into ratings.csv."""
    files = list(files)
    key, text, table = (folder / name for name in ("key.csv", "ratings.md", "ratings.csv"))
    kits = read_rows(Path(files[0]), ["kit"], made_by=None)["kit"]
    own = kits.iloc[0]  # any text, if it is no kit's file
    if set(own) <= set(LETTERS) and (former := former_key(key, own[:KIT])).exists():
        key = former
    by_item = read_key(key)["mode"].iloc[0] == LIKERT
    refuse_existing([text, table], overwrite, "")
    foot = [*storage.read_origin(key).get("about", []), runs.made_by()]
    found = "\n\n".join([summarise(files, key).rstrip(), *foot]) + "\n"
    if by_item:
        storage.write_csv(table, unblinded(files, key))
    elif table.exists():  # of a kit before this one
        storage.remove(table)
    storage.write_text(text, found)
    return found
