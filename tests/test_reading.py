"""Text is read whole or refused: files as pandas, Excel and Windows write them, beside the official
formats."""

import csv
import json
import os
import shlex
import subprocess
import sys

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corpora
import layouts
import storage
import systems
import tabular
from corpora import Example, listener_turns, read_pairs
from DPR.learning import read_entries
from options import Paths, UserError
from records import read_records

COLUMNS = "conv_id utterance_idx context prompt speaker_idx utterance selfeval tags".split()
HEADER = ",".join(COLUMNS)
TEXTS = ["My cat left, on Monday.", 'She said "no", twice.', "Two\nlines", "plain", '"All of it."', "NA"]
REPLIES = ["I'm sorry, really.", 'So she said "no".', "Oh dear,\tthat is hard.", "one\ntwo", "fine", "null"]


def dialogue_table(texts=TEXTS, **changes):
    rows = [("own:1", n, "sad", "My cat, sadly.", 7 + n % 2, t, "", "") for n, t in enumerate(texts, start=1)]
    return pd.DataFrame(rows, columns=COLUMNS).assign(**changes)


def lines(path, *rows, header=HEADER):
    path.write_bytes("\n".join([header, *rows, ""]).encode())
    return path


def refusal(path, read=corpora.read_dialogues):
    with pytest.raises(UserError) as error:
        read(path)
    return str(error.value)


# ------------------------------------------------------------------------------------- dialogues with quoting

QUOTINGS = [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]


@pytest.mark.parametrize("quoting", QUOTINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_dialogue_file_of_pandas_or_excel_is_read_whole(tmp_path, quoting, end, encoding):
    path = tmp_path / "train.csv"
    dialogue_table().to_csv(path, index=False, quoting=quoting, lineterminator=end, encoding=encoding)
    table = corpora.read_dialogues(path)
    assert table["utterance"].tolist() == TEXTS
    assert set(table["prompt"]) == {"My cat, sadly."}


@pytest.mark.parametrize("texts", [[TEXTS[0], "b"], ["a", TEXTS[1]], ["a", TEXTS[2]], ['say "hi"', "b"]])
def test_one_quoted_cell_is_enough_to_know_a_quoted_file(tmp_path, texts):
    path = tmp_path / "train.csv"
    dialogue_table(texts, prompt="p").to_csv(path, index=False)
    assert corpora.read_dialogues(path)["utterance"].tolist() == texts


def test_a_column_that_is_quoted_throughout_is_quoted(tmp_path):
    path = lines(tmp_path / "d.csv", *(f'c,{n},sad,p,{n},"text {n}",,' for n in (1, 2, 3)))
    assert corpora.read_dialogues(path)["utterance"].tolist() == ["text 1", "text 2", "text 3"]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text('",\\\n ab', min_size=1).filter(str.strip), min_size=2, max_size=5))
def test_whatever_pandas_writes_comes_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("pandas") / "train.csv"
    dialogue_table([f"x, {t}" for t in texts]).to_csv(path, index=False)
    assert corpora.read_dialogues(path)["utterance"].tolist() == [f"x, {t}".strip() for t in texts]


def test_quotation_marks_of_the_official_format_stay(tmp_path):
    texts = ['"Oh no" she said', '"quoted"', 'he said "so"', '"so he', 'said"', '""', '"']
    rows = [f"c,{n},sad,p,{n % 2},{t},5|5|5_2|2|5," for n, t in enumerate(texts, start=1)]
    assert corpora.read_dialogues(lines(tmp_path / "d.csv", *rows))["utterance"].tolist() == texts


def test_two_stray_marks_that_could_swallow_a_row_do_not(tmp_path):
    path = lines(tmp_path / "d.csv", 'c,1,sad,p,0,"one,,', 'c,2,sad,p,1,two",,')
    assert corpora.read_dialogues(path)["utterance"].tolist() == ['"one', 'two"']


GRADES = "5|5|5_2|2|5"


@pytest.mark.parametrize(
    "ends", [(f"{GRADES},,yes|no",), (f"{GRADES},,",), (f"{GRADES},<HI>,",), (",,yes",), (",,", ",,")]
)
def test_the_ninth_column_of_the_official_valid_and_test_is_no_text(tmp_path, ends):
    rows = [f"c,{n},sad,p,{n},t{n},{end}" for n, end in enumerate(ends, start=1)]
    assert corpora.read_dialogues(lines(tmp_path / "d.csv", *rows))["utterance"].tolist()[0] == "t1"


