"""Damaged files: a loader gives valid rows or an error that names the file. Sound files: no row is lost."""

import csv
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import corpora
import layouts
import storage
import systems
from corpora import Example
from DPR.learning import read_entries
from options import Paths, UserError

SETTINGS = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

EXAMPLES = [
    Example("hit:0_conv:1", 2, "sad", ("My cat died, sadly.",), "I'm sorry."),
    Example("hit:0_conv:1", 4, "sad", ("My cat died, sadly.", "I'm sorry.", 'He was "old".'), "NA"),
    Example("hit:1_conv:2", 2, "proud", ("I won",), "naïve null"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------------------------- what a valid row is


def is_text(value):
    return isinstance(value, str) and value.encode("utf-8") is not None


def valid_dialogues(table):
    assert len(table)
    assert all(map(is_text, table["utterance"])) and table["utterance"].str.strip().ne("").all()
    assert set(table["context"]) <= set(corpora.EMOTIONS)
    for _, rows in table.groupby("conv_id", sort=False):
        assert rows["utterance_idx"].tolist() == list(range(1, len(rows) + 1))


def valid_turns(examples):
    assert examples
    assert len({e.key for e in examples}) == len(examples)
    for e in examples:
        assert len(e.history) == e.utterance_idx - 1 and e.utterance_idx % 2 == 0
        assert all(map(is_text, (*e.history, e.response))) and e.emotion in corpora.EMOTIONS


def valid_pairs(table):
    assert len(table) and set(table["level"]) <= {0, 1, 2}
    assert set(table.get("label", table["level"])) <= {0, 1, 2}
    assert all(map(is_text, [*table["seeker_post"], *table["response_post"]]))


def valid_scores(scores):
    assert len(scores) == len(EXAMPLES) and all(isinstance(s, float) and -1 <= s <= 1 for s in scores)


def valid_score_table(table):
    assert len(table) and table["sentiment"].between(-1, 1).all()


def valid_labels(labels):
    valid_scores(labels["sentiment"])
    for dim in ("emo", "exp", "int"):
        assert len(labels[dim]) == len(EXAMPLES) and set(labels[dim]) <= {0, 1, 2}


def valid_exemplars(rows):
    assert len(rows) == len(EXAMPLES)
    assert all(isinstance(row, list) and len(row) <= 2 and all(map(is_text, row)) for row in rows)


def replies_of(path):
    return systems.read_file(path, EXAMPLES, Paths(path.parent))


def valid_systems(found):
    """What tables read: each reply a text for an item of the split, none twice."""
    assert found
    for system in found:
        assert len(system.replies) == len(system.numbers) == len(set(system.numbers)) > 0
        assert all(map(is_text, system.replies)) and set(system.numbers) <= set(range(len(EXAMPLES)))
        assert any(text.strip() for text in system.replies)


def valid_entries(entries):
    assert entries
    for e in entries:
        assert is_text(e["question"]) and e["positive_ctxs"]
        for kind in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs"):
            assert all(is_text(p["text"]) for p in e.get(kind, []))


def valid_object(content):
    assert isinstance(content, dict)


# ------------------------------------------------------------------------------------------------ sound files


def csv_bytes(columns, rows, delimiter=","):
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    return (
        pd.DataFrame(rows, columns=columns)
        .to_csv(
            index=False,
            sep=delimiter,
            quoting=quoting,
            quotechar=None if delimiter == "\t" else '"',
            lineterminator="\n",
        )
        .encode("utf-8")
    )


def dialogue_bytes(examples=EXAMPLES):
    lines, seen = ["conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"], set()
    for e in examples:
        for n, text in enumerate((*e.history, e.response), start=1):
            if (e.conv_id, n) not in seen:
                seen.add((e.conv_id, n))
                lines.append(
                    f"{e.conv_id},{n},{e.emotion},a prompt,{n},{text.replace(',', '_comma_')},5|5|5_2|2|5,"
                )
    return ("\n".join(lines) + "\n").encode("utf-8")


KEYS = [e.key for e in EXAMPLES]
PAIRS = [
    ("s1", "r1", 'say "hi", all', "two\nlines", 0),
    ("s2", "r2", "NA", "ok", 2),
    ("s3", "r3", "é", "a, b", 1),
]
PASSAGE = {"title": "", "text": 'so "é"'}
ENTRIES = [
    {"question": f"q {n}", "positive_ctxs": [PASSAGE], "hard_negative_ctxs": [PASSAGE], "negative_ctxs": []}
    for n in range(2)
]


@dataclass(frozen=True)
class Loader:
    name: str
    sound: bytes
    load: Callable[[Path], Any]
    check: Callable[[Any], None]


LOADERS = {
    "dialogues": Loader("train.csv", dialogue_bytes(), corpora.read_dialogues, valid_dialogues),
    "turns": Loader("train.csv", dialogue_bytes(), corpora.listener_turns, valid_turns),
    "turns gz": Loader(
        "train.csv.gz", gzip.compress(dialogue_bytes(), mtime=0), corpora.listener_turns, valid_turns
    ),
    "raw pairs": Loader(
        "reddit.csv",
        csv_bytes(corpora.RAW_PAIR_COLUMNS, PAIRS),
        lambda p: corpora.read_pairs(p, raw=True),
        valid_pairs,
    ),
    "pairs": Loader(
        "pairs.csv",
        csv_bytes(corpora.PAIR_COLUMNS, [(*p, 1) for p in PAIRS]),
        corpora.read_pairs,
        valid_pairs,
    ),
    "vader": Loader(
        "train_vader.csv",
        csv_bytes(corpora.VADER_COLUMNS, [(*k, "NA", 0.5) for k in KEYS]),
        corpora.read_vader,
        valid_score_table,
    ),
    "vader of turns": Loader(
        "train_vader.csv",
        csv_bytes(corpora.VADER_COLUMNS, [(*k, 'a "b", c', -0.25) for k in KEYS]),
        lambda p: corpora.read_sentiment(p, EXAMPLES),
        valid_scores,
    ),
    "labels": Loader(
        "train_labels.csv",
        csv_bytes(corpora.LABEL_COLUMNS, [(*k, 0, 1, 2, 0.125, 'a "b", c') for k in KEYS]),
        lambda p: corpora.read_labels(p, EXAMPLES),
        valid_labels,
    ),
    "exemplars": Loader(
        "train_dpr.csv",
        csv_bytes(
            ("conv_id", "utterance_idx", "exemplars"),
            [(*k, json.dumps(["a, b", 'say "é"', "c"])) for k in KEYS],
        ),
        lambda p: corpora.read_exemplars(p, EXAMPLES, top=2),
        valid_exemplars,
    ),
    **{
        f"replies, {name}": Loader(name, content, replies_of, valid_systems)
        for name, content in {
            "predictions.tsv": csv_bytes(layouts.COLUMNS, [(*k, 'so "é"') for k in KEYS], "\t"),
            "theirs.csv": csv_bytes(
                ("history", "reference", "reply"),
                [(" ".join(e.history), e.response, "so, sad") for e in EXAMPLES],
            ),
            "theirs.jsonl": b"".join(
                json.dumps({"reference": e.response, "prediction": "so sad"}).encode() + b"\n"
                for e in EXAMPLES
            ),
            "theirs.json": json.dumps(
                [{"context": e.history, "gold": e.response, "generated": "Oh."} for e in EXAMPLES]
            ).encode(),
            "theirs.txt": "".join(f"Ref: {e.response}\nPred: so sad\n" for e in EXAMPLES).encode(),
        }.items()
    },
    "entries": Loader("empd_train.json", json.dumps(ENTRIES).encode(), read_entries, valid_entries),
    "json": Loader(
        "args.json",
        json.dumps({"args": {"lr": 1e-4, "name": "é", "x": [1, None]}}).encode(),
        storage.read_json,
        valid_object,
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_sound_file_loads(folder, kind):
    loader = LOADERS[kind]
    path = folder / loader.name
    path.write_bytes(loader.sound)
    loader.check(loader.load(path))


# ----------------------------------------------------------------------------------------------------- damage

SNIPPETS = [
    *(
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\t",
        b"\0",
        b"\xff",
        b"\xc3",
        b"\\",
        b"[",
        b"{",
        b"]",
        b"}",
        b"'",
        b"_comma_",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
    ),
    *(
        b"NA",
        b"nan",
        b"inf",
        b"-1",
        b"0",
        b"3",
        b"1.5",
        b"1e400",
        b"1_0",
        b"null",
        b"NaN",
        b"true",
        b"9" * 5000,
        b"\\ud800",
        b'"\\udfff',
        b"[" * 5000,
    ),
]
PLACE = st.floats(0, 1, allow_nan=False)
DAMAGE = st.one_of(
    st.tuples(st.just("replace"), PLACE, st.sampled_from(SNIPPETS)),
    st.tuples(st.just("insert"), PLACE, st.sampled_from(SNIPPETS)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("delete"), PLACE, st.integers(1, 60)),
    st.tuples(st.just("truncate"), PLACE, st.none()),
    st.tuples(st.sampled_from(["double line", "drop line", "move line"]), PLACE, PLACE),
)


def damaged(content, damage):
    kind, place, what = damage
    if kind.endswith("line"):
        lines = content.splitlines(keepends=True) or [b""]
        at = int(place * (len(lines) - 1))
        line = lines[at] if kind == "double line" else lines.pop(at)
        if kind != "drop line":
            lines.insert(int(what * len(lines)), line)
        return b"".join(lines)
    at = int(place * len(content))
    if kind == "truncate":
        return content[:at]
    if kind == "delete":
        return content[:at] + content[at + what :]
    return content[:at] + what + content[at + (len(what) if kind == "replace" else 0) :]


@pytest.mark.parametrize("kind", LOADERS)
@SETTINGS
@given(damages=st.lists(DAMAGE, min_size=1, max_size=3))
def test_a_damaged_file_gives_valid_rows_or_an_error_that_names_it(folder, kind, damages):
    loader = LOADERS[kind]
    content = loader.sound
    for damage in damages:
        content = damaged(content, damage)
    path = folder / loader.name
    path.write_bytes(content)
    try:
        found = loader.load(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        loader.check(found)


@pytest.mark.parametrize("kind", ["entries", "json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b"[" + b"9" * 5000 + b"]",
        b'{"a": \xff}',
        b"\xff\xfe{\0}\0",
    ],
)
def test_json_of_another_shape_is_an_error_that_names_it(folder, kind, content):
    path = folder / LOADERS[kind].name
    path.write_bytes(content)
    with pytest.raises(UserError, match=LOADERS[kind].name):
        LOADERS[kind].load(path)


BAD_ENTRIES = [
    {**ENTRIES[0], "question": 1},
    {**ENTRIES[0], "positive_ctxs": []},
    {**ENTRIES[0], "positive_ctxs": None},
    {**ENTRIES[0], "positive_ctxs": "text"},
    {**ENTRIES[0], "positive_ctxs": {"text": "x"}},
    {**ENTRIES[0], "hard_negative_ctxs": [{"title": ""}]},
    {**ENTRIES[0], "negative_ctxs": [{"text": None}]},
    {**ENTRIES[0], "negative_ctxs": ["text"]},
    "text",
    None,
]


@pytest.mark.parametrize("bad", BAD_ENTRIES)
def test_a_bad_question_is_named_by_its_number(tmp_path, bad):
    path = tmp_path / "empd_train.json"
    path.write_text(json.dumps([*ENTRIES, bad]))
    with pytest.raises(UserError, match=r"empd_train\.json, entry 2: "):
        read_entries(path)


@pytest.mark.parametrize("bad", [{"question": "\ud800"}, {"positive_ctxs": [{"text": "a \udfff"}]}])
def test_half_a_character_in_a_question_is_refused_before_a_tokenizer_breaks_on_it(tmp_path, bad):
    path = tmp_path / "empd_train.json"
    path.write_text(json.dumps([{**ENTRIES[0], **bad}]))
    with pytest.raises(UserError, match=r"empd_train\.json"):
        read_entries(path)


# --------------------------------------------------------------------------------------------- no row is lost

ODD = [
    "NA",
    "null",
    "None",
    "nan",
    '"',
    '""',
    "a, b",
    "_comma_",
    "'",
    "\\",
    "#",
    "-",
    "0",
    "é",
    "\u2028x",
    "\x85x",
    "🙂",
    "\ufeffa",
    "\0",
]
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\r\n")
TEXT = st.one_of(st.sampled_from(ODD), st.text(CHARACTERS, max_size=12), st.text('",\\ \tab', max_size=8))
UTTERANCE = TEXT.filter(lambda t: t.replace("_comma_", ",").strip())
#: quoted, in a file that is not: refused, since it may be another writer's way of quoting
QUOTED = re.compile(r'"(?=.)(.*"".*|.*\\".*)"', re.DOTALL)
POST = st.one_of(TEXT, st.text(st.sampled_from('",\r\n \ta'), max_size=8))


@SETTINGS
@given(
    conversations=st.lists(
        st.lists(UTTERANCE.filter(lambda t: not QUOTED.fullmatch(t)), min_size=2, max_size=5),
        min_size=1,
        max_size=5,
    ),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_no_turn_of_a_sound_dialogue_file_is_lost(folder, conversations, end):
    rows = [
        (f"c{c}", n, text) for c, turns in enumerate(conversations) for n, text in enumerate(turns, start=1)
    ]
    lines = ["conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"]
    lines += [f'{conv},{n},sad,"p,{n},{text.replace(",", "_comma_")},5|5|5_"2,' for conv, n, text in rows]
    path = folder / "sound.csv"
    path.write_bytes(end.join([*lines, ""]).encode("utf-8"))
    expected = [(conv, n, text.replace("_comma_", ",").strip()) for conv, n, text in rows]
    table = corpora.read_dialogues(path)
    assert list(zip(table["conv_id"], table["utterance_idx"], table["utterance"], strict=True)) == expected
    assert table["line"].tolist() == list(range(2, len(rows) + 2))
    turns = {e.key: (e.history, e.response) for e in corpora.listener_turns(path)}
    whole = [[text for conv, _, text in expected if conv == f"c{c}"] for c in range(len(conversations))]
    assert turns == {
        (f"c{c}", n): (tuple(t[: n - 1]), t[n - 1])
        for c, t in enumerate(whole)
        for n in range(2, len(t) + 1, 2)
    }


@SETTINGS
@given(
    pairs=st.lists(st.tuples(POST, POST, st.integers(0, 2)), min_size=1, max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_no_pair_is_lost_when_read_nor_when_written_and_read_again(folder, pairs, end):
    path = folder / "sound-reddit.csv"
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, quoting=csv.QUOTE_ALL, lineterminator=end)
        writer.writerows(
            [corpora.RAW_PAIR_COLUMNS, *((f"s{n}", f"r{n}", *pair) for n, pair in enumerate(pairs))]
        )
    expected = [(post.strip(), reply.strip(), level) for post, reply, level in pairs]

    def rows(table):
        return list(zip(table["seeker_post"], table["response_post"], table["level"], strict=True))

    raw = corpora.read_pairs(path, raw=True)
    assert rows(raw) == expected
    storage.write_csv(folder / "sound-pairs.csv", raw.assign(label=raw["level"])[list(corpora.PAIR_COLUMNS)])
    assert rows(corpora.read_pairs(folder / "sound-pairs.csv")) == expected


@SETTINGS
@given(texts=st.lists(st.tuples(UTTERANCE, st.lists(TEXT, max_size=3)), min_size=1, max_size=5))
def test_our_own_files_give_back_what_was_written(folder, texts):
    examples = [Example(f"c{n}", 2, "sad", ("hi",), text) for n, (text, _) in enumerate(texts)]
    keys = pd.DataFrame([e.key for e in examples], columns=["conv_id", "utterance_idx"])
    replies = [e.response.replace("\t", " ") for e in examples]
    exemplars = [row for _, row in texts]
    storage.write_csv(folder / "p.tsv", keys.assign(response=replies), sep="\t")
    storage.write_csv(
        folder / "e.csv", keys.assign(exemplars=[json.dumps(row, ensure_ascii=False) for row in exemplars])
    )
    storage.write_csv(
        folder / "v.csv", keys.assign(utterance=replies, sentiment=[n / 7 for n in range(len(keys))])
    )
    [system] = layouts.read_outputs(folder / "p.tsv")
    assert [(reply.key, reply.text) for reply in system.replies] == [
        (e.key, reply) for e, reply in zip(examples, replies, strict=True)
    ]
    assert corpora.read_exemplars(folder / "e.csv", examples) == exemplars
    assert corpora.read_sentiment(folder / "v.csv", examples) == [n / 7 for n in range(len(keys))]
    assert corpora.read_vader(folder / "v.csv")["utterance"].tolist() == replies
