"""Readers keep every row and name what is wrong; tokens, batches and the layouts that the models rely on."""

import copy
import csv
import gzip
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import corpora
import dataloaders
import storage
from corpora import Example
from critic_set import close_replies
from dataloaders import in_pieces
from exemplars import PooledTokens, PooledVectors, Prepended
from glove_models import word_tokenizer
from options import UserError

HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
EOS = 2
WORDS = "example : a b c d e f g h i j k l".split()


def turn(conv="c1", index=1, text="hello", emotion="sad", speaker=None):
    if speaker is None:
        speaker = int(index) % 2 if str(index).isdigit() else 0
    return f"{conv},{index},{emotion},my prompt,{speaker},{text},5|5|5_2|2|5,"


def write_dialogues(path, *rows, header=HEADER):
    path.write_bytes("\n".join([header, *rows, ""]).encode("utf-8"))
    return path


def write_table(path, columns, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter=delimiter, lineterminator="\n")
        writer.writerows([columns, *rows])
    return path


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def example(*turns, conv="c1"):
    return Example(conv, len(turns), "sad", turns[:-1], turns[-1])


# -------------------------------------------------------------------------------------------------- dialogues


def test_a_stray_quote_swallows_no_row(tmp_path):
    rows = [
        turn("c1", 1, '"so he said'),
        turn("c1", 2, 'what" now'),
        turn("c2", 1, "fine"),
        turn("c2", 2, '"'),
    ]
    table = corpora.read_dialogues(write_dialogues(tmp_path / "d.csv", *rows))
    assert table["utterance"].tolist() == ['"so he said', 'what" now', "fine", '"']
    assert table["line"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("word", ["NA", "null", "None", "nan", "0", "-"])
def test_words_that_look_missing_are_utterances(tmp_path, word):
    path = write_dialogues(tmp_path / "d.csv", turn("c1", 1, word), turn("c1", 2, word))
    (found,) = corpora.listener_turns(path)
    assert (found.history, found.response) == ((word,), word)


def test_comma_marks_become_commas_in_utterance_and_prompt(tmp_path):
    row = turn(text="well_comma_ yes_comma_no").replace("my prompt", "once_comma_ I")
    table = corpora.read_dialogues(write_dialogues(tmp_path / "d.csv", row))
    assert table.loc[0, ["utterance", "prompt"]].tolist() == ["well, yes,no", "once, I"]


def test_a_ninth_column_and_missing_optional_ones_are_tolerated(tmp_path):
    rows = [turn("c1", 1) + "<HOW_comma_>,hi|so it is", "c1,2,sad,my prompt,0,ok"]
    table = corpora.read_dialogues(write_dialogues(tmp_path / "d.csv", *rows))
    assert table["utterance"].tolist() == ["hello", "ok"]


def test_columns_are_found_by_name_not_by_place(tmp_path):
    path = write_dialogues(
        tmp_path / "d.csv",
        "hi,1,0,c1,p,sad",
        header="utterance,utterance_idx,speaker_idx,conv_id,prompt,context",
    )
    assert corpora.read_dialogues(path).loc[0, ["conv_id", "context", "utterance"]].tolist() == [
        "c1",
        "sad",
        "hi",
    ]


def test_gz_reads_the_same_as_plain(corpus, tmp_path):
    packed = tmp_path / "train.csv.gz"
    packed.write_bytes(gzip.compress((corpus / "train.csv").read_bytes()))
    pd.testing.assert_frame_equal(
        corpora.read_dialogues(packed), corpora.read_dialogues(corpus / "train.csv")
    )


def test_listener_turns_are_the_even_ones_with_all_that_was_said_before(tmp_path):
    texts = {"c2": "p q r s t".split(), "c1": "u v".split(), "c3": ["w"]}
    rows = [turn(conv, n, text) for conv, row in texts.items() for n, text in enumerate(row, start=1)]
    found = corpora.listener_turns(write_dialogues(tmp_path / "d.csv", *rows))
    assert [(e.key, e.history, e.response) for e in found] == [
        (("c2", 2), ("p",), "q"),
        (("c2", 4), ("p", "q", "r"), "s"),
        (("c1", 2), ("u",), "v"),
    ]


def test_all_turns_are_the_listeners_and_every_answer_of_the_speaker(tmp_path, tokenizer):
    texts = {"c2": "a b c d e".split(), "c1": "f g".split(), "c3": ["h"]}
    rows = [turn(conv, n, text) for conv, row in texts.items() for n, text in enumerate(row, start=1)]
    path = write_dialogues(tmp_path / "d.csv", *rows)
    found = corpora.all_turns(path)
    assert [(e.key, e.history, e.response) for e in found] == [
        (("c2", 2), ("a",), "b"),
        (("c2", 3), ("a", "b"), "c"),
        (("c2", 4), ("a", "b", "c"), "d"),
        (("c2", 5), ("a", "b", "c", "d"), "e"),
        (("c1", 2), ("f",), "g"),
    ]
    # whose turn it is: the source ends with the other one's mark, even where it is cut
    batch = generator(tokenizer, found, src_len=2).collate(list(range(5)))
    ends = [real(batch, "speaker_ids", "source_mask", row)[-1] for row in range(5)]
    assert ends == [1, 2, 1, 2, 1]


def test_a_file_without_listener_turns_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"d\.csv: no conversation has a listener turn, its second"):
        corpora.listener_turns(write_dialogues(tmp_path / "d.csv", turn()))


