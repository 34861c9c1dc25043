"""Anybody's replies are read whole, beside the items that they answer, whatever their layout; all texts are
written for these tests."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hypothesis
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate_responses
import layouts
import records
import storage
import tables
from corpora import Example, listener_turns
from matching import CONTROL_TOKEN
from measures import bleu
from measuring import Standard
from normalising import normalise, words
from options import Paths, UserError
from settings import pick
from systems import item_set, read_system, require_complete, restrict, set_hash

SAID = [
    "I can't believe it, my neighbour's dog bit me!",
    "I'm so sorry; didn't they say \u201csorry\u201d, at least?",
    "They're not even home... it's awful.",
    "You shouldn't have to wait. Let's call the vet \u2014 or what's his name?",
]
EXAMPLES = [
    Example("c:1", 2, "angry", (SAID[0],), SAID[1]),
    Example("c:1", 4, "angry", tuple(SAID[:3]), SAID[3]),
    Example("c:2", 2, "proud", ('I\'ve won (the "big" prize)!',), "Wow, that's great, isn't it? I'd cry :)"),
    Example("c:3", 2, "sad", ("My gran cannot walk.",), "Oh no! He'll be fine, won't he? You've a doctor?"),
    Example(
        "c:3", 4, "sad", ("My gran cannot walk.", "x", "She's 90."), "I'm sure you're gonna manage, Ann."
    ),
]
GOLD = [e.response for e in EXAMPLES]


def read(path, **options):
    return read_system(path, EXAMPLES, "test", Paths(path.parent), **options)


def in_order(folder: Path, layout: str = "lines") -> dict:
    """What lines of mere replies need: the gold replies in their order."""
    if layout != "lines":
        return {}
    (folder / "gold.txt").write_text("".join(text + "\n" for text in GOLD), encoding="utf-8")
    return {"references": folder / "gold.txt"}


def refusal(path, **options):
    with pytest.raises(UserError) as error:
        read(path, **options)
    return str(error.value)


# ---------------------------------------------------------------------------- how groups write the same reply

OPENED = {"can't": "cannot", "i'm": "i am", "didn't": "did not", "it's": "it is", "what's": "what is"} | {
    "that's": "that is", "isn't": "is not", "i'd": "i would", "won't": "will not", "you're": "you are"
}  # fmt: skip


def as_nltk(text):
    """Cut as nltk's word tokenizer does."""
    text = re.sub(r'(^|[ (])"', r"\1`` ", text).replace('"', " '' ")
    text = re.sub(r"(?i)\b(can)(not)\b|\b(gon)(na)\b", r"\1\3 \2\4", text)
    text = re.sub(r"(?i)(n't|'(?:s|m|d|re|ve|ll))\b", r" \1", text)
    return " ".join(re.findall(r"\.\.\.|``|''|\w*'\w+|\w+(?=n't)|n't|\w+|\S", text))


def as_opened(text):
    """Lower case, frequent contractions opened, then cut: the published preprocessing of this corpus."""
    text = text.lower()
    for short, long in OPENED.items():
        text = text.replace(short, long)
    return as_nltk(text) + "  "


def as_moses(text):
    text = text.replace("&", "&amp;").replace("'", "&apos;").replace('"', "&quot;")
    text = re.sub(r"(\w)(&apos;\w)", r"\1 \2", text)
    return re.sub(r"(&quot;|[,.!?:;()])(?!\w)", r" \1 ", text)


WRITERS = {
    "nltk": as_nltk,
    "opened": as_opened,
    "moses": as_moses,
    "lower": str.lower,
    "ends": lambda text: f"{text} </s><pad>",
    "wordpiece": lambda text: re.sub(r"([^\w\s])", r" \1 ", text.lower()),
    "official": lambda text: text.replace(",", "_comma_"),
    "straight": lambda text: text.translate({0x201C: '"', 0x201D: '"', 0x2014: "-"}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_gold_as_each_group_writes_it_scores_100(writer):
    written = [WRITERS[writer](text) for text in GOLD]
    assert written != GOLD
    normal = [normalise(text) for text in GOLD]
    assert [normalise(text) for text in written] == normal
    assert bleu([normalise(text) for text in written], normal, [4])[4].point == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I don't, dont do n't don \u2019 t", "i do not , do not do not do not"),
        ("the dog's bone", "the dog 's bone"),
        ("He's in; she 's out", "he is in ; she is out"),
        ("well, we're ill; its id", "well , we are ill ; its id"),
        ("So... 3,000$", "so . . . 3 , 000 $"),
        ("He said ``no'' to \"us\".", 'he said " no " to " us " .'),
        ("ﬁne\u00a0Stra\u00dfe \u200bso", "fine strasse so"),
        ("", ""),
        ("</s>", ""),
    ],
)
def test_a_text_is_written_in_one_way(text, expected):
    assert normalise(text) == expected
    assert words(text) == expected.split()


PIECES = st.sampled_from(
    "' ’ n't do ca wo can not cannot gon na got ta it im 's 'd _comma_ & amp; ; `` '' </s> . @ - _".split()
)
HARD = st.lists(PIECES | st.just(" ") | st.characters(), max_size=10).map("".join)


@settings(max_examples=100, deadline=None)
@given(HARD)
@hypothesis.example("gon  na")
@hypothesis.example("lem\u00a0 me")
def test_normalising_again_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


# ------------------------------------------------------------------------------------------ published layouts


def blocks(replies, label="Pred", rule="", head="", cut=as_opened):
    """Blocks of labelled lines, with the history as a list in Python's spelling."""
    text = head
    for example, reply in zip(EXAMPLES, replies, strict=True):
        text += f"emotion:{example.emotion} \nContext:{[cut(t).strip() for t in example.history]} \n"
        text += f"Concept:['dog', 'bite'] \n{label}:{reply} \nRef:{cut(example.response)}\n{rule}"
    return text


def gold_file(folder, layout):
    """A file of one layout that holds the gold replies as `as_opened` writes them."""
    cut = [as_opened(text) for text in GOLD]
    columns = {"history": [" </s> ".join(map(as_opened, e.history)) for e in EXAMPLES], "gold": cut}
    table = pd.DataFrame(columns | {"generated": cut})
    path = folder / {"tilde": "out.csv", "json": "out.json"}.get(layout, "out.txt")
    if layout == "ref-pred":
        path.write_text(blocks(cut))
    elif layout == "blocks":
        path.write_text(blocks(cut, rule="-" * 40 + "\n", head="### head ###\nEVAL\tLoss\n", label="Greedy"))
    elif layout == "ref-lines":
        path.write_text("".join(f"ref: {text}\nOurs: {text}\n\n" for text in cut))
    elif layout == "tilde":
        table.to_csv(path, sep="~", index=False)
    elif layout == "json":
        rows = [{"context": list(e.history), "gold": e.response, "output": e.response} for e in EXAMPLES]
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(cut) + "\n")
    return path