@pytest.mark.parametrize(
    "row",
    [
        "c,2,sad,p,1,Well, yes,,",
        "c,2,sad,p,1,Well,yes,,",
        f"c,2,sad,p,1,Well,yes,{GRADES},",
        "c,2,sad,p,1,Well,,,",  # it ends in a comma
        "c,2,sad,p,1,one, two, three,,",
        "c,2,sad,p,1,in May,1990,,",
        "c,2,sad,one, two,1,text,,",
        "c,2,sad,in May, 1990,1,text,,",
        "c,2,sad,p,1,Well, yes",  # without the last columns
        "c,2,sad,p,1,Well, yes,",
        'c,2,sad,p,1,"Well, yes,,',
        'c,2,sad,p,1,"Well, ""yes"", so" it,,',
        'c,2,sad,p,1,"said \\"no\\" to me",,',
        'c,2,sad,p,1,"said ""no"" to me",,',  # quoted, in a file that is not
    ],
)
def test_a_row_that_would_lose_text_is_refused_with_its_line_and_the_remedy(tmp_path, row):
    message = refusal(lines(tmp_path / "d.csv", f'c,1,sad,p,0,say "hi" now,{GRADES},', row))
    assert "d.csv, line 3: " in message
    assert "_comma_" in message or "quoting" in message


def test_an_unquoted_comma_is_refused_whatever_the_header(tmp_path):
    path = lines(tmp_path / "d.csv", "c,1,sad,p,0,Well, yes", header=",".join(COLUMNS[:6]))
    assert "d.csv, line 2: " in refusal(path)


@pytest.mark.parametrize("reader", ["pairs", "vader", "labels"])
def test_a_surplus_cell_in_a_quoted_file_is_refused(tmp_path, reader):
    header, row, read = {
        "pairs": ("sp_id,rp_id,seeker_post,response_post,level", "s,r,a post, cut,reply,1", "read_pairs"),
        "vader": ("conv_id,utterance_idx,utterance,sentiment", "c,2,well, yes,0.5", "read_vader"),
        "labels": ("conv_id,utterance_idx,emo,exp,int,sentiment", "c,2,0,1,2,0,5", "read_labels"),
    }[reader]
    (tmp_path / "f.csv").write_text(f"{header}\n{row}\n")
    more = {"pairs": [True], "vader": [], "labels": [[]]}[reader]
    with pytest.raises(UserError, match=r"f\.csv, line 2: \d columns, expected \d"):
        getattr(corpora, read)(tmp_path / "f.csv", *more)


# -------------------------------------------------------------------------------- other encodings, separators


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "json"])
def test_another_encoding_is_told_with_a_command_that_converts_it(tmp_path, encoding, kind):
    path = tmp_path / f"my data.{kind}"
    if kind == "json":
        path.write_bytes(json.dumps({"a": "café"}, ensure_ascii=False).encode(encoding))
        read = storage.read_json
    else:
        dialogue_table(["café, ok", "b"]).to_csv(path, index=False, encoding=encoding)
        read = corpora.read_dialogues
    message = refusal(path, read)
    assert "not UTF-8" in message
    assert "prepare_data" not in message
    command = message.split("convert it with: ")[1]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    found = read(tmp_path / shlex.split(command)[-1])
    assert (found["a"] if kind == "json" else found["utterance"][0]) in ("café", "café, ok")


def convert(message):
    """Runs the command of a refusal, in this Python."""
    words = shlex.split(message.split("convert it with: ")[1])
    subprocess.run([sys.executable, *words[1:]], check=True)


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_another_separator_is_told_with_a_command_that_converts_it(tmp_path, separator, name):
    path = tmp_path / "own data.csv"
    dialogue_table().to_csv(path, index=False, sep=separator)
    message = refusal(path)
    assert f"separated by {name}, expected commas" in message
    assert "prepare_data" not in message
    convert(message)
    assert corpora.read_dialogues(tmp_path / "own data-converted.csv")["utterance"].tolist() == TEXTS


def test_the_line_in_which_excel_says_its_separator_is_understood_and_left_out_by_the_command(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("sep=;\n" + dialogue_table().to_csv(index=False, sep=";"), encoding="utf-8")
    message = refusal(path)
    assert "separated by semicolons" in message
    convert(message)
    assert corpora.read_dialogues(tmp_path / "d-converted.csv")["utterance"].tolist() == TEXTS


def test_a_workbook_is_told_from_a_csv(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"PK\x03\x04" + bytes(60))
    assert "Excel workbook" in refusal(tmp_path / "d.csv")


def test_a_packed_file_is_read_whatever_its_name(tmp_path):
    dialogue_table().to_csv(tmp_path / "d.csv", index=False, compression="gzip")
    assert corpora.read_dialogues(tmp_path / "d.csv")["utterance"].tolist() == TEXTS


def test_a_byte_order_mark_is_fine_in_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"valid_rows": {}}', encoding="utf-8-sig")
    assert storage.read_json(path) == {"valid_rows": {}}
    entries = [{"question": "q", "positive_ctxs": [{"text": "p"}]}]
    path.write_text(json.dumps(entries), encoding="utf-8-sig")
    assert read_entries(path) == entries