FIRST = [turn("c1", 1), turn("c1", 2)]  # lines 2 and 3


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        pytest.param("", None, "empty", id="empty file"),
        pytest.param(HEADER + "\n", None, "no rows", id="header only"),
        pytest.param(
            "\n".join([HEADER.replace(",prompt", ""), *FIRST]),
            1,
            "make it again with: python prepare_data.py",
            id="missing column",
        ),
        pytest.param(
            "\n".join([HEADER, *FIRST, turn("c2", 1, emotion="hungry")]), 4, "hungry", id="unknown emotion"
        ),
        pytest.param(
            "\n".join([HEADER, *FIRST, turn("c1", 4)]),
            4,
            "expected 3 (a gap or a repeat); count them anew",
            id="gap",
        ),
        pytest.param("\n".join([HEADER, *FIRST, turn("c1", 2)]), 4, "expected 3", id="repeat"),
        pytest.param("\n".join([HEADER, *FIRST, turn("c2", 2)]), 4, "expected 1", id="begins in the middle"),
        pytest.param("\n".join([HEADER, *FIRST, turn("c2", 1), turn("c1", 3)]), 5, "c1", id="goes on later"),
        pytest.param(
            "\n".join([HEADER, *FIRST, turn("c2", 1), turn("c1", 1)]), 5, "c1", id="begins again later"
        ),
        pytest.param(
            "\n".join([HEADER, *FIRST, turn("c1", 3, "  ")]), 4, "empty utterance; fill it in", id="empty"
        ),
        pytest.param("\n".join([HEADER, *FIRST, "c1,3,sad,p,1"]), 4, "5 columns", id="short row"),
        pytest.param("\n".join([HEADER, *FIRST, turn("c1", "three")]), 4, "three", id="index not a number"),
        pytest.param("\n".join([HEADER, *FIRST, turn("c1", "3.5")]), 4, "3.5", id="index not whole"),
        pytest.param("\n".join([HEADER, turn("c1", 0)]), 2, "'0'", id="index below 1"),
        pytest.param(
            "\n".join([HEADER, *FIRST, turn("c1", 3, "x" * 200_000)]), 4, "field", id="field without end"
        ),
        pytest.param(
            "\n".join([HEADER, *FIRST]).encode() + b"\nc1,3,sad,p,1,caf\xe9,,", 4, "utf-8", id="not utf-8"
        ),
    ],
)
def test_a_bad_dialogue_file_is_named_with_its_line(tmp_path, content, line, what):
    path = tmp_path / "dialogues.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        corpora.read_dialogues(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line {line}:" if line else f"{path}:")
    assert what.lower() in message.lower()


@pytest.mark.parametrize("line", [1, 2, 150, 301, 401])
def test_a_bad_byte_in_a_large_file_is_named_with_its_line(tmp_path, line):
    lines = [HEADER, *(turn(f"c{n}", 1, "word " * 20) for n in range(400))]
    content = "\n".join(lines).encode().split(b"\n")
    content[line - 1] += b"\xff"
    path = tmp_path / "dialogues.csv"
    path.write_bytes(b"\n".join(content))
    with pytest.raises(UserError, match=rf"dialogues\.csv, line {line}: "):
        corpora.read_dialogues(path)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b[:5], lambda b: b[:-8] + b"\0" * 8, lambda b: b"not gzip"],
)
def test_a_damaged_gzip_is_named_with_the_command_that_makes_it(tmp_path, damage):
    path = tmp_path / "train.csv.gz"
    texts = np.random.default_rng(0).integers(0, 10**9, (200, 10)).astype(str)
    packed = gzip.compress(
        "\n".join([HEADER, *(turn(f"c{n}", 1, " ".join(row)) for n, row in enumerate(texts))]).encode()
    )
    path.write_bytes(damage(packed))
    with pytest.raises(UserError, match=r"train\.csv\.gz, line \d+: cannot be read .*prepare_data\.py"):
        corpora.read_dialogues(path)


# ------------------------------------------------------------------------------------------------------ pairs

PAIR = ("s1", "r1", "a post", "an answer", "1", "1")


@pytest.mark.parametrize("level", ["", "high", "1.0", "-1", "3", "nan", "inf"])
@pytest.mark.parametrize("column", ["level", "label"])
def test_a_level_or_label_that_is_not_0_to_2_is_named(tmp_path, level, column):
    bad = list(PAIR)
    bad[corpora.PAIR_COLUMNS.index(column)] = level
    path = write_table(tmp_path / "pairs.csv", corpora.PAIR_COLUMNS, [PAIR, bad])
    with pytest.raises(UserError, match=f"pairs.csv, line 3: {column} is '{level}'"):
        corpora.read_pairs(path)


def test_pairs_keep_quotes_commas_line_breaks_and_missing_looking_words(tmp_path):
    posts = ['say "hi", twice', "two\nlines", "NA", "null", ""]
    path = write_table(
        tmp_path / "pairs.csv", corpora.RAW_PAIR_COLUMNS, [("s", "r", p, f" {p} ", "2") for p in posts]
    )
    table = corpora.read_pairs(path, raw=True)
    assert table["seeker_post"].tolist() == posts
    assert table["response_post"].tolist() == posts
    assert table["level"].tolist() == [2] * 5