@pytest.mark.parametrize("layout", ["ref-pred", "blocks", "ref-lines", "tilde", "json", "lines"])
@pytest.mark.parametrize("named", [True, False])
def test_gold_in_each_published_layout_answers_every_item_and_scores_100(tmp_path, layout, named):
    way = {"layout": layout if named else "auto"} | in_order(tmp_path, layout)
    [system] = read(gold_file(tmp_path, layout), **way)
    assert system.numbers == [0, 1, 2, 3, 4]
    found, expected = [[normalise(t) for t in texts] for texts in (system.replies, GOLD)]
    assert found == expected
    assert bleu(found, expected, [4])[4].point == pytest.approx(100)


def test_the_label_is_taken_off_and_its_letters_stay(tmp_path):
    replies = ["dear, red Fred:", "rePred", "Pre", "Red: no", "ed"]
    (tmp_path / "p.txt").write_text(blocks(replies))
    assert read(tmp_path / "p.txt")[0].replies == replies


def test_each_label_of_a_block_is_a_system(tmp_path):
    text = ""
    for n, example in enumerate(EXAMPLES):
        text += f"Context:{list(example.history)}\nTopk:t{n}\nBeam: b{n}\nGreedy:g{n}\n"
        text += f"Ref:{example.response}\n-------\n"
    (tmp_path / "mime.txt").write_text(text)
    found = {s.name: s.replies for s in read(tmp_path / "mime.txt")}
    expected = {k: [f"{k[0]}{n}" for n in range(5)] for k in ("topk", "beam", "greedy")}
    assert found == {f"mime/{k}": v for k, v in expected.items()}


@pytest.mark.parametrize("names", [("Ours: ", "MoEL: "), ("", "")])
def test_each_line_under_a_reference_is_a_system(tmp_path, names):
    text = "".join(f"ref: {t}\n{names[0]}a{n}: so\n{names[1]}b{n}\n\n" for n, t in enumerate(GOLD))
    (tmp_path / "all.txt").write_text(text)
    found = [(s.name, s.replies[1]) for s in read(tmp_path / "all.txt")]
    titles = [name.strip(": ") or f"system {n}" for n, name in enumerate(names, start=1)]
    assert found == [(f"all/{titles[0]}", "a1: so"), (f"all/{titles[1]}", "b1")]


def test_columns_of_lists_are_systems(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"ref": GOLD, "ours": GOLD, "MoEL": ["a"] * 5}))
    assert [s.name for s in read(tmp_path / "m.json")] == ["m/ours", "m/MoEL"]


# ------------------------------------------------------------------------------------------------ odd files

LAYOUTS = ["ref-pred", "blocks", "ref-lines", "lines", "tilde", "csv", "tsv", "json", "jsonl"]
ONE_LINE = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("',\"~:\\-[ "), max_size=9
).filter(lambda text: not CONTROL_TOKEN.search(text))  # which by themselves are refused
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder, layout, replies):
    """A file of one layout with five replies."""
    path = folder / f"p.{layout}"
    if layout in ("ref-pred", "blocks"):
        path.write_text(blocks(replies, rule="-----\n" if layout == "blocks" else ""))
    elif layout == "ref-lines":
        path.write_text("".join(f"ref: {t}\nOurs: {r}\n\n" for t, r in zip(GOLD, replies, strict=True)))
    elif layout == "lines":
        path.write_text("\n".join(replies) + "\n")
    else:
        table = pd.DataFrame([(*e.key, r) for e, r in zip(EXAMPLES, replies, strict=True)])
        table.columns = ["conv_id", "utterance_idx", "response"]
        if "json" in layout:
            table.to_json(path, orient="records", lines=layout == "jsonl")
        else:
            table.to_csv(path, index=False, sep={"csv": ",", "tsv": "\t", "tilde": "~"}[layout])
    return path


@QUICK
@given(layout=st.sampled_from(LAYOUTS), replies=st.lists(ONE_LINE, min_size=4, max_size=4))
def test_whatever_a_reply_holds_it_comes_back_from_every_layout(tmp_path, layout, replies):
    replies = ["plain", *replies]
    [system] = read(written(tmp_path, layout, replies), layout=layout, **in_order(tmp_path, layout))
    assert system.replies == [reply.strip() for reply in replies]


@QUICK
@given(st.sampled_from(LAYOUTS), st.data())
def test_a_damaged_file_is_read_or_refused_in_one_message(tmp_path, layout, data):
    path = written(tmp_path, layout, ["a: b", "", "c", '"d"', "e, f"])
    content = path.read_bytes()
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, min(begin + 30, len(content))))
    new = data.draw(
        st.binary(max_size=4) | st.sampled_from([b"\n", b"Ref:", b"Pred: x\n", b"[[[[", b"\t", b'"'])
    )
    path.write_bytes(content[:begin] + new + content[end:])
    try:
        found = read(path, layout=data.draw(st.sampled_from([layout, "auto"])))
    except UserError:
        return
    for system in found:
        assert len(system.replies) == len(system.numbers) == len(set(system.numbers)) > 0


@QUICK
@given(st.sampled_from(LAYOUTS), st.integers(0, 40))
def test_no_line_is_dropped_in_silence(tmp_path, layout, place):
    path = written(tmp_path, layout, ["a", "b", "c", "d", "e"])
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:place], "so much", *lines[place:]]))
    try:
        [system] = read(path, layout=layout)
    except UserError:
        return
    assert "so much" in " ".join(system.replies) or any("not read" in note for note in system.notes)


# ------------------------------------------------------------------------------------------------- by its key


def keyed(path, rows, columns="conv_id utterance_idx response", **options):
    pd.DataFrame(rows, columns=columns.split()).to_csv(path, index=False, **options)
    return path