# --------------------------------------------------------------------------------------------------- speakers


@pytest.mark.parametrize("speakers", ["0 1 1", "7 7", "a b a a", "0 1.0 1.0"])
def test_one_speaker_twice_in_a_row_is_no_reply(tmp_path, speakers):
    rows = [f"c,{n},sad,p,{who},text,," for n, who in enumerate(speakers.split(), start=1)]
    message = refusal(lines(tmp_path / "d.csv", *rows))
    assert f"d.csv, line {len(rows) + 1}: conversation c has speaker {speakers.split()[-1]} twice" in message
    assert "join the two turns" in message


@pytest.mark.parametrize("speakers", ["0 1 0 1", "612 44 612", "Ann Bob Ann", "1 0 1"])
def test_any_two_speakers_in_turn_are_a_conversation(tmp_path, speakers):
    rows = [f"c,{n},sad,p,{who},text {n},," for n, who in enumerate(speakers.split(), start=1)]
    assert len(corpora.listener_turns(lines(tmp_path / "d.csv", *rows))) == len(rows) // 2


def test_dialogues_are_read_once_and_anew_where_they_were_written_since(tmp_path, monkeypatch):
    file, reads, read = tmp_path / "d.csv", [], corpora.read_dialogues
    monkeypatch.setattr(corpora, "read_dialogues", lambda path: reads.append(path) or read(path))
    lines(file, "c,1,sad,p,1,Hi,s,", "c,2,sad,p,0,Oh,s,")
    first = corpora.listener_turns(file)
    first.clear()  # a caller's own list
    assert [turn.response for turn in corpora.listener_turns(file)] == ["Oh"] and len(reads) == 1
    lines(file, "c,1,sad,p,1,Hi,s,", "c,2,sad,p,0,Oh no,s,")
    assert [turn.response for turn in corpora.listener_turns(file)] == ["Oh no"]
    file.unlink()
    with pytest.raises(UserError, match="d.csv"):
        corpora.listener_turns(file)


def test_a_speaker_that_is_not_said_is_refused(tmp_path):
    assert "has no speaker_idx" in refusal(lines(tmp_path / "d.csv", "c,1,sad,p,,text,,"))


def test_the_numbers_of_pandas_count_as_numbers(tmp_path):
    path = lines(tmp_path / "d.csv", "c,1.0,sad,p,0.0,a,,", "c,2.0,sad,p,1.0,b,,")
    assert corpora.read_dialogues(path)["utterance_idx"].tolist() == [1, 2]


# ------------------------------------------------------------------------------------------------ predictions


def examples(count=6):
    return [Example("own:1", 2 * n + 2, "sad", ("a",), f"gold {n}") for n in range(count)]


def predictions(path, replies=REPLIES, **options):
    keys = pd.DataFrame([e.key for e in examples(len(replies))], columns=["conv_id", "utterance_idx"])
    keys.assign(response=replies).to_csv(path, **{"sep": "\t", "index": False} | options)
    return path


def replies_of(path, examples):
    [system] = systems.read_file(path, examples, Paths(path.parent))
    return system.replies


@pytest.mark.parametrize("quoting", QUOTINGS)
def test_predictions_of_pandas_are_the_replies(tmp_path, quoting):
    path = predictions(tmp_path / "p.tsv", quoting=quoting)
    assert replies_of(path, examples()) == REPLIES


def test_predictions_without_quoting_keep_their_marks(tmp_path):
    replies = ['"Oh no" she said', '"quoted"', 'he "so"', '"so he', 'said"', '""']
    path = predictions(tmp_path / "p.tsv", replies, quoting=csv.QUOTE_NONE, quotechar=None)
    assert replies_of(path, examples()) == replies


@pytest.mark.parametrize("odd", ['"a ""b"" c"', '"quoted"', "a\tb", "a\nb", '"', '""', '"""', 'x "y" z'])
def test_our_own_predictions_come_back_whatever_they_hold(tmp_path, odd):
    replies = [odd, "plain", odd]
    keys = pd.DataFrame([e.key for e in examples(3)], columns=["conv_id", "utterance_idx"])
    storage.write_csv(tmp_path / "p.tsv", keys.assign(response=replies), sep="\t")
    assert replies_of(tmp_path / "p.tsv", examples(3)) == replies