def test_an_unclosed_quote_in_pairs_is_an_error_not_a_swallowed_tail(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('sp_id,rp_id,seeker_post,response_post,level,rationales\ns,r,a,b,1,"open\ns,r,a,b,1,\n')
    with pytest.raises(UserError, match=r"pairs\.csv, line \d"):
        corpora.read_pairs(path, raw=True)


@pytest.mark.parametrize("post", ["a\rb", "a\r\nb", "a\nb", 'say "a\rb"', "x\u2028y\x1cz"])
def test_what_is_written_is_read_back_whatever_the_line_breaks(tmp_path, post):
    path = write_table(tmp_path / "raw.csv", corpora.RAW_PAIR_COLUMNS, [])
    with open(path, "a", encoding="utf-8", newline="") as handle:
        csv.writer(handle, quoting=csv.QUOTE_ALL).writerow(["s", "r", post, "after", 1])
    before = corpora.read_pairs(path, raw=True)
    storage.write_csv(tmp_path / "made.csv", before.assign(label=1)[list(corpora.PAIR_COLUMNS)])
    after = corpora.read_pairs(tmp_path / "made.csv")
    assert after["seeker_post"].tolist() == before["seeker_post"].tolist() == [post.strip()]


# ---------------------------------------------------------------------------- joined on conversation and turn

EXAMPLES = [example("a", "b"), example("a", "b", "c", "d"), example("e", "f", conv="NA")]
KEYS = [("c1", 2), ("c1", 4), ("NA", 2)]


def labels_rows(keys):
    return [(*key, n % 3, 1, 2, n / 10) for n, key in enumerate(keys)]


READERS = {
    "labels": (
        corpora.read_labels,
        corpora.LABEL_COLUMNS[:-1],
        labels_rows,
        ",",
        "label_dialogues.py",
    ),
    "exemplars": (
        corpora.read_exemplars,
        ("conv_id", "utterance_idx", "exemplars"),
        lambda keys: [(*k, json.dumps([f"{k}", "é"])) for k in keys],
        ",",
        "dpr_exemplar_retriever.py",
    ),
    "vader": (
        corpora.read_sentiment,
        corpora.VADER_COLUMNS,
        lambda keys: [(*k, "text", -0.5) for k in keys],
        ",",
        "prepare_data.py",
    ),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_misses_a_listener_turn_names_the_first_and_the_command(tmp_path, kind):
    read, columns, rows, delimiter, command = READERS[kind]
    path = write_table(tmp_path / f"{kind}.csv", columns, rows([KEYS[1]]), delimiter)
    with pytest.raises(UserError) as error:
        read(path, EXAMPLES)
    for part in (str(path), "1 of 3", "first missing: c1, utterance 2)", command):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", READERS)
def test_a_turn_that_stands_twice_is_refused(tmp_path, kind):
    read, columns, rows, delimiter, command = READERS[kind]
    path = write_table(tmp_path / f"{kind}.csv", columns, rows([*KEYS, KEYS[1]]), delimiter)
    twice = rf"{kind}\.csv, line 5: c1, utterance 4 stands there twice; make it again with: .*{command}"
    with pytest.raises(UserError, match=twice):
        read(path, EXAMPLES)


@pytest.mark.parametrize("kind", READERS)
def test_a_missing_file_names_the_command_that_makes_it(tmp_path, kind):
    with pytest.raises(UserError) as error:
        READERS[kind][0](tmp_path / "absent.csv", EXAMPLES)
    assert "absent.csv: no such file" in str(error.value)
    assert READERS[kind][-1] in str(error.value)


def test_values_are_joined_by_key_whatever_the_order_of_the_file(tmp_path):
    shuffled = [KEYS[2], ("other", 2), KEYS[0], KEYS[1]]
    labels = corpora.read_labels(
        write_table(tmp_path / "l.csv", corpora.LABEL_COLUMNS[:-1], labels_rows(shuffled)), EXAMPLES
    )
    assert labels == {"emo": [2, 0, 0], "exp": [1] * 3, "int": [2] * 3, "sentiment": [0.2, 0.3, 0.0]}
    scores = write_table(
        tmp_path / "v.csv", corpora.VADER_COLUMNS, [(*k, "", n / 4) for n, k in enumerate(shuffled)]
    )
    assert corpora.read_sentiment(scores, EXAMPLES) == [0.5, 0.75, 0.0]
    assert corpora.read_vader(scores)["sentiment"].tolist() == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("column", "value"),
    [("emo", "3"), ("exp", "x"), ("int", "1.5"), ("sentiment", "1.01"), ("sentiment", "nan")],
)
def test_a_label_out_of_range_is_named_with_its_line(tmp_path, column, value):
    table = pd.DataFrame(labels_rows(KEYS), columns=corpora.LABEL_COLUMNS[:-1]).astype(object)
    table.loc[1, column] = value
    table.to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(UserError, match=rf"labels\.csv, line 3: {column} is '{value}'"):
        corpora.read_labels(tmp_path / "labels.csv", EXAMPLES)


def test_exemplars_keep_their_order_up_to_the_top(tmp_path):
    found = ["x, y", 'say "z"', "NA", *map(str, range(9))]
    rows = [(*k, json.dumps(found, ensure_ascii=False)) for k in KEYS]
    path = write_table(tmp_path / "e.csv", ("conv_id", "utterance_idx", "exemplars"), rows)
    assert corpora.read_exemplars(path, EXAMPLES)[1] == found
    assert corpora.read_exemplars(path, EXAMPLES, top=2)[1] == ["x, y", 'say "z"']


@pytest.mark.parametrize(
    "cell",
    [
        "",
        "hello",
        '"text"',
        '{"a": 1}',
        "[1]",
        '["a", null]',
        '["a"',
        "[" * 50_000,
        f"[{'1' * 5000}]",
        r'["\ud800"]',
    ],
)
def test_a_cell_that_is_no_json_list_of_texts_is_named_with_its_line(tmp_path, cell):
    rows = [(*KEYS[0], "[]"), (*KEYS[1], cell), (*KEYS[2], "[]")]
    path = write_table(tmp_path / "exemplars.csv", ("conv_id", "utterance_idx", "exemplars"), rows)
    said = (
        r"exemplars\.csv, line 3: exemplars is not a JSON list of texts; make it again with: .*retriever\.py"
    )
    with pytest.raises(UserError, match=said):
        corpora.read_exemplars(path, EXAMPLES)


# ----------------------------------------------------------------------------------------------------- tokens


class Counting:
    """A tokenizer that remembers what it was asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.backend_tokenizer, self.asked = tokenizer, tokenizer.backend_tokenizer, []

    def get_vocab(self):
        return self.tokenizer.get_vocab()

    def __call__(self, texts, **kwargs):
        self.asked += texts
        return self.tokenizer(texts, **kwargs)


TEXTS = ["a b", "", "c", "a b", "zzz c", "c"]


def test_each_text_is_tokenised_once_without_special_tokens(tokenizer):
    counting = Counting(tokenizer)
    encoded = dataloaders.encode(counting, TEXTS)
    assert sorted(counting.asked) == sorted(set(TEXTS))
    assert {t: row.tolist() for t, row in encoded.items()} == {t: ids(tokenizer, t) for t in TEXTS}


def test_a_second_encoding_comes_from_the_cache_and_equals_the_first(tokenizer, tmp_path):
    fresh = dataloaders.encode(tokenizer, TEXTS, tmp_path / "cache")
    again = Counting(tokenizer)
    cached = dataloaders.encode(again, TEXTS, tmp_path / "cache")
    assert again.asked == []
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npz"]
    assert {t: r.tolist() for t, r in cached.items()} == {t: r.tolist() for t, r in fresh.items()}


def test_a_dialogue_that_is_not_kept_does_not_wait_for_its_whole_vocabulary(tokenizer, monkeypatch):
    """A reply encodes ten times, and a hash of 49,152 words takes longer than all of its tokens."""
    monkeypatch.setattr(dataloaders, "tokenizer_hash", pytest.fail)
    assert dataloaders.encode(tokenizer, ["a b"])["a b"].tolist() == ids(tokenizer, "a b")


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (WORDS, ["b", "a"]),
        (WORDS, ["c", "d"]),
        (WORDS, ["a", "b", "c"]),
        (WORDS, ["a"]),
        (["b", "a"], ["a", "b"]),
        (["x", *WORDS], ["a", "b"]),
    ],
)
def test_other_texts_or_another_vocabulary_do_not_hit_the_cache(tokenizer, tmp_path, words, texts):
    dataloaders.encode(tokenizer, ["a", "b"], tmp_path)
    other = word_tokenizer(words)
    encoded = dataloaders.encode(other, texts, tmp_path)
    assert {t: r.tolist() for t, r in encoded.items()} == {t: ids(other, t) for t in texts}


def test_one_vocabulary_read_in_two_ways_does_not_hit_the_cache(tmp_path):
    lowered, cased = word_tokenizer(WORDS), word_tokenizer(WORDS)
    cased.backend_tokenizer.normalizer = normalizers.NFKC()
    for tokenizer in (lowered, cased):
        assert dataloaders.encode(tokenizer, ["A b"], tmp_path)["A b"].tolist() == ids(tokenizer, "A b")
    assert ids(lowered, "A b") != ids(cased, "A b")


def test_one_vocabulary_with_other_merges_does_not_hit_the_cache(tmp_path):
    words = {w: i for i, w in enumerate(["a", "b", "c", "ab", "bc"])}
    found = []
    for merges in ([("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]):
        backend = Tokenizer(BPE(words, merges))
        rows = dataloaders.encode(PreTrainedTokenizerFast(tokenizer_object=backend), ["abc"], tmp_path)
        found.append(rows["abc"].tolist())
    assert found == [[3, 2], [0, 4]]


@pytest.mark.parametrize("name", ["glove", "t5-tiny", "bert-tiny"])
@pytest.mark.parametrize(
    "text",
    [
        "so </s> it",
        "</s>",
        "a<pad>b",
        "<s> <unk>",
        "\uff1c/s\uff1e",
        "</s> \uff1c/s\uff1e",
        "[SEP] [PAD]",
        "<extra_id_0>",
    ],
)
def test_a_control_token_in_a_text_is_words_fresh_or_cached(prepared, tmp_path, name, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(prepared / "data" / name))
    controls = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for _ in range(2):
        found = dataloaders.encode(tokenizer, [text, "so it"], tmp_path)
        assert len(found[text]) >= 3
        assert controls.isdisjoint(found[text].tolist())
        assert found["so it"].tolist() == ids(tokenizer, "so it")


def test_an_unknown_word_stays_one_unknown_word(tokenizer):
    assert dataloaders.encode(tokenizer, ["a zzz b"])["a zzz b"].tolist() == ids(tokenizer, "a zzz b")


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_encode_is_no_error_fresh_or_cached(tokenizer, tmp_path, texts):
    for _ in range(2):
        assert {
            t: len(r) for t, r in dataloaders.encode(tokenizer, texts, tmp_path).items()
        } == dict.fromkeys(texts, 0)


def test_two_processes_may_fill_the_cache_at_once(tokenizer, tmp_path, monkeypatch):
    save, beside = np.savez, []

    def save_while_another_does(handle, **arrays):
        save(handle, **arrays)
        if not beside:
            beside.append(None)
            beside[0] = dataloaders.encode(tokenizer, TEXTS, tmp_path)

    monkeypatch.setattr(np, "savez", save_while_another_does)
    encoded = dataloaders.encode(tokenizer, TEXTS, tmp_path)
    assert {t: r.tolist() for t, r in encoded.items()} == {t: r.tolist() for t, r in beside[0].items()}


@pytest.mark.parametrize(
    ("left", "expected", "mask"),
    [
        (False, [[5, 6, 7], [8, 9, 9], [9, 9, 9]], [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        (True, [[5, 6, 7], [9, 9, 8], [9, 9, 9]], [[1, 1, 1], [0, 0, 1], [0, 0, 0]]),
    ],
)
def test_padding_stands_on_the_side_asked_for(left, expected, mask):
    rows = [np.array([5, 6, 7]), np.array([8]), np.array([], dtype=np.int32)]
    found, found_mask = dataloaders.pad(rows, 9, left=left)
    assert (found.tolist(), found_mask.tolist()) == (expected, mask)


def test_a_batch_of_empty_rows_has_one_column():
    found, mask = dataloaders.pad([np.zeros(0)] * 2, 0)
    assert found.shape == (2, 1)
    assert mask.sum() == 0


# ---------------------------------------------------------------------------------------------------- batches

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 60, 777)]


def plan(epoch=0, seed=1, lengths=LENGTHS, batch_size=4, batch_tokens=0):
    return dataloaders.plan_epoch(
        lengths, batch_size=batch_size, batch_tokens=batch_tokens, seed=seed, epoch=epoch
    )


@pytest.mark.parametrize("planner", ["epoch", "once"])
@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(1, 0), (4, 0), (32, 300), (32, 1), (1000, 0)])
def test_a_plan_covers_each_example_once_within_both_limits(planner, batch_size, batch_tokens):
    if planner == "epoch":
        steps = plan(batch_size=batch_size, batch_tokens=batch_tokens)
    else:
        steps = dataloaders.plan_once(LENGTHS, batch_size, batch_tokens)
    assert sorted(i for step in steps for i in step) == list(range(len(LENGTHS)))
    for step in steps:
        assert 1 <= len(step) <= batch_size
        assert not batch_tokens or len(step) == 1 or len(step) * max(LENGTHS[i] for i in step) <= batch_tokens


def test_token_limit_fills_batches_as_far_as_it_allows():
    (step,) = plan(lengths=[10] * 3, batch_size=8, batch_tokens=30)
    assert len(step) == 3
    assert len(plan(lengths=[10] * 3, batch_size=8, batch_tokens=29)) == 2


def test_a_plan_is_a_function_of_its_arguments_alone():
    first = plan()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert plan() == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_plans_of_two_epochs_and_of_two_seeds_differ():
    different = [plan(0, 1), plan(1, 1), plan(0, 2), plan(1, 0), plan(11, 1), plan(1, 11)]
    batches = [{frozenset(step) for step in p} for p in different]
    assert all(a != b for n, a in enumerate(batches) for b in batches[:n])


def test_the_steps_of_an_epoch_are_not_sorted_by_length():
    longest = [max(LENGTHS[i] for i in step) for step in plan()]
    rises = sum(a < b for a, b in zip(longest, longest[1:], strict=False))
    assert 0.3 < rises / len(longest) < 0.7


def test_batches_hold_examples_of_like_length():
    waste = [max(LENGTHS[i] for i in step) - min(LENGTHS[i] for i in step) for step in plan()]
    assert np.mean(waste) < 2


def test_plan_once_begins_with_the_longest():
    steps = dataloaders.plan_once([3, 9, 5, 9, 1], 2)
    assert steps == [[1, 3], [2, 0], [4]]


@pytest.mark.parametrize("steps", [plan(lengths=[]), dataloaders.plan_once([], 4)])
def test_no_examples_make_no_steps(steps):
    assert steps == []


# ------------------------------------------------------------------------------------------------- generators

LONG = example("a b c", "d e", "f g h", "i j")
SHORT = example("k", "l", conv="c2")


def real(batch, name, mask, row):
    return batch[name][row][batch[mask][row].bool()].tolist()


def prepended(tokenizer, texts, most):
    return Prepended(SimpleNamespace(exemplar_len=most), tokenizer, None).split(texts)


def generator(tokenizer, examples=(LONG, SHORT), src_len=64, tgt_len=8, **options):
    return dataloaders.generator_data(list(examples), tokenizer, src_len=src_len, tgt_len=tgt_len, **options)


def test_a_source_is_its_turns_each_ended_by_eos(tokenizer):
    batch = generator(tokenizer).collate([0, 1])
    expected = [*ids(tokenizer, "a b c"), EOS, *ids(tokenizer, "d e"), EOS, *ids(tokenizer, "f g h"), EOS]
    assert real(batch, "source_ids", "source_mask", 0) == expected
    assert real(batch, "source_ids", "source_mask", 1) == [*ids(tokenizer, "k"), EOS]
    assert batch["names"] == ["c1 utterance 4", "c2 utterance 2"]


@pytest.mark.parametrize("src_len", range(1, 12))
def test_truncation_drops_the_oldest_tokens(tokenizer, src_len):
    whole = generator(tokenizer).collate([0])
    cut = generator(tokenizer, src_len=src_len).collate([0])
    assert cut["source_ids"].tolist()[0] == whole["source_ids"].tolist()[0][-src_len:]
    assert cut["speaker_ids"].tolist()[0] == whole["speaker_ids"].tolist()[0][-src_len:]


@pytest.mark.parametrize("mates", [[0], [0, 1], [1, 0], [1]])
def test_speakers_alternate_whatever_else_is_in_the_batch(tokenizer, mates):
    expected = {0: [1] * 4 + [2] * 3 + [1] * 4, 1: [1, 1]}
    batch = generator(tokenizer).collate(mates)
    for row, number in enumerate(mates):
        assert real(batch, "speaker_ids", "source_mask", row) == expected[number]
        assert not batch["speaker_ids"][row][~batch["source_mask"][row].bool()].any()


def test_exemplars_stand_marked_before_the_dialogue_and_have_no_speaker(tokenizer):
    data = generator(tokenizer, exemplars=prepended(tokenizer, [["l k", "j"], []], 20))
    batch = data.collate([0, 1])
    plain = generator(tokenizer).collate([0, 1])
    block = [*ids(tokenizer, f"{dataloaders.EXEMPLAR_MARKER} l k {dataloaders.EXEMPLAR_MARKER} j"), EOS]
    assert 3 not in block
    assert real(batch, "source_ids", "source_mask", 0) == block + real(plain, "source_ids", "source_mask", 0)
    assert real(batch, "speaker_ids", "source_mask", 0) == [0] * len(block) + real(
        plain, "speaker_ids", "source_mask", 0
    )
    assert real(batch, "source_ids", "source_mask", 1) == real(plain, "source_ids", "source_mask", 1)


def test_what_stands_before_the_turns_does_not_change_their_order_in_a_training(tokenizer):
    long, short = ["l k j i h g"] * 2, ["j"]
    exemplars = prepended(tokenizer, [short, long], 20)  # the longer example becomes the shorter one
    with_them, plain = generator(tokenizer, exemplars=exemplars), generator(tokenizer)
    assert np.argsort(with_them.lengths).tolist() != np.argsort(plain.lengths).tolist()
    orders = [[d.plan(1, 0, seed, 0) for seed in range(9)] for d in (with_them, plain)]
    assert orders[0] == orders[1]
    bounded = with_them.plan(2, sum(with_them.lengths) - 1, 0, 0)
    assert len(bounded) == 2  # a bound in tokens counts them


def test_exemplars_have_a_budget_of_their_own(tokenizer):
    batch = generator(
        tokenizer, src_len=5, exemplars=prepended(tokenizer, [["l k j i h g"] * 3, ["a"]], 6)
    ).collate([0])
    plain = generator(tokenizer, src_len=5).collate([0])
    assert batch["source_ids"].shape[1] == 11
    assert batch["source_ids"][0, 6:].tolist() == plain["source_ids"][0].tolist()
    assert batch["source_ids"][0, :6].tolist() == [
        *ids(tokenizer, f"{dataloaders.EXEMPLAR_MARKER} l k j"),
        EOS,
    ]


@pytest.mark.parametrize(("most", "whole"), [(4, 1), (5, 1), (7, 1), (8, 2), (13, 2), (14, 3), (99, 3)])
def test_only_whole_exemplars_stand_beside_the_first(tokenizer, most, whole):
    texts = ["l k", "j", "a b c d"]
    batch = generator(tokenizer, exemplars=prepended(tokenizer, [texts, []], most)).collate([0])
    plain = generator(tokenizer).collate([0])
    block = [i for t in texts[:whole] for i in ids(tokenizer, f"{dataloaders.EXEMPLAR_MARKER} {t}")]
    assert batch["source_ids"][0].tolist() == [*block[: most - 1], EOS, *plain["source_ids"][0].tolist()]


@pytest.mark.parametrize(("tgt_len", "kept"), [(None, 3), (8, 3), (3, 3), (2, 2), (1, 1)])
def test_a_target_ends_with_eos_only_where_its_reply_ends_and_is_padded_with_the_ignored_id(
    tokenizer, tgt_len, kept
):
    labels = generator(tokenizer, tgt_len=tgt_len).collate([1, 0])["labels"]
    assert labels[1].tolist() == [*ids(tokenizer, "i j"), EOS][:kept]
    short = [*ids(tokenizer, "l"), EOS][:kept]
    assert labels[0].tolist() == short + [-100] * (labels.shape[1] - len(short))


def test_without_a_limit_replies_stay_whole(tokenizer):
    reply = " ".join(["a", "b"] * 100)
    labels = generator(tokenizer, [example("k", reply)], tgt_len=None).collate([0])["labels"]
    assert labels[0].tolist() == [*ids(tokenizer, reply), EOS]


def test_what_a_limit_cuts_is_counted_and_said_where_it_is_more_than_its_share(tokenizer):
    fits, longer = example("a b c", "d e"), example("a b c d", "d e f")  # and an end each
    now, said = {"--src-len": 4, "--tgt-len": 3}, []
    for count in (19, 18):
        data = generator(tokenizer, [fits] * count + [longer], src_len=4, tgt_len=3)
        assert data.cut == {"--src-len": 1, "--tgt-len": 1}
        said.append([line.split(",")[0] for line in dataloaders.too_much_cut(data, now)])
    assert said == [[], ["WARNING: --tgt-len 3 cuts 1 of 19 training replies"]]


def test_lengths_are_what_a_batch_holds(tokenizer):
    data = generator(tokenizer, exemplars=prepended(tokenizer, [["a b"], ["c"]], 4), src_len=6)
    for n in range(len(data)):
        batch = data.collate([n])
        assert data.lengths[n] == batch["source_ids"].shape[1] + batch["labels"].shape[1]


# -------------------------------------------------------------------------------------------- critics' layout

LABELS = {"emo": [2, 0], "sentiment": [0.5, -0.5]}


def test_contexts_are_padded_on_the_left_and_end_in_eos(tokenizer):
    batch = generator(tokenizer, labels=LABELS, critic_context_len=5).collate([0, 1])
    latest = ids(tokenizer, "d e f g h")
    assert batch["context_ids"].tolist() == [[*latest, EOS], [0, 0, 0, 0, *ids(tokenizer, "k"), EOS]]
    assert batch["context_mask"].tolist() == [[1] * 6, [0] * 4 + [1] * 2]
    assert batch["critic_targets"]["emo"].tolist() == [2, 0]
    assert batch["critic_targets"]["sentiment"].tolist() == [0.5, -0.5]


def test_targets_follow_the_examples_chosen(tokenizer):
    batch = generator(tokenizer, labels=LABELS, critic_context_len=5).collate([1])
    assert batch["critic_targets"]["emo"].tolist() == [0]
    assert batch["context_ids"].tolist() == [[*ids(tokenizer, "k"), EOS]]


@pytest.mark.parametrize("context_len", [0, 1, 3, 50])
@pytest.mark.parametrize("reply_len", [1, 2, 7])
@pytest.mark.parametrize("tgt_len", [2, 3, None])
@pytest.mark.parametrize("starts", [False, True])
def test_critics_are_used_on_the_layout_they_are_trained_on(
    tokenizer, context_len, reply_len, tgt_len, starts
):
    """Also where a reply is longer than the critic reads, or was cut for the training of the generator, and
    where the tokenizer has a start token (CodeT5)."""
    tokenizer = copy.deepcopy(tokenizer)
    if starts:
        tokenizer.cls_token = "a"
    settings = SimpleNamespace(context_len=context_len, reply_len=reply_len)
    examples = [LONG, SHORT]
    critic = dataloaders.critic_data(
        [e.history for e in examples], [e.response for e in examples], None, tokenizer, settings
    )
    trained = critic.collate([0, 1])
    used = generator(
        tokenizer, examples, tgt_len=tgt_len, labels=LABELS, critic_context_len=context_len
    ).collate([0, 1])
    gold = torch.nn.functional.one_hot(used["labels"].clamp(min=0), len(tokenizer))
    ending = torch.nn.functional.one_hot(torch.tensor(EOS), len(tokenizer))
    closed, mask = close_replies(gold, used, reply_len, torch.tensor(EOS), ending)
    for row, e in enumerate(examples):
        context = real(used, "context_ids", "context_mask", row)
        reply = closed[row].argmax(-1)[mask[row].bool()].tolist()
        assert real(trained, "input_ids", "attention_mask", row) == context + reply
        assert trained["input_ids"][row][trained["reply_mask"][row].bool()].tolist() == reply
        words = [w for text in e.history for w in ids(tokenizer, text)]
        assert context == [*(words[-context_len:] if context_len else []), EOS]
        assert critic.lengths[row] == len(context + reply)


def test_the_end_of_a_whole_reply_stays_the_models_own_beside_one_that_was_cut():
    batch = {
        "labels": torch.tensor([[5, EOS, -100], [5, 6, 7]]),
        "reply_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    soft, ending = torch.rand(2, 3, 4), torch.rand(4)
    closed, mask = close_replies(soft, batch, 9, torch.tensor(EOS), ending)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert closed[0, :2].equal(soft[0, :2])
    assert closed[1].equal(torch.cat([soft[1], ending[None]]))


def test_critic_batches_carry_names_and_targets_of_the_rows_chosen(tokenizer):
    settings = SimpleNamespace(context_len=4, reply_len=4)
    data = dataloaders.critic_data([["a"], ["b"], ["c"]], ["d", "e", "f"], [0, 1, 2], tokenizer, settings)
    batch = data.collate([2, 0])
    assert (batch["names"], batch["targets"].tolist()) == (["row 2", "row 0"], [2, 0])
    assert batch["input_ids"][:, 0].tolist() == ids(tokenizer, "c a")


def test_a_critic_of_another_family_begins_with_its_own_start_token(tmp_path):
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    bert = BertTokenizer.from_pretrained(str(tmp_path))
    batch = dataloaders.critic_data(
        [["a"]], ["b"], None, bert, SimpleNamespace(context_len=4, reply_len=4)
    ).collate([0])
    assert bert.convert_ids_to_tokens(batch["input_ids"][0].tolist()) == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]
    assert batch["reply_mask"].tolist() == [[0, 0, 0, 1, 1]]


# ------------------------------------------------------------------------------------------- pooled exemplars

EXEMPLARS = [["a b", "c"], [], ["c", "c", "d e f g"], ["h"]]


def test_pooled_tokens_hold_each_distinct_exemplar_once_with_shares_of_one(tokenizer):
    part = PooledTokens(EXEMPLARS, tokenizer, max_len=4).part([2, 0, 1])
    rows = [
        part["exemplar_ids"][u][part["exemplar_mask"][u].bool()].tolist()
        for u in range(len(part["exemplar_ids"]))
    ]
    c, d, a = ([*ids(tokenizer, t), EOS] for t in ("c", "d e f", "a b"))
    assert sorted(rows) == sorted([c, d, a])
    share = {tuple(row): part["exemplar_share"][:, u].tolist() for u, row in enumerate(rows)}
    assert share[tuple(c)] == pytest.approx([2 / 3, 1 / 2, 0])
    assert share[tuple(d)] == pytest.approx([1 / 3, 0, 0])
    assert share[tuple(a)] == pytest.approx([0, 1 / 2, 0])
    assert part["exemplar_share"].sum(1).tolist() == pytest.approx([1, 1, 0])


def test_exemplars_that_are_read_apart_count_where_it_is_tried_what_fits(tokenizer):
    pooled = PooledTokens(EXEMPLARS, tokenizer, max_len=4)
    examples = [Example(f"c{n}", 2, "sad", ("a b",), "c") for n in range(4)]
    layout = {"src_len": 9, "tgt_len": None}
    found = dataloaders.generator_data(examples, tokenizer, exemplars=pooled, **layout).further_lengths
    assert found == [[2] * 4, [3 + 2, 0, 2 + 2 + 4, 2], [3, 0, 4, 2]]
    assert dataloaders.generator_data(examples, tokenizer, **layout).further_lengths == [[2] * 4]


def test_pooled_tokens_of_a_batch_without_exemplars_weigh_nothing(tokenizer):
    part = PooledTokens(EXEMPLARS, tokenizer, max_len=4).part([1, 1])
    assert part["exemplar_mask"].sum() == 1
    assert part["exemplar_share"].tolist() == [[0.0], [0.0]]


def test_pooled_vectors_are_the_mean_of_an_examples_exemplars():
    vectors = {t: np.array([n, 10.0 * n]) for n, t in enumerate(("a b", "c", "d e f g", "h"))}
    part = PooledVectors(EXEMPLARS, vectors, 2).part([2, 1, 0])["exemplar_vectors"]
    assert part.dtype == torch.float32
    assert part.tolist() == [pytest.approx([4 / 3, 40 / 3]), [0.0, 0.0], [0.5, 5.0]]


def test_a_batch_of_the_generator_carries_its_pooled_part(tokenizer):
    pooled = PooledVectors([["a"], ["b"]], {"a": np.ones(3), "b": np.zeros(3)}, 3)
    batch = generator(tokenizer, exemplars=pooled).collate([1, 0])
    assert batch["exemplar_vectors"].tolist() == [[0.0] * 3, [1.0] * 3]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=200))
def test_texts_that_are_read_in_pieces_are_all_read_whole_and_the_short_ones_apart(lengths):
    order, pieces = in_pieces(lengths)
    assert sorted(order) == [*range(len(lengths))] and sum(texts for texts, _ in pieces) == len(lengths)
    left = iter(order)
    for texts, width in pieces:
        own = [lengths[n] for n in itertools.islice(left, texts)]
        assert width == max([1, *own])
    if len(lengths) < 32:
        assert order == sorted(order) and len(pieces) == 1
    else:
        assert 2 <= len(pieces) <= 4 and [width for _, width in pieces] == sorted(w for _, w in pieces)


def test_pooled_exemplars_of_many_lengths_are_padded_to_their_like(tokenizer):
    rows = [[" ".join("a" * (1 + n % 7 + 60 * (n == 40))) + " b" * (n // 7)] for n in range(64)]
    part = PooledTokens(rows, tokenizer, 90).part([*range(64)])
    padded = sum(texts * width for texts, width in part["exemplar_pieces"])
    assert part["exemplar_mask"].sum() <= padded < part["exemplar_mask"].numel() / 2
    assert (part["exemplar_share"].sum(1) == 1).all() and (part["exemplar_share"].sum(0) == 1).all()


def test_however_long_a_dialogue_is_its_last_turn_knows_all_before(tmp_path):
    texts = [f"turn {n}" for n in range(1, 41)]
    rows = ["conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"]
    rows += [f"c,{n},sad,p,{n % 2},{text},," for n, text in enumerate(texts, 1)]
    (tmp_path / "long.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    last = corpora.listener_turns(tmp_path / "long.csv")[-1]
    assert last.history == tuple(texts[:-1]) and last.response == texts[-1]