ROWS = [(*e.key, f"reply {n}, so") for n, e in enumerate(EXAMPLES)]


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_a_file_with_keys_is_read_in_any_order_and_may_lack_items(tmp_path, ending):
    path, rows = tmp_path / f"ours.{ending}", [ROWS[3], ROWS[0]]
    if ending == "jsonl":
        names = ("conv_id", "utterance_idx", "response")
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        keyed(path, rows, sep="\t" if ending == "tsv" else ",")
    [system] = read(path)
    assert (system.name, system.numbers) == ("ours", [0, 3])
    assert system.replies == ["reply 0, so", "reply 3, so"]


def test_the_tsv_of_the_papers_code_is_read(tmp_path):
    rows = [(*e.key, "\n".join(e.history), e.response, f"r{n}") for n, e in enumerate(EXAMPLES)]
    table = pd.DataFrame(rows, columns=["Conv ID", "Utterance Index", "Context", "Reference", "Generated"])
    table.to_csv(tmp_path / "1_output.tsv", sep="\t", index=False)
    assert read(tmp_path / "1_output.tsv")[0].replies == [f"r{n}" for n in range(5)]


def test_several_replies_to_one_context_are_samples(tmp_path):
    by_row = [(*row, s) for row in ROWS for s in (1, 0)]
    by_row = [(c, u, f"{text} {s}", s) for c, u, text, s in by_row]
    keyed(tmp_path / "a.csv", by_row, "conv_id utterance_idx response sample")
    by_column = [(c, u, f"{text} 0", f"{text} 1") for c, u, text in ROWS]
    keyed(tmp_path / "b.csv", by_column, "conv_id utterance_idx response_0 response_1")
    for name in ("a.csv", "b.csv"):
        [system] = read(tmp_path / name)
        assert system.samples[2] == ["reply 2, so 0", "reply 2, so 1"]
        assert system.replies[2] == "reply 2, so 0"