def test_gold_replies_of_the_official_format_come_back_through_pandas(prepared, tmp_path):
    gold = corpora.listener_turns(Paths(prepared).dialogues("train"))
    table = pd.DataFrame([(*e.key, e.response) for e in gold], columns=layouts.COLUMNS)
    table.loc[0, "response"] = gold[0].response + ' "so"'
    table.to_csv(tmp_path / "gold.tsv", sep="\t", index=False)
    assert replies_of(tmp_path / "gold.tsv", gold) == table["response"].tolist()


def test_a_bare_tab_in_a_reply_is_refused(tmp_path):
    path = lines(tmp_path / "p.tsv", "own:1\t2\tOh dear,\tso", header="conv_id\tutterance_idx\tresponse")
    message = refusal(path, lambda p: replies_of(p, examples(1)))
    assert "p.tsv, line 2: 4 columns, expected 3" in message
    assert "to_csv" in message


@pytest.mark.parametrize("first", ['"I quit', '"Never give up" is what I say'])
@pytest.mark.parametrize("last", ['he said"', "well"])
def test_a_mark_at_the_head_of_a_tsv_cell_swallows_no_rows(tmp_path, first, last):
    texts = [first, "Oh no", last, "I see"]
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{n}\t{t}\n" for n, t in enumerate(texts)))
    assert read_records(tmp_path / "a.tsv").texts("text") == texts
    table = tabular.read_rows(tmp_path / "a.tsv", ["id", "text"], made_by=None, delimiter="\t")
    assert table["text"].tolist() == texts
    quoted = pd.DataFrame({"id": [1, 2], "text": ["two\nlines", 'a "word"']})
    quoted.to_csv(tmp_path / "b.tsv", sep="\t", index=False)
    assert read_records(tmp_path / "b.tsv").texts("text") == quoted["text"].tolist()
    table = tabular.read_rows(tmp_path / "b.tsv", ["id", "text"], made_by=None, delimiter="\t")
    assert table["text"].tolist() == quoted["text"].tolist()


def test_predictions_with_commas_for_tabs_are_told_so(tmp_path):
    path = predictions(tmp_path / "p.tsv", sep=",")
    assert "separated by commas, expected tabs" in refusal(path, lambda p: replies_of(p, examples()))


def test_the_first_turns_that_are_not_in_the_split_are_named(tmp_path):
    path = predictions(tmp_path / "p.tsv")
    message = refusal(path, lambda p: replies_of(p, examples(4)))
    assert "2 of 6 rows" in message
    assert "own:1 utterance 10, own:1 utterance 12" in message


@pytest.mark.parametrize("reply", ["</s>", "</s> <pad>", "<pad><pad></s>", "[SEP]", "<unk> <extra_id_0>"])
def test_a_reply_of_control_tokens_is_refused(tmp_path, reply):
    path = predictions(tmp_path / "p.tsv", ["fine", reply])
    message = refusal(path, lambda p: replies_of(p, examples(2)))
    assert "p.tsv, line 3" in message
    assert "skip_special_tokens" in message


def test_a_control_token_inside_a_reply_is_warned_about_and_kept(tmp_path, capsys):
    path = predictions(tmp_path / "p.tsv", ["fine", "I am sorry.</s>"])
    assert replies_of(path, examples(2))[1] == "I am sorry.</s>"
    assert "warning" in capsys.readouterr().out


@pytest.mark.parametrize("index", ["2.0", "2", " 2 ", "2."])
def test_an_index_that_pandas_made_a_float_is_the_same_turn(tmp_path, index):
    path = lines(tmp_path / "p.tsv", f"own:1\t{index}\thello", header="conv_id\tutterance_idx\tresponse")
    assert replies_of(path, examples(1)) == ["hello"]


def test_of_two_columns_of_one_name_none_is_taken_in_silence(tmp_path):
    file = tmp_path / "pairs.csv"
    header = "sp_id,rp_id,seeker_post,response_post,level,label,response_post"
    file.write_text(f"{header}\n1,1,My dog died.,So sorry.,2,1,Cheer up.\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1: column response_post stands there twice"):
        read_pairs(file)


def test_dialogues_are_read_anew_where_as_many_other_letters_were_written(tmp_path):
    file, header = tmp_path / "train.csv", "conv_id,utterance_idx,context,prompt,speaker_idx,utterance"
    for second, said in enumerate(("Oh no!", "Great!"), 1):
        file.write_text(f"{header}\nc,1,sad,x,0,Hello.\nc,2,sad,x,1,{said}\n", encoding="utf-8")
        os.utime(file, (second, second))
        assert [turn.response for turn in listener_turns(file)] == [said]