def test_several_replies_without_keys_are_samples_of_the_turn_that_the_first_finds(tmp_path):
    asked = [(list(e.history), e.response) for e in EXAMPLES]
    lists = [{"context": h, "ref": r, "pred": [f"{n} a", f"{n} b"]} for n, (h, r) in enumerate(asked)]
    rows = [
        {"context": h, "ref": r, "pred": f"{n} {'ab'[s]}", "sample": s}
        for s in (1, 0)
        for n, (h, r) in enumerate(asked)
    ]
    alone = [{key: row[key] for key in ("context", "pred")} for row in lists]
    for name, content in (("lists", lists), ("rows", rows), ("alone", alone)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
        [system] = read(file)
        assert system.samples == [[f"{n} a", f"{n} b"] for n in system.numbers] and not system.left_out
        assert len(system.numbers) >= 3


def rows_file(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_samples_without_keys_stand_beside_the_first_of_their_own_row(tmp_path):
    """Also of two items that nothing tells apart, and where a context has fewer samples than another."""
    twins = [Example(f"t:{n}", 2, "sad", ("Hello.",), "Hi.") for n in range(2)]
    own = [["1 a", "1 b", "1 c"], ["2 a", "2 b", "2 c"]]
    file = rows_file(tmp_path / "p.jsonl", [{"context": "Hello.", "ref": "Hi.", "pred": p} for p in own])
    [system] = read_system(file, twins, "test", Paths(tmp_path))
    assert system.samples == own
    said = [(0, "a", 0), (1, "b", 0), (0, "c", 1)]
    rows = [
        {"context": EXAMPLES[n].history[0], "ref": GOLD[n], "pred": text, "sample": sample}
        for n, text, sample in said
    ]
    [system] = read(rows_file(tmp_path / "few.jsonl", rows))
    assert (system.numbers, system.samples) == ([0, 1], [["a", "c"], ["b"]])


def test_of_a_context_the_sample_of_the_smallest_number_leads(tmp_path):
    rows = [
        {"context": " ".join(EXAMPLES[n].history), "pred": f"{n} {sample}", "sample": sample}
        for n in (0, 1, 2)
        for sample in ((1, 2) if n else (2,))
    ]
    [system] = read(rows_file(tmp_path / "p.jsonl", rows))
    assert (system.numbers, system.samples) == ([0, 1, 2], [["0 2"], ["1 1", "1 2"], ["2 1", "2 2"]])


def test_columns_that_are_read_as_samples_of_one_system_are_named(tmp_path, capsys):
    rows = [(*row, "beam") for row in ROWS]
    [system] = read(keyed(tmp_path / "p.csv", rows, "conv_id utterance_idx topk5 topk50"))
    assert system.samples[0] == [ROWS[0][2], "beam"]
    assert "columns topk5, topk50: read as 2 samples of one system" in capsys.readouterr().out


def test_a_json_of_columns_reads_what_a_table_of_them_reads(tmp_path):
    """Keys by their best name; what says something besides is no system; two gold replies are refused."""
    columns = {"conv_id": [e.conv_id for e in EXAMPLES], "dialog_id": ["x"] * 5}
    columns |= {
        "utterance_idx": [e.utterance_idx for e in EXAMPLES],
        "context": [e.emotion for e in EXAMPLES],
    }
    columns |= {"history": [list(e.history) for e in EXAMPLES], "gold_emotion": ["sad"] * 5}
    columns |= {"response": GOLD, "generated": [f"reply {n}" for n in range(5)]}
    file = tmp_path / "p.json"
    file.write_text(json.dumps(columns))
    [system] = read(file)
    assert system.replies == [f"reply {n}" for n in range(5)]
    assert system.notes == [
        "columns not read: dialog_id, context, gold_emotion (a system's is called response, generated or "
        "predicted)"
    ]
    file.write_text(json.dumps(columns | {"target": GOLD, "gold": GOLD}))
    assert "gold and target both may be the gold reply" in refusal(file)


def test_a_column_that_is_no_known_one_is_no_system_in_silence(tmp_path, capsys):
    keyed(tmp_path / "wide.csv", [(*row, "x") for row in ROWS], "conv_id utterance_idx response MIME")
    [system] = read(tmp_path / "wide.csv")
    said = "columns not read: MIME (a system's is called response"
    assert any(note.startswith(said) for note in system.notes) and said in capsys.readouterr().out
    columns = {"context": [list(e.history) for e in EXAMPLES], "id": [str(n) for n in range(5)]}
    columns |= {"emotion": [1] * 5, "bleu": [0.5, 1, None, 0, 0], "MIME": [f"m{n}" for n in range(5)]}
    (tmp_path / "columns.json").write_text(json.dumps(columns), encoding="utf-8")
    [system] = read(tmp_path / "columns.json")
    assert system.replies == [f"m{n}" for n in range(5)]
    assert "columns not read: id, emotion, bleu" in capsys.readouterr().out


def test_a_json_of_one_column_is_a_system_as_one_of_two_is(tmp_path):
    for name, columns in (("one", ["ours"]), ("two", ["ours", "theirs"])):
        content = {column: [f"{column} {n}" for n in range(5)] for column in columns}
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        found = layouts.read_outputs(tmp_path / f"{name}.json")
        assert [[r.text for r in output.replies] for output in found] == [*content.values()]


def test_a_folder_of_files_is_as_many_systems(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    keyed(folder / "a.csv", ROWS)
    keyed(folder / "b.tsv", ROWS, sep="\t")
    (folder / "a.csv.origin.json").write_text("{}")
    assert [s.name for s in read(folder)] == ["theirs/a", "theirs/b"]


# ------------------------------------------------------------------------------- by history, reference, order


def test_without_keys_history_and_reference_find_the_item_in_any_order(tmp_path, capsys):
    text = blocks([f"r{n}" for n in range(5)]).split("emotion:")[1:]
    text = "emotion:".join(["", text[4], text[2], text[1].replace("Ref:you", "Ref:thou"), text[0]])
    text += "emotion:sad\nContext:['never said']\nConcept:[]\nPred:lost\nRef:nor this\n"
    (tmp_path / "p.txt").write_text(text)
    [system] = read(tmp_path / "p.txt")
    assert (system.numbers, system.replies) == ([0, 1, 2, 4], ["r0", "r1", "r2", "r4"])
    labels, matched, lost = system.notes
    assert labels == "labels not read: emotion, concept"
    assert "the history alone, their references being written otherwise: 1" in matched
    assert "1 of 5" in lost
    assert "first: line 24" in lost and lost in capsys.readouterr().out
    assert [(reply.line, reply.text) for reply in system.left_out] == [(24, "lost")]


def test_of_replies_without_references_none_is_said_to_be_written_otherwise(tmp_path):
    rows = [{"context": " ".join(e.history), "response": f"r{n}"} for n, e in enumerate(EXAMPLES)]
    pd.DataFrame(rows).to_csv(tmp_path / "p.csv", index=False)
    [system] = read(tmp_path / "p.csv")
    assert any("matched by the history alone: " in note for note in system.notes), system.notes


def test_a_file_of_another_split_is_not_read_by_the_references_that_every_split_has(tmp_path):
    others = [f"Ref: nobody said {n} here\nPred: r{n}\n" for n in range(9)]
    (tmp_path / "p.txt").write_text("".join([*others, f"Ref: {GOLD[3]}\nPred: oh\n"]), encoding="utf-8")
    assert re.search(r"1 of its 10 replies .* reference alone.*another --split", refusal(tmp_path / "p.txt"))


@pytest.mark.parametrize("between", [" [SEP] ", " </s> ", "<|im_end|>", " __eou__ "])
def test_what_stands_between_the_turns_of_a_history_is_no_word_of_it(tmp_path, between):
    rows = [{"context": between.join(e.history), "response": f"r{n}"} for n, e in enumerate(EXAMPLES)]
    [system] = read(rows_file(tmp_path / "mine.jsonl", rows))
    assert system.replies == [f"r{n}" for n in range(len(EXAMPLES))] and any(
        len(e.history) > 1 for e in EXAMPLES
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_a_reply_is_a_line_whatever_ends_the_lines_as_score_counts_them(tmp_path, end):
    (tmp_path / "p.txt").write_bytes(end.join(["a b", "c", "d"]).encode())
    (output,) = layouts.read_outputs(tmp_path / "p.txt")
    assert [reply.text for reply in output.replies] == ["a b", "c", "d"]
    assert records.read_records(tmp_path / "p.txt").texts("text") == ["a b", "c", "d"]


def test_names_of_who_speaks_are_no_words_of_a_history(tmp_path):
    for who in ("Speaker: {} Listener: {} Speaker: {}", "user: {}\nbot: {}\nuser: {}"):
        rows = [{"context": who.format(*EXAMPLES[1].history), "pred": "so"}]
        assert read(rows_file(tmp_path / "p.jsonl", rows))[0].numbers == [1]


def test_references_in_a_file_of_their_own_say_which_items_lines_answer(tmp_path):
    numbers = item_set(EXAMPLES, "last")
    (tmp_path / "hyp.txt").write_text("a\n\nb\n")
    (tmp_path / "ref.txt").write_text("".join(as_opened(GOLD[n]) + "\n" for n in numbers))
    [system] = read(tmp_path / "hyp.txt", references=tmp_path / "ref.txt")
    assert (system.numbers, system.replies) == (numbers, ["a", "", "b"])
    assert system.notes == ["empty replies: 1"]
    (tmp_path / "ref.txt").write_text(f"{GOLD[4]}\nother\n{GOLD[1]}\n")
    [system] = read(tmp_path / "hyp.txt", references=tmp_path / "ref.txt")
    assert (system.numbers, system.replies) == ([1, 4], ["b", "a"])
    assert "1 of 3" in system.notes[1]


def test_rows_in_another_order_than_their_own_numbers_are_not_matched_by_lines(tmp_path):
    order = in_order(tmp_path)
    [system] = read(keyed(tmp_path / "p.csv", [(n, f"reply {n}") for n in range(5)], "id response"), **order)
    assert system.replies == [f"reply {n}" for n in range(5)]
    rows = [(n, f"reply {n}") for n in (1, 0, 2, 3, 4)]
    assert "not in the order of their numbers" in refusal(
        keyed(tmp_path / "p.csv", rows, "id response"), **order
    )
    rows = [(f"x{n}", f"reply {n}") for n in (1, 0, 2, 3, 4)]  # no numbers
    assert len(read(keyed(tmp_path / "p.csv", rows, "id response"), **order)) == 1


def test_a_line_too_many_at_either_end_of_a_file_of_lines_is_noticed(tmp_path):
    order = in_order(tmp_path)
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n\n")
    assert read(tmp_path / "p.txt", **order)[0].notes[0] == "its last line is empty: read as an empty reply"
    (tmp_path / "p.txt").write_text("response\na\nb\nc\nd\n")
    assert "line 1: response is the name of a column" in refusal(tmp_path / "p.txt", **order)


def test_a_csv_of_replies_alone_takes_references_as_lines_do(tmp_path):
    (tmp_path / "p.csv").write_text("response\n" + "\n".join("abcde") + "\n")
    [system] = read(tmp_path / "p.csv", **in_order(tmp_path))
    assert system.replies == list("abcde")
    assert "give the gold replies in their order, one a line: --references FILE" in refusal(
        tmp_path / "p.csv"
    )
    (tmp_path / "p.csv").write_text("sep=,\nconv_id,utterance_idx,response\n")
    assert "is Excel's, to say its separator; take it out: tail -n +2" in refusal(tmp_path / "p.csv")


def test_a_reference_that_comes_again_is_matched_by_its_place(tmp_path, capsys):
    items = [Example(f"t:{n}", 2, "sad", (f"h {n}",), t) for n, t in enumerate(["a", "no.", "b", "no.", "c"])]
    (tmp_path / "p.txt").write_text("".join(f"Ref:{t}\nPred:{t} so\n" for t in ("a", "no .", "b", "c")))
    [system] = read_system(tmp_path / "p.txt", items, "test", Paths(tmp_path))
    assert (system.numbers, system.replies) == ([0, 1, 2, 4], ["a so", "no . so", "b so", "c so"])
    (tmp_path / "p.txt").write_text("".join(f"Ref:{t}\nPred:{t} so\n" for t in ("a", "b", "no .", "c")))
    [system] = read_system(tmp_path / "p.txt", items, "test", Paths(tmp_path))
    assert (system.numbers, system.replies) == ([0, 2, 3, 4], ["a so", "b so", "no . so", "c so"])


def test_in_a_file_of_another_order_no_place_says_which_of_two_like_references_is_meant(tmp_path):
    golds = ["a", "no.", "b", "c", "no.", "d"]
    items = [Example(f"t:{n}", 2, "sad", (f"h {n}",), text) for n, text in enumerate(golds)]
    rows = [{"ref": golds[n], "pred": f"to {n}"} for n in (0, 4, 3, 1, 2, 5)]
    [system] = read_system(rows_file(tmp_path / "p.jsonl", rows), items, "test", Paths(tmp_path))
    assert system.numbers == [0, 2, 3, 5] and system.replies == [f"to {n}" for n in (0, 2, 3, 5)]
    assert "2 of 6 (first: line 2, 4)" in system.notes[-1]


def test_where_a_reference_comes_again_one_place_must_be_left_and_it_counts_for_the_next(tmp_path):
    def numbers(golds: str, rows: list[dict]) -> list[int]:
        items = [Example(f"t:{n}", 2, "sad", (f"h {n}",), text) for n, text in enumerate(golds.split())]
        file = rows_file(tmp_path / "p.jsonl", [row | {"pred": "so"} for row in rows])
        return read_system(file, items, "test", Paths(tmp_path))[0].numbers

    assert numbers("no yes no b yes", [{"ref": text} for text in ("yes", "no", "b")]) == [1, 2, 3]
    assert numbers("no b no", [{"ref": text} for text in ("no", "b")]) == [0, 1]
    assert numbers("no b no", [{"ref": text} for text in ("b", "no")]) == [1, 2]
    assert numbers("a no no b", [{"ref": text} for text in ("a", "no", "b")]) == [0, 3], "nobody guesses"
    other = {"context": "said elsewhere", "ref": "no"}
    rows = [{"context": "h 0", "ref": "a"}, other, {"context": "h 2", "ref": "b"}]
    assert numbers("a no b no", rows) == [0, 2], "its history is another"


def test_histories_say_which_items_are_answered_also_where_the_references_stand_in_their_order(tmp_path):
    items = [Example(f"t:{n}", 2, "sad", (f"h {n}",), "Hi.") for n in range(2)]
    rows = [{"context": f"h {n}", "ref": "Hi.", "pred": f"to {n}"} for n in (1, 0)]
    [system] = read_system(rows_file(tmp_path / "p.jsonl", rows), items, "test", Paths(tmp_path))
    assert (system.numbers, system.replies) == ([0, 1], ["to 0", "to 1"])


def test_a_file_of_many_splits_is_read_by_the_few_histories_that_are_of_this_one(tmp_path):
    rows = [{"context": f"said elsewhere {n}", "pred": "no"} for n in range(9)]
    rows.append({"context": list(EXAMPLES[3].history), "pred": "yes"})
    [system] = read(rows_file(tmp_path / "p.jsonl", rows))
    assert (system.numbers, system.replies) == ([3], ["yes"])
    assert any("left out" in note and "9 of 10" in note for note in system.notes)


def test_texts_of_marks_alone_are_told_apart_by_these(tmp_path):
    items = [Example(f"t:{n}", 2, "sad", (text,), f"gold {n}") for n, text in enumerate(("...", "?!"))]
    rows = [{"context": "? !", "pred": "what?"}]
    [system] = read_system(rows_file(tmp_path / "p.jsonl", rows), items, "test", Paths(tmp_path))
    assert system.numbers == [1]


@pytest.mark.parametrize("which", ["last", "non-last"])
def test_lines_under_references_that_come_again_answer_a_whole_set_in_its_order(tmp_path, which):
    items = [
        Example(f"t:{n}", 2 * turn + 2, "sad", (f"h {n}",), text)
        for n in range(2)
        for turn, text in enumerate(("Oh no.", "Bye."))
    ]
    numbers = item_set(items, which)
    (tmp_path / "hyp.txt").write_text("first\nsecond\n")
    (tmp_path / "ref.txt").write_text("".join(items[n].response + "\n" for n in numbers))
    files = {"references": tmp_path / "ref.txt"}
    [system] = read_system(tmp_path / "hyp.txt", items, "test", Paths(tmp_path), **files)
    assert (system.numbers, system.replies) == (numbers, ["first", "second"])


def test_of_two_replies_to_one_history_nobody_guesses_which_is_meant(tmp_path):
    items = [Example(f"t:{n}", 2, "sad", (f"h {n}",), f"gold {n}") for n in range(3)]
    rows = [{"context": f"h {n}", "response": f"reply {line}"} for line, n in enumerate((0, 0, 1, 2))]
    rows_file(tmp_path / "p.jsonl", rows)
    [system] = read_system(tmp_path / "p.jsonl", items, "test", Paths(tmp_path))
    assert (system.numbers, system.replies) == ([1, 2], ["reply 2", "reply 3"])


def test_a_reply_in_quotation_marks_keeps_them_through_our_own_predictions(tmp_path):
    texts = ['"so sorry"', "plain", '"Oh no!"', "I see"]
    keys = {
        "conv_id": [e.conv_id for e in EXAMPLES[:4]],
        "utterance_idx": [e.utterance_idx for e in EXAMPLES[:4]],
    }
    storage.write_csv(tmp_path / "p.tsv", pd.DataFrame(keys | {"response": texts}), sep="\t")
    [system] = read(tmp_path / "p.tsv")
    theirs = pd.read_csv(tmp_path / "p.tsv", sep="\t")["response"].tolist()  # as others read it
    assert system.replies == theirs == texts


def test_two_items_of_one_history_and_reference_are_answered_in_order(tmp_path):
    twins = [Example(f"t:{n}", 2, "sad", ("Hello.",), "Hi.") for n in range(2)]
    text = "".join(f"Context:['hello .']\nPred:{r}\nRef:hi .\n" for r in ("first", "second", "third"))
    (tmp_path / "p.txt").write_text(text)
    [system] = read_system(tmp_path / "p.txt", twins, "test", Paths(tmp_path))
    assert system.replies == ["first", "second"]
    assert "1 of 3" in system.notes[0]


def test_a_reply_that_is_a_quotation_is_one_where_it_is_alone_or_beside_a_lone_mark(tmp_path):
    for name, replies in (("a.csv", ['"so"']), ("b.csv", ['"so"', '"'])):
        rows = [(*e.key, text) for e, text in zip(EXAMPLES, replies, strict=False)]
        assert read(keyed(tmp_path / name, rows))[0].replies == replies


def shifted(part: str) -> list[tuple]:
    """Each item's history or reference and a reply to it, under the key of the next item."""
    said = GOLD if part == "reference" else [" ".join(e.history) for e in EXAMPLES]
    return [(*EXAMPLES[(n + 1) % 5].key, text, f"reply {n}") for n, text in enumerate(said)]


@pytest.mark.parametrize("part", ["context", "reference"])
def test_keys_that_the_histories_or_references_beside_them_contradict_are_not_believed(tmp_path, part):
    columns = f"conv_id utterance_idx {part} response"
    message = refusal(keyed(tmp_path / "p.csv", shifted(part), columns))
    assert "another turn than their key's: " in message
    assert "leave the keys out" in message
    rows = [(text, reply) for *_, text, reply in shifted(part)]
    [system] = read(keyed(tmp_path / "q.csv", rows, f"{part} response"))
    assert system.replies == [f"reply {n}" for n in system.numbers] and len(system.numbers) >= 4
    own = [
        (*e.key, GOLD[n] if part == "reference" else " ".join(e.history), "so")
        for n, e in enumerate(EXAMPLES)
    ]
    own[4] = (*own[4][:2], own[0][2], "so")
    [system] = read(keyed(tmp_path / "p.csv", own, columns))
    assert len(system.numbers) == 5 and "1 of 5 (first: line 6)" in " ".join(system.notes)


@pytest.mark.parametrize("said", [lambda e: e.emotion, lambda e: e.history[-1], lambda e: e.history[0]])
def test_an_emotion_or_one_turn_beside_a_key_contradicts_nothing(tmp_path, said):
    rows = [(*e.key, said(e), "so") for e in EXAMPLES]
    [system] = read(keyed(tmp_path / "p.csv", rows, "conv_id utterance_idx context response"))
    assert len(system.numbers) == 5 and not system.notes


def test_references_beside_keys_are_counted_where_they_are_not_the_splits(tmp_path):
    rows = [(*e.key, "so", text) for e, text in zip(EXAMPLES, [*GOLD[:4], "other"], strict=True)]
    [system] = read(keyed(tmp_path / "p.csv", rows, "conv_id utterance_idx response gold"))
    assert "references that differ from the split's: 1" in system.notes


# --------------------------------------------------------------------------------------------------- refusals

FAULTS = {
    "unknown id": ("p.csv", "conv_id,utterance_idx,response\nc:1,3,a\n", "c:1 utterance 3"),
    "doubled id": ("p.csv", "conv_id,utterance_idx,response\nc:1,2,a\nc:1,2,b\n", "line 3.*twice.*sample"),
    "no number": ("p.csv", "conv_id,utterance_idx,response\nc:1,two,a\n", "line 2: utterance_idx is 'two'"),
    "surplus tab": ("p.tsv", "conv_id\tutterance_idx\tresponse\nc:1\t2\ta\tb\n", "line 2: 4 columns"),
    "surplus comma": ("p.csv", "conv_id,utterance_idx,response\nc:1,2,a, b\n", "line 2: 4 columns"),
    "all empty": ("p.csv", "conv_id,utterance_idx,response\nc:1,2,\n", "empty"),
    "empty file": ("p.txt", "\n\n", "empty"),
    "an unknown id among known ones": (
        "p.csv",
        "conv_id,utterance_idx,response\nc:1,2,a\nc:9,2,b\n",
        r"1 of 2 rows are no listener turn of this split \(first: c:9 utterance 2\)",
    ),
    "control token": ("p.csv", "conv_id,utterance_idx,response\nc:1,2,</s>\n", "control tokens"),
    "control tokens": ("p.csv", "conv_id,utterance_idx,response\nc:1,2,<s> </s>\n", "nothing but control"),
    "no replies": ("p.csv", "conv_id,utterance_idx,answer\nc:1,2,a\n", "no column of replies"),
    "a tab in a line": ("p.txt", "a\nb\tc\n", "line 2: a tab"),
    "too few lines": ("p.txt", "a\nb\n", "which of the 5 listener turns of this split its 2.*--references"),
    "quoted lines": ("p.txt", '"a"\n"b"\n', "line 1: every reply stands in quotation marks"),
    "missing line": (
        "p.txt",
        "Ref:a\nPred:b\nRef:c\nRef:d\nPred:e\n",
        "line 3: the block has the labels ref,",
    ),
    "broken reply": ("p.txt", "Ref:a\nPred:b\nso\nRef:c\nPred:d\n", "line 3: stands under no label"),
    "text as label": ("p.txt", "Ref:a\nPred:b\nNote: so\nRef:c\nPred:d\n", "line 3: stands under no label"),
    "other split": ("p.txt", "Ref:a\nPred:b\n", "none of its 1 replies"),
    "ref lines": ("p.txt", "ref:a\nb\nref:c\nd\ne\n", "line 3: 2 lines under"),
    "json": ("p.json", '[{"gold": "a", "output": 3}]', "line 1: output is '3'"),
    "not json": ("p.json", "{", "not readable as JSON"),
    "unequal": ("p.json", '{"ref": ["a"], "ours": ["a", "b"]}', "unequal"),
    "null": (
        "p.jsonl",
        '{"conv_id": "c:1", "utterance_idx": 2, "response": null}\n',
        'response is null.*empty: ""',
    ),
    "ids as a history": (
        "p.csv",
        "dialogue,turn,response\nc:1,2,a\n",
        "its history \\(of the first 'c:1'\\) nor .*Keys.*stand in columns conv_id and utterance_idx",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_read_whole_is_refused_with_its_place(tmp_path, fault):
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_text(content)
    assert re.search(message, refusal(tmp_path / name))
    assert name in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "sign", "above", "said"),
    [
        ("p.csv", ";", "sep=;\n", "separated by semicolons, expected commas"),
        ("p.csv", "\t", "", "separated by tabs, expected commas"),
        ("p.tsv", "|", "", "separated by vertical bars, expected tabs"),
    ],
)
def test_columns_with_another_separator_are_told_so_whatever_they_are_called(
    tmp_path, name, sign, above, said
):
    table = pd.DataFrame({"gold": GOLD, "generated": [f"{n}, so" for n in range(5)]})
    (tmp_path / name).write_text(above + table.to_csv(sep=sign, index=False), encoding="utf-8")
    message = refusal(tmp_path / name)
    assert said in message
    words = shlex.split(message.split("convert it with: ")[1])
    subprocess.run([sys.executable, *words[1:]], check=True)
    [system] = read(tmp_path / name.replace("p.", "p-converted."))
    assert system.replies == table["generated"].tolist()


def test_prose_without_a_header_is_no_table_with_another_separator(tmp_path):
    (tmp_path / "p.tsv").write_text("Oh, I'm sorry to hear that, friend.\nThat is sad.\n")
    message = refusal(tmp_path / "p.tsv")
    assert "missing column" in message and "convert it" not in message


@pytest.mark.parametrize("name", ["p.parquet", "p.xls", "p.XLSX", "p.csv.bz2", "p.bin", "p.csv"])
def test_a_file_that_is_no_text_is_told_so_without_a_command_that_makes_rubbish(tmp_path, name):
    head = b"PK\x03\x04" if name == "p.XLSX" else b"PAR1\x15\x04\x80\x90"
    (tmp_path / name).write_bytes(head + bytes(range(256)))
    message = refusal(tmp_path / name)
    known = Path(name).suffix not in (".bin", ".csv")
    assert ("is not read here; save it as .csv" if known else "no text") in message
    assert name in message and "iconv" not in message
    keyed(tmp_path / "p.tsv", ROWS, sep="\t")
    assert name in refusal(tmp_path / "p.tsv", references=tmp_path / name)


@pytest.mark.parametrize("ending", ["json", "json.gz", "tsv.gz"])
def test_a_json_and_packed_files_are_read(tmp_path, ending):
    table = pd.DataFrame(ROWS, columns=["conv_id", "utterance_idx", "response"])
    if "json" in ending:
        table.to_json(tmp_path / f"p.{ending}", orient="records")
    else:
        table.to_csv(tmp_path / f"p.{ending}", sep="\t", index=False)
    assert read(tmp_path / f"p.{ending}")[0].replies == [text for _, _, text in ROWS]


def test_replies_whose_order_nothing_confirms_are_refused(tmp_path):
    (tmp_path / "hyp.txt").write_text("a\nb\nc\nd\ne\n")
    assert "nothing in it says which of the 5 listener turns" in refusal(tmp_path / "hyp.txt")


def test_references_are_for_the_file_that_lacks_them(tmp_path):
    (tmp_path / "ref.txt").write_text("a\n")
    rows = [f"{e.conv_id}\t{e.utterance_idx}\tso\n" for e in EXAMPLES]
    (tmp_path / "keys.tsv").write_text("conv_id\tutterance_idx\tresponse\n" + "".join(rows))
    [system] = read(tmp_path / "keys.tsv", references=tmp_path / "ref.txt")
    assert system.numbers == [0, 1, 2, 3, 4]


def test_a_response_beside_gold_and_a_generated_one_is_a_system_too(tmp_path):
    table = pd.DataFrame({"reference": GOLD, "response": "r", "generated": "g"})
    table.to_csv(tmp_path / "two.csv", index=False)
    found = {s.name: s.replies for s in read(tmp_path / "two.csv")}
    assert found == {"two/generated": ["g"] * 5, "two/response": ["r"] * 5}


def test_a_label_that_is_not_read_is_named(tmp_path):
    text = "".join(f"Ref: {gold}\nGreedy: a\nNucleus: b\n" for gold in GOLD)
    (tmp_path / "p.txt").write_text(text)
    [system] = read(tmp_path / "p.txt")
    assert system.notes == ["labels not read: nucleus"]


def test_references_of_another_length_are_refused(tmp_path):
    (tmp_path / "hyp.txt").write_text("a\nb\n")
    (tmp_path / "ref.txt").write_text("a\n")
    assert "1 lines for the 2 replies" in refusal(tmp_path / "hyp.txt", references=tmp_path / "ref.txt")


@pytest.mark.parametrize("label", ["Target", "Reference", "Gold"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_with_references_a_reply_that_begins_as_a_label_is_a_reply(tmp_path, label, place):
    replies = ["a", "b", "c", "Prediction: d", "e"]
    replies[place] = f"{label}: practise more."
    (tmp_path / "hyp.txt").write_text("\n".join(replies) + "\n")
    [system] = read(tmp_path / "hyp.txt", **in_order(tmp_path))
    assert system.replies == replies
    (note,) = system.notes
    assert "a reply a line, some of which begin as labels do; --format" in note


def test_of_a_file_with_labels_is_said_that_it_is_read_without_the_references(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"ref: {text}\nOurs: so\n" for text in GOLD))
    [system] = read(tmp_path / "p.txt", **in_order(tmp_path))
    assert system.replies == ["so"] * 5
    assert system.notes == ["read as ref-lines by its labels, without --references"]
    (tmp_path / "two.txt").write_text("".join(f"ref: {text}\nOurs: so\n" for text in GOLD[2:4]))
    (tmp_path / "gold.txt").write_text("\n".join(GOLD[:4]))  # as many lines by chance
    assert read(tmp_path / "two.txt", references=tmp_path / "gold.txt")[0].replies == ["so", "so"]


@pytest.mark.parametrize("reply", ["so.</s>", 'she said \\"no\\"', "so\\nmuch"])
def test_control_tokens_and_escaped_quotes_inside_a_reply_are_warned_about_and_kept(tmp_path, capsys, reply):
    (tmp_path / "p.txt").write_text("\n".join([reply, "b", "c", "d", "e"]))
    assert read(tmp_path / "p.txt", **in_order(tmp_path))[0].replies[0] == reply
    assert "warning" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- item sets


def test_item_sets_are_named_by_conversations_and_by_what_systems_answer(tmp_path):
    [a] = read(keyed(tmp_path / "a.csv", ROWS[:4]))
    [b] = read(keyed(tmp_path / "b.csv", ROWS[2:]))
    assert [item_set(EXAMPLES, s) for s in ("all", "last", "non-last")] == [
        [0, 1, 2, 3, 4],
        [1, 2, 4],
        [0, 3],
    ]
    assert item_set(EXAMPLES, "shared", [a, b]) == [2, 3]
    assert restrict(b, [2, 4]).replies == ["reply 2, so", "reply 4, so"]
    with pytest.raises(UserError, match=r"a: covers 4 of 5.*c:3 utterance 4.*--items shared"):
        require_complete(a, range(5), EXAMPLES)
    require_complete(a, [0, 3], EXAMPLES)
    with pytest.raises(UserError, match="no item is answered by every system"):
        item_set(EXAMPLES, "shared", [restrict(a, [0]), restrict(b, [4])])


def test_the_hash_of_a_set_is_of_its_items_and_replies():
    own = set_hash(EXAMPLES, [0, 2])
    assert own == set_hash(EXAMPLES, [2, 0]) and re.fullmatch("[0-9a-f]{12}", own)
    other = [Example("c:1", 2, "angry", ("x",), "other"), *EXAMPLES[1:]]
    assert own not in (set_hash(EXAMPLES, [0]), set_hash(EXAMPLES, [0, 1]), set_hash(other, [0, 2]))


def test_a_likelihood_that_was_read_otherwise_than_the_replies_were_written_is_left_out(tmp_path, capsys):
    keys = pd.DataFrame([e.key for e in EXAMPLES], columns=["conv_id", "utterance_idx"])
    predictions = tmp_path / "out" / "predictions.tsv"
    predictions.parent.mkdir()
    note = {"model": {"path": "m", "sha256": "1"}, "precision": "fp32", "seed": 1}
    storage.write_csv(predictions, keys.assign(response="a"), sep="\t", origin=note)
    likelihood, table = predictions.with_name("likelihood.csv"), keys.assign(nll=1.0, tokens=2, words=1)
    for changes, there in (({"seed": 2}, True), ({"exemplars": {"path": "e", "sha256": "2"}}, False)):
        storage.write_csv(likelihood, table, origin=note | changes)
        [system] = read(predictions.parent)
        assert bool(system.likelihoods) == there
        assert ("read with another exemplars than" in capsys.readouterr().out) != there


def test_perplexity_on_a_set_is_of_its_items(tmp_path):
    keys = pd.DataFrame([e.key for e in EXAMPLES], columns=["conv_id", "utterance_idx"])
    predictions = tmp_path / "out" / "predictions.tsv"
    predictions.parent.mkdir()
    storage.write_csv(predictions, keys.assign(response="a"), sep="\t", origin={})
    table = keys.assign(nll=[0.0, 1, 2, 3, 9], tokens=2, words=1)
    storage.write_csv(predictions.with_name("likelihood.csv"), table)
    note = {"decoding": {"num_beams": 8, "max_new_tokens": 50}}
    storage.write_json(storage.origin_file(predictions), note)
    [system] = read(predictions.parent)
    assert system.name == "out" and system.decoding.startswith("beam search, 8 beams")
    found = Standard.likelihoods(system.likelihoods, range(5))
    assert found["ppl_word"].point == pytest.approx(2.718281828**3)
    few = restrict(system, [1, 3])
    assert Standard.likelihoods(few.likelihoods, few.numbers)["ppl_token"].point == pytest.approx(2.718281828)
    # a file without the later columns has no more
    assert Standard.likelihoods(system.likelihoods, (0, 2)).keys() == {"ppl_token", "ppl_word"}
    storage.write_csv(predictions.with_name("likelihood.csv"), table.assign(words=2, nll_end=1, nll_class=""))
    [system] = read(predictions.parent)
    found = Standard.likelihoods(system.likelihoods, (2, 3))
    assert found["ppl_word_open"].point == pytest.approx(2.718281828**1.5)
    assert "ppl_word_class" not in found  # the class could not be counted


def test_what_score_py_wrote_is_a_file_of_replies_as_any_other(tmp_path):
    """Its note is none of a generator: no likelihood is looked for, and it keeps its own name."""
    keyed(tmp_path / "scored.csv", ROWS)
    storage.write_json(storage.origin_file(tmp_path / "scored.csv"), {"prefix": "", "emo": {"sha256": "0"}})
    [system] = read(tmp_path / "scored.csv")
    assert system.name == "scored" and not system.likelihoods


def test_predictions_of_different_folders_are_told_apart_by_these(tmp_path):
    keys = pd.DataFrame([e.key for e in EXAMPLES], columns=["conv_id", "utterance_idx"])
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        storage.write_csv(tmp_path / name / "predictions.tsv", keys.assign(response=name), sep="\t")
        for place in (tmp_path / name, tmp_path / name / "predictions.tsv"):
            assert [system.name for system in read(place)] == [name]


def test_files_of_one_name_are_told_apart_by_their_folders(trained, tmp_path):
    for name in ("greedy", "beam"):
        (tmp_path / name).mkdir()
        gold = listener_turns(Paths(trained).dialogues("test"))
        keyed(tmp_path / name / "sys.csv", [(*e.key, e.response) for e in gold])
    runs = [str(tmp_path / name / "sys.csv") for name in ("greedy", "beam")]
    options = evaluate_responses.parse_args([*runs, "--workdir", str(trained), "--family", "none"])
    read = tables.read_all(pick(tables.TableOptions, options), gold, Paths(trained))
    assert [line.name for line in read] == ["greedy/sys", "beam/sys"]


def test_the_corpus_own_mark_of_a_comma_is_one():
    assert normalise("Oh no_comma_ I am sorry.") == normalise("Oh no, I am sorry.")
